"""``lifeops.convert(model, system)`` and ``lifeops.revert(model)``: instance-level, reversible, nothing is monkey-patched."""

from __future__ import annotations

from torch import nn

from lifeops.integrations import timm

RECORD = "_lifeops_conversion"
SYSTEMS = {"life": timm.convert_life, "localvit": timm.convert_localvit, "dw_shortcut": timm.convert_dw_shortcut}


class Conversion:
    """What ``revert`` needs: the modules that were replaced, in place order, and the hook. Not a module: no state-dict keys."""

    def __init__(self, system: str):
        self.system = system
        self.replaced: list[tuple[str, nn.Module]] = []
        self.hook_id: int | None = None


def convert(model: nn.Module, system: str = "life", **options) -> nn.Module:
    """Give a timm ViT local structure, in place; returns ``model``. :func:`revert` undoes it exactly.

    ``system="life"`` replaces each block's attention by :class:`lifeops.nn.LifeAttention` (cls, distilled and register tokens,
    none, and ``dynamic_img_size`` all work; the grid comes from the patch embedding at every forward). ``proj`` keeps its
    weights; q, k and v start from LIFE's own initialisation because its cascade cannot express a pretrained qkv projection.

    ``system="localvit"`` replaces each block by a :class:`lifeops.nn.LocalViTBlock`: the same ``norm1`` and ``attn``, and
    :class:`lifeops.nn.LocalityFeedForward` with new weights instead of ``norm2`` and ``mlp``.

    ``system="dw_shortcut"`` puts :class:`lifeops.nn.DWShortcut` with new weights around the blocks of a ViT, around CaiT's patch
    blocks, or around the blocks of every Swin stage. ``blocks`` then holds groups of the same blocks, so that state-dict names
    change (``blocks.0.blocks.0…``, ``blocks.0.shortcut…``); a group is what activation checkpointing runs again.

    Options: "life": ``qkv_norm``, ``aux_key``, ``recompute`` as in :class:`lifeops.nn.LifeQKV`; "localvit": ``act`` ("hs+se"),
    ``reduction`` (C, as the authors' tiny and small models), ``expand_ratio`` (the MLP's) as in
    :class:`lifeops.nn.LocalityFeedForward`; "dw_shortcut": ``every`` (1), blocks per shortcut, and ``kernel_sizes`` (3), an odd
    int or several; all: ``num_prefix_tokens`` overrides the model's own.

    Raises:
        ValueError: unknown system, a model converted before, or one that is not a ViT as looked for (the message lists it).
    """
    if system not in SYSTEMS:
        raise ValueError(f"convert: system must be one of {', '.join(map(repr, SYSTEMS))}, got {system!r}")
    if hasattr(model, RECORD):
        raise ValueError(f"convert: the model was converted to {getattr(model, RECORD).system!r} before; call lifeops.revert(model) first")
    record = Conversion(system)
    SYSTEMS[system](model, record, **options)
    setattr(model, RECORD, record)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Put back the modules that ``convert`` replaced, the very same objects, and remove its hook. Returns ``model``."""
    record = getattr(model, RECORD, None)
    if record is None:
        raise ValueError("revert: the model was not converted by lifeops.convert")
    for path, module in record.replaced:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
    model.patch_embed._forward_hooks.pop(record.hook_id, None)
    delattr(model, RECORD)
    return model
