"""The DW shortcut's checkpoints (github.com/ZTX-100/Efficient_ViT_with_DW): the sizes of each host, read from its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

State = Mapping[str, torch.Tensor]
VIT_KEY, CAIT_KEY, SWIN_KEY = "transformer.convs.0.weight", "patch_transformer.convs.0.weight", "layers.0.convs.0.weight"


def _need(family: str, state: State, name: str) -> torch.Tensor:
    if name not in state:
        raise ValueError(f"load_official: the {family} checkpoint has no {name!r}")
    return state[name]


def _side(family: str, name: str, count: int) -> int:
    """The side of a square of ``count``."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"load_official: the {family} models are square, got {name} for {count}")
    return side


def _count(state: State, prefix: str) -> int:
    """How many modules are listed under ``prefix``."""
    return 1 + max((int(k[len(prefix) :].split(".")[0]) for k in state if k.startswith(prefix)), default=-1)


def _vit_sizes(family: str, state: State, stack: str, num_pos_prefix: int) -> dict:
    """What ViT and CaiT share; images have three channels, as the authors'."""
    patch = _need(family, state, "to_patch_embedding.1.weight")
    dim = patch.shape[0]
    side = _side(family, "pos_embedding", _need(family, state, "pos_embedding").shape[1] - num_pos_prefix)
    patch_size = _side(family, "to_patch_embedding.1.weight", patch.shape[1] // 3)
    return {
        "img_size": side * patch_size, "patch_size": patch_size, "num_classes": _need(family, state, "mlp_head.1.weight").shape[0],
        "embed_dim": dim, "depth": _count(state, f"{stack}.layers."), "kernel_sizes": state[f"{stack}.convs.0.weight"].shape[-1],
    }  # fmt: skip


def vit(state: State, num_heads: int | None) -> nn.Module:
    from lifeops.models.vit_cait import ViT

    family = "DW shortcut ViT"
    sizes = _vit_sizes(family, state, "transformer", 1)
    layer = "transformer.layers.0"
    inner = _need(family, state, f"{layer}.0.fn.to_qkv.weight").shape[0] // 3
    heads = num_heads or inner // 64
    if heads < 1 or inner % heads:
        raise ValueError(f"load_official: cannot tell the heads of a model of width {inner}; pass num_heads=…")
    mlp_ratio = _need(family, state, f"{layer}.1.fn.net.0.weight").shape[0] / sizes["embed_dim"]
    return ViT(**sizes, num_heads=heads, head_dim=inner // heads, mlp_ratio=mlp_ratio)


def cait(state: State, num_heads: int | None) -> nn.Module:
    """Its talking-heads matrices tell the heads."""
    from lifeops.models.vit_cait import CaiT

    family = "DW shortcut CaiT"
    sizes = _vit_sizes(family, state, "patch_transformer", 0)
    layer = "patch_transformer.layers.0"
    heads = _need(family, state, f"{layer}.0.fn.fn.mix_heads_pre_attn").shape[0]
    head_dim = _need(family, state, f"{layer}.0.fn.fn.to_q.weight").shape[0] // heads
    mlp_ratio = _need(family, state, f"{layer}.1.fn.fn.net.0.weight").shape[0] / sizes["embed_dim"]
    cls_depth = _count(state, "cls_transformer.layers.")
    return CaiT(**sizes, cls_depth=cls_depth, num_heads=heads, head_dim=head_dim, mlp_ratio=mlp_ratio)


def _swin_side(family: str, state: State, stage: int, depth: int, window: int) -> int:
    """Tokens per side of a stage: from its shifted blocks' masks, which only stages of several windows have."""
    if depth < 2:
        raise ValueError(f"load_official: cannot tell the image size of a {family} model from one block per stage")
    mask = state.get(f"layers.{stage}.blocks.1.attn_mask")
    return window if mask is None else window * _side(family, "attn_mask", mask.shape[0])


def swin(state: State, num_heads: int | None) -> nn.Module:
    """Its bias tables tell heads and windows."""
    from lifeops.models.swin import SwinTransformer

    family = "DW shortcut Swin"
    patch = _need(family, state, "patch_embed.proj.weight")
    depths = [_count(state, f"layers.{s}.blocks.") for s in range(_count(state, "layers."))]
    tables = [_need(family, state, f"layers.{s}.blocks.0.attn.relative_position_bias_table") for s in range(len(depths))]
    windows = [(_side(family, "relative_position_bias_table", len(table)) + 1) // 2 for table in tables]
    stage = next((s for s, depth in enumerate(depths) if depth > 1), 0)
    side = _swin_side(family, state, stage, depths[stage], windows[stage]) * 2**stage
    block = "layers.0.blocks.0"
    return SwinTransformer(
        img_size=(side * patch.shape[2], side * patch.shape[3]), patch_size=tuple(patch.shape[2:]), in_chans=patch.shape[1],
        num_classes=_need(family, state, "head.weight").shape[0], embed_dim=patch.shape[0], depths=depths,
        num_heads=[table.shape[1] for table in tables], window_size=windows[0],
        mlp_ratio=_need(family, state, f"{block}.mlp.fc1.weight").shape[0] / patch.shape[0],
        qkv_bias=f"{block}.attn.qkv.bias" in state, kernel_sizes=state[SWIN_KEY].shape[-1],
    )  # fmt: skip
