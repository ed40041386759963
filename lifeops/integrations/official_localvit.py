"""LocalViT's checkpoints (github.com/ofsoundof/LocalViT) on PVT, TNT, T2T-ViT and Swin: the sizes of each host, read from its tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lifeops.errors import CheckpointError
from lifeops.integrations.official_dw_shortcut import swin_sizes
from lifeops.integrations.official_facts import Facts

PVT_KEY, TNT_KEY = "block1.0.conv.conv.0.weight", "blocks.0.norm_in.weight"
T2T_KEY, SWIN_KEY = "tokens_to_token.attention1.conv.conv.0.weight", "layers.0.blocks.0.conv.conv.0.weight"
_PIXEL_HEADS = {12: 3, 24: 4}  # of TNT's published models, by the pixels' channels


def activation(facts: Facts, block: str) -> str:
    """Of SE there is one activation among the authors' models, of ECA and of none there are two."""
    if f"{block}.conv.conv.6.fc.0.weight" in facts.state:
        return facts.tell("act", [f"{block}.conv"]) or "hs+se"
    eca = f"{block}.conv.conv.6.conv.weight" in facts.state
    return facts.tell("act", [f"{block}.conv"], "hs+eca" if eca else "relu6")


def feed_forward(facts: Facts, block: str) -> tuple[int, float, int]:
    """Channels, expansion and the squeeze's reduction (1 without one) of a block's feed-forward."""
    hidden, dim = facts.shape(f"{block}.conv.conv.0.weight", 4)[:2]
    squeeze = f"{block}.conv.conv.6.fc.0.weight"
    return dim, hidden / dim, hidden // facts.shape(squeeze, 2)[0] if squeeze in facts.state else 1


def _feed_forwards(facts: Facts, blocks: Sequence[str]):
    """What makes those of a host, by one block of every width."""
    from lifeops.nn.localvit import LocalityFeedForward

    act, reductions = activation(facts, blocks[0]), {}
    for block in blocks:
        dim, _, reductions[dim] = feed_forward(facts, block)

    def conv(dim: int, mlp_ratio: float, num_prefix_tokens: int) -> nn.Module:
        return LocalityFeedForward(dim, mlp_ratio, act, reductions[dim], num_prefix_tokens=num_prefix_tokens)

    return conv


def pvt(facts: Facts) -> nn.Module:
    """Heads that metadata does not tell are as wide as those of the first stage."""
    from lifeops.models.pvt import PyramidVisionTransformer

    blocks = [f"block{s + 1}.0" for s in range(facts.count("block"))]
    dims, ratios, _ = zip(*(feed_forward(facts, block) for block in blocks), strict=True)
    reduced = [f"{block}.attn.sr.weight" for block in blocks]
    _, in_chans, *patch = facts.shape("patch_embed1.proj.weight", 4)
    patches = facts.shape("pos_embed1", 3)[1]
    return PyramidVisionTransformer(
        facts.image_size("pos_embed1", patches, tuple(patch)), tuple(patch), in_chans, facts.classes("head.weight", 0), dims,
        [facts.count(f"block{s + 1}.") for s in range(len(blocks))],
        facts.stage_heads(dims, [f"{block}.attn" for block in blocks], {64: 1} if dims == (64, 128, 320, 512) else {}), ratios,
        [facts.shape(name, 4)[-1] if name in facts.state else 1 for name in reduced],
        qkv_bias=f"{blocks[0]}.attn.q.bias" in facts.state, conv=_feed_forwards(facts, blocks),
    )  # fmt: skip


def _pixel_heads(facts: Facts, in_dim: int) -> int:
    """The caller's ``num_heads`` is the patches'."""
    told = getattr(facts.state, "_metadata", {}).get("blocks.0.attn_in", {}).get("num_heads")
    heads = _PIXEL_HEADS.get(in_dim) if told is None else told
    if heads is None:
        raise CheckpointError(f"cannot tell the heads of pixels of {in_dim} channels: metadata has none, and no published model is so wide")
    if told is None:
        facts.notes.append(f"took {heads} heads for the pixels, as the authors' models of {in_dim} channels have")
    return heads


def tnt(facts: Facts) -> nn.Module:
    from lifeops.models.tnt import TNT

    in_dim, in_chans = facts.shape("pixel_embed.proj.weight", 4)[:2]
    patch_size = 4 * facts.shape("pixel_pos", 4)[-1]
    dim, mlp_ratio, _ = feed_forward(facts, "blocks.0")
    patches = facts.shape("patch_pos", 3)[1] - 1
    return TNT(
        facts.image_size("patch_pos", patches, (patch_size, patch_size)), patch_size, in_chans, facts.classes("head.weight", 0),
        dim, in_dim, facts.count("blocks."), facts.heads(dim, ["blocks.0.attn_out"], {192: 3, 384: 6}), _pixel_heads(facts, in_dim),
        mlp_ratio, "blocks.0.attn_out.qk.bias" in facts.state, conv=_feed_forwards(facts, ["blocks.0"]),
    )  # fmt: skip


def t2t(facts: Facts) -> nn.Module:
    from lifeops.models.t2t import T2T

    dim, mlp_ratio, _ = feed_forward(facts, "blocks.0")
    token_dim, patches = facts.shape("tokens_to_token.attention1.proj.weight", 2)[0], facts.shape("pos_embed", 3)[1] - 1
    return T2T(
        facts.image_size("pos_embed", patches, (16, 16)), facts.shape("tokens_to_token.attention1.kqv.weight", 2)[1] // 49,
        facts.classes("head.weight", 0), dim, facts.count("blocks."), facts.heads(dim, ["blocks.0.attn"], {256: 4}), mlp_ratio, token_dim,
        "blocks.0.attn.qkv.bias" in facts.state, conv=_feed_forwards(facts, ["blocks.0"]),
    )  # fmt: skip


def swin(facts: Facts) -> nn.Module:
    """Its bias tables tell heads and windows."""
    from lifeops.models.swin import SwinTransformer

    blocks = [f"layers.{s}.blocks.0" for s in range(facts.count("layers."))]
    mlp_ratio = feed_forward(facts, blocks[0])[1]
    return SwinTransformer(**swin_sizes(facts), mlp_ratio=mlp_ratio, every=None, conv=_feed_forwards(facts, blocks))
