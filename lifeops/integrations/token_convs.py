"""What other people's modules around a depth-wise convolution compute, on token_dwconv: mixed into their classes by ``accelerate``.

The module stays the object that it is, with its layers, parameters, hooks and methods; only its class is another one, a subclass of its
own. Where a layer is not plainly what token_dwconv computes, the original's ``forward`` runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lifeops import torchlib
from lifeops.hosts.token_convs import ENTRIES, GELUS
from lifeops.nn.batch_norm import constants, on_batch
from lifeops.nn.maps import to_maps, to_tokens
from lifeops.nn.plain import Rule, depthwise, exactly, gelu, is_fused, is_plain, sequence_of
from lifeops.nn.scripting import NotScripted
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.token_dwconv.act_function import ChannelAct
from lifeops.ops.token_dwconv.public import token_dwconv
from lifeops.pointwise import product

GRID = 4, 6  # of the tokens that a module is tried on
_GELU, _RELU = ChannelAct(act="gelu"), ChannelAct(act="relu")
_LINEAR = exactly(nn.Linear)
_NORM = exactly(nn.BatchNorm2d, nn.SyncBatchNorm)


def _any_gelu(layer) -> list[str]:
    if type(layer).__name__ in GELUS and vars(layer).get("act") is F.gelu:
        return []
    return gelu(layer)


def _conv(x, layer: nn.Conv2d, grid, **options) -> torch.Tensor:
    return token_dwconv(x, layer.weight, layer.bias, grid=grid, **options)


def _conv_act(x, layer: nn.Conv2d, act: nn.Module, grid, **options) -> torch.Tensor:
    """act(conv(x)); an exact GELU in the convolution's call. Forward and backward that is faster up to kernel size 5, by 4 to 40 % from
    7x7x768 to 56x56x96, and as fast at 7; only x is kept.
    """
    if is_plain(act, _any_gelu):
        return _conv(x, layer, grid, epilogue=_GELU, **options)
    return act(_conv(x, layer, grid, **options))


def _dense(x, layer: nn.Module) -> torch.Tensor:
    """``layer(x)``; where it is plainly a dense layer, by the faster of torch's two libraries."""
    return product(x, layer) if is_plain(layer, _LINEAR) else layer(x)


def _add_conv(x, layer: nn.Conv2d, grid, P: int = 0) -> torch.Tensor:
    """x + [0 | conv(x_patch)] with x's dtype, under autocast too."""
    if torchlib.autocast_dtype(x) in (None, x.dtype):
        return _conv(x, layer, grid, num_prefix_tokens=P, prefix="zero", residual=x)
    return x + _conv(x, layer, grid, num_prefix_tokens=P, prefix="zero")


# ------------------------------------------------------------------------------------------------ the base


class TokenConv(NotScripted):
    """A module that computes ``fused(…)`` while its layers are plain, else what its own class computes."""

    layers: dict[str, str]  # role: path
    original: type[nn.Module]
    kind: str
    rules: tuple[tuple[str, Rule], ...] = ()  # of layers beside ``conv`` that ``fused`` does not call, or on another layout, by role

    def layer(self, role: str) -> nn.Module:
        found = self
        for name in self.layers[role].split("."):
            found = found._modules[name]
        return found

    def fused_layers(self):
        return [(self.layers[role], rule) for role, rule in (("conv", depthwise), *self.rules) if role in self.layers]

    def convs(self) -> list[nn.Conv2d]:
        return [self.layer("conv")]

    def takes(self, x: torch.Tensor) -> bool:
        """Whether ``fused`` is the right path for ``x``."""
        return True

    def forward(self, *args, **kwargs):
        x = next(iter((*args, *kwargs.values())))
        if is_fused(self) and self.takes(x) and not torch._C._are_functorch_transforms_active():
            return self.fused(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def sample(self, draw: Callable) -> tuple:
        """Arguments to try it with, of random tensors ``draw(*shape)``."""
        return draw(2, GRID[0] * GRID[1], self.layer("conv").in_channels), GRID

    def _get_name(self) -> str:
        return f"Accelerated{self.original.__name__}"

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (self.original, self.kind), *state


@functools.cache
def accelerated(original: type[nn.Module], kind: str) -> type[nn.Module]:
    """The subclass of ``original`` that computes it as the ``kind`` of module that it is. It keeps the name, which tools go by."""
    entry = ENTRIES[kind]
    values = {"original": original, "kind": kind, "layers": entry.layers, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (FORMS[entry.form], original), values)


def _blank(original: type[nn.Module], kind: str) -> nn.Module:
    cls = accelerated(original, kind)
    return cls.__new__(cls)


# ------------------------------------------------------------------------------------------------ tokens


def _any(layer) -> list[str]:
    """A module that is passed by: only what was done to it counts."""
    return []


class PEG(TokenConv):
    """x + conv(x)."""

    rules = (("list", sequence_of(1)),)

    def fused(self, x, size):
        return _conv(x, self.layer("conv"), size, residual=x)


class CPE(TokenConv):
    """x + [0 | conv(x_patch)] behind one class token."""

    def fused(self, x, size):
        return _add_conv(x, self.layer("conv"), size, 1)

    def sample(self, draw):
        return draw(2, 1 + GRID[0] * GRID[1], self.layer("conv").in_channels), GRID


class CRPE(TokenConv):
    """q * [0 | conv(v_patch)] for heads (B, h, 1 + H*W, d), several kernels side by side in the channels."""

    def convs(self):
        return [*self.layer("convs")]

    def fused_layers(self):
        return [(f"{self.layers['convs']}.{i}", depthwise) for i in range(len(self.layer("convs")))]

    def fused(self, q, v, size):
        tokens, parts, first = v.transpose(1, 2).flatten(2), [], 0  # a view of a qkv projection
        for conv in self.layer("convs"):
            part = tokens[:, :, first : first + conv.in_channels]
            parts.append(_conv(part, conv, size, num_prefix_tokens=1, prefix="zero"))
            first += conv.in_channels
        return q * torch.cat(parts, 2).unflatten(2, (q.shape[1], -1)).transpose(1, 2)

    def sample(self, draw):
        heads = sum(self.head_splits)
        width = sum(conv.in_channels for conv in self.convs()) // heads
        q, v = draw(2, 1 + GRID[0] * GRID[1], 2, heads, width).permute(2, 0, 3, 1, 4)
        return q, v, GRID


class FFN(TokenConv):
    """fc2(act(conv(fc1(x)))) with dropout, and perhaps a ReLU before the convolution."""

    rules = (("relu", exactly(nn.ReLU, nn.Identity)), ("holder", _any))

    def fused(self, x, feat_size):
        act, drop, conv = self.layer("act"), self.layer("drop"), self.layer("conv")
        x = _dense(x, self.layer("fc1"))
        before = _RELU if "relu" in self.layers and type(self.layer("relu")) is nn.ReLU else None
        x = _conv_act(x, conv, act, feat_size, prologue=before)
        return drop(_dense(drop(x), self.layer("fc2")))

    def sample(self, draw):
        return draw(2, GRID[0] * GRID[1], self.layer("fc1").in_features), GRID


class HFFFN(FFN):
    """The same, as transformers calls it."""

    def fused(self, hidden_states, height, width):
        return super().fused(hidden_states, (height, width))

    def sample(self, draw):
        x, grid = super().sample(draw)
        return x, *grid


class LPI(TokenConv):
    """conv2(norm(gelu(conv1(x)))) with the norm's running statistics; where it takes the batch's, the original is as fast."""

    rules = (("act", gelu), ("norm", _NORM), ("conv2", depthwise))

    def takes(self, x):
        return not on_batch(self.layer("norm")) and self.layer("act").approximate == "none"

    def fused(self, x, H, W):
        x = _conv(x, self.layer("conv"), (H, W))
        prologue = ChannelAct(*constants(self.layer("norm"), accumulate_dtype(x.dtype)), "gelu_first")
        return _conv(x, self.layer("conv2"), (H, W), prologue=prologue)

    def sample(self, draw):
        x, grid = super().sample(draw)
        return x, *grid


# ------------------------------------------------------------------------------------------------ maps that are tokens in memory


class OnMaps(TokenConv):
    """Takes (B, C, H, W) and gives such maps; those that are not channels last are left to the original."""

    def takes(self, x):
        return x.dim() == 4 and x.stride(1) == 1

    def fused(self, x):
        return to_maps(self.on_tokens(to_tokens(x), x.shape[2:]), x.shape[2:])

    def sample(self, draw):
        return (draw(2, *GRID, self.layer("conv").in_channels).permute(0, 3, 1, 2),)


class MapCPE(OnMaps):
    """x + act(conv(x)), act a GELU or nothing."""

    rules = (("act", exactly(nn.GELU, nn.Identity)),)

    def on_tokens(self, t, grid):
        act = self.layer("act")
        if type(act) is nn.Identity:
            return _add_conv(t, self.layer("conv"), grid)
        return t + act(_conv(t, self.layer("conv"), grid))


class MapAct(OnMaps):
    """gelu(conv(x))."""

    rules = (("act", exactly(nn.GELU)),)

    def on_tokens(self, t, grid):
        return _conv_act(t, self.layer("conv"), self.layer("act"), grid)


class MapNorm(OnMaps):
    """norm(conv(x)) with the norm's running statistics; where it takes the batch's, the original is as fast."""

    rules = (("norm", _NORM),)

    def takes(self, x):
        return super().takes(x) and not on_batch(self.layer("norm")) and not torch.is_grad_enabled()

    def on_tokens(self, t, grid):
        return _conv(t, self.layer("conv"), grid, epilogue=ChannelAct(*constants(self.layer("norm"), accumulate_dtype(t.dtype))))


class MapBlock(OnMaps):
    """x + drop_path(gamma * mlp(norm(conv(x))))."""

    def fused(self, x):
        grid = x.shape[2:]
        y = _conv(to_tokens(x), self.layer("conv"), grid).unflatten(1, grid)
        shortcut = y.permute(0, 3, 1, 2) if self.shortcut_after_dw else x
        y = self.layer("mlp")(self.layer("norm")(y))
        y = y if self.gamma is None else self.gamma * y
        return shortcut + self.layer("drop_path")(y.permute(0, 3, 1, 2))


FORMS = {
    "peg": PEG, "cpe": CPE, "crpe": CRPE, "ffn": FFN, "ffn_hf": HFFFN, "lpi": LPI, "map_cpe": MapCPE, "map_act": MapAct,
    "map_norm": MapNorm, "map_block": MapBlock,
}  # fmt: skip
