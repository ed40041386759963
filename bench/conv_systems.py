"""CvT and EdgeViT: the projections of CvT's attention, the whole of it, EdgeViT's local aggregation, and both models."""

from __future__ import annotations

import torch

import lifeops
from bench import baselines, whole
from bench.block_systems import _on_grid, _xs
from bench.case import Case, of_module
from bench.op_systems import _view, _wide
from bench.problems import Problem
from lifeops.models import cvt, edgevit
from lifeops.models.edgevit import LGLBlock
from lifeops.nn import ConvProjectionAttention, LocalAgg
from lifeops.nn.eager_cvt import EagerConvProjectionAttention
from lifeops.nn.eager_edgevit import EagerLGLBlock, EagerLocalAgg
from lifeops.nn.feed_forward import FeedForward

CLASSES = 1000
RELEASED = {"cvt_13": (cvt, "13"), "edgevit_xs": (edgevit, "xs")}


def _pair(p: Problem, eager: torch.nn.Module, ours: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The authors' module and ours with its weights; for inference batch norms are folded, as they would be."""
    dtype, training = getattr(torch, p.dtype), p.mode != "fwd"
    eager, ours = eager.to(dtype).train(training), ours.to(dtype).train(training)
    ours.load_state_dict(eager.state_dict())
    return eager, ours if training else lifeops.fuse_(ours)


def _attentions(p: Problem) -> tuple[torch.nn.Module, torch.nn.Module]:
    heads = max(1, p.C // 64)
    return _pair(p, EagerConvProjectionAttention(p.C, heads, p.P), ConvProjectionAttention(p.C, heads, p.P))


def _without(module: torch.nn.Module, *parts: str) -> torch.nn.Module:
    """``module`` with the parameters frozen whose name has one of ``parts`` in it: those whose gradient is rounding alone, or none."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))
    return module


def attention(p: Problem, compile: bool) -> Case:
    eager, ours = (_without(m, "proj_k.bias", "proj_k.bn.bias") for m in _attentions(p))
    call = _on_grid(p)
    oracle = _wide(eager, call)
    return Case(p, _xs(p), {"lifeops": of_module(ours, call, truth=oracle), "eager": of_module(eager, call, truth=oracle)})


def projections(p: Problem, compile: bool) -> Case:
    """q, k and v before their Linears: three convolutions and batch norms of one sequence."""
    eager, ours = (_without(m, "proj_q.", "proj_k.", "proj_v.", "proj.") for m in _attentions(p))
    coarse = lifeops.conv_grid((p.H, p.W), 3, 2)

    def call(m, i):
        return m.projected(_view(i["x"]), (p.H, p.W))

    def gradients(i):
        return i["dy"], i["dk"], i["dv"]

    def draw():
        x, dtype = torch.randn(p.B, p.P + p.H * p.W, p.C), getattr(torch, p.dtype)
        few = [torch.randn(p.B, p.P + coarse[0] * coarse[1], p.C) for _ in range(2)]
        return {name: t.to(dtype) for name, t in zip(("x", "dy", "dk", "dv"), (x, torch.randn_like(x), *few), strict=True)}

    oracle = _wide(eager, call, dy=gradients)
    return Case(p, draw, {name: of_module(m, call, truth=oracle, dy=gradients) for name, m in (("lifeops", ours), ("eager", eager))})


def local_agg(p: Problem, compile: bool) -> Case:
    """The authors' module runs on contiguous maps, as their patch embedding leaves them."""
    eager, ours = _pair(p, EagerLocalAgg(p.C), LocalAgg(p.C))
    return on_maps(p, ours, eager, lambda m, i: m.on_maps(i["map"]))


def on_maps(p: Problem, ours: torch.nn.Module, eager: torch.nn.Module, call) -> Case:
    """``ours`` on tokens beside ``call(eager, inputs)`` on contiguous maps."""

    def draw():
        x, dy = (torch.randn(p.B, p.H * p.W, p.C).to(getattr(torch, p.dtype)) for _ in range(2))
        return {"x": x, "dy": dy, **{name: baselines.to_map(t, p._replace(P=0)).contiguous() for name, t in (("map", x), ("d_map", dy))}}

    oracle = _wide(eager, _on_grid(p))
    maps = _wide(eager, call, ("map",), dy=lambda i: i["d_map"])
    variants = {
        "lifeops": of_module(ours, _on_grid(p), truth=oracle),
        "eager": of_module(eager, call, ("map",), truth=maps, dy=lambda i: i["d_map"]),
    }
    return Case(p, draw, variants)


# ------------------------------------------------------------------------------------------------ models


class _EagerMlp(torch.nn.Module):
    """With its layers called, and a QuickGELU of three operators."""

    def __init__(self, mlp: FeedForward):
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, mlp.act, mlp.fc2

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def _authors(parent: torch.nn.Module, name: str, module: torch.nn.Module) -> torch.nn.Module | None:
    """The authors' counterpart of one of ours, with its weights; None for any other module."""
    P = getattr(module, "num_prefix_tokens", 0)
    if isinstance(module, FeedForward):
        return _EagerMlp(module)
    if isinstance(module, ConvProjectionAttention):
        eager = EagerConvProjectionAttention(module.dim, module.num_heads, P)
    elif isinstance(module, LGLBlock):
        attn, hidden = module.SelfAttn.attn, module.SelfAttn.mlp.fc1.out_features
        eager = EagerLGLBlock(attn.dim, attn.num_heads, attn.sr_ratio, attn.num_prefix_tokens, hidden / attn.dim)
        eager.contiguous = name == "0"  # as a patch embedding leaves the maps
    else:
        return None
    return whole.with_weights(eager, module)


def as_authors(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of ``model`` with the authors' modules in the place of ours."""
    return whole.exchanged(model, _authors)


def model(p: Problem, compile: bool) -> Case:
    """``K``: so many blocks in every stage, or the released depths."""
    build, variant = RELEASED[p.system]
    dtype = getattr(torch, p.dtype)
    full = build(variant, num_classes=CLASSES) if not p.K else None
    ours = full or build(variant, num_classes=CLASSES, depths=(p.K,) * (3 if p.system == "cvt_13" else 4))
    last = len(ours.stage2.blocks) - 1 if p.system == "cvt_13" else len(ours.blocks4) - 1
    # what softmax, the head and batch norm do not see, or no more than their eps lets them
    dead = (
        "proj_k.bias",
        "proj_k.bn.bias",
        "norm1.",
        f"stage2.blocks.{last}.attn.conv_proj_q.",
        f"blocks4.{last}.SelfAttn.mlp.fc2.bias",
    )
    ours = ours.to(dtype).train(p.mode != "fwd")
    ours, eager = (_without(m, *dead) for m in (ours, as_authors(ours)))
    if not ours.training:
        lifeops.fuse_(ours)
    return whole.case(p, ours, eager, CLASSES)


BUILDERS = {"cvt_projections": projections, "cvt_attention": attention, "edgevit_local_agg": local_agg} | dict.fromkeys(RELEASED, model)
