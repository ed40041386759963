"""LocalViT (arXiv 2104.05707) on DeiT, PVT, TNT, T2T-ViT and Swin: the authors' models by their sizes; state-dict keys are theirs."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lifeops.arguments import check_choice, under
from lifeops.models.blocks import ConvFactory, pre_norm_block
from lifeops.models.deit import Attention, VisionTransformer
from lifeops.models.inputs import check_rates, check_sizes
from lifeops.models.pvt import PyramidVisionTransformer
from lifeops.models.swin import SwinTransformer
from lifeops.models.t2t import T2T
from lifeops.models.tnt import TNT
from lifeops.nn.localvit import ACTS, LocalityFeedForward
from lifeops.options import GateAct


class Variant(NamedTuple):
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    act: str
    reduction: int


class HostVariant(NamedTuple):
    """``build(**sizes)`` makes the host; the feed-forward's ``reduction`` is its channels divided by ``parts``."""

    build: type[nn.Module]
    parts: int
    sizes: dict


DEIT_VARIANTS = {
    "tiny_mlp4_act3_r192": Variant(192, 4, 4.0, "hs+se", 192),  # 5,908,696 parameters with 1000 classes
    "tiny_mlp4_act3_r4": Variant(192, 4, 4.0, "hs+se", 4),  # 9,376,168
    "tiny_mlp6_act1": Variant(192, 4, 6.0, "relu6", 192),  # 7,655,080
    "small_mlp4_act3_r384": Variant(384, 8, 4.0, "hs+se", 384),  # 22,433,176
}
HOST_VARIANTS = {
    "pvt_tiny": HostVariant(PyramidVisionTransformer, 1, {}),  # 13,456,152
    "tnt_t": HostVariant(TNT, 1, {}),  # 6,261,064
    "t2t_7": HostVariant(T2T, 2, {}),  # 4,385,386
    "swin_tiny": HostVariant(SwinTransformer, 4, {"every": None}),  # 29,079,010
}
VARIANTS = (*DEIT_VARIANTS, *HOST_VARIANTS)


def plain(variant: str, **host) -> nn.Module:
    """The host of a variant with LayerNorm and MLP in its blocks."""
    if variant in HOST_VARIANTS:
        build, _, sizes = HOST_VARIANTS[variant]
        return build(**{**sizes, **host})
    v = DEIT_VARIANTS[variant]
    return VisionTransformer(**{"embed_dim": v.embed_dim, "num_heads": v.num_heads, "mlp_ratio": v.mlp_ratio, **host})


@under("localvit")
def localvit(
    variant: str = "tiny_mlp4_act3_r192", *, act: GateAct | None = None, reduction: int | None = None, **host: object
) -> nn.Module:
    """LocalViT: a host whose blocks end in :class:`lifeops.nn.LocalityFeedForward` instead of LayerNorm and MLP.

    Args:
        variant: one of the authors' models. On DeiT: "tiny_mlp4_act3_r192", "tiny_mlp4_act3_r4", "tiny_mlp6_act1",
            "small_mlp4_act3_r384". "pvt_tiny": PVT, whose class token of the last stage passes the feed-forwards by; "tnt_t": TNT, in
            the blocks over patches; "t2t_7": T2T-ViT, also where it joins tokens (h-swish alone there); "swin_tiny": Swin, on the whole
            map of a stage.
        act, reduction: of the feed-forwards, instead of the variant's own.
        host: everything else :class:`lifeops.models.VisionTransformer`, ``PyramidVisionTransformer``, ``TNT``, ``T2T`` or
            ``SwinTransformer`` takes (img_size, num_classes, embed_dim, …), instead of the variant's own.

    Raises ValueError for an unknown variant or sizes that do not fit.
    """
    check_choice("localvit", "variant", variant, VARIANTS)
    check_choice("localvit", "act", "hs+se" if act is None else act, ACTS)
    check_sizes("localvit", ("reduction",), reduction=reduction)
    if variant in DEIT_VARIANTS:
        return _deit(DEIT_VARIANTS[variant], act, reduction, **host)
    build, parts, sizes = HOST_VARIANTS[variant]
    return build(**{**sizes, **host}, conv=_feed_forwards("hs+se" if act is None else act, reduction, parts))


def _feed_forwards(act: str, reduction: int | None, parts: int = 1) -> ConvFactory:
    """What makes a host's feed-forwards; where there is no ``reduction`` it is their channels divided by ``parts``."""

    def conv(dim: int, mlp_ratio: float, num_prefix_tokens: int) -> nn.Module:
        divisor = max(1, dim // parts) if reduction is None else reduction
        return LocalityFeedForward(dim, mlp_ratio, act, divisor, num_prefix_tokens=num_prefix_tokens)

    return conv


def _deit(
    v: Variant, act: str | None, reduction: int | None, embed_dim=None, num_heads=None, mlp_ratio=None, qkv_bias=True, norm_eps=1e-6, **host
) -> VisionTransformer:
    given = {"embed_dim": embed_dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "act": act, "reduction": reduction}
    v = v._replace(**{k: value for k, value in given.items() if value is not None})
    check_sizes("localvit", embed_dim=v.embed_dim, num_heads=v.num_heads)
    check_rates("localvit", mlp_ratio=v.mlp_ratio, eps=norm_eps, qkv_bias=qkv_bias)
    conv = _feed_forwards(v.act, v.reduction)

    def block(dim, num_heads, num_prefix_tokens, drop_path):
        return pre_norm_block(dim, Attention(dim, num_heads, qkv_bias), v.mlp_ratio, norm_eps, drop_path, conv, num_prefix_tokens)

    return VisionTransformer(embed_dim=v.embed_dim, num_heads=v.num_heads, norm_eps=norm_eps, block=block, **host)
