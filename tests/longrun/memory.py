"""What a process holds while shapes change from call to call, and whether it grows."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from lifeops import registry


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [(n, ctypes.c_size_t) for n in ("arena", "free", "smblks", "hblks", "mapped", "x", "y", "used", "unused", "top")]


class Mark(NamedTuple):
    """After so many calls. Bytes: the process's memory, and what malloc has given out. ``blocks``: of Python's allocator; these and the
    tensors are counted when caches have been emptied, ``cached`` (entries) before.
    """

    calls: int
    resident: int
    heap: int
    blocks: int
    tensors: int
    cached: int
    seconds: float


def _own_modules() -> Iterator:
    return (m for name, m in [*sys.modules.items()] if name.partition(".")[0] == "lifeops")


def lru_caches() -> dict[str, Callable]:
    """Every function of the library that remembers results, by name."""
    found = (f for m in _own_modules() for f in vars(m).values() if hasattr(f, "cache_info"))
    return {f"{f.__module__}.{f.__qualname__}": f for f in found}


def containers() -> dict[str, object]:
    """Every dict, list and set that a module of the library keeps, by name."""
    kept = ((f"{m.__name__}.{n}", v) for m in _own_modules() for n, v in vars(m).items() if not n.startswith("__"))
    return {name: v for name, v in kept if isinstance(v, (dict, list, set))}


def heap() -> int:
    """Bytes that malloc has given out and not been given back."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo
    found = libc.mallinfo2()
    return found.used + found.mapped


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mark(calls: int, start: float) -> Mark:
    process, cached = resident(), len(registry.plans)
    registry.forget_choices()
    for f in lru_caches().values():
        f.cache_clear()
    gc.collect()  # behind that: it empties what Python keeps of tuples, too
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    return Mark(calls, process, heap(), sys.getallocatedblocks(), tensors, cached, round(time.process_time() - start, 1))


def watch(calls: Iterable[Callable[[], None]], count: int, marks: int = 20) -> list[Mark]:
    """Makes ``count`` calls; a mark after each ``marks``-th part of them."""
    found, start, each = [], time.process_time(), count // marks
    for i, call in enumerate(itertools.islice(calls, each * marks), start=1):
        call()
        if i % each == 0:
            found.append(mark(i, start))
    return found


# ------------------------------------------------------------------------------------------------ whether it grows

WARM_UP = 0.4  # of the calls: what is made once has been made, bounded caches are full
LIMITS = {"resident": 160, "heap": 80, "blocks": 0.02, "tensors": 0}  # added by a call, of many: 16 and 8 MB in 100,000
BOUNDS = {  # of what modules keep beside registry._Plans: one entry for each class, operator or file there is, never for a shape
    "lifeops.pointwise.vendor", "lifeops.pointwise._table", "lifeops.cost.published.rows", "lifeops.integrations.host_block._class",
    "lifeops.integrations.token_convs.accelerated",
}  # fmt: skip


def growth(marks: list[Mark]) -> dict[str, float]:
    """How much of what a mark counts is added by a call, behind the warm-up: slopes of straight lines."""
    late = [m for m in marks if m.calls > WARM_UP * marks[-1].calls]
    calls = [m.calls for m in late]
    return {n: statistics.linear_regression(calls, [getattr(m, n) for m in late]).slope for n in LIMITS}


def grown(marks: list[Mark], limits: Mapping[str, float] = LIMITS) -> list[str]:
    """What grows by more than ``limits`` a call."""
    return [f"{n} grows by {v:.3g} a call" for n, v in growth(marks).items() if v > limits[n]]


def unbounded() -> list[str]:
    """Functions of the library that remember results for arguments of any number."""
    return [name for name, f in lru_caches().items() if f.cache_info().maxsize is None and name not in BOUNDS]


def sizes() -> dict[str, int]:
    """How many entries every container and cache of the library holds, but those that start afresh when they are full."""
    kept = {name: len(c) for name, c in containers().items() if not isinstance(c, registry._Plans)}
    return kept | {name: f.cache_info().currsize for name, f in lru_caches().items() if f.cache_info().maxsize is None}


# ------------------------------------------------------------------------------------------------ a process of its own

# torch keeps up to 1024 of oneDNN's products and convolutions of other shapes in each of two caches, half a megabyte each in bfloat16
TORCH_CACHES = "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def measure(count: int, seed: int = 0, entries: int = 64) -> list[Mark]:
    """The marks of ``count`` calls in a process of its own, on one thread, with so many ``entries`` in each of ``TORCH_CACHES``."""
    here = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **dict.fromkeys(TORCH_CACHES, str(entries)), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "longrun.memory", str(count), str(seed)]
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"longrun: {done.stderr[-3000:]}")
    return [Mark(*m) for m in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    from longrun.calls import Calls

    torch.set_num_threads(1)
    print(json.dumps(watch(Calls(int(sys.argv[2])), int(sys.argv[1]))))
