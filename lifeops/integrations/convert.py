"""``lifeops.convert(model, system)`` and ``lifeops.revert(model)``: instance-level, reversible, nothing is monkey-patched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from lifeops.arguments import check_choice, under
from lifeops.hosts.host import CONVERSION as RECORD
from lifeops.integrations import timm
from lifeops.integrations.accelerate import put_back
from lifeops.integrations.convert_probe import can_try
from lifeops.integrations.convert_probe import probe as run_once
from lifeops.integrations.undisturbed import HOOKS, undisturbed
from lifeops.nn.dw_shortcut import ShortcutBlocks
from lifeops.nn.grid_copies import living
from lifeops.nn.grids import GridHolder

SYSTEMS = {"life": timm.convert_life, "localvit": timm.convert_localvit, "dw_shortcut": timm.convert_dw_shortcut}


_KEPT = {"norm1", "attn", "ls1", "drop_path1"}  # parts of a block that its LocalViT block holds, too


class _State(NamedTuple):
    """What a user may do to a whole model: mode, dtype, device, freezing."""

    training: bool
    dtype: torch.dtype | None
    device: torch.device | None
    trainable: frozenset[bool]


class Conversion:
    """What ``revert`` needs: which module stands for which, and the hooks. Not a module: no state-dict keys."""

    def __init__(self, system: str, swaps: list[tuple[nn.Module, nn.Module]]):
        self.system, self.swaps = system, swaps
        self.states = [_state(new, old) for old, new in swaps]
        self.holder = GridHolder()
        self.handles: list = []

    def __getstate__(self):
        return {**self.__dict__, "handles": living(self.handles)}


def _own(module: nn.Module, other: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``module`` that ``other`` does not hold too."""
    shared = {id(p) for p in other.parameters()}
    return [p for p in module.parameters() if id(p) not in shared]


def _state(new: nn.Module, old: nn.Module) -> _State:
    own = _own(new, old)
    like = next((p for p in own if p.is_floating_point()), None)
    place = (None, None) if like is None else (like.dtype, like.device)
    return _State(new.training, *place, frozenset(p.requires_grad for p in new.parameters()))


def _follow(old: nn.Module, new: nn.Module, before: _State) -> None:
    """Do to ``old`` what has been done to ``new``, which stood in its place."""
    now, kept = _state(new, old), {id(m) for m in new.modules()}
    if now.training != before.training:
        for m in old.modules():
            if id(m) not in kept:
                m.training = now.training
    if (now.dtype, now.device) != (before.dtype, before.device):
        old.to(device=now.device, dtype=now.dtype)
    old._is_full_backward_hook = new._is_full_backward_hook
    for name in _KEPT & old._modules.keys() & new._modules.keys():
        old._modules[name] = new._modules[name]  # exchanged meanwhile, perhaps
    if now.trainable != before.trainable and len(now.trainable) == 1:
        for p in _own(old, new):
            p.requires_grad_(*now.trainable)


def _put(model: nn.Module, instead: dict[int, nn.Module]) -> None:
    """Put modules in place of others, wherever the model holds them."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in instead:
                parent._modules[name] = instead[id(child)]


def _hook(model: nn.Module, record: Conversion, blocks: list[nn.Module]) -> None:
    """Bind the grid of each forward pass: see lifeops.nn.grids."""
    holder, handles = record.holder, record.handles
    handles += [model.register_forward_pre_hook(holder.enter_model), model.register_forward_hook(holder.leave_model, always_call=True)]
    for block in blocks:
        handles += [block.register_forward_pre_hook(holder.enter_block), block.register_forward_hook(holder.leave_block, always_call=True)]
    holder.belongs_to(model)
    holder.watch(model.patch_embed)


def _try(model: nn.Module, plan: timm.Plan) -> None:
    """Raise ValueError where the plan would change what it must not; see lifeops.integrations.convert_probe."""
    blocks = {id(block): (f"blocks.{i}", block) for i, block in reversed(list(enumerate(model.blocks)))}
    with undisturbed(model, *(new for _, new in plan.swaps)):
        plan.check(run_once(model, dict(blocks.values()), plan.prefix))


def convert(model: nn.Module, system: str = "life", *, probe: bool = True, **options) -> nn.Module:
    """Give a timm ViT local structure, in place; returns ``model``. :func:`revert` undoes it exactly.

    ``system="life"`` replaces each block's attention by :class:`lifeops.nn.LifeAttention` (cls, distilled and register tokens,
    none, and ``dynamic_img_size`` all work; the grid comes from the patch embedding at every forward and holds for that pass
    alone, see :mod:`lifeops.nn.grids`). ``proj`` keeps its weights; q, k and v start from LIFE's own initialisation because its
    cascade cannot express a pretrained qkv projection.

    ``system="localvit"`` replaces each block by a :class:`lifeops.nn.LocalViTBlock`: the same ``norm1`` and ``attn``, and
    :class:`lifeops.nn.LocalityFeedForward` with new weights instead of ``norm2`` and ``mlp``.

    ``system="dw_shortcut"`` puts :class:`lifeops.nn.DWShortcut` with new weights around the blocks of a ViT, around CaiT's patch
    blocks, or around the blocks of every Swin stage. ``blocks`` then holds groups of the same blocks, so that state-dict names
    change (``blocks.0.blocks.0…``, ``blocks.0.shortcut…``); a group is what activation checkpointing runs again.

    Each block is tried first: the model runs on one random image, its blocks passing on their tokens, and each is then called once as the
    model calls it. "life" must replace plain softmax attention over all tokens, "localvit" leave the attention's branch what it is. Not on
    the meta device or where weights are offloaded; ``probe=False`` leaves it out, and what it costs: about two forward passes ("life").

    Blocks that the model holds several times stay shared, hooks on a replaced module act on its replacement, and a conversion that
    fails changes nothing.

    Options: "life": ``qkv_norm``, ``aux_key``, ``recompute`` as in :class:`lifeops.nn.LifeQKV`; "localvit": ``act`` ("hs+se"),
    ``reduction`` (C, as the authors' tiny and small models), ``expand_ratio`` (the MLP's) as in
    :class:`lifeops.nn.LocalityFeedForward`; "dw_shortcut": ``every`` (1), blocks per shortcut, and ``kernel_sizes`` (3), an odd
    int or several; all: ``num_prefix_tokens`` overrides the model's own.

    Raises:
        ValueError: unknown system, a model converted before, one that is not a ViT as looked for (the message lists it) or whose blocks do
            something else when tried, or one whose layers were adapted, quantised or sharded: convert it first. TypeError: no module,
            unknown options.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("convert", "system", system, SYSTEMS)
    if hasattr(model, RECORD):
        raise ValueError(f"convert: the model was converted to {getattr(model, RECORD).system!r} before; call lifeops.revert(model) first")
    with under("convert"):
        plan = SYSTEMS[system](model, **options)
    if probe and plan.blocks and can_try(model):
        _try(model, plan)
    record = Conversion(system, plan.swaps)
    for old, new in plan.swaps:
        new.__dict__.update({name: old.__dict__[name] for name in HOOKS})  # shared: who registers or removes one means both
        new._is_full_backward_hook = old._is_full_backward_hook
    for module in plan.asks:
        module.grid_holder = record.holder
    _put(model, {id(old): new for old, new in plan.swaps})
    if plan.blocks:
        _hook(model, record, plan.blocks)
    setattr(model, RECORD, record)
    return model


def _without_shortcuts(model: nn.Module, record: Conversion) -> dict[int, nn.Module]:
    """For every list of groups the list of their blocks: the original one, or a new one where groups were taken out."""
    groups = {id(group) for _, new in record.swaps for group in new}
    instead = {}
    for m in model.modules():
        if isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m) and all(id(group) in groups for group in m):
            blocks = [block for group in m for block in group.blocks]
            same = [old for old, _ in record.swaps if [*map(id, old)] == [*map(id, blocks)]]
            new = same[0] if same else nn.Sequential(*blocks) if isinstance(m, nn.Sequential) else nn.ModuleList(blocks)
            new.training = m.training
            instead[id(m)] = new
    return instead


def revert(model: nn.Module) -> nn.Module:
    """Put back the modules that ``convert`` replaced, the very same objects, and remove its hooks; undo ``accelerate``. Returns ``model``.

    What was done to the model meanwhile stays done: mode, dtype, device, freezing, hooks, blocks taken out. The weights are those of
    before; what a replacement learned goes with it.

    Raises ValueError if the model was neither converted nor accelerated, TypeError for no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: model must be a torch.nn.Module, got {type(model).__name__}")
    record, accelerated = getattr(model, RECORD, None), put_back(model)
    if record is None and not accelerated:
        raise ValueError("revert: the model was not converted by lifeops.convert, nor accelerated by lifeops.accelerate")
    if record is not None:
        _take_back(model, record)
        put_back(model)  # inside what stood there before
    return model


def _take_back(model: nn.Module, record: Conversion) -> None:
    if any(isinstance(group, ShortcutBlocks) for _, new in record.swaps for group in new.children()):
        instead = _without_shortcuts(model, record)
    else:
        instead = {id(new): old for old, new in record.swaps}
        for (old, new), before in zip(record.swaps, record.states, strict=True):
            _follow(old, new, before)
    for handle in (*record.handles, *record.holder.handles):
        handle.remove()
    _put(model, instead)
    delattr(model, RECORD)
