"""Named problems and what the library promises on them. The CLI and the pytest-benchmark suite share them."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

DTYPES = ("float32", "bfloat16")


class Problem(NamedTuple):
    """One measurement: ``system`` and ``mode`` say what runs (see systems.py), the rest is its size."""

    system: str
    mode: str
    B: int
    H: int
    W: int
    C: int
    K: int  # 0 where the system fixes its kernels
    dtype: str
    P: int = 1

    @property
    def name(self) -> str:
        kernel = f"_k{self.K}" if self.K else ""
        return f"b{self.B}_{self.H}x{self.W}_c{self.C}{kernel}_{self.dtype}"

    @property
    def bytes(self) -> int:
        """Compulsory traffic of one sequence read and one written, the unit of the GB/s column; 0 for a whole module."""
        size = 4 if self.dtype == "float32" else 2
        passes = {"fwd": 2, "dw": 2, "fwdbwd": 5}[self.mode]  # fwdbwd: x, y; then dy, x, dx
        return passes * self.B * (self.P + self.H * self.W) * self.C * size if self.system == "token_dwconv" else 0


class Target(NamedTuple):
    """``time(baseline) / time(lifeops) >= at_least``."""

    baseline: str
    at_least: float


SIZES = [(8, 14, 14), (32, 14, 14), (16, 16, 16), (8, 32, 32), (8, 37, 37)]
QUICK_SIZES = [(16, 14, 14), (8, 32, 32)]


def _dwconv(modes, quick):
    sizes, widths = (QUICK_SIZES, (192, 768)) if quick else (SIZES, (192, 384, 768))
    for mode, dtype, (B, H, W), C, K in product(modes, DTYPES, sizes, widths, (3, 5, 7)):
        yield Problem("token_dwconv", mode, B, H, W, C, K, dtype)


def _module(system, modes, widths):
    for mode, dtype, C in product(modes, DTYPES, widths):
        yield Problem(system, mode, 16, 14, 14, C, 0, dtype, P=1)


def _attention(modes, quick):
    widths = (192,) if quick else (192, 384)
    for mode, dtype, (B, size), C in product(modes, DTYPES, ((16, 14), (4, 32)), widths):
        yield Problem("local_attention", mode, B, size, size, C, 3, dtype)


SYSTEMS = ("token_dwconv", "life_qkv", "local_attention", "life_attention", "localvit_ffn", "dw_shortcut", "dw_shortcut_block")


def modes_of(system: str) -> tuple[str, ...]:
    """fwd is inference (batch norms folded or constant), dw the weight gradient alone, fwdbwd a training step."""
    return ("fwd", "dw", "fwdbwd") if system == "token_dwconv" else ("fwd", "fwdbwd")


def problems(system: str, modes: list[str] | None = None, *, quick: bool = False, dtypes: tuple[str, ...] = DTYPES) -> list[Problem]:
    """The committed set for a system; ``quick`` is a subset for a look."""
    if system not in SYSTEMS:
        raise ValueError(f"bench: system must be one of {', '.join(SYSTEMS)}, got {system!r}")
    modes = modes or modes_of(system)
    if system == "local_attention":
        return [p for p in _attention(modes, quick) if p.dtype in dtypes]
    widths = (192, 384, 768) if system.startswith("life") else (192, 384)
    found = _dwconv(modes, quick) if system == "token_dwconv" else _module(system, modes, widths)
    return [p for p in found if p.dtype in dtypes]


def targets(p: Problem, allocator: str) -> list[Target]:
    """What the library promises for this problem on CPU; an empty list where nothing is promised."""
    if p.system == "token_dwconv":
        large = p.K >= 5
        return {
            "fwd": [Target("eager", 1.5)] + ([Target("onednn", 1.0)] if large else []),
            "dw": [Target("onednn", 10.0 if large else 1.0)],
            "fwdbwd": [Target("eager", 3.0 if large else 1.5)],
        }[p.mode]
    if p.system == "life_qkv" and p.dtype == "float32":
        i = (192, 384, 768).index(p.C)
        if allocator == "default":
            return [Target("eager", 2.0)] if p.mode == "fwd" else []
        if p.mode == "fwd":
            return [Target("plain", 1 / (1.4, 1.25, 1.15)[i]), Target("eager", (1.55, 1.5, 1.4)[i])]
        return [Target("eager", (1.5, 1.5, 1.3)[i])]
    if p.system == "local_attention" and p.mode == "fwd" and p.dtype == "float32":
        return [Target("sdpa", 1 / 1.2)]
    if p.system == "life_attention" and p.C in (192, 384) and p.dtype == "float32" and allocator == "warm":
        return [Target("eager", 1.25 if p.mode == "fwd" else 1.2)]
    if p.system == "localvit_ffn" and p.dtype == "float32" and allocator == "warm":
        i = (192, 384).index(p.C)
        return [Target("eager", ((1.4, 1.2) if p.mode == "fwd" else (1.5, 1.3))[i]), Target("compiled", 1.0)]
    if allocator == "warm":
        return {"dw_shortcut": [Target("eager", 2.5)], "dw_shortcut_block": [Target("block", 1 / 1.05)]}.get(p.system, [])
    return []
