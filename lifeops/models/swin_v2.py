"""Swin V2 (arXiv 2111.09883), plain and with LIFE (arXiv 2305.08551) in its windows; state-dict keys are LIFE's authors', which are timm's.

A LIFE projection runs inside every window after the cyclic shift: its convolutions see zeros at a window's border, and in shifted
blocks what was wrapped around, as its authors have it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.arguments import check_choice, check_flags, under
from lifeops.models.deit import DropPath, NormedPatchEmbed, _init_linear
from lifeops.models.inputs import check_counts, check_rates, check_sizes, to_pair
from lifeops.models.swin import PatchMerging, WindowedBlock, relative_position_index
from lifeops.nn.attend import attend_tokens
from lifeops.nn.dense import linears, multiplier
from lifeops.nn.feed_forward import FeedForward
from lifeops.nn.inputs import check_heads
from lifeops.nn.life import LifeQKV
from lifeops.options import Pair

NAME = "SwinTransformerV2"
VARIANTS = {  # parameters with 100 classes, plain and with LIFE
    "tiny": {"depths": (2, 2, 6, 2)},  # 27,655,054  27,809,614
    "small": {"depths": (2, 2, 18, 2)},  # 49,036,318  49,352,158
}


def relative_coordinates(size: int) -> Tensor:
    """(1, 2 size - 1, 2 size - 1, 2): sign(t) log2(|t| + 1) / 3 of the offsets t of rows and columns, scaled to [-8, 8]; float32."""
    steps = torch.arange(1 - size, size, dtype=torch.float32) / max(1, size - 1) * 8
    steps = steps.sign() * torch.log2(steps.abs() + 1) / 3
    return torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)[None]


class CosineWindowAttention(nn.Module):
    """softmax(τ_h cos(q, k) + 16 sigmoid(cpb(offset))) v inside windows of size x size, then ``proj``.

    τ_h = exp(min(``logit_scale``_h, ln 100)); ``cpb_mlp`` gives a bias per head of the offset between two tokens on a logarithmic scale.
    ``life``: q, k and v are :class:`lifeops.nn.LifeQKV` on each window's map; ``q_bias`` and ``v_bias`` then stay without use, as in
    the authors' state dict, and are not trained.
    """

    def __init__(self, dim: int, size: int, num_heads: int, qkv_bias: bool, life: bool):
        super().__init__()
        dim, self.num_heads = check_heads(NAME, dim, num_heads)
        self.grid, self.life = (size, size), life
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.register_buffer("relative_coords_table", relative_coordinates(size), persistent=False)
        self.register_buffer("relative_position_index", relative_position_index(size), persistent=False)
        self.qkv = LifeQKV(dim, num_heads, 0) if life else nn.Linear(dim, 3 * dim, bias=False)
        for name in ("q_bias", "v_bias"):
            self.register_parameter(name, nn.Parameter(torch.zeros(dim), requires_grad=not life) if qkv_bias else None)
        self.proj = nn.Linear(dim, dim)

    def bias(self) -> Tensor:
        """(1, h, n, n), for n tokens of a window."""
        table = self.cpb_mlp(self.relative_coords_table.to(self.cpb_mlp[0].weight.dtype)).flatten(0, 2)  # FSDP2 casts no buffers
        return 16 * table.sigmoid()[self.relative_position_index].permute(2, 0, 1)[None]

    def fused_layers(self):
        return linears("proj") if self.life else linears("qkv", "proj")

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.life:
            return self.qkv(x, self.grid)
        q, k, v = multiplier(self)(x, self.qkv).chunk(3, -1)
        return (q, k, v) if self.q_bias is None else (q + self.q_bias, k, v + self.v_bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B * nW, n, C) to q, k, v (B * nW, h, n, d): the scores are q kᵀ and the bias."""
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in self._projected(x))
        return F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100)).exp(), F.normalize(k, dim=-1), v

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B * nW, n, C), mask (nW, n, n) or None."""
        q, k, v = self.heads(x)
        bias = self.bias() if mask is None else self.bias() + mask[:, None].to(k.dtype)
        return multiplier(self)(attend_tokens(q, k, v, 1.0, bias), self.proj)


class SwinV2Block(WindowedBlock):
    """Post-norm block: x + drop_path(norm1(attn(x))) in shifted windows, then x + drop_path(norm2(mlp(x)))."""

    def __init__(self, dim, resolution, num_heads, size, shift, mlp_ratio, qkv_bias, drop_path, life):
        super().__init__(resolution, size, shift, lambda size: CosineWindowAttention(dim, size, num_heads, qkv_bias, life), NAME)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp, self.drop_path = FeedForward(dim, int(dim * mlp_ratio)), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.norm1(self.windowed(x)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class SwinV2Stage(nn.Module):
    """Blocks, then patch merging if there is a next stage."""

    def __init__(self, blocks, dim: int, resolution: tuple[int, int], merge: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = PatchMerging(dim, resolution, NAME, post_norm=True) if merge else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class SwinTransformerV2(nn.Module):
    """Swin V2: images (B, in_chans, H, W) to logits (B, num_classes), read from the mean of the normalised tokens.

    Args:
        depths, num_heads: blocks and heads of each stage, of embed_dim, 2 embed_dim, … channels. window_size: one number; stages no
            larger than it have one window.
        life: whether q, k and v are LIFE's.

    ``num_classes=0`` leaves the head out: the features (B, C) come out. Raises ValueError where sizes do not fit each other.
    """

    def __init__(
        self, img_size: Pair = 256, patch_size: int = 4, in_chans: int = 3, num_classes: int = 1000, embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2), num_heads: tuple[int, ...] = (3, 6, 12, 24), window_size: int = 8, mlp_ratio: float = 4.0,
        qkv_bias: bool = True, drop_path_rate: float = 0.0, life: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(NAME, in_chans=in_chans, num_classes=num_classes, embed_dim=embed_dim, window_size=window_size)
        check_counts(NAME, depths=depths, num_heads=num_heads)
        check_rates(NAME, mlp_ratio=mlp_ratio, drop=("drop_path_rate", drop_path_rate), qkv_bias=qkv_bias)
        check_flags(NAME, life=life)
        self.num_classes, self.img_size = num_classes, to_pair(NAME, "img_size", img_size)
        self.patch_embed = NormedPatchEmbed(self.img_size, to_pair(NAME, "patch_size", patch_size), in_chans, embed_dim, NAME)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())

        def stage(s, depth, heads):
            dim, resolution = embed_dim << s, tuple(n >> s for n in self.patch_embed.grid_size)
            if dim % heads:
                raise ValueError(f"{NAME}: the width {dim} of stage {s} must be a multiple of num_heads[{s}], got {heads}")
            shifts = [window_size // 2 * (i % 2) for i in range(depth)]
            sizes = dim, resolution, heads, window_size
            blocks = [SwinV2Block(*sizes, shift, mlp_ratio, qkv_bias, next(rates), life) for shift in shifts]
            return SwinV2Stage(blocks, dim, resolution, s + 1 < len(depths))

        self.layers = nn.ModuleList(stage(s, *sizes) for s, sizes in enumerate(zip(depths, num_heads, strict=True)))
        width = embed_dim << len(depths) - 1
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.apply(_init_linear)
        for block in (block for stage in self.layers for block in stage.blocks):
            for parameter in (*block.norm1.parameters(), *block.norm2.parameters()):
                nn.init.zeros_(parameter)  # every block starts as the identity

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last stage's normalised tokens (B, H'*W', C)."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, H'*W', C) to logits (B, num_classes)."""
        return self.head(x.mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@under("life_swinv2")
def life_swinv2(variant: str = "tiny", **options: object) -> SwinTransformerV2:
    """Swin V2 with LIFE by its authors' sizes: "tiny" or "small", by default for 256 x 256 pixels in patches of 4, windows of 8 x 8.

    Args:
        variant: which. options: everything :class:`lifeops.models.SwinTransformerV2` takes (img_size, window_size, num_classes, …),
            instead of the variant's; the authors also have window_size 16, and patch_size 1 with img_size 32 or 64.

    Raises ValueError for an unknown variant or sizes that do not fit.
    """
    check_choice("life_swinv2", "variant", variant, VARIANTS)
    return SwinTransformerV2(**{**VARIANTS[variant], "life": True, **options})
