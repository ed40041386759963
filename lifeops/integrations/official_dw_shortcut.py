"""The DW shortcut's checkpoints (github.com/ZTX-100/Efficient_ViT_with_DW): the sizes of each host, read from its tensors."""

from __future__ import annotations

from torch import nn

from lifeops.errors import CheckpointError
from lifeops.integrations.official_facts import Facts

VIT_KEY, CAIT_KEY, SWIN_KEY = "transformer.convs.0.weight", "patch_transformer.convs.0.weight", "layers.0.convs.0.weight"


def _vit_sizes(facts: Facts, stack: str, num_pos_prefix: int) -> dict:
    """What ViT and CaiT share; images have three channels, as the authors'."""
    dim, pixels = facts.shape("to_patch_embedding.1.weight", 2)
    patch_size = facts.side("to_patch_embedding.1.weight", pixels // 3)
    count = facts.shape("pos_embedding", 3)[1] - num_pos_prefix
    return {
        "img_size": facts.image_size("pos_embedding", count, (patch_size, patch_size)), "patch_size": patch_size,
        "num_classes": facts.classes("mlp_head.1.weight"), "embed_dim": dim, "depth": facts.count(f"{stack}.layers."),
        "kernel_sizes": facts.shape(f"{stack}.convs.0.weight", 4)[-1],
    }  # fmt: skip


def vit(facts: Facts) -> nn.Module:
    from lifeops.models.dw_shortcut import VARIANTS
    from lifeops.models.vit_cait import ViT

    sizes = _vit_sizes(facts, "transformer", 1)
    layer = "transformer.layers.0"
    inner = facts.shape(f"{layer}.0.fn.to_qkv.weight", 2)[0] // 3
    published = {options["embed_dim"]: options["num_heads"] for host, options in VARIANTS.values() if host is ViT}
    heads = facts.heads(inner, [f"{layer}.0.fn"], published)
    mlp_ratio = facts.shape(f"{layer}.1.fn.net.0.weight", 2)[0] / sizes["embed_dim"]
    return ViT(**sizes, num_heads=heads, head_dim=inner // heads, mlp_ratio=mlp_ratio)


def cait(facts: Facts) -> nn.Module:
    """Its talking-heads matrices tell the heads."""
    from lifeops.models.vit_cait import CaiT

    sizes = _vit_sizes(facts, "patch_transformer", 0)
    layer = "patch_transformer.layers.0"
    heads = facts.shape(f"{layer}.0.fn.fn.mix_heads_pre_attn", 2)[0]
    head_dim = facts.shape(f"{layer}.0.fn.fn.to_q.weight", 2)[0] // heads
    mlp_ratio = facts.shape(f"{layer}.1.fn.fn.net.0.weight", 2)[0] / sizes["embed_dim"]
    return CaiT(**sizes, cls_depth=facts.count("cls_transformer.layers."), num_heads=heads, head_dim=head_dim, mlp_ratio=mlp_ratio)


# ------------------------------------------------------------------------------------------------ Swin


def _windows(facts: Facts, stages: int) -> list[int]:
    tables = [facts.shape(f"layers.{s}.blocks.0.attn.relative_position_bias_table", 2)[0] for s in range(stages)]
    return [(facts.side("relative_position_bias_table", rows) + 1) // 2 for rows in tables]


def _side(facts: Facts, depths: list[int], windows: list[int]) -> int | None:
    """Patches per side of the checkpoint's images, None where nothing tells.

    A shifted block's mask counts its stage's windows. A window smaller than the first stage's is its stage's whole grid.
    """
    for s, window in enumerate(windows):
        masks = [k for k in (f"layers.{s}.blocks.{i}.attn_mask" for i in range(depths[s])) if k in facts.state]
        if masks:
            return window * facts.side("attn_mask", facts.shape(masks[0], 3)[0]) << s
        if window < windows[0]:
            return window << s
    return None


def window_size(facts: Facts, window: int, old: int | None, sides: tuple[int, int], stages: int) -> int:
    """The window at another image size of ``sides`` patches: the checkpoint's, or in proportion where that does not divide a stage."""
    if facts.given.window_size is not None:
        return facts.given.window_size
    grids = [(sides[0] >> s, sides[1] >> s) for s in range(stages)]
    if old is None or all((min(grid) <= window and grid[0] == grid[1]) or not any(n % window for n in grid) for grid in grids):
        return window
    if sides[0] != sides[1] or window * sides[0] % old:
        raise CheckpointError(f"the window {window} does not divide grids of {sides[0]} x {sides[1]} patches; pass window_size=…")
    facts.notes.append(f"windows of {window * sides[0] // old} instead of {window} patches, in proportion to the image size")
    return window * sides[0] // old


def swin_sizes(facts: Facts) -> dict:
    """Of a Swin without its MLPs, whose bias tables tell heads and windows."""
    dim, in_chans, *patch = facts.shape("patch_embed.proj.weight", 4)
    stages = facts.count("layers.")
    depths = [facts.count(f"layers.{s}.blocks.") for s in range(stages)]
    windows = _windows(facts, stages)
    old, img_size = _side(facts, depths, windows), facts.given.img_size
    if img_size is None:
        if old is None:
            what = "one block per stage" if max(depths, default=1) < 2 else "tensors without attn_mask"
            raise CheckpointError(f"cannot tell the image size of a {facts.family} model from {what}; pass img_size=…")
        img_size = (old * patch[0], old * patch[1])
    block, sides = "layers.0.blocks.0", (img_size[0] // patch[0], img_size[1] // patch[1])
    return {
        "img_size": img_size, "patch_size": tuple(patch), "in_chans": in_chans, "num_classes": facts.classes("head.weight", 0),
        "embed_dim": dim, "depths": depths,
        "num_heads": [facts.shape(f"layers.{s}.blocks.0.attn.relative_position_bias_table", 2)[1] for s in range(stages)],
        "window_size": window_size(facts, windows[0], old, sides, stages), "qkv_bias": f"{block}.attn.qkv.bias" in facts.state,
    }  # fmt: skip


def swin(facts: Facts) -> nn.Module:
    from lifeops.models.swin import SwinTransformer

    sizes = swin_sizes(facts)
    mlp_ratio = facts.shape("layers.0.blocks.0.mlp.fc1.weight", 2)[0] / sizes["embed_dim"]
    return SwinTransformer(**sizes, mlp_ratio=mlp_ratio, kernel_sizes=facts.shape(SWIN_KEY, 4)[-1])
