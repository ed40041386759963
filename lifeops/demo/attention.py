"""Where the class token, those of regions or windows look: attention of a trained demo model, computed explicitly from its q and k."""

from __future__ import annotations

import torch
from torch import Tensor

from lifeops.geometry import conv_grid
from lifeops.models.deit import Attention, VisionTransformer
from lifeops.models.regionvit import RegionViT, from_windows
from lifeops.models.swin import from_windows as windows_on_map
from lifeops.models.swin_v2 import SwinTransformerV2
from lifeops.nn import ConvProjectionAttention, GlobalSparseAttention, PoolingAttention
from lifeops.ops.token_pool.function import token_pool


@torch.no_grad()
def region_attention(model: RegionViT, x: Tensor) -> Tensor:
    """Images (B, 1, H, W) to the attention of every region's token over its patches (B, H/p, W/p), mean over heads, in the first
    stage's last block: RegionViT has no class token.
    """
    stage, seen = model.layers[0], []
    attn = stage.block[-1].attn
    handle = attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model.eval()(x)
    finally:
        handle.remove()
    regions, grid = (tuple(m(x).shape[2:]) for m in (model.cls_token, model.patch_embed))
    q, k = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in attn.qkv(seen[-1]).chunk(3, -1)[:2])
    weights = (q[:, :, :1] @ k.transpose(-2, -1) * attn.scale + attn.bias()[:, :1]).softmax(-1).mean(1)  # (B * regions, 1, 1 + w * w)
    return from_windows(weights.transpose(1, 2), regions, grid, stage.window_size)[1][..., 0].unflatten(1, grid)


@torch.no_grad()
def window_attention(model: SwinTransformerV2, x: Tensor) -> Tensor:
    """Images (B, 1, H, W) to what a patch gets of the attention in its window (B, H/p, W/p), mean over heads and tokens, in the first
    block: Swin V2 has no class token.
    """
    block, seen = model.layers[0].blocks[0], []
    handle = block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model.eval()(x)
    finally:
        handle.remove()
    q, k, _ = block.attn.heads(seen[0])
    weights = (q @ k.transpose(-2, -1) + block.attn.bias()).softmax(-1).mean((1, 2))  # (B * windows, tokens)
    return windows_on_map(weights[..., None], block.size, *block.resolution)[..., 0]


@torch.no_grad()
def cls_attention(model: VisionTransformer, x: Tensor) -> Tensor:
    """Images (B, 1, H, W) to the class token's attention over the patches (B, H/p, W/p), mean over heads; of coarser keys (B, H', W')."""
    block, seen = model.blocks[-1], []
    block = getattr(block, "blocks", [block])[-1]  # a shortcut's lies inside
    attn = getattr(block, "SelfAttn", block).attn
    handle = attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model.eval()(x)
    finally:
        handle.remove()
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    q, k, grid, scale = _queries_keys(attn, seen[0], grid)
    q, k = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k))
    weights = (q[:, :, :1] @ k.transpose(-2, -1) * (scale or q.shape[-1] ** -0.5)).softmax(dim=-1)  # (B, h, 1, N): the class token's row
    return weights[:, :, 0, prefix:].mean(dim=1).unflatten(1, grid)


def _queries_keys(attn, tokens: Tensor, grid: tuple[int, int]):
    """q and k (B, N, C), the grid of the keys, and the scale of their products if it is not that of the heads' width."""
    if isinstance(attn, ConvProjectionAttention):
        q, k, _ = attn.projected(tokens, grid)
        return attn.proj_q(q), attn.proj_k(k), conv_grid(grid, attn.conv_proj_k.conv.kernel_size, attn.stride_kv), attn.scale
    if isinstance(attn, PoolingAttention):
        (q, k, _), (_, grid, _) = attn.pooled_heads(tokens, grid)
        return q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2), grid, attn.scale
    if isinstance(attn, GlobalSparseAttention):
        r, P = attn.sr_ratio, attn.num_prefix_tokens
        tokens = token_pool(tokens, 1, mode="subsample", stride=r, grid=grid, num_prefix_tokens=P)
        return *attn.qkv(tokens).chunk(3, dim=-1)[:2], (grid[0] // r, grid[1] // r), None
    q, k = attn.qkv(tokens).chunk(3, dim=-1)[:2] if isinstance(attn, Attention) else attn.qkv(tokens, grid)[:2]
    return q, k, grid, None
