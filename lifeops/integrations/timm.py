"""timm VisionTransformer models. timm itself is not imported: the modules are recognised by what they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from lifeops.arguments import check_choice, check_flags, check_int, check_positive
from lifeops.integrations.convert_probe import Probed, call, check_attention, check_branch, check_shortcut, sequence
from lifeops.nn.dw_shortcut import ShortcutModule, wrap
from lifeops.nn.inputs import kernel_sizes as check_kernel_sizes
from lifeops.nn.life import LifeAttention
from lifeops.nn.localvit import ACTS, LocalityFeedForward, LocalViTBlock
from lifeops.nn.plain import exactly, why_not
from lifeops.ops.life_qkv import AUX_KEYS

_LOOKED_FOR = "a timm VisionTransformer: patch_embed with grid_size, num_prefix_tokens, and blocks[i].attn with qkv, proj, num_heads"


class Plan(NamedTuple):
    """What a conversion is going to do: nothing is changed before all of it is known.

    ``swaps``: (module, the one that takes its place). ``asks``: the new modules that ask for a grid. ``blocks``: the modules called with
    the tokens, during each of which one grid holds; none where the modules see it themselves. ``prefix``: P. ``check``: compares the new
    with the old, given what the model gives its blocks; raises ValueError.
    """

    swaps: list[tuple[nn.Module, nn.Module]]
    asks: list[nn.Module]
    blocks: list[nn.Module]
    prefix: int
    check: Callable[[Probed], None]


def _once(modules) -> list[nn.Module]:
    """Each module once, in order: shared ones are converted once and stay shared."""
    return list({id(m): m for m in modules}.values())


def _readable(path: str, layer: nn.Module) -> None:
    """Raise unless the parameters that a conversion copies or measures are what the layer computes with."""
    wrong = why_not(layer, exactly(nn.Linear))
    if wrong:
        raise ValueError(f"convert: {path} cannot be read: {'; '.join(wrong)} (convert first, then adapt, quantise, prune or shard)")


def _beyond(module: nn.Module, known: tuple[str, ...]) -> list[str]:
    """The parts with parameters that are none of ``known``."""
    parts = {name.partition(".")[0]: None for name, _ in module.named_parameters(remove_duplicate=False)}
    return [name for name in parts if name not in known]


def _check_attention(path: str, attn: nn.Module) -> None:
    missing = [name for name in ("qkv", "proj", "num_heads") if getattr(attn, name, None) is None]  # EvaAttention has qkv or q_proj, …
    if missing:
        raise ValueError(f"convert: {path} is {type(attn).__name__} without {', '.join(missing)}; looked for {_LOOKED_FOR}")
    if not isinstance(attn.qkv, nn.Linear):
        _readable(f"{path}.qkv", attn.qkv)
    odd = [n for n in ("q_norm", "k_norm", "norm") if not isinstance(getattr(attn, n, nn.Identity()), nn.Identity)]
    odd += [n for n in ("gate", "rope") if getattr(attn, n, None) is not None]
    odd += _beyond(attn, ("qkv", "proj", "q_bias", "k_bias", "v_bias", *odd))
    if odd:
        raise ValueError(f"convert: {path} has {', '.join(odd)}, which LIFE's attention does not know (use qkv_norm=True for its own norm)")
    _readable(f"{path}.proj", attn.proj)
    dim = attn.proj.in_features
    if (attn.qkv.in_features, attn.proj.out_features) != (dim, dim):
        raise ValueError(f"convert: {path} must map {dim} channels to {dim}, got {attn.qkv.in_features} to {attn.proj.out_features}")


def _rate(attn: nn.Module, name: str) -> float:
    """Of a dropout that may be missing or an Identity."""
    return getattr(getattr(attn, name, None), "p", 0.0)


def _replacement(attn: nn.Module, num_prefix_tokens: int, options: dict) -> LifeAttention:
    weight = attn.proj.weight
    new = LifeAttention(
        attn.proj.in_features, attn.num_heads, num_prefix_tokens, attn_drop=_rate(attn, "attn_drop"), proj_drop=_rate(attn, "proj_drop"),
        proj_bias=attn.proj.bias is not None, device=weight.device, dtype=weight.dtype, **options,
    )  # fmt: skip
    with torch.no_grad():
        for ours, theirs in zip(new.proj.parameters(), attn.proj.parameters(), strict=True):
            ours.copy_(theirs)
    for ours, theirs in zip(new.proj.parameters(), attn.proj.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return new.train(attn.training)


def _options(options: dict, known: tuple[str, ...]) -> None:
    unknown = options.keys() - set(known)
    if unknown:
        raise TypeError(f"convert: unknown options {', '.join(sorted(unknown))}; known: {', '.join(known)}, num_prefix_tokens")


def _prefix_tokens(model: nn.Module, num_prefix_tokens: int | None) -> int:
    """P of a model that looks like a ViT."""
    embed = getattr(model, "patch_embed", None)
    if not (hasattr(model, "blocks") and isinstance(embed, nn.Module) and hasattr(embed, "grid_size")):
        raise ValueError(f"convert: {type(model).__name__} is not a known ViT; looked for {_LOOKED_FOR}")
    told = 0 if hasattr(model, "blocks_token_only") else getattr(model, "num_prefix_tokens", None)  # CaiT's cls joins behind the blocks
    prefix = told if num_prefix_tokens is None else num_prefix_tokens
    if prefix is None:
        raise ValueError(f"convert: {type(model).__name__} does not say num_prefix_tokens; pass num_prefix_tokens=…")
    return check_int("convert", "num_prefix_tokens", prefix, 0)


def convert_life(model: nn.Module, *, num_prefix_tokens: int | None = None, **options) -> Plan:
    """Replace the attention of every block."""
    _options(options, ("qkv_norm", "aux_key", "recompute"))
    check_flags("convert", **{name: options[name] for name in options.keys() & {"qkv_norm", "recompute"}})
    check_choice("convert", "aux_key", options.get("aux_key", AUX_KEYS[0]), AUX_KEYS)
    prefix = _prefix_tokens(model, num_prefix_tokens)
    found = {}
    for i, block in enumerate(model.blocks):
        attn = getattr(block, "attn", None)
        if id(attn) not in found:
            _check_attention(f"blocks.{i}.attn", attn)
            found[id(attn)] = attn
    swaps = [(attn, _replacement(attn, prefix, options)) for attn in found.values()]
    instead = {id(attn): new for attn, new in swaps}

    def check(probed: Probed) -> None:
        for path, block in _paths(model.blocks, probed):
            given, attn = probed.calls[id(block)], block.attn
            sequence(path, given.x)
            check_attention(path, block, attn, given, ("attn_mask", "is_causal"))
            try:
                block._modules["attn"] = instead[id(attn)]
                with block.attn.grid_holder.use(probed.grid):
                    call(path, block, given)
            finally:
                block._modules["attn"] = attn

    return Plan(swaps, [new for _, new in swaps], _once(model.blocks), prefix, check)


def _paths(blocks, probed: Probed) -> list[tuple[str, nn.Module]]:
    """The blocks that ran, each once, with where they are."""
    found = {id(block): (f"blocks.{i}", block) for i, block in reversed(list(enumerate(blocks)))}
    return [pair for key, pair in reversed(found.items()) if key in probed.calls]


def _localvit_block(path: str, block: nn.Module, prefix: int, act: str, reduction: int | None, expand_ratio: float | None) -> LocalViTBlock:
    missing = [name for name in ("norm1", "attn", "norm2", "mlp") if not hasattr(block, name)]
    if missing or not hasattr(block.mlp, "fc1"):
        lacks = ", ".join(missing) or "mlp.fc1"
        raise ValueError(f"convert: {path} is {type(block).__name__} without {lacks}; looked for a timm Block with norm1, attn, norm2, mlp")
    odd = _beyond(block, ("norm1", "attn", "ls1", "norm2", "mlp", "ls2", "gamma_2"))
    if odd:
        raise ValueError(f"convert: {path} is {type(block).__name__} with {', '.join(odd)}, which LocalViT's block does not have")
    _readable(f"{path}.mlp.fc1", block.mlp.fc1)
    weight = block.mlp.fc1.weight
    hidden, dim = weight.shape
    conv = LocalityFeedForward(
        dim, hidden / dim if expand_ratio is None else expand_ratio, act, dim if reduction is None else reduction,
        num_prefix_tokens=prefix, device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    drop_path = getattr(block, "drop_path1", getattr(block, "drop_path", None))
    new = LocalViTBlock(block.norm1, block.attn, conv, drop_path, getattr(block, "ls1", None))
    new.conv.train(block.training)
    new.training = block.training
    return new


def convert_localvit(
    model: nn.Module, *, num_prefix_tokens: int | None = None, act: str = "hs+se", reduction: int | None = None,
    expand_ratio: float | None = None, **options,
) -> Plan:  # fmt: skip
    """Replace every block by one with the same attention and LocalViT's feed-forward instead of LayerNorm and MLP."""
    _options(options, ("act", "reduction", "expand_ratio"))
    check_choice("convert", "act", act, ACTS)
    check_int("convert", "reduction", reduction, 1, optional=True), check_positive("convert", "expand_ratio", expand_ratio, optional=True)
    prefix = _prefix_tokens(model, num_prefix_tokens)
    made: dict[int, tuple[nn.Module, nn.Module]] = {}
    for i, block in enumerate(model.blocks):
        if id(block) not in made:
            made[id(block)] = block, _localvit_block(f"blocks.{i}", block, prefix, act, reduction, expand_ratio)
    news = [new for _, new in made.values()]

    def check(probed: Probed) -> None:
        for path, block in _paths(model.blocks, probed):
            sequence(path, probed.calls[id(block)].x)
            check_branch(path, block, made[id(block)][1], probed.calls[id(block)])

    return Plan(list(made.values()), [new.conv for new in news], news, prefix, check)


def _stages(model: nn.Module, num_prefix_tokens: int | None) -> tuple[list[str], int]:
    """Where the blocks are that shortcuts go around, and P: a ViT's, CaiT's patch blocks (no prefix there), each Swin stage's."""
    if any(isinstance(m, ShortcutModule) for m in model.modules()):
        raise ValueError(f"convert: {type(model).__name__} has DW shortcuts of its own")
    stages = list(getattr(model, "layers", ()))
    if stages and hasattr(model, "patch_embed") and all(hasattr(stage, "blocks") for stage in stages):
        return [f"layers.{i}.blocks" for i in range(len(stages))], num_prefix_tokens or 0
    return ["blocks"], _prefix_tokens(model, num_prefix_tokens)


def convert_dw_shortcut(
    model: nn.Module, *, num_prefix_tokens: int | None = None, every: int = 1, kernel_sizes: int | tuple[int, ...] = 3, **options
) -> Plan:
    """Put a shortcut around every ``every`` blocks, which stay what they are."""
    _options(options, ("every", "kernel_sizes"))
    kernel_sizes = check_kernel_sizes("convert", "kernel_sizes", kernel_sizes)
    check_int("convert", "every", every, 1)
    check_int("convert", "num_prefix_tokens", num_prefix_tokens, 0, optional=True)
    paths, prefix = _stages(model, num_prefix_tokens)
    swaps, groups = [], []
    for path in paths:
        blocks = model.get_submodule(path)
        wrapped = wrap(blocks, every, kernel_size=kernel_sizes, num_prefix_tokens=prefix)
        new = nn.Sequential(*wrapped) if isinstance(blocks, nn.Sequential) else wrapped
        new.training = blocks.training
        swaps.append((blocks, new))
        groups += wrapped

    def check(probed: Probed) -> None:
        for i, group in enumerate(groups):
            if id(group.blocks[0]) in probed.calls:
                check_shortcut(f"blocks.{i * every}", group, probed.calls[id(group.blocks[0])], probed.grid)

    return Plan(swaps, [group.shortcut for group in groups], groups if paths == ["blocks"] else [], prefix, check)
