"""``convert(model, "life")``: LIFE's attention in place of each block's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lifeops.arguments import check_choice, check_flags
from lifeops.hosts.host import Block
from lifeops.hosts.projections import PROJ, heads_of, projections
from lifeops.integrations.convert_check import check_attention
from lifeops.integrations.convert_plan import Plan, beyond, check_options, host_of, one_list, readable, share_hooks
from lifeops.integrations.convert_probe import Probed, call, paths, ran, sequence
from lifeops.integrations.host_attention import NORMS, class_for, keep
from lifeops.integrations.host_block import host_block
from lifeops.nn.life import LifeAttention
from lifeops.ops.life_qkv.spec import AUX_KEYS

_LOOKED_FOR = "qkv or q_proj, k_proj, v_proj; proj, o_proj or out_proj; num_heads or num_attention_heads"
_KNOWN = ("qkv", "q_proj", "k_proj", "v_proj", *PROJ, "q_bias", "k_bias", "v_bias", "rel_pos", "relative_position_bias_table")


def _attentions(block: Block) -> dict[str, nn.Module]:
    """By their paths in the block: one, or those of a block with several side by side."""
    found = block.part("attn")
    if isinstance(found, nn.ModuleList):
        return {f"{block.attn}.{i}.attn": getattr(branch, "attn", branch) for i, branch in enumerate(found)}
    return {block.attn or "attn": found}


def _check(path: str, attn: nn.Module | None) -> nn.Linear:
    """The output projection of what can be replaced."""
    layers, proj = projections(attn), next((getattr(attn, name) for name in PROJ if hasattr(attn, name)), None)
    if not layers or proj is None or heads_of(attn) is None:
        lacks = [what for what, has in (("q, k and v", layers), ("an output projection", proj), ("heads", heads_of(attn))) if not has]
        raise ValueError(f"convert: {path} is {type(attn).__name__} without {', '.join(lacks)}; looked for {_LOOKED_FOR}")
    for name, layer in layers:
        if not isinstance(layer, nn.Linear):
            readable(f"{path}.{name}", layer)
    odd = [] if getattr(attn, "gate", None) is None else ["gate"]
    odd += beyond(attn, (*_KNOWN, *NORMS, *odd))
    if odd:
        raise ValueError(f"convert: {path} is {type(attn).__name__}, which has {', '.join(odd)}, which LIFE's attention does not know")
    readable(f"{path}.proj", proj)
    dim, heads, width = proj.in_features, heads_of(attn), 3 * proj.in_features // len(layers)
    if {layer.in_features for _, layer in layers} | {proj.out_features} != {dim} or {layer.out_features for _, layer in layers} != {width}:
        sizes = ", ".join(f"{name} {layer.in_features} to {layer.out_features}" for name, layer in (*layers, ("proj", proj)))
        raise ValueError(f"convert: {path} must map {dim} channels to {dim}, in heads of equal number for q, k and v; got {sizes}")
    for name, size in zip(NORMS, (dim // heads, dim // heads, dim), strict=True):
        norm = getattr(attn, name, None)
        shape = getattr(norm, "normalized_shape", getattr(getattr(norm, "weight", None), "shape", (size,)))
        if tuple(shape) != (size,):
            raise ValueError(f"convert: {path}.{name} is over {tuple(shape)} channels, looked for {(size,)}")
    return proj


def _rate(attn: nn.Module, *names: str) -> float:
    """Of a dropout that may be a module, a number, an Identity or missing."""
    found = next((v for v in (getattr(attn, name, None) for name in names) if v is not None), 0.0)
    return found if isinstance(found, float) else getattr(found, "p", 0.0)


def _replacement(attn: nn.Module, proj: nn.Linear, library: str, prefix: int, options: dict) -> LifeAttention:
    new = class_for(attn, library)(
        proj.in_features, heads_of(attn), prefix, attn_drop=_rate(attn, "attn_drop", "attention_dropout", "dropout"),
        proj_drop=_rate(attn, "proj_drop"), proj_bias=proj.bias is not None, device=proj.weight.device, dtype=proj.weight.dtype, **options,
    )  # fmt: skip
    return keep(new, attn)


def _put(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    block.get_submodule(parent)._modules[name] = module


@contextlib.contextmanager
def _instead(block: nn.Module, found: dict[str, nn.Module], news: dict[int, nn.Module]) -> Iterator[None]:
    """The new attentions in the block."""
    try:
        for path, attn in found.items():
            _put(block, path, news[id(attn)])
        yield
    finally:
        for path, attn in found.items():
            _put(block, path, attn)


def convert_life(model: nn.Module, *, num_prefix_tokens: int | None = None, **options) -> Plan:
    """Replace the attention of every block."""
    check_options(options, ("qkv_norm", "aux_key", "recompute"))
    check_flags("convert", **{name: options[name] for name in options.keys() & {"qkv_norm", "recompute"}})
    check_choice("convert", "aux_key", options.get("aux_key", AUX_KEYS[0]), AUX_KEYS)
    host, prefix = host_of(model, num_prefix_tokens)
    one_list(host, "life")
    attentions, news, swaps = {}, {}, []
    for block in host.blocks:
        attentions[id(block.module)] = found = _attentions(block)
        for path, attn in found.items():
            if id(attn) not in news:
                proj = _check(f"{block.path}.{path}", attn)
                news[id(attn)] = _replacement(attn, proj, host.library, prefix, options)
                swaps.append((attn, news[id(attn)]))

    def check(probed: Probed) -> None:
        for path, block, given in ran(host, probed):
            found = attentions[id(block)]
            sequence(path, given.x)
            for inner, attn in found.items():
                check_attention(f"{path}.{inner}", attn, news[id(attn)], lambda p=path, b=block, g=given: call(p, b, g), given, probed.grid)
            with _instead(block, found, news), contextlib.ExitStack() as stack:
                for attn in found.values():
                    stack.enter_context(news[id(attn)].grid_holder.use(probed.grid))
                call(path, block, given)

    asks = list(news.values())
    if host.library != "transformers":
        return Plan(host, swaps, asks, list(paths(host).values()), prefix, True, check)
    clones = _clones(host, attentions, news, swaps)
    return Plan(host, clones, asks + [new for _, new in clones], [], prefix, True, check)


def _clones(host, attentions, news, swaps) -> list[tuple[nn.Module, nn.Module]]:
    """Every block and one with LIFE's attention in it."""
    for attn, new in swaps:
        share_hooks(attn, new)
    found = [(block, host_block(block)) for block in paths(host).values()]
    for block, new in found:
        for path, attn in attentions[id(block)].items():
            _put(new, path, news[id(attn)])
    return found
