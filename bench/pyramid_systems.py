"""A ViT's tokens as a feature pyramid: nn.TokenPyramid beside its own layers called on (B, C, H, W) maps, as heads for dense tasks do."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bench.case import Case, of_module
from bench.op_systems import _view, _wide, tokens
from bench.problems import Problem
from lifeops.nn import TokenPyramid

OUT = 64  # channels of every map


class _OnMaps(nn.Module):
    """The maps of the patches are made once, contiguous; dense layers are 1x1 convolutions there."""

    def __init__(self, pyramid: TokenPyramid):
        super().__init__()
        self.pyramid = pyramid

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
        patches = x[:, self.pyramid.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid).contiguous()
        return [_level(level, patches) for level in self.pyramid.levels]


def _level(level: nn.Module, maps: torch.Tensor) -> torch.Tensor:
    def dense(layer, t):
        return F.conv2d(t, layer.weight[:, :, None, None], layer.bias)

    t = dense(level.mix, level.act(level.conv(dense(level.proj, maps))))
    return level.norm(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def token_pyramid(p: Problem, compile: bool) -> Case:
    """Strides 4 to 32 of 16 pixels' patches; all maps side by side are the result."""
    dtype, grid = getattr(torch, p.dtype), (p.H, p.W)
    ours = TokenPyramid(p.C, OUT, p.P).to(dtype)
    eager = _OnMaps(ours)

    def call(m, i):
        return torch.cat([t.flatten(2) for t in m(_view(i["x"]), grid)], 2)

    def draw():
        places = sum(-(-p.H * 16 // s) * -(-p.W * 16 // s) for s in ours.strides)
        return {"x": tokens(p), "dy": torch.randn(p.B, OUT, places).to(dtype)}

    oracle = _wide(eager, call)
    return Case(p, draw, {"lifeops": of_module(ours, call, truth=oracle), "eager": of_module(eager, call, truth=oracle)})


BUILDERS = {"token_pyramid": token_pyramid}
