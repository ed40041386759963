"""LIFE (Local InFormation Enhancer, arXiv 2305.08551) as modules; state-dict keys are the authors'."""

from __future__ import annotations

import torch
from torch import nn

from lifeops import geometry
from lifeops.arguments import check_choice, check_factory, check_flags, check_int, check_rate
from lifeops.nn.attend import DROPOUT, attend
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_heads, check_input, check_like, check_mask
from lifeops.nn.maps import call, on_patches, to_maps, to_tokens
from lifeops.nn.plain import depthwise, exactly, is_fused, pointwise, without_bias
from lifeops.nn.rotary import check_rope, rotate
from lifeops.nn.scripting import NotScripted
from lifeops.ops.life_qkv.function import join_scales, life_qkv
from lifeops.ops.life_qkv.project_scales import project_scales
from lifeops.ops.life_qkv.spec import AUX_KEYS, scale1_keys, scale_dims
from lifeops.options import AuxKey
from lifeops.told import ToldInMetadata


def _check_options(name: str, dim, num_heads, num_prefix_tokens, qkv_norm, aux_key, recompute):
    """(dim, num_heads, P) of both modules, checked under the name of the one that was called."""
    dim, num_heads = check_heads(name, dim, num_heads)
    if dim < 3:
        raise ValueError(f"{name}: three scales need a dim of at least 3, got {dim}")
    check_choice(name, "aux_key", aux_key, AUX_KEYS)
    if aux_key == "scale1" and dim % 3:
        raise ValueError(f"{name}: aux_key='scale1' needs a dim divisible by 3 (the authors' models), got {dim}")
    check_flags(name, qkv_norm=qkv_norm, recompute=recompute)
    return dim, num_heads, check_int(name, "num_prefix_tokens", num_prefix_tokens, 0)


class _Scale(nn.Module):
    """One deeper scale: ``depthwise.weight`` (C_in, 1, K, K) and ``pointwise.weight`` (C_out, C_in, 1, 1). Called on the composed path."""

    def __init__(self, dim_in: int, dim_out: int, kernel_size: int, **dd):
        super().__init__()
        self.depthwise = nn.Conv2d(dim_in, dim_in, kernel_size, padding=kernel_size // 2, groups=dim_in, bias=False, **dd)
        self.pointwise = nn.Conv2d(dim_in, dim_out, 1, bias=False, **dd)

    def forward(self, z: torch.Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> torch.Tensor:
        """z (B, P + H*W, C_in) -> (B, P + H*W, C_out): DW over the patches, then the product over all tokens."""
        z = on_patches("LifeQKV: depthwise", self.depthwise, z, grid, num_prefix_tokens, depthwise)
        return to_tokens(call("LifeQKV: pointwise", self.pointwise, to_maps(z, (z.shape[1], 1)), pointwise))


class LifeQKV(NotScripted, ToldInMetadata):
    """Multi-scale q, k, v of (B, N, C) tokens: see :func:`lifeops.life_qkv`.

    Args:
        dim: C, at least 3.
        num_heads: heads that will read q, k and v; they lie inside one scale each iff ``self.aligned``.
        num_prefix_tokens: P.
        qkv_norm: one LayerNorm(C), eps 1e-5, shared by q, k and v.
        aux_key: "multiscale" or "scale1" (the authors' checkpoints).
        recompute: keep less for backward, run the depth-wise steps again there.

    State dicts say ``num_heads`` and ``aux_key`` in their metadata; loading one that says others is an error.
    """

    told = "num_heads", "aux_key"

    def __init__(
        self, dim: int, num_heads: int, num_prefix_tokens: int = 1, qkv_norm: bool = False, aux_key: AuxKey = "multiscale", *,
        recompute: bool = False, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        options = num_prefix_tokens, qkv_norm, aux_key, recompute
        dim, num_heads, num_prefix_tokens = _check_options("LifeQKV", dim, num_heads, *options)
        dd = check_factory("LifeQKV", device, dtype)
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.aux_key, self.recompute = aux_key, recompute
        widths = [3 * d for d in scale_dims(dim)]
        self.scale1 = nn.Linear(dim, widths[0], **dd)
        self.scale2 = _Scale(widths[0], widths[1], 3, **dd)
        self.scale3 = _Scale(widths[1], widths[2], 5, **dd)
        self.norm = nn.LayerNorm(dim, **dd) if qkv_norm else None
        nn.init.trunc_normal_(self.scale1.weight, std=0.02)
        nn.init.zeros_(self.scale1.bias)

    @property
    def aligned(self) -> bool:
        """Every head lies inside one scale (h % 3 == 0 and C % 3 == 0), so no channels need to be joined."""
        return self.num_heads % 3 == 0 and self.dim % 3 == 0

    def fused_layers(self):
        scales, steps = ("scale2", "scale3"), (("depthwise", without_bias(depthwise)), ("pointwise", without_bias(pointwise)))
        layers = [(f"{scale}.{name}", rule) for scale in scales for name, rule in steps]
        return [("scale1", exactly(nn.Linear)), *((scale, exactly(_Scale)) for scale in scales), *layers]

    def scales(self, x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """z1, z2, z3, each (B, N, 3·d_s) holding q|k|v of its scale; before any qkv_norm."""
        if not is_fused(self):
            return self._composed(x, grid)
        s2, s3 = self.scale2, self.scale3
        weights = s2.depthwise.weight, s2.pointwise.weight, s3.depthwise.weight, s3.pointwise.weight
        return life_qkv(
            x, self.scale1.weight, self.scale1.bias, *weights, grid=grid, num_prefix_tokens=self.num_prefix_tokens,
            aux_key=self.aux_key, layout="scales", recompute=self.recompute,
        )  # fmt: skip

    def _composed(self, x, grid):
        """The scales by calling every layer."""
        P = self.num_prefix_tokens
        z1 = self.scale1(x)
        z2 = self.scale2(z1, grid, P)
        z3 = self.scale3(z2, grid, P)
        return scale1_keys(z1, z2, z3, P) if self.aux_key == "scale1" and P else (z1, z2, z3)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, P + H*W, C), grid (H, W) -> q, k, v, each (B, N, C) with channels ordered by scale."""
        grid = check_input("LifeQKV", x, self.dim, grid, self.num_prefix_tokens)
        check_like("LifeQKV", "x", x, self.scale1)
        qkv = join_scales(self.scales(x, grid))
        return qkv if self.norm is None else tuple(self.norm(t) for t in qkv)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, num_prefix_tokens={self.num_prefix_tokens}, aux_key={self.aux_key!r}"


def _per_scale(t, num_heads):
    """An attention mask, or a rope, for each third of the heads; one that is shared by all heads is shared by the scales."""
    if t is None or t.dim() < 3 or t.shape[-3] == 1:
        return (t,) * 3
    return t.split(num_heads // 3, -3)


class LifeAttention(NotScripted, nn.Module):
    """Multi-head self-attention over LIFE's multi-scale q, k, v; a drop-in for timm's ``Attention`` once it knows the grid.

    ``softmax(q kᵀ / sqrt(d)) v``, then ``proj``. Where heads lie inside one scale (h % 3 == 0), each scale is attended as a
    strided view of its own buffer and projected from there: no concatenation, no permute copy. ``rotate_half``, an attribute (False) as
    timm's, says how ``forward(…, rope=…)`` pairs the channels: see :func:`lifeops.nn.rotary.rotate`.

    Args:
        dim, num_heads: C and h, C % h == 0.
        num_prefix_tokens: P (cls, dist, registers).
        grid: (H, W) for every call, or None: then ``forward`` must be given it.
        qkv_norm, aux_key, recompute: see :class:`LifeQKV`.
        attn_drop, proj_drop: dropout rates. proj_bias: bias of the output projection.
    """

    needs_grid = True
    rotate_half = False
    by_scale = True  # False where something goes over all heads before they attend

    def __init__(
        self, dim: int, num_heads: int = 8, num_prefix_tokens: int = 1, *, grid: tuple[int, int] | None = None, qkv_norm: bool = False,
        aux_key: AuxKey = "multiscale", attn_drop: float = 0.0, proj_drop: float = 0.0, proj_bias: bool = True, recompute: bool = False,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        options = num_prefix_tokens, qkv_norm, aux_key, recompute
        dim, num_heads, num_prefix_tokens = _check_options("LifeAttention", dim, num_heads, *options)
        check_flags("LifeAttention", proj_bias=proj_bias)
        check_rate("LifeAttention", "attn_drop", attn_drop), check_rate("LifeAttention", "proj_drop", proj_drop, one=True)
        grid = geometry.fixed_grid("LifeAttention", grid, num_prefix_tokens)
        self.dim, self.num_heads, self.head_dim, self.scale = dim, num_heads, dim // num_heads, (dim // num_heads) ** -0.5
        dd = check_factory("LifeAttention", device, dtype)
        self.qkv = LifeQKV(dim, num_heads, num_prefix_tokens, qkv_norm, aux_key, recompute=recompute, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.grid_holder = GridHolder(grid)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        if proj_bias:
            nn.init.zeros_(self.proj.bias)

    @property
    def num_prefix_tokens(self) -> int:
        return self.qkv.num_prefix_tokens

    def _heads(self, t: torch.Tensor) -> torch.Tensor:
        """(B, N, n·d) -> (B, n, N, d), a view."""
        return t.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def _placed(self, q, k, rope):
        """q and k (B, n, N, d) as their positions leave them."""
        return (q, k) if rope is None else (rotate(q, rope, self.rotate_half), rotate(k, rope, self.rotate_half))

    def _attend(self, q, k, v, grid, attn_mask, is_causal, rope, fused):
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        q, k = self._placed(q, k, rope)
        place = {"grid": grid, "num_prefix_tokens": self.num_prefix_tokens}
        return attend(self, q, k, v, attn_mask, is_causal, fused=fused, **place)

    def _project(self, parts):
        """The heads' outputs, of one scale each or all together, through ``proj``."""
        return self.proj(parts[0]) if len(parts) == 1 else project_scales(parts, self.proj.weight, self.proj.bias)

    def qkv_heads(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> tuple[torch.Tensor, ...]:
        """q, k, v as (B, h, N, d): what an attention map is computed from."""
        return tuple(self._heads(t) for t in self.qkv(x, self.grid_holder.of("LifeAttention", grid)))

    def fused_layers(self):
        return [("qkv", exactly(LifeQKV)), ("attn_drop", DROPOUT), ("proj", exactly(nn.Linear))]

    def forward(
        self, x: torch.Tensor, grid: tuple[int, int] | None = None, attn_mask: torch.Tensor | None = None, is_causal: bool = False,
        rope: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """x (B, P + H*W, C) -> (B, P + H*W, C). ``attn_mask``, ``is_causal`` as in F.scaled_dot_product_attention.

        ``rope``: sines and cosines side by side as timm's, (…, H*W, 2 d), for all heads or (…, h, H*W, 2 d): LIFE's q and k of the patches
        are rotated by them; of all tokens if there are P + H*W rows.
        """
        grid = check_input("LifeAttention", x, self.dim, self.grid_holder.of("LifeAttention", grid), self.num_prefix_tokens)
        check_like("LifeAttention", "x", x, getattr(self.qkv, "scale1", None))
        if isinstance(rope, torch.Tensor) and rope.device != x.device:
            raise ValueError(f"LifeAttention: rope must be on x's device {x.device}, got {rope.device}")
        check_mask("LifeAttention", attn_mask, x, self.num_heads)
        check_flags("LifeAttention", is_causal=is_causal)
        check_rope("LifeAttention", rope, x.shape[0], self.num_heads, grid, self.head_dim, self.num_prefix_tokens)
        fused = is_fused(self)
        if fused and self.by_scale and self.qkv.aligned and self.qkv.norm is None:
            masks, ropes = (_per_scale(t, self.num_heads) for t in (attn_mask, rope))
            scales = zip(self.qkv.scales(x, grid), masks, ropes, strict=True)
            parts = [self._attend(*z.chunk(3, -1), grid, mask, is_causal, turn, fused) for z, mask, turn in scales]
            y = self._project(parts)
        else:
            y = self._project([self._attend(*self.qkv(x, grid), grid, attn_mask, is_causal, rope, fused)])
        return self.proj_drop(y)
