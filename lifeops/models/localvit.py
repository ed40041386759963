"""LocalViT on a DeiT host (arXiv 2104.05707): the authors' models by their sizes; state-dict keys are theirs."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lifeops.arguments import check_choice, under
from lifeops.models.deit import Attention, VisionTransformer
from lifeops.models.inputs import check_rates, check_sizes
from lifeops.nn.localvit import ACTS, LocalityFeedForward, LocalViTBlock


class Variant(NamedTuple):
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    act: str
    reduction: int


VARIANTS = {
    "tiny_mlp4_act3_r192": Variant(192, 4, 4.0, "hs+se", 192),  # 5,908,696 parameters with 1000 classes
    "tiny_mlp4_act3_r4": Variant(192, 4, 4.0, "hs+se", 4),  # 9,376,168
    "tiny_mlp6_act1": Variant(192, 4, 6.0, "relu6", 192),  # 7,655,080
    "small_mlp4_act3_r384": Variant(384, 8, 4.0, "hs+se", 384),  # 22,433,176
}


@under("localvit")
def localvit(
    variant: str = "tiny_mlp4_act3_r192", *, embed_dim=None, num_heads=None, mlp_ratio=None, act=None, reduction=None, qkv_bias=True,
    norm_eps=1e-6, **host,
) -> VisionTransformer:  # fmt: skip
    """LocalViT: a DeiT whose blocks end in :class:`lifeops.nn.LocalityFeedForward` instead of LayerNorm and MLP.

    Args:
        variant: one of the authors' models, "tiny_mlp4_act3_r192", "tiny_mlp4_act3_r4", "tiny_mlp6_act1", "small_mlp4_act3_r384".
        embed_dim, num_heads, mlp_ratio, act, reduction: instead of the variant's own.
        host: everything else :class:`lifeops.models.deit.VisionTransformer` takes (img_size, num_classes, dist_token, …).

    Raises ValueError for an unknown variant or sizes that do not fit.
    """
    check_choice("localvit", "variant", variant, VARIANTS)
    given = {"embed_dim": embed_dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "act": act, "reduction": reduction}
    v = VARIANTS[variant]._replace(**{k: value for k, value in given.items() if value is not None})

    check_sizes("localvit", embed_dim=v.embed_dim, num_heads=v.num_heads, reduction=v.reduction)
    check_rates("localvit", mlp_ratio=v.mlp_ratio, eps=norm_eps, qkv_bias=qkv_bias)
    check_choice("localvit", "act", v.act, ACTS)

    def block(dim, num_heads, num_prefix_tokens, drop_path):
        conv = LocalityFeedForward(dim, v.mlp_ratio, v.act, v.reduction, num_prefix_tokens=num_prefix_tokens)
        return LocalViTBlock(nn.LayerNorm(dim, eps=norm_eps), Attention(dim, num_heads, qkv_bias), conv, drop_path)

    return VisionTransformer(embed_dim=v.embed_dim, num_heads=v.num_heads, norm_eps=norm_eps, block=block, **host)
