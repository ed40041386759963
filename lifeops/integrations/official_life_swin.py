"""LIFE's Swin V2 checkpoints (github.com/NeurAI-Lab/LIFE): sizes read from their tensors, the window from the masks of shifted blocks."""

from __future__ import annotations

from torch import nn

from lifeops.errors import CheckpointError
from lifeops.integrations.official_dw_shortcut import window_size
from lifeops.integrations.official_facts import Facts

KEY = "layers.0.blocks.0.attn.qkv.scale1.weight"


def _window(facts: Facts, depths: list[int]) -> tuple[int | None, int | None]:
    """The window and the patches per side of the checkpoint's images; (None, None) without a mask."""
    for s, depth in enumerate(depths):
        for name in (f"layers.{s}.blocks.{i}.attn_mask" for i in range(depth)):
            if name in facts.state:
                count, tokens, _ = facts.shape(name, 3)
                window = facts.side(f"the window of {name}", tokens)
                return window, window * facts.side(name, count) << s
    return None, None


def life_swinv2(facts: Facts) -> nn.Module:
    """``logit_scale`` tells the heads."""
    from lifeops.models.swin_v2 import SwinTransformerV2

    dim, in_chans, *patch = facts.shape("patch_embed.proj.weight", 4)
    stages = range(facts.count("layers."))
    depths = [facts.count(f"layers.{s}.blocks.") for s in stages]
    window, old = _window(facts, depths)
    window, img_size = facts.given.window_size if window is None else window, facts.given.img_size
    if window is None or (img_size is None and old is None):
        lacks = " and ".join(name for name, value in (("img_size", img_size), ("window_size", window)) if value is None)
        raise CheckpointError(f"cannot tell {lacks} of a {facts.family} model from tensors without attn_mask; pass it")
    img_size = (old * patch[0], old * patch[1]) if img_size is None else img_size
    sides = img_size[0] // patch[0], img_size[1] // patch[1]
    return SwinTransformerV2(
        img_size, tuple(patch), in_chans, facts.classes("head.weight", 0), dim, depths,
        [facts.shape(f"layers.{s}.blocks.0.attn.logit_scale", 3)[0] for s in stages], window_size(facts, window, old, sides, len(stages)),
        facts.shape("layers.0.blocks.0.mlp.fc1.weight", 2)[0] / dim, "layers.0.blocks.0.attn.q_bias" in facts.state, life=True,
    )  # fmt: skip
