"""Every environment variable of the library, and ``use_backend``. Nothing else reads ``os.environ``."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

from lifeops.arguments import got
from lifeops.options import Backend

BACKENDS = ("reference", "cpu", "cuda", "triton")


class Switch(NamedTuple):
    """One environment variable: its name, what it may be, what it is by default and what it does."""

    name: str
    values: tuple[str, ...]
    default: str
    meaning: str


SWITCHES = (
    Switch("LIFEOPS_BACKEND", ("", *BACKENDS), "", "preferred backend; an op it cannot run falls back, with a warning"),
    Switch("LIFEOPS_STRICT", ("0", "1"), "0", "1: a fallback to a slower backend is an error, not a warning"),
    Switch("LIFEOPS_CPU_ISA", ("auto", "baseline", "avx2", "avx512"), "auto", "highest instruction set of the CPU kernels"),
    Switch("LIFEOPS_CPU_GEMM", ("auto", "linear", "conv1x1"), "auto", "point-wise products on CPU: F.linear or oneDNN's 1x1 conv"),
    Switch("LIFEOPS_BUILD", ("auto", "none", "cpu", "cuda"), "auto", "read by setup.py: which compiled kernels to build"),
)
_BY_NAME = {s.name: s for s in SWITCHES}


def read(name: str) -> str:
    """The value of one environment variable, checked against what it may be."""
    switch = _BY_NAME[name]
    value = os.environ.get(name, switch.default).strip().lower()
    if value not in switch.values:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, switch.values))}, got {value!r}")
    return value


class Settings(NamedTuple):
    backend: str
    strict: bool
    cpu_isa: str
    cpu_gemm: str


def _load() -> Settings:
    return Settings(
        backend=read("LIFEOPS_BACKEND"),
        strict=read("LIFEOPS_STRICT") == "1",
        cpu_isa=read("LIFEOPS_CPU_ISA"),
        cpu_gemm=read("LIFEOPS_CPU_GEMM"),
    )


settings = _load()


def refresh() -> Settings:
    """Read the environment again (it is read once, at import)."""
    global settings
    settings = _load()
    return settings


class _Requested(threading.local):
    def __init__(self):  # not a class attribute: torch.compile (2.13) would read that whatever the thread has set
        self.backend = ""


_requested = _Requested()


def check_backend(op: str, backend: str) -> str:
    if not isinstance(backend, str) or backend not in ("", *BACKENDS):
        raise ValueError(f"{op}: backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {got(backend)}")
    return backend


def requested_backend(op: str, backend: str | None) -> str:
    """The backend a call of ``op`` asks for: its own argument, else the enclosing ``use_backend``, else "" (automatic)."""
    if backend is None:
        return _requested.backend
    return check_backend(op, backend)


def use_backend(backend: Backend | None) -> contextlib.AbstractContextManager[None]:
    """Run every op inside the ``with`` on ``backend`` ("reference", "cpu", "cuda", "triton"; None: automatic).

    The choice is kept with each forward call, so its backward uses it also after the ``with``. An op that the backend
    cannot run raises :class:`lifeops.NotSupported` with every reason. The setting is per thread.
    """
    return _use(check_backend("use_backend", "" if backend is None else backend))


@contextlib.contextmanager
def _use(backend: str) -> Iterator[None]:
    before, _requested.backend = _requested.backend, backend
    try:
        yield
    finally:
        _requested.backend = before
