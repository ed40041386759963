"""Attention with a local term on its values, as a module with timm's options and keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lifeops import geometry
from lifeops.arguments import check_callable, check_factory, check_flags, check_int, check_rate
from lifeops.nn.attend import DROPOUT, attend
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_heads, check_input, check_kernel_size, check_like, check_mask
from lifeops.nn.plain import depthwise, is_fused
from lifeops.nn.scripting import NotScripted


class LocalAttention(NotScripted, nn.Module):
    """timm's ``Attention`` plus a depth-wise convolution of the values over the patch grid (:func:`lifeops.local_attention`).

    ``proj(norm(softmax(q kᵀ / sqrt(d)) v + [0 for the prefix ; DW_K(v_patch)]) · gate)``. Keys are timm's (``qkv``, ``q_norm``,
    ``k_norm``, ``norm``, ``gate``, ``proj``) and ``local.weight`` (C, 1, K, K), ``local.bias`` (C,) with C = heads x width.

    Args:
        dim, num_heads: channels of the tokens, heads; dim % num_heads == 0 unless ``attn_head_dim`` is given.
        kernel_size: odd K. local_bias: bias of the convolution.
        num_prefix_tokens: P (cls, dist, registers). grid: (H, W) for every call, or None: then ``forward`` must be given it.
        attn_head_dim, dim_out, qkv_bias, qk_norm, scale_norm, proj_bias, gated, attn_drop, proj_drop, norm_layer: as timm's;
            ``norm_layer`` None is LayerNorm.
    """

    needs_grid = True

    def __init__(
        self, dim: int, num_heads: int = 8, kernel_size: int = 3, num_prefix_tokens: int = 1, *, grid: tuple[int, int] | None = None,
        attn_head_dim: int | None = None, dim_out: int | None = None, qkv_bias: bool = False, qk_norm: bool = False,
        scale_norm: bool = False, proj_bias: bool = True, gated: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | None = None, local_bias: bool = True, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        name = "LocalAttention"
        attn_head_dim, dim_out = (check_int(name, n, v, 1, True) for n, v in (("attn_head_dim", attn_head_dim), ("dim_out", dim_out)))
        sizes = (check_int(name, n, v, 1) for n, v in (("dim", dim), ("num_heads", num_heads)))
        dim, num_heads = check_heads(name, dim, num_heads) if attn_head_dim is None else sizes
        kernel_size, num_prefix_tokens = check_kernel_size(name, kernel_size), check_int(name, "num_prefix_tokens", num_prefix_tokens, 0)
        grid = geometry.fixed_grid(name, grid, num_prefix_tokens)
        flags = {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "scale_norm": scale_norm, "proj_bias": proj_bias, "gated": gated}
        check_flags(name, **flags, local_bias=local_bias)
        check_rate(name, "attn_drop", attn_drop), check_rate(name, "proj_drop", proj_drop, one=True)
        check_callable(name, "norm_layer", norm_layer)
        dd, norm_layer = check_factory(name, device, dtype), nn.LayerNorm if norm_layer is None else norm_layer
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        self.attn_dim, self.scale = num_heads * self.head_dim, self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.local = nn.Conv2d(
            self.attn_dim, self.attn_dim, kernel_size, padding=kernel_size // 2, groups=self.attn_dim, bias=local_bias, **dd
        )
        self.norm = norm_layer(self.attn_dim, **dd) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **dd) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim if dim_out is None else dim_out, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.grid_holder = GridHolder(grid)

    def fused_layers(self):
        return [("attn_drop", DROPOUT), ("local", depthwise)]

    def forward(
        self, x: torch.Tensor, grid: tuple[int, int] | None = None, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out). ``attn_mask``, ``is_causal`` as in F.scaled_dot_product_attention."""
        grid = check_input("LocalAttention", x, self.dim, self.grid_holder.of("LocalAttention", grid), self.num_prefix_tokens)
        check_like("LocalAttention", "x", x, self.qkv)
        check_mask("LocalAttention", attn_mask, x, self.num_heads)
        check_flags("LocalAttention", is_causal=is_causal)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        place = {"grid": grid, "num_prefix_tokens": self.num_prefix_tokens}
        y = attend(self, self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal, self.local, fused=is_fused(self), **place)
        y = self.norm(y)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_prefix_tokens={self.num_prefix_tokens}"
