"""PVTv2's layers (arXiv 2106.13797): a feed-forward with a convolution in it, and an overlapping patch embedding; keys are the authors'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops import geometry, torchlib
from lifeops.arguments import check_factory, check_flags, check_int, check_rate, check_tensor
from lifeops.nn.embedded_grid import plain
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_input, check_kernel_size, check_like
from lifeops.nn.localvit import hidden_width
from lifeops.nn.maps import on_patches, to_tokens, written_down
from lifeops.nn.plain import depthwise, exactly, gelu, is_fused, is_plain
from lifeops.nn.scripting import NotScripted
from lifeops.ops.token_dwconv.act_function import ChannelAct
from lifeops.ops.token_dwconv.public import token_dwconv
from lifeops.pointwise import product
from lifeops.told import ToldInMetadata

NAME, EMBED = "ConvFeedForward", "OverlapPatchEmbed"


class DWConv(nn.Module):
    """The convolution, one module deeper, as the authors name it."""

    def __init__(self, dim: int, kernel_size: int, **dd):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.dwconv(maps)


class ConvFeedForward(NotScripted, nn.Module):
    """fc2(GELU(DW_K(fc1(x)) + b)) on (B, P + H*W, C) tokens: PVTv2's and SegFormer's feed-forward, which makes positions known.

    Prefix tokens bypass the convolution alone: theirs is fc2(GELU(fc1(x))). GELU is part of the convolution, in backward too, and the
    hidden tokens are kept once. State-dict keys are PVTv2's (``dwconv.dwconv.weight``); timm's (``dwconv.weight``) are loaded as well.

    Where a layer was exchanged, hooked or wrapped the layers are called (``lifeops.explain(module)`` says why). Differentiable once.

    Args:
        dim: C. mlp_ratio: hidden width / C. num_prefix_tokens: P >= 0. kernel_size: K, odd.
        grid: (H, W) for every call, or None: then ``forward`` must be given it.
        extra_relu: a ReLU before the convolution, as PVTv2's models with linear attention have it.
        drop: rate of the dropout behind GELU and behind fc2.

    Raises ValueError for sizes that do not fit.
    """

    needs_grid = True

    def __init__(
        self, dim: int, mlp_ratio: float = 4.0, num_prefix_tokens: int = 0, *, kernel_size: int = 3, grid: tuple[int, int] | None = None,
        extra_relu: bool = False, drop: float = 0.0, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dim, hidden = hidden_width(NAME, dim, mlp_ratio, "mlp_ratio")
        kernel_size, num_prefix_tokens = check_kernel_size(NAME, kernel_size), check_int(NAME, "num_prefix_tokens", num_prefix_tokens, 0)
        check_flags(NAME, extra_relu=extra_relu), check_rate(NAME, "drop", drop, one=True)
        grid, dd = geometry.fixed_grid(NAME, grid, num_prefix_tokens), check_factory(NAME, device, dtype)
        self.dim, self.num_prefix_tokens = dim, num_prefix_tokens
        self.fc1, self.relu = nn.Linear(dim, hidden, **dd), nn.ReLU() if extra_relu else nn.Identity()
        self.dwconv, self.act = DWConv(hidden, kernel_size, **dd), nn.GELU()
        self.fc2, self.drop = nn.Linear(hidden, dim, **dd), nn.Dropout(drop)
        self.grid_holder = GridHolder(grid)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("weight", "bias"):
            if f"{prefix}dwconv.{name}" in state_dict:  # timm's
                state_dict[f"{prefix}dwconv.dwconv.{name}"] = state_dict.pop(f"{prefix}dwconv.{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fused_layers(self):
        linear, conv = exactly(nn.Linear), [("dwconv", exactly(DWConv)), ("dwconv.dwconv", depthwise)]
        return [("fc1", linear), ("relu", exactly(nn.ReLU, nn.Identity)), *conv, ("act", gelu), ("fc2", linear)]

    def _activated(self, h: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """GELU of the convolved patches, behind that of the prefix tokens, if there are any."""
        P, conv = self.num_prefix_tokens, self.dwconv.dwconv
        before = ChannelAct(act="relu") if isinstance(self.relu, nn.ReLU) else None
        place = {"grid": grid, "num_prefix_tokens": P, "prefix": "drop"}
        patches = token_dwconv(h, conv.weight, conv.bias, prologue=before, epilogue=ChannelAct(act="gelu"), **place)
        return [self.act(self.relu(h[:, :P])), patches] if P else [patches]

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """x (B, P + H*W, C), grid (H, W) -> (B, P + H*W, C)."""
        P = self.num_prefix_tokens
        grid = check_input(NAME, x, self.dim, self.grid_holder.of(NAME, grid), P)
        check_like(NAME, "x", x, self.fc1)
        if not is_fused(self):
            h = on_patches(f"{NAME}: dwconv", self.dwconv, self.relu(self.fc1(x)), grid, P, depthwise)
            return self.drop(self.fc2(self.drop(self.act(h))))
        parts = [product(self.drop(t), self.fc2) for t in self._activated(product(x, self.fc1), grid)]
        return self.drop(torch.cat(parts, 1) if P else parts[0])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_prefix_tokens={self.num_prefix_tokens}"


class OverlapPatchEmbed(ToldInMetadata):
    """LN(conv(maps)) as tokens: images, or a coarser stage's maps, to (B, H'*W', C) and their grid (H', W').

    A dense convolution with a kernel larger than its stride, so that patches overlap: PVTv2's, SegFormer's and CvT's. It reads maps
    channels last, as those that are views of tokens are: its result is then the tokens in order, and the norm copies nothing.

    Args:
        in_chans, embed_dim: channels in and out. patch_size, stride: of the convolution. padding: None is ``patch_size // 2``.

    Raises ValueError for maps of other channels, and where none are left. State-dict keys are PVTv2's, ``proj`` and ``norm``.
    """

    told = "stride", "padding"

    def __init__(
        self, in_chans: int = 3, embed_dim: int = 64, patch_size: int = 7, stride: int = 4, padding: int | None = None, *,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"in_chans": in_chans, "embed_dim": embed_dim, "patch_size": patch_size, "stride": stride}
        in_chans, embed_dim, patch_size, stride = (check_int(EMBED, name, n, 1) for name, n in sizes.items())
        padding, dd = check_int(EMBED, "padding", padding, 0, optional=True), check_factory(EMBED, device, dtype)
        self.in_chans, self.patch_size, self.stride = in_chans, patch_size, stride
        self.padding = patch_size // 2 if padding is None else padding
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride, self.padding, **dd)
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def _convolved(self, maps: Tensor) -> Tensor:
        """``proj(maps)``. Torch's bfloat16 weight gradient on CPU (2.13) is not written where a tap sees padding alone, as on maps that are
        smaller than kernel and stride: computed in float32 there. findings/bf16_depthwise_weight_gradient.sh
        """
        conv, dtype = self.proj, torchlib.autocast_dtype(maps) or maps.dtype
        small = dtype == torch.bfloat16 and maps.device.type == "cpu" and not torchlib.captured()
        if not small or min(maps.shape[2:]) >= self.patch_size + self.stride or not is_plain(conv, exactly(nn.Conv2d)):
            return conv(maps)
        with torch.autocast("cpu", enabled=False):
            weight, bias = conv.weight.float(), None if conv.bias is None else conv.bias.float()
            return F.conv2d(maps.float(), weight, bias, conv.stride, conv.padding).to(dtype)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """maps (B, in_chans, H, W) -> the tokens (B, H'*W', C) and their grid."""
        check_tensor(EMBED, "maps", maps)
        if maps.dim() != 4 or maps.shape[1] != self.in_chans:
            raise ValueError(f"{EMBED}: maps must be (B, {self.in_chans}, H, W), got {tuple(maps.shape)}")
        check_like(EMBED, "maps", maps, self.proj)
        geometry.filtered_grid(EMBED, *maps.shape[2:], *((n, n) for n in (self.patch_size, self.stride, self.padding)))
        maps = self._convolved(written_down(maps) if torchlib.captured() else maps.contiguous(memory_format=torch.channels_last))
        return self.norm(to_tokens(maps)), plain(maps.shape[2:])
