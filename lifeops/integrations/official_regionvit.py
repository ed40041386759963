"""RegionViT's checkpoints (github.com/IBM/RegionViT): the sizes of every stage, read from its tensors."""

from __future__ import annotations

from torch import nn

from lifeops.errors import CheckpointError
from lifeops.integrations.official_facts import Facts

KEY = "layers.0.block.1.attn.rel_pos"


def _stages(facts: Facts) -> tuple[list[int], list[int], list[int]]:
    """Width, blocks and heads of each; the first of its blocks is the step from the stage before."""
    stages = range(facts.count("layers."))
    shapes = [facts.shape(f"layers.{s}.block.1.attn.proj.weight", 2) for s in stages]
    depths = [facts.count(f"layers.{s}.block.") - (s > 0) for s in stages]
    return [shape[0] for shape in shapes], depths, [facts.shape(f"layers.{s}.block.1.attn.rel_pos", 2)[0] for s in stages]


def regionvit(facts: Facts) -> nn.Module:
    """What is attended to at padded corners is told by our own state dicts' metadata; others were trained with the authors' code."""
    from lifeops.models.regionvit import RegionViT

    widths, depths, heads = _stages(facts)
    entries = facts.side("rel_pos", facts.shape(KEY, 2)[1])
    region, window = facts.shape("cls_token.proj.weight", 4), (entries + 1) // 2
    if region[2] != region[3] or region[2] % window:
        raise CheckpointError(f"a region of {window} x {window} patches must be a square of whole patches, got a filter of {region[2:]}")
    return RegionViT(
        facts.given.img_size or 224, region[2] // window, region[1], facts.classes("head.weight"), widths, depths, heads, window,
        mlp_ratio=facts.shape("layers.0.block.1.mlp.fc1.weight", 2)[0] / widths[0],
        stem="1conv" if "patch_embed.proj.weight" in facts.state else "3conv", peg="layers.0.peg.weight" in facts.state,
        corner_mask=facts.tell("corner_mask", [""]) or "authors", qkv_bias="layers.0.block.1.attn.qkv.bias" in facts.state,
    )  # fmt: skip
