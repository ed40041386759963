"""T2T-ViT (arXiv 2101.11986): tokens joined twice with their neighbours before a ViT; state-dict keys are the authors'."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops import geometry, torchlib
from lifeops.arguments import check_callable, check_choice, under
from lifeops.models.blocks import ConvFactory, TokenAttention, pre_norm_block
from lifeops.models.deit import AttentionFactory, DropPath, _init_linear
from lifeops.models.inputs import check_images, check_rates, check_sizes, to_pair
from lifeops.nn.dense import linears, multiplier
from lifeops.nn.inputs import check_heads
from lifeops.nn.life import LifeAttention
from lifeops.nn.localvit import LocalityFeedForward
from lifeops.nn.maps import to_maps
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.options import Pair

NAME = "T2T"
_SPLITS = (7, 4, 2), (3, 2, 1), (3, 2, 1)  # kernel, stride and padding of the three unfoldings
_EPS = 1e-8  # added to the sums that the performer divides by


VARIANTS = {  # parameters with 100 classes, plain; 54,528 of them are not trained
    "7": {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0},  # 4,078,922
    "12": {"embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2.0},  # 6,710,602
}


class TokenPerformer(nn.Module):
    """v + proj(performer(k, q, v)) of normalised tokens (B, N, dim), then a feed-forward: (B, N, emb).

        phi(t) = exp(w t - |t|²/2) / sqrt(m)      y_i = phi(q_i) (sum_j phi(k_j) v_jᵀ) / (phi(q_i) sum_j phi(k_j) + 1e-8)

    One head, with m = emb / 2 random features ``w`` that are no trained parameter; features are float32 where tokens are less. ``local``:
    the feed-forward is LocalViT's with h-swish, as wide as its tokens, and ``norm2`` stays without use, as in the authors' state dict.
    """

    no_rollout = "which lets every token draw on all before the blocks do, by products of features: no matrix between tokens is made"

    def __init__(self, dim: int, emb: int, local: bool, proj_drop: float):
        super().__init__()
        self.emb, m = emb, emb // 2
        self.kqv, self.proj, self.drop = nn.Linear(dim, 3 * emb), nn.Linear(emb, emb), nn.Dropout(proj_drop)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(emb).requires_grad_(not local)
        self.conv = LocalityFeedForward(emb, 1.0, "hs", num_prefix_tokens=0) if local else None
        self.mlp = None if local else nn.Sequential(nn.Linear(emb, emb), nn.GELU(), nn.Linear(emb, emb), nn.Dropout(proj_drop))
        self.w = nn.Parameter(nn.init.orthogonal_(torch.empty(m, emb)) * math.sqrt(m), requires_grad=False)

    def fused_layers(self):
        return linears("kqv", "proj")

    def _features(self, t: Tensor) -> Tensor:
        w = self.w.to(t.dtype)
        return torch.exp(t @ w.T - t.square().sum(-1, keepdim=True) / 2) / math.sqrt(w.shape[0])

    def _performer(self, k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        wide = accumulate_dtype(v.dtype)
        with torchlib.without_autocast(v):
            k, q, values = self._features(k.to(wide)), self._features(q.to(wide)), v.to(wide)
            total = q @ k.sum(1).unsqueeze(-1)
            return (q @ (k.transpose(1, 2) @ values) / (total + _EPS)).to(v.dtype)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        multiply = multiplier(self)
        k, q, v = multiply(self.norm1(x), self.kqv).chunk(3, -1)
        x = v + self.drop(multiply(self._performer(k, q, v), self.proj))
        return x + self.mlp(self.norm2(x)) if self.conv is None else self.conv(x, grid)


class TokensToToken(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, H'*W', C): windows of 7 x 7 with stride 4, then twice of 3 x 3 with stride 2 are joined
    to tokens, with a :class:`TokenPerformer` between.
    """

    def __init__(self, img_size: tuple[int, int], in_chans: int, embed_dim: int, token_dim: int, local: bool, proj_drop: float):
        super().__init__()
        self.img_size, self.in_chans, grids = img_size, in_chans, [img_size]
        for window in _SPLITS:
            grids.append(geometry.filtered_grid(NAME, *grids[-1], *((n, n) for n in window)))
        *self.grids, self.grid_size = grids[1:]
        self.attention1 = TokenPerformer(in_chans * 7 * 7, token_dim, local, proj_drop)
        self.attention2 = TokenPerformer(token_dim * 3 * 3, token_dim, local, proj_drop)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        check_images(NAME, x, self.in_chans, self.img_size, self.project)
        for (kernel, stride, padding), layer, grid in zip(_SPLITS, (self.attention1, self.attention2), self.grids, strict=False):
            x = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)
            x = to_maps(layer(x, grid), grid)
        kernel, stride, padding = _SPLITS[-1]
        return self.project(F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2))


def sinusoids(count: int, dim: int) -> Tensor:
    """(1, count, dim): sin(n / 10000^(2i/dim)) in channel 2i, cos of the same in 2i + 1, of position n; float32 of float64."""
    channel = torch.arange(dim, dtype=torch.float64) // 2 * 2 / dim
    angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000**channel
    return torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos()).float()[None]


class T2T(nn.Module):
    """T2T-ViT: images (B, in_chans, H, W) to logits (B, num_classes), read from the class token.

    Args:
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: of the blocks behind the tokens' joining; token_dim: of the tokens inside it,
            and token_drop the dropout behind their projections and MLPs (0.1 as the authors').
        attn: called as ``attn(dim, num_heads, 1)`` once per block, gives its attention; None: a plain one.
        conv: called as ``conv(dim, mlp_ratio, 1)`` once per block, gives what stands in the place of the second LayerNorm and the
            MLP (:class:`lifeops.nn.LocalityFeedForward`); the tokens' feed-forwards are then LocalViT's, too. None: they themselves.

    The position embedding is a fixed table of sines. ``num_classes=0`` leaves the head out: the features (B, C) come out. Raises
    ValueError where sizes do not fit each other.
    """

    def __init__(
        self, img_size: Pair = 224, in_chans: int = 3, num_classes: int = 1000, embed_dim: int = 256, depth: int = 7, num_heads: int = 4,
        mlp_ratio: float = 2.0, token_dim: int = 64, qkv_bias: bool = False, norm_eps: float = 1e-5, token_drop: float = 0.1,
        drop_path_rate: float = 0.0, attn: AttentionFactory | None = None, conv: ConvFactory | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(NAME, in_chans=in_chans, num_classes=num_classes, embed_dim=embed_dim, depth=depth, token_dim=token_dim)
        check_heads(NAME, embed_dim, num_heads)
        check_rates(NAME, mlp_ratio=mlp_ratio, drop=("drop_path_rate", drop_path_rate), eps=norm_eps, qkv_bias=qkv_bias)
        check_rates(NAME, mlp_ratio=mlp_ratio, drop=("token_drop", token_drop))
        check_callable(NAME, "attn", attn), check_callable(NAME, "conv", conv)
        self.num_classes, self.img_size, self.num_prefix_tokens = num_classes, to_pair(NAME, "img_size", img_size), 1
        self.tokens_to_token = TokensToToken(self.img_size, in_chans, embed_dim, token_dim, conv is not None, token_drop)
        H, W = self.grid_size = self.tokens_to_token.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sinusoids(1 + H * W, embed_dim), requires_grad=False)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()

        def block(rate):
            attention = TokenAttention(embed_dim, num_heads, qkv_bias) if attn is None else attn(embed_dim, num_heads, 1)
            return pre_norm_block(embed_dim, attention, mlp_ratio, norm_eps, DropPath(rate), conv, 1)

        self.blocks = nn.ModuleList(map(block, rates))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(_init_linear)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    @property
    def patch_embed(self) -> TokensToToken:
        """What reads the images."""
        return self.tokens_to_token

    def position_grids(self) -> dict[str, tuple[int, int]]:
        """The grid that each position embedding is of."""
        return {"pos_embed": self.grid_size}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to normalised tokens (B, 1 + H*W, C)."""
        x = self.tokens_to_token(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x), 1) + self.pos_embed
        for block in self.blocks:
            x = block(x, self.grid_size)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + H*W, C) to logits (B, num_classes)."""
        return self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@under("life_t2t")
def life_t2t(variant: str = "12", **options: object) -> T2T:
    """T2T-ViT with LIFE (arXiv 2305.08551): :class:`lifeops.nn.LifeAttention` in every block behind the tokens' joining.

    Our reading: the paper has a T2T-ViT-12 with LIFE (6.59 M parameters, 1.71 GMACs), its authors' repository has no code of it. Tokens
    are joined as in the plain model; the 256 channels, no multiple of 3, are shared by the scales as 86, 85 and 85 (6.77 M trained
    parameters; ``embed_dim=252`` is near the paper's).

    Args:
        variant: "7" or "12", the depth. options: everything :class:`lifeops.models.T2T` takes (img_size, num_classes, …), instead of the
            variant's.

    Raises ValueError for an unknown variant or sizes that do not fit.
    """
    check_choice("life_t2t", "variant", variant, VARIANTS)
    return T2T(**{**VARIANTS[variant], "attn": LifeAttention, **options})
