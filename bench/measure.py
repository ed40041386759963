"""Timing: variants interleaved call by call, so that a noisy moment hits all of them; medians and quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

WARM_ALLOCATOR = {
    # glibc keeps freed memory instead of returning it, so that no page faults fall into the timed loop
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(1 << 30),
}


class Timing(NamedTuple):
    """Milliseconds per call."""

    median: float
    q25: float
    q75: float


def interleaved(variants: dict[str, Callable[[], object]], seconds: float = 0.6, least: int = 5, most: int = 400) -> dict[str, Timing]:
    """Time every variant in turn for about ``seconds`` in all, at least ``least`` rounds, after two untimed ones."""
    for fn in variants.values():
        fn(), fn()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    for n in range(most):
        for name, fn in variants.items():
            t = time.perf_counter()
            fn()
            samples[name].append((time.perf_counter() - t) * 1e3)
        if n + 1 >= least and time.perf_counter() - start > seconds:
            break
    return {name: Timing(*(statistics.quantiles(ms, n=4)[i] for i in (1, 0, 2))) for name, ms in samples.items()}
