"""README.md's table of the systems: what each is made of here, and how much faster that is than its authors' code.

What a row names is looked up: an op, module, model or test file that is gone is an error, and the speed is that of the stored rows.
"""

from __future__ import annotations

import statistics
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import lifeops
from bench import rows, tables

ROOT = Path(__file__).parent.parent


class System(NamedTuple):
    """``rows``: the benchmarks of its module and its model. ``loads``: whether load_official reads its authors' files."""

    name: str
    ops: tuple[str, ...]
    modules: tuple[str, ...]
    models: tuple[str, ...]
    loads: bool
    tests: tuple[str, ...]
    rows: tuple[str, ...]


SYSTEMS = (
    System(
        "LIFE", ("life_qkv", "token_dwconv", "local_attention"), ("LifeQKV", "LifeAttention"), ("VisionTransformer",), True,
        ("test_life", "test_official_sizes"), ("life_attention", "vit_life"),
    ),
    System(
        "LocalViT", ("token_dwconv",), ("LocalityFeedForward", "LocalViTBlock"), ("localvit",), True, ("test_localvit",),
        ("localvit_ffn", "vit_localvit"),
    ),
    System(
        "DW shortcut", ("token_dwconv",), ("DWShortcut", "wrap"), ("dw_shortcut",), True, ("test_dw_shortcut",),
        ("dw_shortcut_block", "vit_dw_shortcut"),
    ),
    System(
        "CvT", ("token_dwconv_multi", "token_pool"), ("ConvProjectionAttention",), ("cvt",), True, ("test_cvt",),
        ("cvt_projections", "cvt_attention", "cvt_13"),
    ),
    System(
        "MViT", ("token_dwconv", "token_pool"), ("PoolingAttention",), ("mvitv2",), True, ("test_mvit",), ("mvit_pool", "mvitv2_tiny"),
    ),
    System(
        "EdgeViT", ("token_dwconv", "token_dwconv_transpose", "token_pool"), ("LocalAgg", "GlobalSparseAttention"), ("edgevit",), True,
        ("test_edgevit",), ("edgevit_local_agg", "edgevit_xs"),
    ),
    System(
        "RegionViT", ("token_dwconv",), ("RegionalAttention", "TwoGridDownsampling"), ("regionvit",), True, ("test_regionvit",),
        ("region_down", "regionvit_tiny"),
    ),
    System(
        "self-slimmed ViT", (), ("TokenSlimming", "ReverseTokenSlimming"), ("sit",), True, ("test_token_slimming",),
        ("token_slimming", "sit_tiny"),
    ),
    System(
        "PVTv2's layers", ("token_dwconv",), ("ConvFeedForward", "OverlapPatchEmbed"), (), False, ("test_conv_ffn",),
        ("conv_ffn", "patch_embed"),
    ),
    System("Bootstrapping ViTs", ("token_dwconv",), ("SharedConvAttention",), (), False, ("test_shared_conv",), ("shared_conv",)),
    System("Curriculum by Smoothing", ("token_dwconv",), ("TokenSmoothing",), (), False, ("test_smoothing",), ("token_smoothing",)),
    System(
        "dense relative localisation", ("losses.dense_relative_localization",), (), (), False, ("test_relative_localization",),
        ("relative_localization",),
    ),
    System("attention roll-out", ("rollout", "rollout_step"), (), (), False, ("test_rollout",), ("rollout",)),
    System("structured initialisation", ("init.structured_", "init.impulse_qk"), (), (), False, ("test_init",), ()),
)  # fmt: skip


def _names(module, names: tuple[str, ...]) -> str:
    for name in names:
        attrgetter(name)(module)  # an AttributeError where it is gone
    return ", ".join(f"`{name}`" for name in names) or "-"


def _tests(names: tuple[str, ...]) -> str:
    for name in names:
        if not (ROOT / "tests" / f"{name}.py").exists():
            raise SystemExit(f"bench/systems_table.py: tests/{name}.py is gone")
    return ", ".join(f"[{name}](tests/{name}.py)" for name in names)


def _speed(found: dict, system: str) -> str:
    """The spread of eager over lifeops, forward and with backward."""
    parts = []
    for modes, word in ((("fwd", "infer"), "forward"), (("fwdbwd", "train"), "step")):
        of_system = [(p, cell) for (p, *_), cell in found.items() if (p.system, p.dtype) == (system, "float32")]
        cells = [cell["eager"] for p, cell in of_system if p.mode in modes and "eager" in cell]
        if cells:
            parts.append(f"{tables.spread([statistics.median(values) for values in cells])} {word}")
    return ", ".join(parts)


def systems_table() -> str:
    every = [row for path in sorted((ROOT / "bench" / "results").glob("cpu*.csv")) for row in rows.read(path)]
    found = tables.ratios(tables.measured(every))
    columns = "system", "ops", "`lifeops.nn`", "`lifeops.models`", "authors' files", "tests", "times as fast as its authors' code, fp32"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for s in SYSTEMS:
        speed = "; ".join(f"`{name}` {text}" for name in s.rows if (text := _speed(found, name))) or "-"
        ops, modules, models = _names(lifeops, s.ops), _names(lifeops.nn, s.modules), _names(lifeops.models, s.models)
        cells = s.name, ops, modules, models, "yes" if s.loads else "-", _tests(s.tests), speed
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
