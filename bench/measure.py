"""Timing: variants interleaved call by call, so that a noisy moment hits all of them; medians and quartiles.

The order is drawn anew each round: a variant that always followed the one that fills the caches most would look slower, by up to a
tenth, even behind an untimed call of its own.

Inputs are rotated: round n runs every variant on set n of its inputs. ``warm``: an untimed call on the same inputs comes right
before the timed one (left out where a call takes longer than filling the caches would). ``cold``: a buffer larger than the last
cache is read by all threads before every timed call.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

WARM_ALLOCATOR = {
    # glibc keeps freed memory instead of returning it, so that no page faults fall into the timed loop
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(1 << 30),
}
FLUSH_BYTES = 80 << 20  # more than the last-level cache of the machines so far
LONG_MS = 20.0  # a call that takes longer streams its inputs anyhow
Run = Callable[[], object]


class Timing(NamedTuple):
    """Milliseconds per call."""

    median: float
    q25: float
    q75: float


def quartiles(ms: Sequence[float]) -> Timing:
    return Timing(*(statistics.quantiles(ms, n=4)[i] for i in (1, 0, 2)))


def _once(fn: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    fn()
    return (clock() - start) * 1e3


def interleaved(
    variants: Mapping[str, Sequence[Run]], seconds: float = 0.6, cache: str = "warm", least: int = 5, most: int = 400,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:  # fmt: skip
    """Time every variant, given as one function per set of inputs, in turn for about ``seconds`` in all, at least ``least`` rounds.

    ``clock``: ``time.process_time`` where one thread works and others use the machine too.
    """
    flush = torch.ones(FLUSH_BYTES // 4) if cache == "cold" else None
    first = {name: min(_once(fn) for fn in runs) for name, runs in variants.items()}  # sets up what is set up lazily
    for name, runs in variants.items():
        if first[name] < LONG_MS:
            first[name] = min(_once(fn) for fn in runs)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    start, order = time.perf_counter(), random.Random(0)
    for n in range(most):
        for name in order.sample(list(variants), len(variants)):
            fn = variants[name][n % len(variants[name])]
            if flush is not None:
                flush.sum()
            elif first[name] < LONG_MS:
                fn()
            samples[name].append(_once(fn, clock))
        if n + 1 >= least and time.perf_counter() - start > seconds:
            break
    return {name: quartiles(ms) for name, ms in samples.items()}
