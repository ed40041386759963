"""RegionViT: the step to a coarser grid on both grids, and RegionViT-Ti whole, beside the authors' computation."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bench import whole
from bench.case import Case, of_module
from bench.op_systems import _view, _wide
from bench.problems import Problem
from lifeops.models import regionvit
from lifeops.models.regionvit import RegionStage
from lifeops.nn.downsampling import LayerNorm2d, TwoGridDownsampling
from lifeops.nn.eager_regionvit import EagerLayerNorm2d, EagerRegionStage, EagerTwoGridDownsampling

WINDOW, CLASSES = 7, 100


class _OnMaps(nn.Module):
    """The authors' step on the maps that tokens are views of; tokens again behind it."""

    def __init__(self, step: EagerTwoGridDownsampling):
        super().__init__()
        self.step = step

    def forward(self, regions, region_grid, x, grid):
        maps = (t.transpose(1, 2).unflatten(2, g).contiguous() for t, g in ((regions, region_grid), (x, grid)))
        return tuple(m.flatten(2).transpose(1, 2) for m in self.step(*maps))


def region_down(p: Problem, compile: bool) -> Case:
    """``x`` has the patches' tokens and, in front of them, the regions'."""
    dtype, grid, coarse = getattr(torch, p.dtype), (p.H, p.W), (-(-p.H // WINDOW), -(-p.W // WINDOW))
    R, ours = coarse[0] * coarse[1], TwoGridDownsampling(p.C, 2 * p.C)
    eager = _OnMaps(EagerTwoGridDownsampling(copy.deepcopy(ours)).to(dtype))
    ours = ours.to(dtype)

    def call(m, i):
        x = _view(i["x"])
        out = m(x[:, :R], coarse, x[:, R:], grid)
        return torch.cat((out[0], out[-2 if len(out) == 4 else 1]), 1)

    def draw():
        rows = -(-coarse[0] // 2) * -(-coarse[1] // 2) + -(-p.H // 2) * -(-p.W // 2)
        return {"x": torch.randn(p.B, R + p.H * p.W, p.C).to(dtype), "dy": torch.randn(p.B, rows, 2 * p.C).to(dtype)}

    oracle = _wide(eager, call)
    return Case(p, draw, {"lifeops": of_module(ours, call, truth=oracle), "eager": of_module(eager, call, truth=oracle)})


def _authors(parent: nn.Module, name: str, child: nn.Module) -> nn.Module | None:
    """The authors' counterpart of a stage, or of a norm of the patch embedding; None for any other module."""
    if isinstance(child, RegionStage):
        return EagerRegionStage(child)
    return whole.with_weights(EagerLayerNorm2d(child.weight.shape[1], child.eps), child) if type(child) is LayerNorm2d else None


def as_authors(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose stages and norms run as the authors run them."""
    return whole.exchanged(model, _authors)


def regionvit_tiny(p: Problem, compile: bool) -> Case:
    ours = regionvit("tiny", img_size=16 * p.H, num_classes=CLASSES).to(getattr(torch, p.dtype)).train(p.mode != "fwd")
    for name, parameter in ours.layers[-1].block[-1].named_parameters():  # the last block's patches reach nothing
        parameter.requires_grad_(name != "attn.rel_pos")
    return whole.case(p, ours, as_authors(ours), CLASSES)


BUILDERS = {"region_down": region_down, "regionvit_tiny": regionvit_tiny}
