"""Triton's kernels compiled before anything is timed: every launch of the benchmark set, a process a core, into one cache.

A process runs problems as they would be timed, on two images, with every launch of Triton compiled and loaded but not made: what it
compiles for depends on no batch size. Results are garbage and thrown away. ``rehearse`` stands in for a device where there is none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

import lifeops
from bench import systems
from bench.case import inputs_of, runner
from bench.problems import WINDOWS, Problem
from lifeops import registry

IMAGES = 2
TARGET = 90  # what a rehearsal compiles for
counts = {"compiled": 0, "found": 0}
"""How many kernels this process compiled, and found in the cache."""


class _Device:
    """What Triton asks of a driver to compile, with no device behind it."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device) -> int:
        return 0


def listen() -> None:
    """Count from here on what Triton compiles."""
    import triton

    def compiled(*, cache_hit: bool, **_):
        counts["found" if cache_hit else "compiled"] += 1

    triton.knobs.compilation.listener = compiled


def rehearse(arch: int = TARGET) -> None:
    """Compile for ``arch`` what is asked for on CPU tensors. For a process of its own: nothing of this is undone."""
    from triton.runtime.driver import driver

    driver.set_active(_Device(arch))
    registry.load("triton")
    for op in registry.ops.values():
        if "triton" in op.impls:
            op.impls["triton"] = dataclasses.replace(op.impls["triton"], supports=lambda problem: [])
    registry.forget_choices()


class _Forgetful(dict):
    """Keeps nothing."""

    def __setitem__(self, key, value) -> None:
        pass


@contextlib.contextmanager
def without_launches(load: bool) -> Iterator[None]:
    """Triton's kernels are compiled, and with ``load`` put on the device with their launchers, but not run."""
    from triton.runtime.jit import JITFunction

    from lifeops.kernels import _tile

    run, known = JITFunction.run, _tile.compiled

    def prepare(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if load and kernel is not None:
            kernel.run  # noqa: B018  (a property: builds the launcher, which needs a C compiler, and loads the kernel)
        return kernel

    JITFunction.run, _tile.compiled = prepare, _Forgetful()  # a kernel that is known would be launched past run
    try:
        yield
    finally:
        JITFunction.run, _tile.compiled = run, known


def worth(problems: list[Problem]) -> list[Problem]:
    """Without those whose launches others have too, the slowest to compile first; last the largest grids, which need what others do."""
    steps = {p._replace(mode="") for p in problems if p.mode == "fwdbwd"}
    shared = ("token_dwconv", *WINDOWS)
    chosen = [p for p in problems if p.mode == "fwdbwd" or p.system not in shared or p._replace(mode="") not in steps]
    return sorted(dict.fromkeys(p._replace(B=IMAGES) for p in chosen), key=lambda p: (p.W > 32, -p.K, p.system not in shared))


def one(p: Problem, device: str) -> str:
    """Compile what ``p`` launches; what went wrong, or nothing."""
    try:
        with torch.device(device):
            case = systems.case(p)
            i = inputs_of(case, 0)
        with lifeops.use_backend("triton"), without_launches(load=device == "cuda"):
            runner(case.variants["lifeops"], p.mode, i)()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return ""


def _start(device: str) -> None:
    torch.set_num_threads(1)
    listen()
    if device == "cpu":
        rehearse()


def _told(p: Problem, device: str, until: float) -> tuple[Problem, str, float, dict[str, int]]:
    before, start = dict(counts), time.time()
    wrong = one(p, device) if start < until else "not compiled: the time is over"
    return p, wrong, time.time() - start, {name: n - before[name] for name, n in counts.items()}


class _Processes:
    """A process for each thread that asks, in the place of one that died a new one."""

    def __init__(self, device: str):
        self.device, self.mine, self.all = device, threading.local(), []

    def __call__(self, p: Problem, until: float) -> tuple[Problem, str, float, dict[str, int]]:
        if getattr(self.mine, "pool", None) is None:
            self.mine.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (self.device,))
            self.all.append(self.mine.pool)
        try:
            return self.mine.pool.submit(_told, p, self.device, until).result()
        except BrokenProcessPool as error:
            self.mine.pool = None
            return p, str(error), 0.0, dict.fromkeys(counts, 0)

    def close(self) -> None:
        for pool in self.all:
            pool.shutdown()


def run(problems: list[Problem], device: str, jobs: int, seconds: float) -> int:
    """How many problems could not be compiled; one line for each as it is done."""
    start, failed, compiled, spent = time.time(), 0, 0, 0.0
    todo, processes = worth(problems), _Processes(device)
    with ThreadPoolExecutor(min(jobs, len(todo))) as threads:
        for done in as_completed([threads.submit(processes, p, start + seconds) for p in todo]):
            p, wrong, took, new = done.result()
            failed, compiled, spent = failed + bool(wrong), compiled + new["compiled"], spent + took
            said = f"{p.system} {p.mode} {p.name}: {new['compiled']} compiled in {took:.1f} s {wrong}"
            print(f"{time.time() - start:6.1f} s  {said}", flush=True)
    processes.close()
    print(f"{compiled} kernels for {len(todo)} problems in {time.time() - start:.0f} s, {spent:.0f} s in all processes; {failed} failed")
    return failed
