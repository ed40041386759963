"""EdgeViT's checkpoints (github.com/saic-fi/edgevit): the sizes of every stage, read from its tensors."""

from __future__ import annotations

from torch import nn

from lifeops.integrations.official_facts import Facts

KEY = "blocks1.0.SelfAttn.pos_embed.weight"


def edgevit(facts: Facts) -> nn.Module:
    """Heads that metadata does not tell are as wide as those of the first stage, and those all there is to know of published models."""
    from lifeops.models.edgevit import VARIANTS, EdgeViT

    stages = range(1, facts.count("blocks") + 1)
    dims = tuple(facts.shape(f"patch_embed{s}.proj.weight", 4)[0] for s in stages)
    attentions = [f"blocks{s}.0.SelfAttn.attn" for s in stages]
    published = {v.embed_dims: v.num_heads[0] for v in VARIANTS.values()}.get(dims)
    heads = facts.stage_heads(dims, attentions, {} if published is None else {dims[0]: published})
    spread = [f"{attention}.LocalProp.weight" for attention in attentions]
    return EdgeViT(
        facts.given.img_size or 224, facts.shape("patch_embed1.proj.weight", 4)[1], facts.classes("head.weight", 0), dims,
        [facts.count(f"blocks{s}.") for s in stages], heads,
        [facts.shape(name, 4)[-1] if name in facts.state else 1 for name in spread],
        [facts.shape(f"patch_embed{s}.proj.weight", 4)[-1] for s in stages],
        mlp_ratio=facts.shape("blocks1.0.SelfAttn.mlp.fc1.weight", 2)[0] / dims[0], qkv_bias=f"{attentions[0]}.qkv.bias" in facts.state,
    )  # fmt: skip
