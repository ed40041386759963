"""How an attention layer is read: its q, k, v, scale, what turns q and k, what is added to the scores, and how its heads are mixed.

    A_h = softmax(scale q_h k_hᵀ + bias_h)          q and k rotated where the layer rotates them
    A   = W_w softmax(W_l (scale q kᵀ))             talking heads: W mix the heads

A layer is recognised by its attributes and refused where it holds more than is known. A reading is a claim; that it is what the layer
computes is checked by who uses it (:mod:`lifeops.integrations.attention_check`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.hosts.heads import MASKS, ROTATIONS, Call, Heads, added, given_bias, normed, relative, rotated, table_bias, tokens_given
from lifeops.hosts.pooled import POOLED, matches, read
from lifeops.hosts.projections import NAMED, SEPARATE, heads_of, on_grid, thirds

LOOKED_FOR = (
    "attention with qkv and num_heads (timm, lifeops), q_proj/k_proj or query/key and num_heads or num_attention_heads (timm,"
    " transformers), qkv_heads (LIFE), q/k/v for a class token (CaiT), in_proj and in_split (parallel MLP), pool_q/k/v (MViTv2), or Swin"
    " blocks"
)


_NO_MATRIX = {"RegionalAttention": "attends among regions and, in turns, in the window of each: no one matrix between tokens of one grid"}
"""Classes of lifeops that look like a known kind and are none, and why."""


class Kind(NamedTuple):
    """``known``: the children and parameters the layer may hold; ``given``: the tensors that may come with a call."""

    name: str
    matches: Callable[[nn.Module], bool]
    known: frozenset[str]
    given: tuple[str, ...]
    read: Callable[[Call, bool], Heads]


# ------------------------------------------------------------------------------------------------ q, k and v


def _scale(module: nn.Module) -> float | None:
    return next((getattr(module, name) for name in ("scale", "scaling") if isinstance(getattr(module, name, None), (int, float))), None)


def _attending(call: Call, q: Tensor, k: Tensor, v: Tensor | None) -> Heads:
    """What both ways to project have in common."""
    q, k = rotated(call, *(normed(getattr(call.module, name, None), t) for name, t in (("q_norm", q), ("k_norm", k))))
    bias = added(call, q)
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (t if t is None else t.repeat_interleave(groups, 1) for t in (k, v))
    return Heads(q, k, v, _scale(call.module), bias)


def _read_life(call: Call, values: bool) -> Heads:
    return Heads(*call.module.qkv_heads(call.x, call.grid), call.module.scale)


def _joint(call: Call) -> list[Tensor]:
    """q, k and v (B, h, N, d) of one projection."""
    return [t.unflatten(2, (heads_of(call.module), -1)).transpose(1, 2) for t in thirds(call.module, call.x, call.grid)]


def _read_fused(call: Call, values: bool) -> Heads:
    return _attending(call, *_joint(call))


def _read_separate(call: Call, values: bool) -> Heads:
    module, x = call.module, call.x
    names = SEPARATE if hasattr(module, "q_proj") else NAMED
    q = getattr(module, names[0])(x).unflatten(2, (heads_of(module), -1)).transpose(1, 2)
    rest = [getattr(module, name)(x).unflatten(2, (-1, q.shape[-1])).transpose(1, 2) for name in names[1 : 2 + values]]
    return _attending(call, q, rest[0], rest[1] if values else None)


def _read_talking(call: Call, values: bool) -> Heads:
    return Heads(*_joint(call), call.module.scale, mix=(call.module.proj_l, call.module.proj_w))


def _read_class(call: Call, values: bool) -> Heads:
    """CaiT's class attention: only the class token asks."""
    module, x = call.module, call.x
    heads = [p(t).unflatten(2, (module.num_heads, -1)).transpose(1, 2) for p, t in ((module.q, x[:, :1]), (module.k, x), (module.v, x))]
    return Heads(*heads, module.scale)


def _read_cosine(call: Call, values: bool) -> Heads:
    """Swin 2 of transformers: q and k of length one, a scale per head, a bias that an MLP gives; the mask is added twice there."""
    module, h = call.module, call.module.num_attention_heads
    q, k, v = (p(call.x).unflatten(2, (h, -1)).transpose(1, 2) for p in (module.query, module.key, module.value))
    table = 16 * module.continuous_position_bias_mlp(module.relative_coords_table).view(-1, h).sigmoid()
    mask = call.given.get("attention_mask")
    bias = (table_bias(table, module.relative_position_index), *(() if mask is None else 2 * (given_bias(mask),)))
    return Heads(F.normalize(q, dim=-1) * module.logit_scale.clamp(max=math.log(100)).exp(), F.normalize(k, dim=-1), v, 1.0, bias)


def _read_beside_mlp(call: Call, values: bool) -> Heads:
    module = call.module
    parts = on_grid(module.in_proj, module.in_norm(call.x), call.grid).split(module.in_split, -1)[1:]
    return _attending(call, *(t.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for t in parts))


# ------------------------------------------------------------------------------------------------ the kinds


def _holds(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _counts_heads(module: nn.Module) -> bool:
    return any(isinstance(getattr(module, name, None), int) for name in ("num_heads", "num_attention_heads"))


_OUT = {"q_norm", "k_norm", "attn_drop", "proj", "proj_drop", "norm", "gate", "dropout", "projection_layer", "projection_dropout"}
KINDS = (
    Kind("LIFE", lambda m: hasattr(m, "qkv_heads"), frozenset(), (), _read_life),
    Kind("talking heads", lambda m: _holds(m, "qkv", "proj_l", "proj_w") and _counts_heads(m),
         frozenset({"qkv", "proj_l", "proj_w", "proj", "attn_drop", "proj_drop"}), (), _read_talking),
    Kind("pooled", lambda m: matches(m) and _holds(m, "qkv") and _counts_heads(m), POOLED, (), read),
    Kind("fused", lambda m: _holds(m, "qkv") and _counts_heads(m),
         frozenset({"qkv", "q_bias", "v_bias", "projection", *_OUT}), (*MASKS, *ROTATIONS), _read_fused),
    Kind("cosine", lambda m: _holds(m, "query", "key", "value", "continuous_position_bias_mlp") and _counts_heads(m),
         frozenset({"query", "key", "value", "continuous_position_bias_mlp", "logit_scale", "dropout"}), MASKS[1:2], _read_cosine),
    Kind("separate", lambda m: (_holds(m, "q_proj", "k_proj") or _holds(m, "query", "key")) and _counts_heads(m),
         frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value", "o_proj", "out_proj", *_OUT}),
         (*MASKS, *ROTATIONS), _read_separate),
    Kind("class", lambda m: _holds(m, "q", "k", "v", "proj") and _counts_heads(m),
         frozenset({"q", "k", "v", "proj", "attn_drop", "proj_drop"}), (), _read_class),
    Kind("beside an MLP", lambda m: _holds(m, "in_norm", "in_proj") and hasattr(m, "in_split") and _counts_heads(m),
         frozenset({"in_norm", "in_proj", "mlp_bias", "q_norm", "k_norm", "attn_drop", "mlp_drop", "mlp_act", "out_proj", "attn_out_proj",
                    "mlp_out_proj", "ls", "drop_path"}), MASKS[:1], _read_beside_mlp),
)  # fmt: skip


def kind_of(op: str, path: str, module: nn.Module) -> Kind | None:
    """How ``module`` attends; None if it does not. ValueError if it does in a way that is not known."""
    kind = next((kind for kind in KINDS if kind.matches(module)), None)
    if kind is None or kind.name == "LIFE":
        return kind
    if (why := _NO_MATRIX.get(type(module).__name__)) is not None:
        raise ValueError(f"{op}: {path} is {type(module).__name__}, which {why}; looked for {LOOKED_FOR}")
    has = {name for named in (module.named_children(), module.named_parameters(recurse=False)) for name, _ in named}
    if MASKS[0] in kind.given:
        has -= relative(module)
    if has - kind.known:
        extra = ", ".join(sorted(has - kind.known))
        raise ValueError(f"{op}: {path} is {type(module).__name__} with {extra}, which is not known; looked for {LOOKED_FOR}")
    return kind


def parallel_attentions(block: nn.Module) -> list[nn.Module]:
    """Those that stand side by side in a parallel block."""
    lists = [getattr(block, name, None) for name in ("attns", "ffns")]
    return list(block.attns) if all(isinstance(found, nn.ModuleList) and len(found) > 1 for found in lists) else []


def side_by_side(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The parallel blocks (ParallelThingsBlock) by the modules of their attentions."""
    return {part: block for block in model.modules() for attn in parallel_attentions(block) for part in attn.modules()}


# ------------------------------------------------------------------------------------------------ a call


def arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call by name, the first (the tokens) left out."""
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*args, **kwargs).arguments
        gathered = [p.name for p in signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    except (TypeError, ValueError):  # the call itself will tell, or a forward without signature
        bound, gathered = {f"argument {i + 1}": value for i, value in enumerate(args)} | kwargs, []
    named = dict(list(bound.items())[1:])
    inner = [named.pop(name) for name in gathered if name in named]
    for more in inner:
        named |= more if isinstance(more, dict) else {f"argument {i + 2}": value for i, value in enumerate(more)}
    return named


def _tensors(value) -> bool:
    held = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return isinstance(value, Tensor) or any(map(_tensors, held))


def call_of(op: str, path: str, kind: Kind, module: nn.Module, args: tuple, kwargs: dict) -> Call:
    """What a run of a layer was given, from its pre-hook. ValueError for tensors beside the tokens that are not known."""
    x = tokens_given(args, kwargs)
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{op}: {path} is given {found}, looked for tokens (B, N, C) or (B, H, W, C)")
    given = arguments(module, args, kwargs)
    beside = [name for name, value in given.items() if (_tensors(value) and name not in kind.given) or (name == "is_causal" and value)]
    if beside:
        raise ValueError(f"{op}: {path} was called with {', '.join(beside)} beside the tokens, which is not known")
    if kind.name == "LIFE":
        return Call(module, x, _told_grid(module, given), {})
    if kind.name == "pooled":
        grid = given["feat_size"] if "feat_size" in given else _told_grid(module, given)
        return Call(module, x, tuple(int(n) for n in grid), {})
    if x.dim() == 3 and getattr(module, "rel_pos_h", None) is not None:
        found = f"has relative positions of rows and columns and is given {tuple(x.shape)}"
        raise ValueError(f"{op}: {path} {found}, looked for maps (B, H, W, C)")
    return Call(module, x, _bound_grid(module), given) if x.dim() == 3 else Call(module, x.flatten(1, 2), tuple(x.shape[1:3]), given)


def _bound_grid(module: nn.Module) -> tuple[int, int] | None:
    """Of a layer with LIFE's q, k and v the one that the model runs with."""
    layers = (getattr(module, name, None) for name in ("qkv", "in_proj"))
    return next((layer.grid_holder.grid for layer in layers if getattr(layer, "needs_grid", False)), None)


def _told_grid(module: nn.Module, given: dict) -> tuple[int, int]:
    """The call's own, or the one that the model runs with."""
    grid = next((value for name, value in given.items() if name == "grid" and value is not None), None)
    return module.grid_holder.grid if grid is None else grid
