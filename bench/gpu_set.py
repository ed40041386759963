"""What the GPU run measures: its problems in order of worth, and the variants of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import product, zip_longest

import torch

from bench import systems
from bench.baselines import eager_dwconv, shift_and_add
from bench.case import check, inputs_of, on_backend, runner
from bench.problems import NO_PREFIX, STAGED, WINDOWS, Problem, level_of, modes_of

WIDTHS = {"T": 192, "S": 384, "B": 768}
SHAPES = [(256, 14, 14), (64, 32, 32), (16, 64, 64)]
PYRAMID = {28: 128, 56: 64}  # images of a side
COMPILED = {(14, 384, 3), (14, 768, 3)}  # (W, C, K) where torch.compile is a baseline: each takes seconds to compile
SEQUENCES = ("token_dwconv", "life_qkv", "localvit_ffn", "dw_shortcut", "local_attention", "rollout", "life_attention", "dw_shortcut_block")


def _sequences(system: str, tiny: bool) -> Iterator[Problem]:
    shapes, widths = ([(2, 4, 5)], [192]) if tiny else (SHAPES, [WIDTHS[k] for k in "STB"])
    kernels = (3, 5, 7) if system == "token_dwconv" else (3,) if system == "local_attention" else (0,)
    modes = [m for m in modes_of(system) if m != "bwd"]
    for (B, H, W), C, K, mode in product(shapes, widths, kernels, modes):
        yield Problem(system, mode, B, H, W, C, K, "bfloat16")


def _pyramid(system: str, tiny: bool) -> Iterator[Problem]:
    """Grids of the first stages of pyramids."""
    if system in STAGED:
        sizes = [(side, C, P, 0) for side, C, P in STAGED[system]]
    else:
        widths = {"pool_qkv": (96,), "token_dwconv_multiplied": (96, 192)}.get(system, (192, 64, 384))
        kernels = (2, 4) if system in ("pool_qkv", "token_dwconv_transpose") else (3,)
        sizes = [(side, C, int(system not in NO_PREFIX), K) for side, C, K in product(PYRAMID, widths, kernels)]
    for (side, C, P, K), mode in product(sizes[-1:] if tiny else sizes, ("fwd", "fwdbwd")):
        B, side = (2, 8) if tiny else (PYRAMID.get(side, 256), side)
        yield Problem(system, mode, B, side, side, C, K, "bfloat16", P)


def problems(tiny: bool) -> Iterator[Problem]:
    """Most telling first, for the run may be cut off: the first of every system, the second of every system, …"""
    each = [_sequences(s, tiny) for s in SEQUENCES] + [_pyramid(s, tiny) for s in (*WINDOWS, *STAGED)]
    yield from (p for together in zip_longest(*each) for p in together if p is not None)


def last(tiny: bool) -> list[Problem]:
    """Those that are measured once more at the end beside torch.compile of the eager path and of the unrolled one."""
    return [] if tiny else [p for p in problems(tiny) if p.system == "token_dwconv" and p.mode == "fwd" and (p.W, p.C, p.K) in COMPILED]


def compiled(p: Problem, device: str) -> dict[str, Callable]:
    """torch.compile's baselines of a token_dwconv forward pass."""
    with torch.device(device):
        x = torch.randn(p.B, p.P + p.H * p.W, p.C, dtype=torch.bfloat16)
        w = torch.randn(p.C, 1, p.K, p.K, dtype=torch.bfloat16)
    whole, unrolled = torch.compile(eager_dwconv), torch.compile(shift_and_add)
    return {"clone": x.clone, "compiled": lambda: whole(x, w, p), "compiled_shifts": lambda: unrolled(x, w, p)}


def backends(device: str) -> list[str]:
    """What lifeops can run with there, the one without a compiler at run time first."""
    return ["cpu", "reference"] if device == "cpu" else ["cuda", "triton"]


def variants(p: Problem, device: str) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """What is timed, by name, and for lifeops' a check to be called before, which raises where the result is wrong or there is none."""
    with torch.device(device):
        case = systems.case(p, device=device)
        i = inputs_of(case, 0)
    ours, known = case.variants.pop("lifeops"), {}
    mine = {f"lifeops_{backend}": on_backend(ours, backend) for backend in backends(device)}
    if level_of(p.system) == "block":  # of several ops, which no backend has all: what lifeops chooses for each
        mine["lifeops"] = ours
    runs = {name: runner(v, p.mode, i) for name, v in mine.items()}
    checks = {name: functools.partial(check, case, v, i, known) for name, v in mine.items()}
    runs |= {name: runner(v, p.mode, i) for name, v in case.variants.items() if name != "plain_conv1x1"}
    if "x" in i and p.mode in ("fwd", "dw"):
        runs["clone"] = i["x"].clone
    return runs, checks


def models(tiny: bool) -> Iterator[tuple[Problem, dict[str, Callable]]]:
    """Training steps and inference of whole models in bfloat16: (problem, {system: what makes the model}). Of released models, lifeops' and
    the authors' modules, there is nothing to make.
    """
    for size in ("tiny",) if tiny else ("tiny", "small"):
        for mode in ("fwd", "fwdbwd"):
            yield _vits(size, mode, tiny)
    for system, C in (("cvt_13", 384), ("edgevit_xs", 240)):
        side, B = (4, 2) if tiny else (14, 128)
        for mode in ("fwd", "fwdbwd"):
            yield Problem(system, mode, B, side, side, C, int(tiny), "bfloat16"), {}


def _vits(size: str, mode: str, tiny: bool) -> tuple[Problem, dict[str, Callable]]:
    from lifeops.models import deit, dw_shortcut, localvit
    from lifeops.nn import LifeAttention

    side, depth, B = (4, 2, 2) if tiny else (14, 12, 256)
    width, heads = {"tiny": (192, 3), "small": (384, 6)}[size]
    host = {"img_size": 16 * side, "patch_size": 16, "num_classes": 100, "depth": depth, "embed_dim": width, "num_heads": heads}
    return Problem("model", mode, B, side, side, width, 0, "bfloat16"), {
        "plain": lambda: deit.VisionTransformer(**host),
        "life": lambda: deit.VisionTransformer(attn=LifeAttention, **host),
        "localvit": lambda: localvit(**host),
        "dw_plain": lambda: dw_shortcut(f"vit_{size}", every=None, **host),
        "dw_shortcut": lambda: dw_shortcut(f"vit_{size}", **host),
    }


def model_runs(p: Problem, makers: dict[str, Callable], device: str) -> dict[str, Callable]:
    """{variant: a step} of one of ``models``."""
    with torch.device(device):
        if not makers:
            case = systems.case(p, device=device)
            i = inputs_of(case, 0)
            return {name: runner(v, p.mode, i) for name, v in case.variants.items()}
        images = torch.randn(p.B, 3, 16 * p.H, 16 * p.W, dtype=torch.bfloat16)
        return {name: _step(make().to(torch.bfloat16).train(p.mode == "fwdbwd"), images, p.mode) for name, make in makers.items()}


def _step(model, images, mode: str) -> Callable:
    if mode == "fwd":
        return torch.no_grad()(lambda: model(images))
    parameters = [q for q in model.parameters() if q.requires_grad]
    return lambda: torch.autograd.grad(model(images).float().logsumexp(-1).sum(), parameters)
