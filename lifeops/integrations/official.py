"""The authors' checkpoints, recognised by their keys, as models of this library."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch
from torch import nn

_LIFE_KEY = "blocks.0.attn.qkv.scale1.weight"


def load_official(checkpoint, *, num_heads: int | None = None) -> nn.Module:
    """Build the model that an official checkpoint is for, at the sizes its tensors tell, and load it strictly; in eval mode.

    Args:
        checkpoint: a path (``.safetensors``, or a torch file, read with ``weights_only=True``) or a loaded dict; with or
            without the outer "model" key.
        num_heads: attention heads where the checkpoint's family does not fix them; default C // 64 for LIFE's DeiT models.

    Recognised: LIFE DeiT (``blocks.0.attn.qkv.scale1.weight``; returned with ``aux_key="scale1"``, as they were trained).

    Raises:
        ValueError: keys of no known family, or sizes that do not fit together. RuntimeError: unexpected or missing keys.
    """
    state = _state_dict(checkpoint)
    if _LIFE_KEY not in state:
        known = "LIFE DeiT ('blocks.0.attn.qkv.scale1.weight')"
        raise ValueError(f"load_official: no known checkpoint; looked for {known}, got keys such as {sorted(state)[:5]}")
    model = _life_deit(state, num_heads)
    model.load_state_dict(state, strict=True)
    return model.eval()


def _state_dict(checkpoint) -> Mapping[str, torch.Tensor]:
    if isinstance(checkpoint, (str, os.PathLike)):
        path = os.fspath(checkpoint)
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            checkpoint = load_file(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"load_official: the checkpoint must be a path or a dict, got {type(checkpoint).__name__}")
    state = checkpoint.get("model", checkpoint)
    wrong = [k for k, v in state.items() if not isinstance(v, torch.Tensor)] if isinstance(state, Mapping) else ["model"]
    if wrong:
        raise ValueError(f"load_official: the checkpoint must map names to tensors (perhaps under 'model'); {wrong[:3]} do not")
    return state


def _life_deit(state: Mapping[str, torch.Tensor], num_heads: int | None) -> nn.Module:
    from lifeops.models.deit import VisionTransformer
    from lifeops.nn.life import LifeAttention

    def need(name: str) -> torch.Tensor:
        if name not in state:
            raise ValueError(f"load_official: the LIFE DeiT checkpoint has no {name!r}")
        return state[name]

    patch = need("patch_embed.proj.weight")
    dim, in_chans, *patch_size = patch.shape
    dist = "dist_token" in state
    patches = need("pos_embed").shape[1] - 1 - dist
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"load_official: the authors' models have square grids, got pos_embed for {patches} patches")
    heads = num_heads or dim // 64
    if heads < 1 or dim % heads:
        raise ValueError(f"load_official: cannot tell the heads of a model of width {dim}; pass num_heads=…")
    qkv_norm = "blocks.0.attn.qkv.norm.weight" in state

    def attention(dim, num_heads, num_prefix_tokens):
        return LifeAttention(dim, num_heads, num_prefix_tokens, qkv_norm=qkv_norm, aux_key="scale1")

    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    return VisionTransformer(
        img_size=(side * patch_size[0], side * patch_size[1]), patch_size=tuple(patch_size), in_chans=in_chans,
        num_classes=need("head.weight").shape[0], embed_dim=dim, depth=depth,
        num_heads=heads, mlp_ratio=need("blocks.0.mlp.fc1.weight").shape[0] / dim, dist_token=dist, attn=attention,
    ).to(patch.dtype)  # fmt: skip
