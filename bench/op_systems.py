"""Variants and checks of the op-level problems: token_dwconv, life_qkv, local_attention, dw_shortcut, rollout."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

import lifeops
from bench import baselines
from bench.case import Case, Variant, of_module
from bench.problems import Problem
from lifeops import config, registry, torchlib
from lifeops.nn import DWShortcut, LifeQKV
from lifeops.nn.eager_dw_shortcut import EagerDWShortcut
from lifeops.nn.eager_life import EagerLifeAttention
from lifeops.ops.life_qkv.spec import scale_dims
from lifeops.ops.token_dwconv import spec as dwconv

CHECKED_CHANNELS, CHECKED_IMAGES = 48, 2


def tokens(p: Problem, channels: int = 0) -> torch.Tensor:
    return torch.randn(p.B, p.P + p.H * p.W, channels or p.C).to(getattr(torch, p.dtype))


# ------------------------------------------------------------------------------------------------ token_dwconv


def _some_channels(p: Problem):
    """All images of a few random channels, the last among them."""
    chosen = torch.randperm(p.C, device="cpu")[:CHECKED_CHANNELS]
    chosen[0] = p.C - 1
    dims = {"w": 0, "dw": 0, "map": 1, "d_map": 1, "y_map": 1}
    return lambda name, t, is_result: t.index_select(dims.get(name, 2), chosen.to(t.device))


def _some_images(name, t, is_result):
    if name in ("w", "b", "dw", "db"):
        return None if is_result else t
    return t[:CHECKED_IMAGES]


def token_dwconv(p: Problem, compile: bool) -> Case:
    def draw():
        x, dy = tokens(p), tokens(p)
        w = torch.randn(p.C, 1, p.K, p.K).to(x.dtype) / p.K
        maps = [baselines.to_map(t, p).contiguous(memory_format=torch.channels_last) for t in (x, dy)]
        return {"x": x, "w": w, "dy": dy, **({} if p.mode in ("bwd", "fwdbwd") else dict(zip(("map", "d_map"), maps, strict=True)))}

    narrow = [_some_channels(p)] if p.mode == "dw" else [_some_channels(p), _some_images]
    variants = _weight_gradient(p) if p.mode == "dw" else _dwconv_variants(p, compile)
    return Case(p, draw, variants, narrow, True, lambda name: p.B * p.H * p.W if name in ("w", "dw") else 1)


def _dwconv_variants(p: Problem, compile: bool) -> dict[str, Variant]:
    def functional(fn, **options):
        return Variant(lambda i: fn(i["x"], i["w"]), ("x", "w"), **options)

    oracle = functional(lambda x, w: dwconv.reference(x, w, None, None, p.H, p.W, p.P, "keep", ""))
    variants = {
        "lifeops": functional(lambda x, w: lifeops.token_dwconv(x, w, grid=(p.H, p.W), num_prefix_tokens=p.P), truth=oracle),
        "eager": functional(lambda x, w: baselines.eager_dwconv(x, w, p), truth=oracle),
    }
    if p.mode == "fwd":
        bare = Variant(lambda i: F.conv2d(i["map"], i["w"], padding=p.K // 2, groups=i["w"].shape[0]), ("map", "w"), result="y_map")
        variants["onednn"] = bare
    if compile:
        whole, unrolled = baselines.compiled(baselines.eager_dwconv), baselines.compiled(baselines.shift_and_add)
        variants["compiled"] = functional(lambda x, w: whole(x, w, p), truth=oracle, compiled=True)
        variants["compiled_shifts"] = functional(lambda x, w: unrolled(x, w, p), truth=oracle, compiled=True)
    return variants


def _weight_gradient(p: Problem) -> dict[str, Variant]:
    dtype = getattr(torch, p.dtype)

    def reference(i):
        return dwconv.reference_bwd_dw(i["dy"], i["x"], p.K, p.H, p.W, p.P, "keep", i["x"].dtype, None, "")[0]

    call = torchlib.caller(dwconv.bwd_dw_op)  # as a backward pass calls it

    def ours(i):
        return call(i["dy"], i["x"], p.K, p.H, p.W, p.P, "keep", dtype, None, config.requested_backend("token_dwconv", None))[0]

    def bare(i):
        conv = ([1, 1], [p.K // 2] * 2, [1, 1], False, [0, 0], p.C, [False, True, False])
        return torch.ops.aten.convolution_backward(i["d_map"], i["map"], i["w"], None, *conv)[1]

    oracle = Variant(reference, ("x", "dy"))
    return {
        "lifeops": Variant(ours, ("x", "dy"), truth=oracle, result="dw"),
        "onednn": Variant(bare, ("map", "d_map"), truth=oracle, result="dw"),
    }


# ------------------------------------------------------------------------------------------------ life_qkv


def _by_scale(q, k, v):
    """q, k, v with their scales side by side as z1, z2, z3 with q, k, v side by side: what attention on scales reads."""
    return [torch.cat(parts, -1) for parts in zip(*(t.chunk(3, -1) for t in (q, k, v)), strict=True)]


def life_qkv(p: Problem, compile: bool) -> Case:
    heads, dtype, grid = p.C // 64, getattr(torch, p.dtype), (p.H, p.W)
    eager = EagerLifeAttention(p.C, heads, p.P).to(dtype).qkv
    ours = LifeQKV(p.C, heads, p.P).to(dtype)
    ours.load_state_dict(eager.state_dict())
    wide = copy.deepcopy(eager).double()
    oracle = of_module(wide, lambda m, i: torch.cat(m(i["x"], grid), -1))
    scales = of_module(wide, lambda m, i: _by_scale(*m(i["x"], grid)), dy=_dy_by_scale)
    variants = {
        "lifeops": of_module(ours, lambda m, i: m.scales(i["x"], grid), dy=_dy_by_scale, truth=scales),
        "eager": of_module(eager, lambda m, i: torch.cat(m(_view(i["x"]), grid), -1), truth=oracle),
        **_plain_projections(p),
        "products": _products(p),
    }
    if compile:
        module = baselines.compiled(eager)
        variants["compiled"] = of_module(module, lambda m, i: torch.cat(m(i["x"], grid), -1), truth=oracle, compiled=True)
    return Case(p, lambda: {"x": tokens(p), "dy": tokens(p, 3 * p.C)}, variants)


def _view(x):
    """A leaf as a module of the FLOP counter's hooks can take it."""
    return x.view_as(x)


def _dy_by_scale(i):
    return _by_scale(*i["dy"].chunk(3, -1))


def _plain_projections(p: Problem) -> dict[str, Variant]:
    """The plain C -> 3C projection on both library paths; reports take the better one as ``plain``."""
    linear = torch.nn.Linear(p.C, 3 * p.C).to(getattr(torch, p.dtype))
    conv = torch.nn.Conv2d(p.C, 3 * p.C, 1).to(linear.weight.dtype)
    conv.load_state_dict({"weight": linear.weight[:, :, None, None], "bias": linear.bias})

    def as_map(m, i):
        return m(i["x"].transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)

    return {
        "plain_linear": of_module(linear, lambda m, i: m(_view(i["x"])), truth=_wide(linear, lambda m, i: m(i["x"]))),
        "plain_conv1x1": of_module(conv, as_map, truth=_wide(conv, as_map)),
    }


def _products(p: Problem) -> Variant:
    """The three products alone, each of the one before: what life_qkv takes where depth-wise steps are free."""
    a, b, c = (3 * d for d in scale_dims(p.C))
    layers = [torch.nn.Linear(p.C, a), torch.nn.Linear(a, b, bias=False), torch.nn.Linear(b, c, bias=False)]

    def cascade(m, i):
        scales = [_view(i["x"])]
        for layer in m:
            scales.append(layer(scales[-1]))
        return scales[1:]

    module = torch.nn.ModuleList(layers).to(getattr(torch, p.dtype))
    return of_module(module, cascade, dy=_dy_by_scale, truth=_wide(module, cascade, dy=_dy_by_scale))


def _wide(module, call, reads=("x",), **options) -> Variant:
    """The truth of a plain module: its own float64 copy."""
    return of_module(copy.deepcopy(module).double(), call, reads, own=of_module(module, call, reads, **options), **options)


# ------------------------------------------------------------------------------------------------ local_attention, rollout


def _one_head(name, t, is_result):
    """All images, the last head: enough for the gradients of the convolution."""
    if name in ("w", "b"):
        return t[-64:]
    return t[..., -64:] if name in ("y", "dy") else t[:, -1:]


def local_attention(p: Problem, compile: bool) -> Case:
    heads, dtype = p.C // 64, getattr(torch, p.dtype)

    def draw():
        qkv = torch.randn(p.B, p.P + p.H * p.W, 3, heads, 64).to(dtype)
        parts = dict(zip("qkv", (t.detach() for t in qkv.permute(2, 0, 3, 1, 4)), strict=True))
        return {**parts, "w": torch.randn(p.C, 1, p.K, p.K).to(dtype) / p.K, "b": torch.randn(p.C).to(dtype), "dy": tokens(p)}

    def ours(i):
        return lifeops.local_attention(*(i[n] for n in "qkvwb"), grid=(p.H, p.W), num_prefix_tokens=p.P)

    def eager(i):
        map_ = i["v"].transpose(1, 2).flatten(2)[:, p.P :].transpose(1, 2).unflatten(2, (p.H, p.W))
        local = F.conv2d(map_, i["w"], i["b"], padding=p.K // 2, groups=i["w"].shape[0]).flatten(2).transpose(1, 2)
        return baselines.attention(i["q"], i["k"], i["v"]) + F.pad(local, (0, 0, p.P, 0))

    def reference(i):
        op = registry.ops["local_attention"]
        return op.reference(*(i[n] for n in "qkvwb"), *[None] * 3, p.H, p.W, p.P, 0.125, 0.0, False, "")[0]

    oracle = Variant(reference, tuple("qkvwb"))
    variants = {
        "lifeops": Variant(ours, tuple("qkvwb"), truth=oracle),
        "eager": Variant(eager, tuple("qkvwb"), truth=oracle),
        "sdpa": Variant(lambda i: baselines.attention(i["q"], i["k"], i["v"]), tuple("qkv")),
    }
    if compile:
        fused = baselines.compiled(eager)
        variants["compiled"] = Variant(fused, tuple("qkvwb"), truth=oracle, compiled=True)
    n = p.P + p.H * p.W
    return Case(p, draw, variants, [_some_images, _one_head], True, lambda name: p.B * p.H * p.W if name in ("w", "b") else n)


def rollout(p: Problem, compile: bool) -> Case:
    n, dtype = p.P + p.H * p.W, getattr(torch, p.dtype)

    def draw():
        q, k, _ = torch.randn(p.B, n, 3, p.C // 64, 64).to(dtype).permute(2, 0, 3, 1, 4)
        r = torch.rand(p.B, 1, n)
        return {"r": r / r.sum(-1, keepdim=True), "q": q, "k": k}

    def functional(fn, **options):
        return Variant(lambda i: fn(i["r"], i["q"], i["k"]), ("r", "q", "k"), **options)

    oracle = functional(lambda r, q, k: registry.ops["rollout_step"].reference(r, q, k, 0.125, "mean", 0.5, 0.0, ""))
    variants = {
        "lifeops": functional(lifeops.rollout_step, truth=oracle),
        "naive": functional(baselines.naive_rollout, truth=oracle),
        "product": functional(lambda r, q, k: q @ k.mT),
    }
    return Case(p, draw, variants, [lambda name, t, is_result: t[:1]], False, lambda name: n)


# ------------------------------------------------------------------------------------------------ dw_shortcut


def shortcuts(p: Problem):
    """The authors' module, ours with the same weights and running statistics, and a float64 copy of the former."""
    eager = EagerDWShortcut(p.C, p.K or 3, p.P)
    for norm in eager.batchnorms:
        torch.nn.init.uniform_(norm.running_mean), torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    eager = eager.to(getattr(torch, p.dtype)).train(p.mode != "fwd")
    ours = DWShortcut(p.C, p.K or 3, p.P).to(getattr(torch, p.dtype)).train(p.mode != "fwd")
    ours.load_state_dict(eager.state_dict())
    if p.mode == "fwd":
        lifeops.fuse_(ours)
    return eager, ours, copy.deepcopy(eager).double()


def dw_shortcut(p: Problem, compile: bool) -> Case:
    """What the shortcut itself costs: x and a block's output in, their sum out."""
    eager, ours, wide = shortcuts(p)
    grid, reads = (p.H, p.W), ("x", "y")

    def call(m, i):
        return m(_view(i["x"]), _view(i["y"]), grid)

    oracle = of_module(wide, call, reads)
    variants = {"lifeops": of_module(ours, call, reads, truth=oracle), "eager": of_module(eager, call, reads, truth=oracle)}
    if compile:
        module = baselines.compiled(eager)
        variants["compiled"] = of_module(module, call, reads, truth=oracle, compiled=True)
    return Case(p, lambda: {"x": tokens(p), "y": tokens(p), "dy": tokens(p)}, variants)


BUILDERS = {
    "token_dwconv": token_dwconv, "life_qkv": life_qkv, "local_attention": local_attention, "dw_shortcut": dw_shortcut,
    "rollout": rollout,
}  # fmt: skip
