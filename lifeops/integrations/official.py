"""The authors' checkpoints, recognised by their keys, as models of this library."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from lifeops.integrations import official_dw_shortcut as shortcut

_LIFE_KEY = "blocks.0.attn.qkv.scale1.weight"
_LOCALVIT_KEY = "blocks.0.conv.conv.0.weight"


def load_official(checkpoint, *, num_heads: int | None = None, act: str | None = None) -> nn.Module:
    """Build the model that an official checkpoint is for, at the sizes its tensors tell, and load it strictly; in eval mode.

    Args:
        checkpoint: a path (``.safetensors``, or a torch file, read with ``weights_only=True``) or a loaded dict; with or
            without the outer "model" key.
        num_heads: attention heads where the tensors do not tell; default C // 64 for LIFE's DeiT models and the DW shortcut's ViT,
            C // 48 for LocalViT's.
        act: LocalViT's activation where the tensors do not tell; default "relu6" without channel attention (the authors'
            mlp6_act1), "hs+se" with squeeze and excitation, "hs+eca" with ECA.

    Recognised: LIFE DeiT (``blocks.0.attn.qkv.scale1.weight``; returned with ``aux_key="scale1"``, as they were trained),
    LocalViT DeiT (``blocks.0.conv.conv.0.weight``), and the DW shortcut's ViT (``transformer.convs.0.weight``), CaiT
    (``patch_transformer.convs.0.weight``) and Swin (``layers.0.convs.0.weight``).

    Raises:
        ValueError: keys of no known family, or sizes that do not fit together. RuntimeError: unexpected or missing keys.
    """
    state = state_dict_of(checkpoint)
    for key, _, build in _families(num_heads, act):
        if key in state:
            model = build(state).to(state[key].dtype)
            model.load_state_dict(state, strict=True)
            return model.eval()
    known = ", ".join(f"{name} ({key!r})" for key, name, _ in _families(num_heads, act))
    raise ValueError(f"load_official: no known checkpoint; looked for {known}, got keys such as {sorted(state)[:5]}")


def _families(num_heads, act):
    """The key that tells a family, its name, and what builds its model from a state dict."""
    return (
        (_LIFE_KEY, "LIFE DeiT", lambda state: _life_deit(state, num_heads, "scale1")),
        (_LOCALVIT_KEY, "LocalViT DeiT", lambda state: _localvit_deit(state, num_heads, act)),
        (shortcut.VIT_KEY, "DW shortcut ViT", lambda state: shortcut.vit(state, num_heads)),
        (shortcut.CAIT_KEY, "DW shortcut CaiT", lambda state: shortcut.cait(state, num_heads)),
        (shortcut.SWIN_KEY, "DW shortcut Swin", lambda state: shortcut.swin(state, num_heads)),
    )


class _Settings:
    """Stands in for yacs' CfgNode, which checkpoints of Swin-style training scripts hold beside the model: an inert dict."""

    def __new__(cls, *args):
        return OrderedDict()


def _load(path: str):
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    with torch.serialization.safe_globals([(_Settings, "yacs.config.CfgNode")]):
        return torch.load(path, map_location="cpu", weights_only=True)


def state_dict_of(checkpoint) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint by name: a path or a loaded dict, with or without the outer "model" key."""
    if isinstance(checkpoint, (str, os.PathLike)):
        checkpoint = _load(os.fspath(checkpoint))
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"load_official: the checkpoint must be a path or a dict, got {type(checkpoint).__name__}")
    state = checkpoint.get("model", checkpoint)
    wrong = [k for k, v in state.items() if not isinstance(v, torch.Tensor)] if isinstance(state, Mapping) else ["model"]
    if wrong:
        raise ValueError(f"load_official: the checkpoint must map names to tensors (perhaps under 'model'); {wrong[:3]} do not")
    return state


class _Host:
    """The sizes of a DeiT host, read from its tensors."""

    def __init__(self, family: str, state: Mapping[str, torch.Tensor], num_heads: int | None, head_dim: int):
        self.family, self.state = family, state
        patch = self.need("patch_embed.proj.weight")
        dim, in_chans, *patch_size = patch.shape
        dist = "dist_token" in state
        patches = self.need("pos_embed").shape[1] - 1 - dist
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"load_official: the authors' models have square grids, got pos_embed for {patches} patches")
        heads = num_heads or dim // head_dim
        if heads < 1 or dim % heads:
            raise ValueError(f"load_official: cannot tell the heads of a model of width {dim}; pass num_heads=…")
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        self.sizes = {
            "img_size": (side * patch_size[0], side * patch_size[1]), "patch_size": tuple(patch_size), "in_chans": in_chans,
            "num_classes": self.need("head.weight").shape[0], "embed_dim": dim, "depth": depth, "num_heads": heads, "dist_token": dist,
        }  # fmt: skip

    def need(self, name: str) -> torch.Tensor:
        if name not in self.state:
            raise ValueError(f"load_official: the {self.family} checkpoint has no {name!r}")
        return self.state[name]


def _deit(state: Mapping[str, torch.Tensor], family: str, num_heads: int | None, attn=None) -> nn.Module:
    from lifeops.models.deit import VisionTransformer

    host = _Host(family, state, num_heads, 64)
    mlp_ratio = host.need("blocks.0.mlp.fc1.weight").shape[0] / host.sizes["embed_dim"]
    return VisionTransformer(**host.sizes, mlp_ratio=mlp_ratio, attn=attn)


def _life_deit(state: Mapping[str, torch.Tensor], num_heads: int | None, aux_key: str = "scale1") -> nn.Module:
    from lifeops.nn.life import LifeAttention

    qkv_norm = "blocks.0.attn.qkv.norm.weight" in state

    def attention(dim, num_heads, num_prefix_tokens):
        return LifeAttention(dim, num_heads, num_prefix_tokens, qkv_norm=qkv_norm, aux_key=aux_key)

    return _deit(state, "LIFE DeiT", num_heads, attention)


def lifeops_deit(checkpoint, *, num_heads: int | None = None) -> nn.Module:
    """A :class:`lifeops.models.VisionTransformer` that this library trained, plain, with LIFE or with LocalViT's feed-forward, at the
    sizes its tensors tell; in eval mode. ``checkpoint`` and ``num_heads`` as in :func:`load_official`; LIFE with its default key.
    """
    state = state_dict_of(checkpoint)
    if _LOCALVIT_KEY in state:
        model = _localvit_deit(state, num_heads, None)
    elif _LIFE_KEY in state:
        model = _life_deit(state, num_heads, "multiscale")
    else:
        model = _deit(state, "DeiT", num_heads)
    model.to(state["patch_embed.proj.weight"].dtype).load_state_dict(state, strict=True)
    return model.eval()


def _localvit_deit(state: Mapping[str, torch.Tensor], num_heads: int | None, act: str | None) -> nn.Module:
    from lifeops.models.localvit import localvit

    host = _Host("LocalViT DeiT", state, num_heads, 48)
    hidden, dim = host.need(_LOCALVIT_KEY).shape[:2]
    squeeze = state.get("blocks.0.conv.conv.6.fc.0.weight")
    if act is None:
        eca = squeeze is None and "blocks.0.conv.conv.6.conv.weight" in state
        act = "hs+eca" if eca else "relu6" if squeeze is None else "hs+se"
    reduction = 1 if squeeze is None else hidden // squeeze.shape[0]
    return localvit(mlp_ratio=hidden / dim, act=act, reduction=reduction, **host.sizes)
