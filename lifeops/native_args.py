"""Arguments that every compiled operator takes."""

from __future__ import annotations

from lifeops import config

_ISA = {"auto": 0, "baseline": 1, "avx2": 2, "avx512": 3}


def isa() -> int:
    return _ISA[config.settings.cpu_isa]


def rows(P, prefix):
    """Prefix rows of the side that "drop" has none on."""
    return 0 if prefix == "drop" else P


def mode(prefix) -> int:
    """What the kernels do with the prefix rows they write: 0 copies them, 1 writes zeros."""
    return int(prefix != "keep")


def contiguous(t):
    return t if t is None or t.is_contiguous() else t.contiguous()
