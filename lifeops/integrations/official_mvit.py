"""MViTv2's checkpoints (github.com/facebookresearch/mvit, timm): names as timm has them, sizes read from the tensors."""

from __future__ import annotations

import itertools
from collections import OrderedDict

from torch import nn

from lifeops.errors import CheckpointError
from lifeops.integrations.official_facts import Facts

KEY, TIMM_KEY = "blocks.0.attn.norm_q.weight", "stages.0.blocks.0.attn.norm_q.weight"


def _depths(facts: Facts) -> tuple[list[int], bool]:
    """Blocks of each stage of the authors' one list, and whether channels grow in the attention of a stage's first block: else they do
    in the MLP of the last one before. ``proj`` is where they grow.
    """
    count = facts.count("blocks.")
    grows = [i for i in range(count) if f"blocks.{i}.proj.weight" in facts.state]
    if not grows:
        raise CheckpointError(f"a {facts.family} model has several stages, and no block has {'blocks.*.proj.weight'!r}")
    wider = facts.shape(f"blocks.{grows[0]}.proj.weight", 2)[0]
    in_attention = facts.shape(f"blocks.{grows[0]}.attn.qkv.weight", 2)[0] == 3 * wider
    starts = [0, *(i if in_attention else i + 1 for i in grows), count]
    return [end - start for start, end in itertools.pairwise(starts)], in_attention


def timm_keys(facts: Facts) -> OrderedDict:
    """The authors' tensors under timm's names; convolutions over a single frame (SlowFast) without that axis."""
    depths, in_attention = _depths(facts)
    places = [f"stages.{s}.blocks.{i}" for s, depth in enumerate(depths) for i in range(depth)]
    shortcut = "shortcut_proj_attn" if in_attention else "shortcut_proj_mlp"

    def renamed(name):
        first, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        if first == "blocks" and number.isdigit():
            inner = f"{shortcut}.{inner.removeprefix('proj.')}" if inner.startswith("proj.") else inner
            return f"{places[int(number)]}.{inner}"
        return name.replace("head.projection.", "head.fc.")

    state = OrderedDict((renamed(name), t[:, :, 0] if t.dim() == 5 and t.shape[2] == 1 else t) for name, t in facts.state.items())
    state._metadata = OrderedDict()
    return state


def mvit(facts: Facts) -> nn.Module:
    """Tables of relative positions tell the image size; what keys and values are pooled by is known of the authors' models alone."""
    from lifeops.models.mvit import VARIANTS, MViT

    if "pos_embed" in facts.state:
        raise CheckpointError(f"the {facts.family} checkpoint has 'pos_embed'; models with absolute positions are not known")
    dim, in_chans, *_ = facts.shape("patch_embed.proj.weight", 4)
    depths = tuple(facts.count(f"stages.{s}.blocks.") for s in range(facts.count("stages.")))
    first = "stages.0.blocks.0.attn"
    width, head_dim = facts.shape(f"{first}.qkv.weight", 2)[0] // 3, facts.shape(f"{first}.pool_q.weight", 4)[0]
    in_attention = not any(".shortcut_proj_mlp." in name for name in facts.state)
    sizes = {"embed_dim": dim, "depths": depths, "num_heads": width // head_dim, "expand_attn": in_attention}
    published = tuple(sizes.values()) in [(v.embed_dim, v.depths, v.num_heads, v.expand_attn) for v in VARIANTS.values()]
    stride_kv = facts.tell("stride_kv", [first], None if published else (4, 4))
    return MViT(
        facts.given.img_size or _image_size(facts, first), in_chans, facts.classes("head.fc.weight"), **sizes,
        mlp_ratio=facts.shape("stages.0.blocks.0.mlp.fc1.weight", 2)[0] / width, class_token="cls_token" in facts.state,
        kernel=facts.shape(f"{first}.pool_q.weight", 4)[-1], stride_kv=4 if stride_kv is None else stride_kv[0],
        residual_pooling=facts.tell("residual_pooling", [first]) is not False, rel_pos=f"{first}.rel_pos_h" in facts.state,
        residual_prefix=facts.tell("residual_prefix", [first]) is not False, qkv_bias=f"{first}.qkv.bias" in facts.state,
    )  # fmt: skip


def _image_size(facts: Facts, attention: str) -> tuple[int, int]:
    """Of the first block's tables, which know every distance of a grid of a quarter of the image."""
    if f"{attention}.rel_pos_h" not in facts.state:
        return 224, 224  # any will do: nothing depends on it
    return tuple(2 * (facts.shape(f"{attention}.rel_pos_{axis}", 2)[0] + 1) for axis in "hw")
