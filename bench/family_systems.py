"""What surrounds the convolutions in related systems: smoothing, token slimming, localisation, shared weights, PVTv2's layers."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bench import whole
from bench.block_systems import _on_grid, _xs
from bench.case import Case, of_module
from bench.conv_systems import on_maps
from bench.op_systems import _view, _wide, tokens
from bench.problems import Problem
from lifeops.losses import RelativeLocalizationHead, dense_relative_localization
from lifeops.losses.eager_relative_localization import eager_relative_localization
from lifeops.models import sit
from lifeops.models.deit import Attention
from lifeops.models.sit import ScaledBlock
from lifeops.nn import ConvFeedForward, OverlapPatchEmbed, SharedConvAttention, TokenSlimming, TokenSmoothing
from lifeops.nn.eager_conv_ffn import EagerConvFeedForward
from lifeops.nn.eager_shared_conv import EagerSharedConv
from lifeops.nn.eager_smoothing import EagerSmoothing
from lifeops.nn.eager_token_slimming import EagerBlock, EagerTokenSlimming

CLASSES, PAIRS = 100, 32


def _beside(p: Problem, ours: nn.Module, eager: nn.Module, call, draw=None) -> Case:
    """The same call of both."""
    dtype = getattr(torch, p.dtype)
    ours, eager = ours.to(dtype), eager.to(dtype)
    truth = _wide(eager, call)
    return Case(p, draw or _xs(p), {"lifeops": of_module(ours, call, truth=truth), "eager": of_module(eager, call, truth=truth)})


def smoothing(p: Problem, compile: bool) -> Case:
    """The authors' networks smooth contiguous maps; behind a prefix token the maps have to be made of tokens."""
    ours, eager = TokenSmoothing(1.0, 3, p.P), EagerSmoothing(p.C, 1.0, 3, p.P)
    if p.P:
        return _beside(p, ours, eager, _on_grid(p))
    return on_maps(p, ours, eager.to(getattr(torch, p.dtype)), lambda m, i: m.conv(i["map"]))


def slimming(p: Problem, compile: bool) -> Case:
    """Half of the tokens are left."""
    K = p.H * p.W // 2
    ours = TokenSlimming(p.C, K, p.P)
    ours.weight[3].bias.requires_grad_(False)  # which softmax does not see
    eager = EagerTokenSlimming(copy.deepcopy(ours))

    def draw():
        return {"x": tokens(p), "dy": torch.randn(p.B, p.P + K, p.C).to(getattr(torch, p.dtype))}

    return _beside(p, ours, eager, lambda m, i: m(_view(i["x"])), draw)


class _Localization(nn.Module):
    """A loss with its head."""

    def __init__(self, loss, head: nn.Module):
        super().__init__()
        self.loss, self.head = loss, head

    def forward(self, x, grid, P, pairs):
        return self.loss(x, grid, P, head=self.head, pairs=pairs)


def localization(p: Problem, compile: bool) -> Case:
    head, grid = RelativeLocalizationHead(p.C), (p.H, p.W)

    def draw():
        pairs = {name: torch.stack([torch.randint(n, (p.B, PAIRS)) for n in grid], -1) for name in "ab"}
        return {"x": tokens(p), "dy": torch.ones(()), **pairs}

    def call(m, i):
        return m(_view(i["x"]), grid, p.P, (i["a"], i["b"])).float()

    eager = _Localization(eager_relative_localization, copy.deepcopy(head))
    return _beside(p, _Localization(dense_relative_localization, head), eager, call, draw)


def shared_conv(p: Problem, compile: bool) -> Case:
    attn = Attention(p.C, 6 if p.C % 9 else 9)
    attn.qkv.bias.requires_grad_(False)  # which the authors leave out
    ours = SharedConvAttention(attn, p.P)
    return _beside(p, ours, EagerSharedConv(copy.deepcopy(ours)), _on_grid(p))


def conv_ffn(p: Problem, compile: bool) -> Case:
    ratio = 8 if p.C <= 128 else 4
    ours, eager = ConvFeedForward(p.C, ratio, p.P), EagerConvFeedForward(p.C, ratio, p.P)
    ours.load_state_dict(eager.state_dict())
    return _beside(p, ours, eager, _on_grid(p))


class _EagerEmbed(nn.Module):
    def __init__(self, ours: OverlapPatchEmbed):
        super().__init__()
        self.proj, self.norm = ours.proj, ours.norm

    def forward(self, maps):
        return self.norm(self.proj(maps).flatten(2).transpose(1, 2)), None


def patch_embed(p: Problem, compile: bool) -> Case:
    """Of images in the first stage (64 channels), else of maps that are views of tokens."""
    window, chans = ((7, 4), 3) if p.C == 64 else ((3, 2), p.C // 2)
    side = p.H * window[1]
    ours = OverlapPatchEmbed(chans, p.C, *window)

    def draw():
        x = torch.randn(p.B, chans, side, side).to(getattr(torch, p.dtype))
        return {"x": x if chans == 3 else x.contiguous(memory_format=torch.channels_last), "dy": tokens(p)}

    return _beside(p, ours, _EagerEmbed(copy.deepcopy(ours)), lambda m, i: m(_view(i["x"]))[0], draw)


# ------------------------------------------------------------------------------------------------ SiT


def _authors(parent: nn.Module, name: str, child: nn.Module) -> nn.Module | None:
    """The authors' counterpart, with its layers; None for any other module."""
    kinds = {ScaledBlock: EagerBlock, TokenSlimming: EagerTokenSlimming}
    return kinds[type(child)](child) if type(child) in kinds else None


def as_authors(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that runs as the authors run it."""
    return whole.exchanged(model, _authors)


def sit_tiny(p: Problem, compile: bool) -> Case:
    """``K``: so many blocks in every stage, or the released depths."""
    depths = {"stage_blocks": (p.K,) * 4} if p.K else {}
    ours = sit("tiny", img_size=16 * p.H, num_classes=CLASSES, **depths).to(getattr(torch, p.dtype)).train(p.mode != "fwd")
    for slim in ours.tsm:
        slim.weight[3].bias.requires_grad_(False)
        for layer in (slim.weight[1], slim.weight[3]):  # as trained ones; new ones join all patches nearly alike, with gradients of 1e-10
            layer.weight.data.mul_(10)
    return whole.case(p, ours, as_authors(ours), CLASSES)


BUILDERS = {
    "token_smoothing": smoothing, "token_slimming": slimming, "relative_localization": localization, "shared_conv": shared_conv,
    "conv_ffn": conv_ffn, "patch_embed": patch_embed, "sit_tiny": sit_tiny,
}  # fmt: skip
