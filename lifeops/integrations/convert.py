"""``lifeops.convert(model, system)`` and ``lifeops.revert(model)``: instance-level, reversible, nothing is monkey-patched."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import nn

from lifeops.arguments import check_choice, check_flags, got, under
from lifeops.hosts.host import CONVERSION as RECORD
from lifeops.hosts.patch_order import in_order
from lifeops.integrations import timm_indices
from lifeops.integrations.accelerate import put_back
from lifeops.integrations.convert_dw_shortcut import convert_dw_shortcut
from lifeops.integrations.convert_life import convert_life
from lifeops.integrations.convert_localvit import convert_localvit
from lifeops.integrations.convert_plan import Plan, share_hooks
from lifeops.integrations.convert_probe import can_try, run_through
from lifeops.integrations.convert_probe import probe as run_once
from lifeops.integrations.convert_stages import pooled, put_in_place, try_stages
from lifeops.integrations.converted_states import names_of, refuse_others
from lifeops.integrations.undisturbed import undisturbed
from lifeops.nn.grid_copies import living
from lifeops.nn.grids import GridHolder
from lifeops.nn.shortcut_blocks import ShortcutBlocks
from lifeops.options import AuxKey, GateAct, System

M = TypeVar("M", bound=nn.Module)
SYSTEMS = {"life": convert_life, "localvit": convert_localvit, "dw_shortcut": convert_dw_shortcut}
_NO_IDENTITY = {
    "life": "LIFE's cascade of q, k and v cannot express a pretrained projection",
    "localvit": "LocalViT's feed-forward takes the place of the MLP, whose outputs it cannot give",
}


class _State(NamedTuple):
    """What a user may do to a whole model: mode, dtype, device, freezing."""

    training: bool
    dtype: torch.dtype | None
    device: torch.device | None
    trainable: frozenset[bool]
    kept: frozenset[str]  # the parts that both hold


class Conversion:
    """What ``revert`` needs: which module stands for which, and the hooks. Not a module: no state-dict keys."""

    def __init__(self, system: str, swaps: list[tuple[nn.Module, nn.Module]]):
        self.system, self.swaps = system, swaps
        self.states = [_state(new, old) for old, new in swaps]
        self.holder = GridHolder()
        self.handles: list = []
        self.gone: frozenset[str] = frozenset()  # names that the model's parameters and buffers had before

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
    kept = frozenset(name for name, m in new._modules.items() if m is not None and old._modules.get(name) is m)
    return _State(new.training, *place, frozenset(p.requires_grad for p in new.parameters()), kept)


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
    for name in before.kept & new._modules.keys():
        old._modules[name] = new._modules[name]  # exchanged meanwhile, perhaps
    if now.trainable != before.trainable and len(now.trainable) == 1:
        for p in _own(old, new):
            p.requires_grad_(*now.trainable)


def _hook(model: nn.Module, record: Conversion, plan: Plan) -> None:
    """Bind the grid of each forward pass: see lifeops.nn.grids."""
    holder, handles = record.holder, record.handles
    handles += [model.register_forward_pre_hook(holder.enter_model), model.register_forward_hook(holder.leave_model, always_call=True)]
    for block in plan.blocks:
        handles += [block.register_forward_pre_hook(holder.enter_block), block.register_forward_hook(holder.leave_block, always_call=True)]
    holder.embed_path = ".".join(filter(None, (plan.host.path, plan.host.teller_path or plan.host.embed_path)))
    holder.embed_method = plan.host.embeds_in
    holder.belongs_to(model)
    stages, pools = pooled(plan.host)
    handles += [stage.register_forward_pre_hook(holder.enter_stage) for stage in stages]
    for module in (*pools, plan.host.teller):
        holder.watch(module)
    handles += [module.register_forward_hook(in_order) for module in plan.host.pickers]


def _try(plan: Plan) -> None:
    """Raise ValueError where the plan would change what it must not; see lifeops.integrations.convert_probe and convert_stages."""
    if plan.whole is not None:
        try_stages(plan.host, plan.swaps, plan.whole, plan.prefix)
    if plan.check is not None:
        with undisturbed(plan.host.trunk, *(new for _, new in plan.swaps)):
            plan.check(run_through(plan.host) if plan.host.staged else run_once(plan.host, plan.prefix))


def _check_start(system: str, start: str | None, options: dict) -> None:
    """Hand ``start`` to the system that knows it."""
    if start is not None and (not isinstance(start, str) or start != "identity"):
        raise ValueError(f"convert: start must be None or 'identity', got {got(start)}")
    if start is not None and system in _NO_IDENTITY:
        raise ValueError(f"convert: {system!r} cannot start as the identity: {_NO_IDENTITY[system]}; 'dw_shortcut' can")
    options.update({"start": start} if system not in _NO_IDENTITY else {})


def _check_not_compiled(model: nn.Module) -> None:
    """torch's compiler keeps programs that see neither new layers nor the hooks which tell the grid."""
    for path, module in model.named_modules():
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"convert: {path or 'the model'} is compiled; convert the model as it was before, then torch.compile it")


@overload
def convert(
    model: M, system: Literal["life"] = "life", *, probe: bool = True, start: None = None, num_prefix_tokens: int | None = None,
    qkv_norm: bool = False, aux_key: AuxKey = "multiscale", recompute: bool = False,
) -> M: ...  # fmt: skip
@overload
def convert(
    model: M, system: Literal["localvit"], *, probe: bool = True, start: None = None, num_prefix_tokens: int | None = None,
    act: GateAct = "hs+se", reduction: int | None = None, expand_ratio: float | None = None,
) -> M: ...  # fmt: skip
@overload
def convert(
    model: M, system: Literal["dw_shortcut"], *, probe: bool = True, start: Literal["identity"] | None = None,
    num_prefix_tokens: int | None = None, every: int = 1, kernel_sizes: int | tuple[int, ...] = 3,
) -> M: ...  # fmt: skip
@overload
def convert(model: M, system: System, *, probe: bool = True, start: None = None, num_prefix_tokens: int | None = None) -> M: ...
def convert(model: M, system: System = "life", *, probe: bool = True, start: str | None = None, **options: Any) -> M:
    """Give a ViT of timm, transformers or lifeops local structure, in place; returns ``model``. :func:`revert` undoes it exactly.

    The model is found inside whatever holds it, and its parts by :func:`lifeops.describe`. Any prefix tokens, none, and images of
    changing size work; the grid comes from the patch embedding at every forward and holds for that pass alone, see
    :mod:`lifeops.nn.grids`.

    ``system="life"`` replaces each block's attention by :class:`lifeops.nn.LifeAttention`, those side by side each. ``proj`` keeps its
    weights, norms of q, k and the joined heads stay, and so do positions: q and k are rotated after LIFE, relative biases are added. q, k
    and v start from LIFE's own initialisation because its cascade cannot express a pretrained qkv projection. Attention that does more
    with q, k and v (talking heads, differential, gated, over channels, in windows, beside an MLP in one layer) stays what it is, and only
    the layer that makes them is exchanged; in windows (Swin, SAM) LIFE convolves inside each, after any shift, as its authors do.
    transformers' Swin makes q, k and v by three layers: there the attention is replaced, and keeps its relative positions and the masks
    of shifted windows. CaiT's and XCiT's class attention, where one token asks, stays.

    ``system="localvit"`` replaces each block by a :class:`lifeops.nn.LocalViTBlock`: the same ``norm1`` and ``attn``, and
    :class:`lifeops.nn.LocalityFeedForward` with new weights instead of ``norm2`` and ``mlp``. Blocks with another order of norms, scales
    that are parameters or several attentions, windows (Swin, SAM), a reduced grid (PVT v2), and those of transformers, stay of their
    class, and only the MLP's part is exchanged: the branch takes the MLP's name and is neither normalised nor scaled, and sees the whole
    grid, not windows.

    ``system="dw_shortcut"`` puts :class:`lifeops.nn.DWShortcut` with new weights around the blocks of a ViT, around the patch blocks of
    CaiT and XCiT, or around the blocks of every stage of a Swin, PVT, Twins, PiT, NesT, CoaT (with one for each scale that its parallel
    blocks change) or SegFormer; of TNT's blocks around the patches' tokens. timm's ``blocks`` then hold groups of the same blocks, so that
    state-dict names change (``blocks.0.blocks.0…``, ``blocks.0.shortcut…``); a group is what activation checkpointing runs again. The
    layers of transformers, and Twins' blocks where ``every`` is not 1, keep their names, and the last of a group gets a ``shortcut``
    (``layers.0.shortcut…``). timm's ``group_matcher`` (layer decay), ``forward_intermediates`` and ``get_intermediate_layers`` of the
    instance count blocks all the same: a shortcut belongs to the last block that it is around, and so it is in the hidden states that
    transformers records.

    Layers of transformers stay instances of their classes, so that gradient checkpointing and recorded hidden states go on as before;
    with "life" no attention matrices are made, and ``output_attentions=True`` is a ValueError.

    Each block is tried first: the model runs on one random image, its blocks passing on their tokens, and each is then called once as the
    model calls it. "life", given the old q, k and v, must give what the old attention gives; "localvit" must leave the attention's branch
    what it is; a shortcut must find tokens. Models of stages, and groups, run with and without shortcuts that add nothing, and must put
    out the same. Not on the meta device or where weights are offloaded; ``probe=False`` leaves it out, and what it costs: about two forward
    passes.

    Patches that a model shuffles before its blocks (ViTMAE) reach them in the order of the grid. Where it leaves some out, at a
    ``mask_ratio`` that is not 0 or by timm's patch dropout in training, that forward pass is a ValueError.

    ``load_state_dict`` of a converted model takes the checkpoints of models converted alike, and parts of them. One of a model
    that was not converted, or to another system, is a CheckpointError (ValueError and RuntimeError) before anything is loaded, with
    ``strict=False``, too: names differ, and the layers behind them would silently stay what they are. Load, then convert.

    Blocks that the model holds several times stay shared, hooks on a replaced module act on its replacement, and a conversion that
    fails changes nothing.

    Options: "life": ``qkv_norm``, ``aux_key``, ``recompute`` as in :class:`lifeops.nn.LifeQKV`; "localvit": ``act`` ("hs+se"),
    ``reduction`` (C, as the authors' tiny and small models), ``expand_ratio`` (the MLP's) as in
    :class:`lifeops.nn.LocalityFeedForward`; "dw_shortcut": ``every`` (1), blocks per shortcut, and ``kernel_sizes`` (3), an odd
    int or several; all: ``num_prefix_tokens`` overrides the model's own.

    ``start="identity"`` leaves the model's outputs what they are, for fine-tuning from there: "dw_shortcut" alone can, its convolutions
    start at zero (and their batch norms as ever, so that gradients reach the convolutions at once, the norms after a step).

    Raises:
        ValueError: unknown system, a model converted before, one that is not a ViT as looked for (the message lists it) or whose blocks do
            something else when tried, one that holds several, one that is compiled, or whose layers were adapted, quantised or sharded:
            convert it first; a ``start`` that the system does not have. TypeError: no module, unknown options.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("convert", "system", system, SYSTEMS)
    if hasattr(model, RECORD):
        raise ValueError(f"convert: the model was converted to {getattr(model, RECORD).system!r} before; call lifeops.revert(model) first")
    check_flags("convert", probe=probe), _check_not_compiled(model)
    _check_start(system, start, options)
    with under("convert"):
        plan = SYSTEMS[system](model, **options)
    if probe and can_try(plan.host):
        _try(plan)
    record, before = Conversion(system, plan.swaps), names_of(model)
    for old, new in plan.swaps:
        share_hooks(old, new)
    for module in plan.asks:
        module.grid_holder = record.holder
    put_in_place(model, {id(old): new for old, new in plan.swaps})
    if plan.bound:
        _hook(model, record, plan)
    record.gone = frozenset(before - names_of(model))
    record.handles.append(model.register_load_state_dict_pre_hook(refuse_others))
    timm_indices.count_blocks(model)
    if plan.starts is not None:
        record.handles += [
            model.register_forward_pre_hook(plan.starts.clear), model.register_forward_hook(plan.starts.clear, always_call=True),
        ]  # fmt: skip
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


def revert(model: M) -> M:
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
    put_in_place(model, instead)
    timm_indices.count_modules(model)
    delattr(model, RECORD)
