"""Timing on a GPU: events on the stream, the last-level cache flushed before every call, and CUDA graphs for the time without Python.

With ``device="cpu"`` the same functions time with the clock and neither flush nor capture: a rehearsal of the GPU script.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.measure import Timing

FLUSH_BYTES = 256 << 20  # more than the second-level cache of any GPU so far


class Clock(NamedTuple):
    """How calls are timed: on which device, cold or warm, and for how long in all."""

    device: str
    flush: torch.Tensor | None
    seconds: float
    most: int = 100


def clock(device: str, seconds: float, cold: bool = True) -> Clock:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if cold and device == "cuda" else None
    return Clock(device, flush, seconds)


def _once(fn: Callable[[], object], c: Clock):
    """A function of no arguments that says how many milliseconds the call took, to be asked after a synchronisation."""
    if c.device != "cuda":
        start = time.perf_counter()
        fn()
        ms = (time.perf_counter() - start) * 1e3
        return lambda: ms
    if c.flush is not None:
        c.flush.zero_()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    fn()
    last.record()
    return lambda: first.elapsed_time(last)


def once(fn: Callable[[], object], c: Clock) -> float:
    """Milliseconds of one call."""
    ask = _once(fn, c)
    _synchronize(c.device)
    return ask()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(variants: dict[str, Callable[[], object]], c: Clock, least: int = 5) -> dict[str, Timing]:
    """Median and quartiles of every variant, called in turn for about ``c.seconds`` in all after two untimed rounds."""
    for fn in variants.values():
        fn(), fn()
    _synchronize(c.device)
    asked: dict[str, list[Callable[[], float]]] = {name: [] for name in variants}
    start = time.perf_counter()
    for n in range(c.most):
        for name, fn in variants.items():
            asked[name].append(_once(fn, c))
        _synchronize(c.device)
        if n + 1 >= least and time.perf_counter() - start > c.seconds:
            break
    samples = {name: [ask() for ask in asks] for name, asks in asked.items()}
    return {name: Timing(*(statistics.quantiles(ms, n=4)[i] for i in (1, 0, 2))) for name, ms in samples.items()}


def captured(fn: Callable[[], object], device: str) -> Callable[[], object] | None:
    """``fn`` as a CUDA graph's replay, or None where it cannot be captured."""
    if device != "cuda":
        return None
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                fn()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fn()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def peak_bytes(fn: Callable[[], object], device: str) -> int:
    """Most bytes alive at once while ``fn`` runs, above what was alive before it."""
    if device != "cuda":
        from lifeops.demo.measure import peak_memory

        return peak_memory(fn)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
