"""Patch tokens to a feature pyramid, as heads for dense tasks read it: every map is made by one depth-wise token convolution."""

from __future__ import annotations

import torch
from torch import nn

from lifeops import geometry
from lifeops.arguments import check_factory, check_int, check_number, got
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_input, check_like
from lifeops.nn.maps import apply, to_maps, to_tokens
from lifeops.nn.plain import is_fused, strided_depthwise, transposed_depthwise
from lifeops.nn.scripting import NotScripted
from lifeops.ops.token_conv.public import token_dwconv_transpose
from lifeops.ops.token_dwconv.public import token_dwconv

NAME = "TokenPyramid"


def _conv(dim: int, patch_size: int, stride: int, dd: dict) -> nn.Module:
    """The layer from patches of ``patch_size`` pixels to places of ``stride``: every one of a filter's taps falls somewhere."""
    if stride < patch_size:
        finer = patch_size // stride
        return nn.ConvTranspose2d(dim, dim, finer, stride=finer, groups=dim, **dd)
    coarser = stride // patch_size
    kernel = max(3, 2 * coarser - 1)
    return nn.Conv2d(dim, dim, kernel, stride=coarser, padding=kernel // 2, groups=dim, **dd)


class PyramidLevel(NotScripted, nn.Module):
    """One map of the pyramid, of (B, H*W, dim) patch tokens: ``norm(mix(act(conv(proj(x)))))``."""

    def __init__(self, dim: int, out_dim: int, patch_size: int, stride: int, norm_eps: float, dd: dict):
        super().__init__()
        self.proj, self.conv, self.act = nn.Linear(dim, out_dim, **dd), _conv(out_dim, patch_size, stride, dd), nn.GELU()
        self.mix, self.norm = nn.Linear(out_dim, out_dim, **dd), nn.LayerNorm(out_dim, eps=norm_eps, **dd)

    def fused_layers(self):
        return [("conv", transposed_depthwise if isinstance(self.conv, nn.ConvTranspose2d) else strided_depthwise)]

    def _resampled(self, x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, int]]:
        """x on its new grid, and that grid."""
        conv = self.conv
        if not is_fused(self):
            maps = apply(f"{NAME}: conv", conv, to_maps(x, grid))
            return to_tokens(maps), tuple(maps.shape[2:])
        place = {"stride": conv.stride, "padding": conv.padding}
        if isinstance(conv, nn.ConvTranspose2d):
            place["output_padding"] = conv.output_padding
            y = token_dwconv_transpose(x, conv.weight, conv.bias, grid=grid, **place)
            return y, geometry.transposed_grid(grid, conv.kernel_size, **place)
        return token_dwconv(x, conv.weight, conv.bias, grid=grid, **place), geometry.conv_grid(grid, conv.kernel_size, **place)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """x (B, H*W, dim) -> (B, out_dim, H', W')."""
        t, grid = self._resampled(self.proj(x), grid)
        return to_maps(self.norm(self.mix(self.act(t))), grid)


class TokenPyramid(NotScripted, nn.Module):
    """A feature pyramid of (B, P + H*W, dim) tokens, such as heads for segmentation and detection take: maps of several strides from the
    one grid of a ViT. For each of ``strides``, s, with patches of p pixels,

        y_s = LN(V_s GELU(conv_s(W_s x + a_s)) + b_s)         of the patches x

    where conv_s is depth-wise, with a bias: for s < p transposed, kernel and stride p/s; for s = p 3 x 3; for s > p of stride r = s/p and
    kernel max(3, 2r - 1), zero padding kernel // 2. The grid of y_s is (H p/s, W p/s), rounded up for s > p: any grid, odd ones too.
    Prefix tokens are read by no map. The tokens are never rearranged; where a convolution was exchanged, hooked or wrapped it is called
    on (B, out_dim, H, W) maps (``lifeops.explain(module)`` says why).

    Args:
        dim: C of the tokens. out_dim: of every map.
        num_prefix_tokens: P >= 0.
        patch_size: p, pixels between two patches. strides: pixels between two places of each map, increasing; each divides p or is
            a multiple of it.
        grid: (H, W) for every call, or None: then ``forward`` must be given it.
        norm_eps: of the layer norms.

    Raises ValueError for strides that do not fit the patches, a grid without patches, and tokens that are not P + H*W. x and the
    weights share a dtype, or autocast chooses it.

    Our design: maps resampled from a plain ViT's last tokens are ViTDet's (arXiv 2203.16527), whose convolutions are dense; a depth-wise
    one between two dense layers is MobileNet's.

    Examples:
        >>> pyramid = lifeops.nn.TokenPyramid(192, 64, num_prefix_tokens=1)
        >>> [tuple(m.shape) for m in pyramid(torch.randn(2, 1 + 14 * 14, 192), (14, 14))]
        [(2, 64, 56, 56), (2, 64, 28, 28), (2, 64, 14, 14), (2, 64, 7, 7)]
    """

    needs_grid = True

    def __init__(
        self, dim: int, out_dim: int = 256, num_prefix_tokens: int = 0, *, patch_size: int = 16, strides: tuple[int, ...] = (4, 8, 16, 32),
        grid: tuple[int, int] | None = None, norm_eps: float = 1e-6, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dim, out_dim = check_int(NAME, "dim", dim, 1), check_int(NAME, "out_dim", out_dim, 1)
        num_prefix_tokens = check_int(NAME, "num_prefix_tokens", num_prefix_tokens, 0)
        patch_size = check_int(NAME, "patch_size", patch_size, 1)
        check_number(NAME, "norm_eps", norm_eps, "finite and not negative", lambda v: v >= 0)
        grid, dd = geometry.fixed_grid(NAME, grid, num_prefix_tokens), check_factory(NAME, device, dtype)
        self.dim, self.out_dim, self.num_prefix_tokens = dim, out_dim, num_prefix_tokens
        self.patch_size, self.strides = patch_size, _strides(strides, patch_size)
        self.levels = nn.ModuleList(PyramidLevel(dim, out_dim, patch_size, s, norm_eps, dd) for s in self.strides)
        self.grid_holder = GridHolder(grid)

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> list[torch.Tensor]:
        """x (B, P + H*W, dim), grid (H, W) -> the maps (B, out_dim, H_s, W_s), one for each of ``strides``, channels last in memory."""
        grid = check_input(NAME, x, self.dim, self.grid_holder.of(NAME, grid), self.num_prefix_tokens)
        if 0 in grid:
            raise ValueError(f"{NAME}: grid must have patches, got {grid}")
        check_like(NAME, "x", x, self.levels[0].proj)
        patches = x[:, self.num_prefix_tokens :]
        return [level(patches, grid) for level in self.levels]

    def extra_repr(self) -> str:
        return f"num_prefix_tokens={self.num_prefix_tokens}, patch_size={self.patch_size}, strides={self.strides}"


def _strides(strides, patch_size: int) -> tuple[int, ...]:
    if not isinstance(strides, (tuple, list)) or not strides:
        raise ValueError(f"{NAME}: strides must be one or more ints in a tuple or list, got {got(strides)}")
    found = tuple(check_int(NAME, "strides", s, 1) for s in strides)
    if list(found) != sorted(set(found)):
        raise ValueError(f"{NAME}: strides must increase, got {got(strides)}")
    wrong = [s for s in found if patch_size % s and s % patch_size]
    if wrong:
        raise ValueError(f"{NAME}: strides must divide patch_size {patch_size} or be multiples of it, got {wrong[0]}")
    return found
