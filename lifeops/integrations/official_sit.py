"""Self-slimmed ViT's checkpoints (github.com/Sense-X/SiT): the sizes, read from their tensors."""

from __future__ import annotations

from torch import nn

from lifeops.errors import CheckpointError
from lifeops.integrations.official_facts import Facts

KEY = "tsm.0.weight.1.weight"


def _stage_blocks(facts: Facts, depth: int, dim: int) -> tuple[int, ...]:
    """By metadata, the caller, what ``rtsm`` reads behind each block, or the width and depth, where one published model has them."""
    from lifeops.models.sit import VARIANTS

    stages, kept = facts.count("tsm.") + 1, [facts.shape(f"tsm.{j}.weight.3.weight", 2)[0] for j in range(facts.count("tsm."))]
    read = [facts.state.get(f"rtsm.{i}.mlp1.fc1.weight") for i in range(depth)]
    if read[-1] is not None:
        behind = [None if t is None else t.shape[1] for t in read]
        starts = [behind.index(K) + 1 if K in behind else depth for K in kept]
        counts = tuple(b - a for a, b in zip((0, *starts), (*starts, depth), strict=True))
        return facts.tell("stage_blocks", [""]) or counts
    same = [v.stage_blocks for v in VARIANTS.values() if v.embed_dim == dim]
    published = [blocks for blocks in same if (sum(blocks), len(blocks)) == (depth, stages)]
    found = facts.tell("stage_blocks", [""], published[0] if len(published) == 1 else None)
    if found is None or sum(found) != depth or len(found) != stages:
        models = " or ".join(map(str, published))
        said = f"; of published models {models}" if models else ""
        raise CheckpointError(f"cannot tell after which blocks tokens are slimmed; pass stage_blocks=…, {stages} ints of sum {depth}{said}")
    return tuple(found)


def sit(facts: Facts) -> nn.Module:
    """What residual branches are divided by is known of published widths and of our own state dicts."""
    from lifeops.models.sit import PATCH, VARIANTS, SiT

    depth, stem = facts.count("blocks."), sum(f"patch_embed.conv{i}.weight" in facts.state for i in range(1, 7))
    dim, tokens = facts.shape("cls_token", 3)[2], facts.shape("pos_embed", 3)[1] - 1
    variants = {v.embed_dim: v for v in VARIANTS.values()}
    skip = facts.tell("skip", [""]) or (variants[dim].skip if dim in variants else None)
    if skip is None:
        raise CheckpointError(f"cannot tell what a SiT of width {dim} divides its residual branches by: it is none of the published ones")
    distill = any(name.startswith("rtsm.") for name in facts.state)
    size = facts.image_size("pos_embed", tokens, (PATCH, PATCH))
    patches = (size[0] // PATCH) * (size[1] // PATCH)
    if distill and patches != tokens:
        raise CheckpointError(f"its rtsm recovers {tokens} patch tokens: img_size must have as many, got {patches}")
    return SiT(
        size, facts.shape("patch_embed.conv1.weight", 4)[1], facts.classes("head.weight"), dim,
        facts.heads(dim, ["blocks.0.attn"], {v.embed_dim: v.num_heads for v in VARIANTS.values()}),
        _stage_blocks(facts, depth, dim), facts.shape("blocks.0.mlp.fc1.weight", 2)[0] / dim,
        num_tokens=[facts.shape(f"tsm.{j}.weight.3.weight", 2)[0] for j in range(facts.count("tsm."))],
        stem=stem, skip=skip, qkv_bias="blocks.0.attn.qkv.bias" in facts.state, distill=distill,
    )  # fmt: skip
