"""CvT's checkpoints (github.com/microsoft/CvT): the sizes of every stage, read from its tensors."""

from __future__ import annotations

from torch import nn

from lifeops.errors import CheckpointError
from lifeops.integrations.official_facts import Facts

KEY = "stage0.blocks.0.attn.conv_proj_q.conv.weight"
_WINDOWS = {(7, 7): (4, 2), (3, 3): (2, 1)}  # stride and padding of the authors' embeddings, by their kernels
_HEAD_DIM = 64  # of all published models


def _window(facts: Facts, s: int) -> tuple[int, int, int]:
    """Kernel, stride and padding of a stage's embedding, by its metadata or its kernel."""
    kernel, name = facts.shape(f"stage{s}.patch_embed.proj.weight", 4)[2:], f"stage{s}.patch_embed"
    told = tuple(facts.tell(option, [name]) for option in ("stride", "padding"))
    if None in told and kernel not in _WINDOWS:
        raise CheckpointError(f"cannot tell the stride of {name}: of the authors' kernels, 7 x 7 and 3 x 3, it is known, got {kernel}")
    return kernel[0], *(_WINDOWS[kernel] if None in told else told)


def cvt(facts: Facts) -> nn.Module:
    """Heads that metadata does not tell are as wide as those of the first stage."""
    from lifeops.models.cvt import VARIANTS, CvT

    stages = range(facts.count("stage"))
    dims = tuple(facts.shape(f"stage{s}.patch_embed.proj.weight", 4)[0] for s in stages)
    published = {v.embed_dims: v for v in VARIANTS.values()}.get(dims)
    attentions = [f"stage{s}.blocks.0.attn" for s in stages]
    heads, attention = facts.stage_heads(dims, attentions, {dims[0]: dims[0] // _HEAD_DIM} if published else {}), attentions[0]
    strides = {name: facts.tell(name, [attention]) for name in ("stride_q", "stride_kv")}
    return CvT(
        facts.given.img_size or (published.img_size if published else 224), facts.shape("stage0.patch_embed.proj.weight", 4)[1],
        facts.classes("head.weight", 0), dims, [facts.count(f"stage{s}.blocks.") for s in stages], heads,
        *zip(*(_window(facts, s) for s in stages), strict=True),
        mlp_ratio=facts.shape("stage0.blocks.0.mlp.fc1.weight", 2)[0] / dims[0],
        class_token=f"stage{len(dims) - 1}.cls_token" in facts.state, qkv_bias=f"{attention}.proj_q.bias" in facts.state,
        kernel_size=facts.shape(KEY, 4)[-1], **strides,
    )  # fmt: skip
