"""EdgeViT's attention (arXiv 2205.03436) over every r-th token, spread over the grid again; state-dict keys are the authors'."""

from __future__ import annotations

import torch
from torch import nn

from lifeops import geometry, torchlib
from lifeops.arguments import check_factory, check_flags, check_int, check_rate
from lifeops.nn.attend import DROPOUT, attend
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_heads, check_input, check_like
from lifeops.nn.maps import on_patches
from lifeops.nn.plain import exactly, is_fused, subsample, transposed_depthwise
from lifeops.nn.scripting import NotScripted
from lifeops.ops.local_attention.formula import heads
from lifeops.ops.token_conv.public import token_dwconv_transpose
from lifeops.ops.token_pool.function import token_pool
from lifeops.pointwise import product
from lifeops.told import ToldInMetadata

NAME = "GlobalSparseAttention"


class GlobalSparseAttention(NotScripted, ToldInMetadata):
    """EdgeViT's attention: of every r x r patches the first attends, and is spread over them by an r x r filter of its channel.

        s = x[::r, ::r]         y = softmax(q kᵀ / sqrt(d)) v, q, k, v of [prefix ; s]
        out = proj(LN([prefix ; LocalProp(y)]))         LocalProp: a transposed depth-wise convolution, kernel and stride r, bias

    With r = 1 it is plain attention, without LocalProp and LN. Prefix tokens attend and are attended to, and pass LocalProp.

    On the fast path neither the pick nor the spreading rearranges tokens to maps. Where a layer was exchanged, hooked or wrapped, and
    under torch.func, the layers are called on (B, C, H, W) maps instead (``lifeops.explain(module)`` says why).

    Args:
        dim, num_heads: C and h, C % h == 0.
        sr_ratio: r. num_prefix_tokens: P >= 0.
        grid: (H, W) for every call, multiples of r, or None: then ``forward`` must be given it.
        qkv_bias: of the projection to q, k and v. attn_drop, proj_drop: dropout rates.

    Raises ValueError for sizes that do not fit.
    """

    needs_grid = True
    no_rollout = (
        "which attends from one token of several, and spreads what comes by learnt filters: what a token draws on is not its attention"
    )

    def __init__(
        self, dim: int, num_heads: int = 8, sr_ratio: int = 1, num_prefix_tokens: int = 0, *, grid: tuple[int, int] | None = None,
        qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dim, num_heads = check_heads(NAME, dim, num_heads)
        sr_ratio, num_prefix_tokens = check_int(NAME, "sr_ratio", sr_ratio, 1), check_int(NAME, "num_prefix_tokens", num_prefix_tokens, 0)
        check_flags(NAME, qkv_bias=qkv_bias)
        check_rate(NAME, "attn_drop", attn_drop), check_rate(NAME, "proj_drop", proj_drop, one=True)
        grid, dd = geometry.fixed_grid(NAME, grid, num_prefix_tokens), check_factory(NAME, device, dtype)
        self.dim, self.num_heads, self.sr_ratio, self.num_prefix_tokens = dim, num_heads, sr_ratio, num_prefix_tokens
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(attn_drop), nn.Linear(dim, dim, **dd), nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sampler = nn.AvgPool2d(1, sr_ratio)  # a pick: windows of one
            self.LocalProp = nn.ConvTranspose2d(dim, dim, sr_ratio, sr_ratio, groups=dim, **dd)
            self.norm = nn.LayerNorm(dim, **dd)
        self.grid_holder = GridHolder(grid)

    def fused_layers(self):
        sparse = [("sampler", subsample), ("LocalProp", transposed_depthwise)] if self.sr_ratio > 1 else []
        return [*sparse, ("qkv", exactly(nn.Linear)), ("attn_drop", DROPOUT), ("proj", exactly(nn.Linear))]

    def _picked(self, x, grid, fast):
        """(B, P + H/r * W/r, C)"""
        P, pick = self.num_prefix_tokens, self.sampler
        if fast:
            return token_pool(x, 1, mode="subsample", stride=pick.stride, grid=grid, num_prefix_tokens=P)
        return on_patches(f"{NAME}: sampler", pick, x, grid, P)

    def _spread(self, y, grid, fast):
        """Back to (B, P + H*W, C); ``grid`` is that of ``y``."""
        P, layer = self.num_prefix_tokens, self.LocalProp
        if fast:
            place = {"stride": layer.stride, "padding": layer.padding, "output_padding": layer.output_padding}
            return token_dwconv_transpose(y, layer.weight, layer.bias, grid=grid, num_prefix_tokens=P, **place)
        return on_patches(f"{NAME}: LocalProp", layer, y, grid, P)

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """x (B, P + H*W, C), grid (H, W) -> (B, P + H*W, C)."""
        r, P = self.sr_ratio, self.num_prefix_tokens
        grid = check_input(NAME, x, self.dim, self.grid_holder.of(NAME, grid), P)
        check_like(NAME, "x", x, self.qkv)
        if grid[0] % r or grid[1] % r:
            raise ValueError(f"{NAME}: grid must be a multiple of sr_ratio {r}, got {grid}")
        fused = is_fused(self)
        fast = fused and not torchlib.calls_layers()
        coarse = grid[0] // r, grid[1] // r
        s = self._picked(x, grid, fast) if r > 1 else x
        qkv = product(s, self.qkv) if fused else self.qkv(s)
        q, k, v = (heads(t, self.num_heads) for t in qkv.chunk(3, -1))
        y = attend(self, q, k, v, None, False, grid=coarse, num_prefix_tokens=P, fused=fused)
        if r > 1:
            y = self.norm(self._spread(y, coarse, fast))
        return self.proj_drop(product(y, self.proj) if fused else self.proj(y))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, sr_ratio={self.sr_ratio}, num_prefix_tokens={self.num_prefix_tokens}"
