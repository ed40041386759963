"""Named problems and what the library promises on them. The CLI and the pytest-benchmark suite share them."""

from __future__ import annotations

import functools
import re
from itertools import product
from typing import NamedTuple

DTYPES = ("float32", "bfloat16")
_NAME = re.compile(r"b(\d+)_(\d+)x(\d+)_c(\d+)(?:_[kd](\d+))?(?:_(float\d+|bfloat16))?(?:_p(\d+))?")


class Problem(NamedTuple):
    """One measurement: ``system`` and ``mode`` say what runs (see systems.py), the rest is its size."""

    system: str
    mode: str
    B: int
    H: int
    W: int
    C: int
    K: int  # kernel size; 0 where the system fixes it; a model's depth; of pool_qkv the stride of k and v
    dtype: str
    P: int = 1

    @property
    def name(self) -> str:
        kernel = "" if not self.K else f"_d{self.K}" if self.system.startswith("vit_") else f"_k{self.K}"
        usual = 0 if self.system in NO_PREFIX else 1
        prefix = "" if usual == self.P else f"_p{self.P}"
        return f"b{self.B}_{self.H}x{self.W}_c{self.C}{kernel}_{self.dtype}{prefix}"


class Target(NamedTuple):
    """``time(baseline) / time(lifeops) >= at_least``."""

    baseline: str
    at_least: float


STAGED = {  # systems on the maps of several stages: (side, channels, prefix tokens)
    "cvt_projections": ((56, 64, 0), (28, 192, 0), (14, 384, 1)),
    "cvt_attention": ((28, 192, 0), (14, 384, 1)),
    "edgevit_local_agg": ((56, 48, 0), (28, 96, 0), (14, 240, 0)),
}
FAMILY = {  # around the convolutions of related systems, at their models' sizes: the same
    "token_smoothing": ((56, 64, 0), (28, 192, 0), (14, 384, 1)),
    "token_slimming": ((14, 320, 1), (14, 512, 1)),
    "relative_localization": ((14, 192, 1), (14, 384, 1)),
    "shared_conv": ((28, 288, 0), (14, 288, 0)),
    "conv_ffn": ((56, 64, 0), (28, 128, 0), (14, 320, 0)),
    "patch_embed": ((28, 128, 0), (56, 64, 0)),
}
WINDOWS = ("token_dwconv_strided", "token_dwconv_multiplied", "token_dwconv_transpose", "token_pool", "pool_qkv")
TIMM = ("coat_pos_enc", "pvt_mlp", "twins_pos_conv")
HOSTS = ("localvit_pvt_tiny", "localvit_tnt_t", "localvit_t2t_7", "localvit_swin_tiny", "life_swinv2_tiny")
KINKED = ("localvit_ffn", "vit_localvit", *HOSTS[:4])  # h-swish has kinks
LEVELS = {
    "op": ("token_dwconv", "life_qkv", "local_attention", "dw_shortcut", "rollout", *WINDOWS, "mvit_pool", "region_down"),
    "block": ("life_attention", "localvit_ffn", "dw_shortcut_block", "token_pyramid", *TIMM, *STAGED, *FAMILY),
    "model": (
        "vit_life", "vit_localvit", "vit_dw_shortcut", "cvt_13", "edgevit_xs", "mvitv2_tiny", "regionvit_tiny", "sit_tiny", *HOSTS,
    ),
}  # fmt: skip
WHOLE = ("mvitv2_tiny", "regionvit_tiny", "sit_tiny", *HOSTS)  # models of their own, without a plain host
SYSTEMS = tuple(system for systems in LEVELS.values() for system in systems)
NO_PREFIX = (
    "pvt_mlp", "twins_pos_conv", "token_dwconv_multiplied", "token_dwconv_transpose", "mvit_pool", "region_down", "shared_conv",
    "conv_ffn", "patch_embed", *WHOLE,
)  # fmt: skip
MODES = {"fwd": "fwd", "infer": "fwd", "bwd": "bwd", "dw": "dw", "fwdbwd": "fwdbwd", "train": "fwdbwd"}
SIZES = [(8, 14, 14), (32, 14, 14), (16, 16, 16), (8, 32, 32), (8, 37, 37)]
FEW_SIZES = [(32, 14, 14), (8, 32, 32)]
COMPILED = {"b8_14x14_c192_k3_float32", "b32_14x14_c384_k5_float32", "b16_14x14_c192_float32", "b16_14x14_c192_k3_float32"}  # seconds each
COMPILED_QUICK = {("token_dwconv", "b8_14x14_c192_k3_float32"), ("localvit_ffn", "b16_14x14_c192_float32")}


def _dwconv(modes):
    for mode, dtype, (B, H, W), C, K in product(modes, DTYPES, SIZES, (192, 384, 768), (3, 5, 7)):
        slow = dtype == "bfloat16" and mode != "fwd"  # oneDNN's gradients there: a second a call
        if (B, H, W) in FEW_SIZES or not (slow or mode == "bwd"):
            yield Problem("token_dwconv", mode, B, H, W, C, K, dtype)


def _dwconv_quick(modes):
    for mode, (dtype, B, H, C, K) in product(modes, (
        ("float32", 8, 14, 192, 3), ("float32", 32, 14, 384, 5), ("float32", 8, 32, 384, 7), ("bfloat16", 32, 14, 384, 3),
    )):  # fmt: skip
        yield Problem("token_dwconv", mode, B, H, H, C, K, dtype)


def _widths(system: str, quick: bool) -> tuple[int, ...]:
    if quick:
        return (192,)
    return (192, 384, 768) if system.startswith("life") else (192, 384)


def _module(system: str, modes, quick: bool):
    P = 0 if system in NO_PREFIX else 1
    if quick and system in LEVELS["block"]:
        modes = [m for m in modes if m != "bwd"]
    for mode, dtype, C in product(modes, ("float32",) if quick else DTYPES, _widths(system, quick)):
        if dtype == "bfloat16" and (mode == "bwd" or C > 192):  # emulated on most CPUs: seconds a call
            continue
        yield Problem(system, mode, 16, 14, 14, C, 0, dtype, P)


def _attention(system: str, modes, quick: bool):
    sizes = [(16, 14, 1)] if quick else [(16, 14, 1), (4, 32, 1)]
    if system == "local_attention" and not quick:
        sizes += [(64, 7, 0), (64, 8, 0)]  # windows of four images
    for mode, dtype, (B, size, P), C in product(modes, ("float32",) if quick else DTYPES, sizes, _widths(system, quick)):
        yield Problem(system, mode, B, size, size, C, 3 if system == "local_attention" else 0, dtype, P)


def _staged(system: str, modes, quick: bool):
    every = {**STAGED, **FAMILY}[system]
    sizes = every[-1:] if quick else every
    for mode, dtype, (side, C, P) in product(modes, ("float32",) if quick else DTYPES, sizes):
        if dtype == "float32" or mode == "fwd":  # bfloat16's gradients are emulated on most CPUs
            yield Problem(system, mode, 16, side, side, C, 0, dtype, P)


def _downs(system: str, modes, quick: bool):
    """RegionViT-Ti's steps."""
    sizes = ((28, 128),) if quick else ((56, 64), (28, 128), (14, 256))
    for mode, dtype, (size, C) in product(modes, ("float32",) if quick else DTYPES, sizes):
        yield Problem(system, mode, 8, size, size, C, 0, dtype, 0)


def _pools(system: str, modes, quick: bool):
    """MViTv2-T's first three stages: heads of 96 channels, K the stride of keys and values."""
    sizes = ((28, 192, 2),) if quick else ((56, 96, 4), (28, 192, 2), (14, 384, 1))
    for mode, dtype, (size, C, stride) in product(modes, ("float32",) if quick else DTYPES, sizes):
        yield Problem(system, mode, 8, size, size, C, stride, dtype, 0)


def _model(system: str, modes, quick: bool):
    if system in WHOLE:
        side = {"life_swinv2_tiny": 16, "localvit_swin_tiny": 14}.get(system, (8 if system in HOSTS else 7) if quick else 14)
        sizes = (2 if quick else 8, side, side)
        yield from (Problem(system, mode, *sizes, 96, 0, "float32", 0) for mode in modes)
        return
    if not system.startswith("vit_"):
        yield from (Problem(system, mode, 2 if quick else 8, 14, 14, 384, 0, "float32") for mode in modes)
        return
    for mode in modes:
        yield Problem(system, mode, 2 if quick else 8, 14, 14, 192, 2 if quick else 12, "float32")  # K: the depth


def _windows(system: str, modes, quick: bool):
    """The grids of a pyramid's first stages. K: 3, of transposes their stride too; of pool_qkv the stride of k and v."""
    sizes, widths, P = ((28,), (192,), int(system not in NO_PREFIX)) if quick else ((28, 56), (64, 192, 384), int(system not in NO_PREFIX))
    kernels = {"token_dwconv_transpose": (2, 4), "pool_qkv": (2, 4)}.get(system, (3,))
    widths = {"pool_qkv": (96,), "token_dwconv_multiplied": (96, 192)}.get(system, widths)
    for mode, dtype, size, C, K in product(modes, DTYPES, sizes, widths, kernels):
        slow = dtype == "bfloat16" and mode != "fwd" and size == 56 and C > 64  # torch's gradients there
        if not slow and not (quick and dtype == "bfloat16"):
            yield Problem(system, mode, 16, size, size, C, K, dtype, P)


def level_of(system: str) -> str:
    return next(level for level, systems in LEVELS.items() if system in systems)


def modes_of(system: str) -> tuple[str, ...]:
    """fwd is inference (batch norms folded or constant), dw the weight gradient alone, bwd both gradients of a graph that exists
    already, fwdbwd a training step.
    """
    if system == "rollout":
        return ("fwd",)
    if level_of(system) == "model":
        return ("fwd", "fwdbwd")
    if system in WINDOWS:
        return ("fwd", "fwdbwd")
    return ("fwd", "dw", "bwd", "fwdbwd") if system == "token_dwconv" else ("fwd", "bwd", "fwdbwd")


def problems(system: str, modes: list[str] | None = None, *, quick: bool = False, dtypes: tuple[str, ...] = DTYPES) -> list[Problem]:
    """The committed set for a system; ``quick`` is a subset for a look. Modes that the system does not have are left out."""
    if system not in SYSTEMS:
        raise ValueError(f"bench: system must be one of {', '.join(SYSTEMS)}, got {system!r}")
    modes = [m for m in modes_of(system) if modes is None or m in modes]
    if system == "token_dwconv":
        found = _dwconv_quick(modes) if quick else _dwconv(modes)
    elif level_of(system) == "model":
        found = _model(system, modes, quick)
    elif system in STAGED or system in FAMILY:
        found = _staged(system, modes, quick)
    elif system in ("mvit_pool", "region_down"):
        found = (_pools if system == "mvit_pool" else _downs)(system, modes, quick)
    elif system in ("local_attention", "rollout"):
        found = _attention(system, modes, quick)
    elif system in WINDOWS:
        found = _windows(system, modes, quick)
    else:
        found = _module(system, modes, quick)
    return [p for p in found if p.dtype in dtypes]


def named(text: str, system: str, mode: str, dtype: str) -> Problem:
    """A problem from a name like b16_14x14_c192, b8_32x32_c384_k5_bfloat16 or b8_32x32_c384_k5_p0."""
    found = _NAME.fullmatch(text)
    if not found:
        raise ValueError(f"bench: a problem is named like b16_14x14_c192_k3_float32, got {text!r}")
    B, H, W, C, K, own, P = found.groups()
    prefix = int(P) if P else 0 if system in NO_PREFIX else 1
    return Problem(system, mode, int(B), int(H), int(W), int(C), int(K or 0), own or dtype, prefix)


def compiles(p: Problem, quick: bool) -> bool:
    """Whether torch.compile is a baseline of ``p``."""
    if level_of(p.system) == "model" or p.mode in ("dw", "bwd"):
        return False
    if p.system == "localvit_ffn" and p.dtype == "float32" and not quick:  # promised
        return True
    return ((p.system, p.name) in COMPILED_QUICK and p.mode == "fwd") if quick else p.name in COMPILED


def cold_too(p: Problem) -> bool:
    """Whether ``p`` is also timed with cold caches: ops' forwards and training steps; of token_dwconv's full set two sizes."""
    if level_of(p.system) != "op" or p.mode not in ("fwd", "fwdbwd"):
        return False
    return p.system != "token_dwconv" or (p.B, p.H, p.W) in FEW_SIZES or (p.B, p.H, p.W) not in SIZES


@functools.cache
def _committed(system: str) -> frozenset[Problem]:
    return frozenset(problems(system))


def targets(p: Problem, allocator: str) -> list[Target]:
    """What the library promises for this problem on CPU; an empty list where nothing is promised: other than the committed sizes."""
    if p not in _committed(p.system):
        return []
    if p.system == "token_dwconv":
        large = p.K >= 5
        return {
            "fwd": [Target("eager", 1.5)] + ([Target("onednn", 1.0)] if large else []),
            "dw": [Target("onednn", 10.0 if large else 1.0)],
            "bwd": [],
            "fwdbwd": [Target("eager", 3.0 if large else 1.5)],
        }[p.mode]
    if p.system in WINDOWS:
        most = {"token_dwconv_strided": (1.6, 2.0), "pool_qkv": (2.0, 1.8), "token_dwconv_multiplied": (1.5, 1.5)}.get(p.system)
        return [Target("eager", most[p.mode != "fwd"])] if most and allocator == "warm" else []
    if p.system == "life_qkv" and p.dtype == "float32":
        i = (192, 384, 768).index(p.C)
        if allocator == "default":
            return [Target("eager", 2.0)] if p.mode == "fwd" else []
        if p.mode == "fwd":
            return [Target("plain", 1 / (1.4, 1.25, 1.15)[i]), Target("eager", (1.55, 1.5, 1.4)[i])]
        return [Target("eager", (1.5, 1.5, 1.3)[i])] if p.mode == "fwdbwd" else []
    if p.system == "local_attention" and p.dtype == "float32":  # with its local term, against attention without
        window = p.H <= 8
        return [Target("sdpa", {"fwd": 1.1 if window else 1.4, "bwd": 1.0, "fwdbwd": 1.0 if window else 1.25}[p.mode])]
    if p.mode == "bwd":
        return []
    if p.system in ("token_smoothing", "shared_conv", "conv_ffn") and p.dtype == "float32" and allocator == "warm":
        return [Target("eager", 1.3)]
    if p.system in ("token_slimming", "relative_localization", "patch_embed") and p.dtype == "float32" and allocator == "warm":
        return [Target("eager", 1.0)] if p.system != "patch_embed" or p.C == 64 else []  # later stages are torch's very layers
    if p.system == "life_attention" and p.C in (192, 384) and p.dtype == "float32" and allocator == "warm":
        return [Target("eager", 1.25 if p.mode == "fwd" else 1.2)]
    if p.system == "localvit_ffn" and p.dtype == "float32" and allocator == "warm":
        i = (192, 384).index(p.C)
        return [Target("eager", ((1.4, 1.2) if p.mode == "fwd" else (1.5, 1.3))[i]), Target("compiled", 1.0)]
    if allocator == "warm":
        return {"dw_shortcut": [Target("eager", 2.5)], "dw_shortcut_block": [Target("block", 1 / 1.05)]}.get(p.system, [])
    return []
