"""What a model costs: parameters, multiply-accumulates, peak memory and time of a training step."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lifeops.cost.model_cost import count_macs, count_params


class Cost(NamedTuple):
    """``params`` and ``macs`` (forward, one image) are counts, ``step_time`` is in seconds, ``peak`` in bytes."""

    params: int
    macs: int
    step_time: float
    peak: int


def peak_memory(fn: Callable[[], object]) -> int:
    """Most bytes of CPU tensors alive at once while ``fn`` runs, above what was alive before it.

    The running sum of the profiler's allocation events, at its maximum. What a library allocates for itself, without
    PyTorch's allocator, is not in it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler else reports its start and stop on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def step_times(steps: Mapping[str, Callable[[], object]], rounds: int, count: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Median seconds of each function, called in turn so that a slow moment of the machine hits all of them; ``count`` after each call."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
            count()
    return {name: statistics.median(values) for name, values in times.items()}


def compare(
    models: Mapping[str, nn.Module], step: Callable[[nn.Module], object], image: torch.Tensor, rounds: int,
    count: Callable[[], object] = lambda: None,
) -> dict[str, Cost]:  # fmt: skip
    """The cost of every model. ``step(model)`` is one training step, ``image`` (1, C, H, W) is what MACs are counted for; ``count`` is
    called after each timed step.
    """
    steps = {name: (lambda m=model: step(m)) for name, model in models.items()}
    for fn in steps.values():
        fn()  # lazy set-up (optimizer state, kernels) is no part of a step
    times = step_times(steps, rounds, count)
    peaks = {name: peak_memory(fn) for name, fn in steps.items()}
    macs = {name: count_macs(lambda m=model: m(image)) for name, model in models.items()}
    return {name: Cost(count_params(models[name]), macs[name], times[name], peaks[name]) for name in models}
