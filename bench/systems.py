"""From a problem to what runs: ``case(p)`` has the variants and the inputs, ``build(p)`` plain callables and a check of lifeops."""

from __future__ import annotations

import torch

from bench import (
    block_systems,
    conv_systems,
    family_systems,
    host_systems,
    model_systems,
    mvit_systems,
    op_systems,
    optional,
    pyramid_systems,
    regionvit_systems,
    timm_systems,
    window_systems,
)
from bench.case import Case, Run, check, inputs_of, on_backend, runner
from bench.problems import Problem
from lifeops import registry

_PARTS = (
    op_systems, block_systems, timm_systems, model_systems, conv_systems, window_systems, mvit_systems, regionvit_systems,
    pyramid_systems, family_systems, host_systems,
)  # fmt: skip
BUILDERS = {name: build for part in _PARTS for name, build in part.BUILDERS.items()}


def backends(device: str = "cpu") -> list[str]:
    """Backends other than the one lifeops chooses there."""
    for name in ("cpu", "cuda", "triton"):
        registry.load(name)
    return ["reference"] if device == "cpu" else ["triton", "reference"]


def case(p: Problem, compile: bool = False, backend: str = "auto", device: str = "cpu") -> Case:
    """The variants of a problem. ``backend`` "all" adds ``lifeops_<backend>`` beside the one that lifeops chooses."""
    torch.manual_seed(0)
    made = BUILDERS[p.system](p, compile)
    if device == "cuda" and "onednn" in made.variants:
        made.variants["cudnn"] = made.variants.pop("onednn")
    made.variants.update(optional.variants(p, device))
    more = backends(device) if backend == "all" else [] if backend == "auto" else backend.split(",")
    made.variants.update({f"lifeops_{name}": on_backend(made.variants["lifeops"], name) for name in more})
    return made


def build(p: Problem, compile: bool = False) -> tuple[dict[str, Run], Run]:
    """Every variant as a function of no arguments, and a check that raises AssertionError if lifeops is wrong on their inputs."""
    made = case(p, compile)
    i = inputs_of(made, 0)
    ours = made.variants["lifeops"]
    runs = {name: runner(v, p.mode, i) for name, v in made.variants.items()}
    if "x" in i and p.mode in ("fwd", "dw"):
        runs["clone"] = lambda: i["x"].clone()
    return runs, lambda: check(made, ours, i, {})


def better_plain(times: dict[str, float]) -> dict[str, float]:
    """One entry "plain", the better of its paths, beside the others."""
    paths = [t for name, t in times.items() if name.startswith("plain_")]
    return {**times, **({"plain": min(paths)} if paths else {})}
