"""``convert(model, "life")``: LIFE's attention in place of each block's, or LIFE's q, k and v in one that does more with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from lifeops.arguments import check_choice, check_flags
from lifeops.hosts.host import Block, Host
from lifeops.hosts.projections import BIASES, INNER, NAMED, OUTPUT, PROJ, SEPARATE, core, heads_of, joined, projections
from lifeops.integrations.convert_check import check_attention, check_projections
from lifeops.integrations.convert_plan import Plan, beyond, check_options, host_of, one_list, readable, share_hooks
from lifeops.integrations.convert_probe import Call, Probed, call, paths, ran, sequence
from lifeops.integrations.host_attention import NORMS, POSITIONS, class_for, keep, norm_width
from lifeops.integrations.host_block import host_block, same_parts
from lifeops.integrations.life_projection import LifeProjection, projection_for
from lifeops.nn.life import LifeAttention
from lifeops.ops.life_qkv.spec import AUX_KEYS

_LOOKED_FOR = (
    "qkv, or q_proj, k_proj, v_proj, or query, key, value inside; proj, o_proj, out_proj, projection, projection_layer or output.dense;"
    " num_heads or num_attention_heads"
)
_KNOWN = ("qkv", *SEPARATE, *NAMED, *PROJ, *BIASES, *NORMS, *POSITIONS, "relative_position_bias_table")


_WINDOWS = "windows or maps"


class _Swap(NamedTuple):
    """``old``, at ``path`` in its block (in an attention until it is known where that is), and what takes its place.

    ``asks``: what of it asks for a grid. ``layer``: the one that a :class:`LifeProjection` stands for.
    """

    path: str
    old: nn.Module
    new: nn.Module
    asks: LifeAttention | LifeProjection
    layer: nn.Linear | None = None


def _attentions(block: Block) -> dict[str, nn.Module]:
    """By their paths in the block: one, those of a block with several side by side, or the block itself where it attends."""
    found = block.part("attn")
    if found is None and hasattr(block.module, "in_split"):
        return {"": block.module}
    if isinstance(found, nn.ModuleList):
        return {f"{block.attn}.{i}.attn": getattr(branch, "attn", branch) for i, branch in enumerate(found)}
    return {block.attn or "attn": found}


def _odd(block: Block, attn: nn.Module) -> list[str]:
    """What the attention has that :class:`LifeAttention` does not know."""
    odd = [name for name in ("gate", "proj_l") if getattr(attn, name, None) is not None]
    odd += [] if core(attn) is attn else beyond(attn, (INNER, OUTPUT))
    odd += beyond(core(attn), (*_KNOWN, *odd))
    return [*odd, _WINDOWS] if hasattr(block.module, "window_size") else odd


def _check(path: str, attn: nn.Module | None) -> nn.Linear:
    """The output projection of what can be replaced."""
    layers, proj, heads = (None, None, None) if attn is None else (projections(attn), joined(attn), heads_of(attn))
    if not layers or proj is None or heads is None:
        lacks = [what for what, has in (("q, k and v", layers), ("an output projection", proj), ("heads", heads)) if not has]
        raise ValueError(f"convert: {path} is {type(attn).__name__} without {', '.join(lacks)}; looked for {_LOOKED_FOR}")
    for name, layer in layers:
        if not isinstance(layer, nn.Linear):
            readable(f"{path}.{name}", layer)
    name, proj = proj
    readable(f"{path}.{name}", proj)
    dim, width = proj.in_features, 3 * proj.in_features // len(layers)
    if {layer.in_features for _, layer in layers} | {proj.out_features} != {dim} or {layer.out_features for _, layer in layers} != {width}:
        sizes = ", ".join(f"{name} {layer.in_features} to {layer.out_features}" for name, layer in (*layers, (name, proj)))
        raise ValueError(f"convert: {path} must map {dim} channels to {dim}, in heads of equal number for q, k and v; got {sizes}")
    for name, sizes in zip(NORMS, ((dim // heads, dim), (dim // heads, dim), (dim,)), strict=True):
        if (width := norm_width(getattr(attn, name, None))) not in (None, *sizes):
            raise ValueError(f"convert: {path}.{name} is over {width} channels, looked for {' or '.join(map(str, sizes))}")
    return proj


def _exchange(host: Host, block: Block, path: str, attn: nn.Module | None, prefix: int, options: dict) -> _Swap:
    """LIFE's attention for a plain one; its q, k and v alone where the attention has something of its own that goes by them."""
    if attn is block.module:
        return _projection(attn, block.path, "in_proj", prefix, options)
    odd = _odd(block, attn) if attn is not None and projections(attn) else []
    windows = odd == [_WINDOWS] and host.library == "transformers" and host.grid_from == "call" and len(projections(attn)) == 3  # Swin
    if windows or not odd:
        new = _replacement(attn, _check(path, attn), class_for(attn, host.library, windows), prefix, options)
        if windows:
            new.block = (block.module,)
        return _Swap("", attn, new, new)
    if isinstance(getattr(attn, "qkv", None), nn.Linear):
        return _projection(attn, path, "qkv", prefix, {"block": block.module, **options})
    raise ValueError(
        f"convert: {path} is {type(attn).__name__}, which has {', '.join(odd)}, which LIFE's attention does not know; looked for a linear"
        " layer qkv, in whose place LIFE's q, k and v leave the rest as it is"
    )


def _projection(attn: nn.Module, path: str, name: str, prefix: int, options: dict) -> _Swap:
    layer, heads = getattr(attn, name), heads_of(attn)
    if name == "in_proj":  # whose MLP's weights are copied
        readable(f"{path}.{name}", layer)
    new = None if heads is None else projection_for(attn, name, heads, prefix, options)
    if new is None:
        got = f"{layer.in_features} channels to {layer.out_features}, heads: {heads}"
        raise ValueError(f"convert: {path}.{name} must give q, k and v as wide as its tokens, a multiple of the heads; got {got}")
    if all(getattr(attn, bias, None) is None for bias in BIASES):
        return _Swap(name, layer, new, new, layer)
    if not hasattr(attn, "qkv_bias_separate"):
        raise ValueError(f"convert: {path} is {type(attn).__name__}, which reads the weight of {name} beside biases of its own")
    same = same_parts(attn)
    same._modules[name], same.qkv_bias_separate = new, True  # it calls the layer then, and adds its biases
    return _Swap("", attn, same, new, layer)


def _get(module, path: str):
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _rate(attn: nn.Module, *names: str) -> float:
    """Of a dropout that may be a module, a number, an Identity or missing."""
    found = next((v for v in (_get(attn, name) for name in names) if v is not None), 0.0)
    return found if isinstance(found, float) else getattr(found, "p", 0.0)


def _replacement(attn: nn.Module, proj: nn.Linear, cls: type[LifeAttention], prefix: int, options: dict) -> LifeAttention:
    new = cls(
        proj.in_features, heads_of(attn), prefix, attn_drop=_rate(core(attn), "attn_drop", "attention_dropout", "dropout_prob", "dropout"),
        proj_drop=_rate(attn, "proj_drop", "projection_dropout", f"{OUTPUT}.dropout"), proj_bias=proj.bias is not None,
        device=proj.weight.device, dtype=proj.weight.dtype, **options,
    )  # fmt: skip
    return keep(new, attn)


def _path(*parts: str) -> str:
    return ".".join(filter(None, parts))


def _put(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    block.get_submodule(parent)._modules[name] = module


@contextlib.contextmanager
def _instead(block: nn.Module, swaps: list[_Swap]) -> Iterator[None]:
    """The new modules in the block."""
    try:
        for swap in swaps:
            _put(block, swap.path, swap.new)
        yield
    finally:
        for swap in swaps:
            _put(block, swap.path, swap.old)


def _try(host: Host, path: str, block: nn.Module, swaps: list[_Swap], given: Call, grid: tuple[int, int] | None) -> None:
    """Raise unless the block, given the old q, k and v, is what it was, and runs with the new ones."""

    def run():
        return call(path, block, given)

    for swap in swaps:
        if swap.layer is None:
            sequence(path, given.x)
            check_attention(f"{path}.{swap.path}", swap.old, swap.new, run, given, grid)
    layers = {f"{path}.{swap.path}": (swap.layer, swap.asks) for swap in swaps if swap.layer is not None}
    if layers and host.library == "transformers" and given.x.dim() == 3:
        what = f"with attention that does more with q, k and v than LIFE's, and is given tokens {tuple(given.x.shape)}"
        raise ValueError(f"convert: {path} is {type(block).__name__} {what}; of transformers looked for maps (B, H, W, C)")
    expected = run() if layers else None
    with _instead(block, swaps), contextlib.ExitStack() as stack:
        if layers:
            check_projections(path, layers, run, expected, given)
        for swap in swaps:
            stack.enter_context(swap.asks.grid_holder.use(grid))
        run()


def convert_life(model: nn.Module, *, num_prefix_tokens: int | None = None, **options) -> Plan:
    """Replace the attention of every block, or what makes its q, k and v."""
    check_options(options, ("qkv_norm", "aux_key", "recompute"))
    check_flags("convert", **{name: options[name] for name in options.keys() & {"qkv_norm", "recompute"}})
    check_choice("convert", "aux_key", options.get("aux_key", AUX_KEYS[0]), AUX_KEYS)
    host, prefix = host_of(model, num_prefix_tokens)
    windows = host.staged and all(hasattr(block.module, "window_size") for block in host.blocks)
    if not windows:
        one_list(host, "life")
    made: dict[int, _Swap] = {}
    found: dict[int, list[_Swap]] = {}
    for block in host.blocks:
        for inner, attn in _attentions(block).items() if id(block.module) not in found else ():
            if id(attn) not in made:
                made[id(attn)] = _exchange(host, block, _path(block.path, inner), attn, prefix, options)
            swap = made[id(attn)]
            found.setdefault(id(block.module), []).append(swap._replace(path=_path(inner, swap.path)))

    def check(probed: Probed) -> None:
        for path, block, given in ran(host, probed):
            _try(host, path, block, found[id(block)], given, probed.grid)

    swaps = [(swap.old, swap.new) for swap in made.values()]
    asks = [swap.asks for swap in made.values() if getattr(swap.asks, "window", None) is None]
    if windows and asks:
        raise ValueError(f"convert: {type(host.trunk).__name__} has stages of blocks, and in some of them attention outside of windows")
    if host.library != "transformers" or not asks:
        return Plan(host, swaps, asks, list(paths(host).values()) if asks else [], prefix, bool(asks), check)
    if any(swap.layer is not None for swap in made.values()):
        return Plan(host, swaps, asks, [], prefix, bool(asks), check)
    clones = _clones(host, found, swaps)
    return Plan(host, clones, asks + [new for _, new in clones], [], prefix, True, check)


def _clones(host: Host, found: dict[int, list[_Swap]], swaps: list[tuple[nn.Module, nn.Module]]) -> list[tuple[nn.Module, nn.Module]]:
    """Every block and one with LIFE's attention in it."""
    for old, new in swaps:
        share_hooks(old, new)
    blocks = [(block, host_block(block)) for block in paths(host).values()]
    for block, new in blocks:
        for swap in found[id(block)]:
            _put(new, swap.path, swap.new)
    return blocks
