"""Timing on a GPU: events on the stream, the last-level cache flushed before every call, and CUDA graphs for the time without Python.

With ``device="cpu"`` the same functions time with the clock and neither flush nor capture: a rehearsal of the GPU script.

The cache is flushed by reading: a buffer that was written would leave it full of lines to be written back, 50 MB on an H200, at the cost
of the call that is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.measure import Timing, quartiles

SHORT_MS = 0.06  # below it a graph's launch, or Python's, shows: the kernels' own time is asked for, too
TIMED = "lifeops_timed"
FLUSH_BYTES = 256 << 20  # more than the second-level cache of any GPU so far


class Clock(NamedTuple):
    """How calls are timed: on which device, cold or warm, and for how long in all."""

    device: str
    flush: torch.Tensor | None
    seconds: float
    most: int = 100


def clock(device: str, seconds: float, cold: bool = True) -> Clock:
    flush = torch.ones(FLUSH_BYTES // 4, device=device) if cold and device == "cuda" else None
    return Clock(device, flush, seconds)


def _once(fn: Callable[[], object], c: Clock):
    """A function of no arguments that says how many milliseconds the call took, to be asked after a synchronisation."""
    if c.device != "cuda":
        start = time.perf_counter()
        fn()
        ms = (time.perf_counter() - start) * 1e3
        return lambda: ms
    if c.flush is not None:
        c.flush.sum()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    fn()
    last.record()
    return lambda: first.elapsed_time(last)


def once(fn: Callable[[], object], c: Clock) -> float:
    """Milliseconds of one call."""
    ask = _once(fn, c)
    synchronize(c.device)
    return ask()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def broken() -> bool:
    """Whether this process's CUDA context is: after an illegal access every later call fails, whatever it is."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def interleaved(variants: dict[str, Callable[[], object]], c: Clock, least: int = 5) -> dict[str, Timing]:
    """Median and quartiles of every variant, called in turn for about ``c.seconds`` in all after two untimed rounds."""
    for fn in variants.values():
        fn(), fn()
    synchronize(c.device)
    asked: dict[str, list[Callable[[], float]]] = {name: [] for name in variants}
    start = time.perf_counter()
    for n in range(c.most):
        for name, fn in variants.items():
            asked[name].append(_once(fn, c))
        synchronize(c.device)
        if n + 1 >= least and time.perf_counter() - start > c.seconds:
            break
    samples = {name: [ask() for ask in asks] for name, asks in asked.items()}
    return {name: quartiles(ms) for name, ms in samples.items()}


def captured(fn: Callable[[], object]) -> Callable[[], object]:
    """``fn`` as a CUDA graph's replay; RuntimeError where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def kernel_times(fn: Callable[[], object], c: Clock, calls: int = 12) -> Timing:
    """What torch's profiler says the kernels of one call took in all, behind a flushed cache: no launch is in it, of a kernel or a graph.

    On the CPU: what the call took. RuntimeError where the profiler saw no kernels.
    """
    activities, cuda = [torch.profiler.ProfilerActivity.CPU], c.device == "cuda"
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(calls):
            if c.flush is not None:
                c.flush.sum()
            with torch.profiler.record_function(TIMED):
                fn()
            synchronize(c.device)
    events = [e for e in profile.events() if e.name == TIMED and e.device_type == torch.autograd.DeviceType.CPU]
    ms = [(e.device_time_total if cuda else e.cpu_time_total) / 1e3 for e in events]
    if len(ms) != calls or not all(ms):
        raise RuntimeError(f"the profiler saw kernels in {sum(map(bool, ms))} of {calls} calls")
    return quartiles(ms[2:])  # the first ones set up what is set up lazily


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
