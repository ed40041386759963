"""Where the class token looks: attention of a trained demo model's last block, computed explicitly from its q and k."""

from __future__ import annotations

import torch
from torch import Tensor

from lifeops.models.deit import Attention, VisionTransformer


@torch.no_grad()
def cls_attention(model: VisionTransformer, x: Tensor) -> Tensor:
    """Images (B, 1, H, W) to the class token's attention over the patches (B, H/p, W/p), mean over heads."""
    block, seen = model.blocks[-1], []
    attn = getattr(block, "blocks", [block])[-1].attn  # a shortcut's block lies inside
    handle = attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model.eval()(x)
    finally:
        handle.remove()
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    q, k = _queries_keys(attn, seen[0], grid)
    weights = (q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (B, h, 1, N): the class token's row
    return weights[:, :, 0, prefix:].mean(dim=1).unflatten(1, grid)


def _queries_keys(attn, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """q and k as (B, h, N, d), from plain or LIFE attention."""
    q, k = attn.qkv(tokens).chunk(3, dim=-1)[:2] if isinstance(attn, Attention) else attn.qkv(tokens, grid)[:2]
    return tuple(t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k))
