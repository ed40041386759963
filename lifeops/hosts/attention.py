"""How an attention layer is read: its q, k, v, scale, what turns q and k, what is added to the scores, and how its heads are mixed.

    A_h = softmax(scale q_h k_hᵀ + bias_h)          q and k rotated where the layer rotates them
    A   = W_w softmax(W_l (scale q kᵀ))             talking heads: W mix the heads

A layer is recognised by its attributes and refused where it holds more than is known. A reading is a claim; that it is what the layer
computes is checked by who uses it (:mod:`lifeops.integrations.attention_check`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.ops.channel_act import accumulate_dtype

LOOKED_FOR = (
    "attention with qkv and num_heads (timm, lifeops), q_proj/k_proj or query/key and num_heads or num_attention_heads (timm,"
    " transformers), qkv_heads (LIFE), q/k/v for a class token (CaiT), in_proj and in_split (parallel MLP), or Swin blocks"
)
_MASKS = ("attn_mask", "attention_mask", "shared_rel_pos_bias", "shared_rel_pos", "relative_position_bias")  # added to the scores
_ROTATIONS = ("rope", "position_embeddings")
Bias = Callable[[slice | Tensor], Tensor]  # some query rows to (b or 1, h or 1, n or 1, N)


class Heads(NamedTuple):
    """What a layer attends with: q (b, h, n, d), k and v (b, h, N, d); ``mix``: what mixes the heads before and behind the softmax."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    scale: float | None
    bias: tuple[Bias, ...] = ()
    mix: tuple[nn.Linear, nn.Linear] | None = None

    @property
    def plain(self) -> bool:
        """softmax(scale q kᵀ) and nothing else."""
        return not self.bias and self.mix is None

    def scores(self, rows: slice | Tensor) -> Tensor:
        """(b, h, n, N) of some queries before the softmax, in float32 or wider; to be called with autocast off."""
        wide = accumulate_dtype(self.q.dtype)
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = scale * self.q[:, :, rows].to(wide) @ self.k.to(wide).transpose(-2, -1)
        for bias in self.bias:
            scores = scores + bias(rows).to(wide)
        return scores if self.mix is None else _mixed(self.mix[0], scores)

    def weights(self, scores: Tensor) -> Tensor:
        """What the values are summed by."""
        weights = scores.softmax(-1)
        return weights if self.mix is None else _mixed(self.mix[1], weights)


def _mixed(linear: nn.Linear, heads: Tensor) -> Tensor:
    """(b, h, n, N) mixed over h."""
    mixed = torch.einsum("oh,bhnm->bonm", linear.weight.to(heads.dtype), heads)
    return mixed if linear.bias is None else mixed + linear.bias.to(heads.dtype)[:, None, None]


class Call(NamedTuple):
    """One run of a layer: its tokens x (B, N, C), the grid (LIFE, tokens that come as maps), the named arguments beside x."""

    module: nn.Module
    x: Tensor
    grid: tuple[int, int] | None
    given: dict

    def of(self, images: list[int]) -> Call:
        B = self.x.shape[0]
        pick = lambda t: t[images] if isinstance(t, Tensor) and t.dim() == 4 and t.shape[0] == B else t  # noqa: E731
        return self._replace(x=self.x[images], given={name: pick(value) for name, value in self.given.items()})

    def tensors(self) -> list[Tensor]:
        """Everything that a later reading needs unchanged."""
        beside = [t for value in self.given.values() for t in (value if isinstance(value, (tuple, list)) else (value,))]
        return [self.x, *(t for t in beside if isinstance(t, Tensor))]


class Kind(NamedTuple):
    """``known``: the children and parameters the layer may hold; ``given``: the tensors that may come with a call."""

    name: str
    matches: Callable[[nn.Module], bool]
    known: frozenset[str]
    given: tuple[str, ...]
    read: Callable[[Call, bool], Heads]


# ------------------------------------------------------------------------------------------------ rotation


def _turned(t: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """The last tokens of t (b, h, N, d) rotated, as many as there are angles; pairs are neighbours or, ``halves``, d / 2 apart."""
    prefix = t.shape[2] - cos.shape[-2]
    own = t[:, :, prefix:]
    if halves:
        first, second = own.chunk(2, -1)
        across = torch.cat((-second, first), -1)
    else:
        across = torch.stack((-own[..., 1::2], own[..., ::2]), -1).flatten(-2)
    return torch.cat((t[:, :, :prefix], (own * cos + across * sin).to(t.dtype)), 2)


def _rotated(call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if (rope := call.given.get("rope")) is not None:  # timm: sines, then cosines
        sin, cos = rope.chunk(2, -1)
        halves = getattr(call.module, "rotate_half", False)
    elif (angles := call.given.get("position_embeddings")) is not None:  # transformers
        (cos, sin), halves = angles, True
    else:
        return q, k
    return _turned(q, cos, sin, halves), _turned(k, cos, sin, halves)


# ------------------------------------------------------------------------------------------------ bias


def _given_bias(t: Tensor) -> Bias:
    t = torch.zeros_like(t, dtype=torch.float32).masked_fill_(~t, -torch.inf) if t.dtype == torch.bool else t
    return lambda rows: t if t.dim() < 2 or t.shape[-2] == 1 else t[..., rows, :]


def _table_bias(table: Tensor, index: Tensor) -> Bias:
    """One row of ``table`` (n, h) for each distance, ``index`` (N, N) the distances."""
    return lambda rows: table[index[rows]].permute(2, 0, 1)


def _axis(table: Tensor, size: int) -> Tensor:
    """(size, size, d): for two places of an axis the vector of their distance, resized as SAM does it."""
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.mT[None], size=2 * size - 1, mode="linear")[0].mT
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at + size - 1]


def _axes_bias(module: nn.Module, q: Tensor, grid: tuple[int, int]) -> Bias:
    """SAM: q's product with a vector per row distance and one per column distance."""
    H, W = grid
    tables = [_axis(table.to(q.dtype), size) for table, size in ((module.rel_pos_h, H), (module.rel_pos_w, W))]

    def bias(rows):
        at = torch.arange(H * W, device=q.device)[rows]
        own = q[:, :, rows]
        down, across = (torch.einsum("bhnd,nkd->bhnk", own, table[p]) for table, p in zip(tables, (at // W, at % W), strict=True))
        return (down[..., :, None] + across[..., None, :]).flatten(-2)

    return bias


def _own_bias(call: Call, q: Tensor) -> list[Bias]:
    module = call.module
    own = getattr(module, "relative_position_bias", None)
    if getattr(module, "relative_position_bias_table", None) is not None:  # timm's BEiT
        return [_table_bias(module.relative_position_bias_table, module.relative_position_index)]
    if isinstance(own, nn.Module):  # Data2Vec
        patch = module.config.patch_size
        size = tuple(n // patch for n in call.given["resolution"])
        return [_given_bias(own(size, call.given.get("interpolate_pos_encoding", False), dim_size=q.shape[2]))]
    if getattr(module, "rel_pos_h", None) is not None:
        return [_axes_bias(module, q, call.grid)]
    return []


def _bias(call: Call, q: Tensor) -> tuple[Bias, ...]:
    if isinstance(getattr(call.module, "rel_pos", None), nn.Module):  # timm's rel-pos ViTs: instead of a shared one
        return (_given_bias(call.module.rel_pos.get_bias()),)
    given = [call.given[name] for name in _MASKS if isinstance(call.given.get(name), Tensor)]
    return (*_own_bias(call, q), *map(_given_bias, given))


# ------------------------------------------------------------------------------------------------ q, k and v


def _num_heads(module: nn.Module) -> int:
    return module.num_heads if hasattr(module, "num_heads") else module.num_attention_heads


def _normed(module: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(getattr(module, name, nn.Identity())(t) for name, t in (("q_norm", q), ("k_norm", k)))


def _scale(module: nn.Module) -> float | None:
    return next((getattr(module, name) for name in ("scale", "scaling") if isinstance(getattr(module, name, None), (int, float))), None)


def _attending(call: Call, q: Tensor, k: Tensor, v: Tensor | None) -> Heads:
    """What both ways to project have in common."""
    q, k = _rotated(call, *_normed(call.module, q, k))
    bias = _bias(call, q)
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (t if t is None else t.repeat_interleave(groups, 1) for t in (k, v))
    return Heads(q, k, v, _scale(call.module), bias)


def _read_life(call: Call, values: bool) -> Heads:
    return Heads(*call.module.qkv_heads(call.x, call.grid), call.module.scale)


def _thirds(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, bias = module.qkv(x), getattr(module, "q_bias", None)
    if bias is not None:
        y = y + torch.cat((bias, torch.zeros_like(bias), module.v_bias)).to(y.dtype)
    return y.unflatten(2, (3, _num_heads(module), -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _read_fused(call: Call, values: bool) -> Heads:
    return _attending(call, *_thirds(call.module, call.x))


def _read_separate(call: Call, values: bool) -> Heads:
    module, x = call.module, call.x
    names = ("q_proj", "k_proj", "v_proj") if hasattr(module, "q_proj") else ("query", "key", "value")
    q = getattr(module, names[0])(x).unflatten(2, (_num_heads(module), -1)).transpose(1, 2)
    rest = [getattr(module, name)(x).unflatten(2, (-1, q.shape[-1])).transpose(1, 2) for name in names[1 : 2 + values]]
    return _attending(call, q, rest[0], rest[1] if values else None)


def _read_talking(call: Call, values: bool) -> Heads:
    return Heads(*_thirds(call.module, call.x), call.module.scale, mix=(call.module.proj_l, call.module.proj_w))


def _read_class(call: Call, values: bool) -> Heads:
    """CaiT's class attention: only the class token asks."""
    module, x = call.module, call.x
    heads = [p(t).unflatten(2, (module.num_heads, -1)).transpose(1, 2) for p, t in ((module.q, x[:, :1]), (module.k, x), (module.v, x))]
    return Heads(*heads, module.scale)


def _read_beside_mlp(call: Call, values: bool) -> Heads:
    module = call.module
    parts = module.in_proj(module.in_norm(call.x)).split(module.in_split, -1)[1:]
    return _attending(call, *(t.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for t in parts))


# ------------------------------------------------------------------------------------------------ the kinds


def _holds(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _counts_heads(module: nn.Module) -> bool:
    return any(isinstance(getattr(module, name, None), int) for name in ("num_heads", "num_attention_heads"))


_OUT = {"q_norm", "k_norm", "attn_drop", "proj", "proj_drop", "norm", "gate", "dropout"}
KINDS = (
    Kind("LIFE", lambda m: hasattr(m, "qkv_heads"), frozenset(), (), _read_life),
    Kind("talking heads", lambda m: _holds(m, "qkv", "proj_l", "proj_w") and _counts_heads(m),
         frozenset({"qkv", "proj_l", "proj_w", "proj", "attn_drop", "proj_drop"}), (), _read_talking),
    Kind("fused", lambda m: _holds(m, "qkv") and _counts_heads(m),
         frozenset({"qkv", "q_bias", "v_bias", "projection", *_OUT}), (*_MASKS, *_ROTATIONS), _read_fused),
    Kind("separate", lambda m: (_holds(m, "q_proj", "k_proj") or _holds(m, "query", "key")) and _counts_heads(m),
         frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value", "o_proj", "out_proj", *_OUT}),
         (*_MASKS, *_ROTATIONS), _read_separate),
    Kind("class", lambda m: _holds(m, "q", "k", "v", "proj") and _counts_heads(m),
         frozenset({"q", "k", "v", "proj", "attn_drop", "proj_drop"}), (), _read_class),
    Kind("beside an MLP", lambda m: _holds(m, "in_norm", "in_proj") and hasattr(m, "in_split") and _counts_heads(m),
         frozenset({"in_norm", "in_proj", "mlp_bias", "q_norm", "k_norm", "attn_drop", "mlp_drop", "mlp_act", "out_proj", "attn_out_proj",
                    "mlp_out_proj", "ls", "drop_path"}), _MASKS[:1], _read_beside_mlp),
)  # fmt: skip


def _relative(module: nn.Module) -> set[str]:
    """The names of its relative positions, as far as :func:`_bias` reads them."""
    index, known = getattr(module, "relative_position_index", None), set()
    if isinstance(index, Tensor) and index.dim() == 2:
        known.add("relative_position_bias_table")
    if hasattr(getattr(module, "rel_pos", None), "get_bias"):
        known.add("rel_pos")
    if _holds(module, "relative_position_bias") and hasattr(getattr(module, "config", None), "patch_size"):
        known.add("relative_position_bias")
    if all(isinstance(getattr(module, name, None), Tensor) for name in ("rel_pos_h", "rel_pos_w")):
        known |= {"rel_pos_h", "rel_pos_w"}
    return known


def kind_of(op: str, path: str, module: nn.Module) -> Kind | None:
    """How ``module`` attends; None if it does not. ValueError if it does in a way that is not known."""
    kind = next((kind for kind in KINDS if kind.matches(module)), None)
    if kind is None or kind.name == "LIFE":
        return kind
    has = {name for named in (module.named_children(), module.named_parameters(recurse=False)) for name, _ in named}
    if _MASKS[0] in kind.given:
        has -= _relative(module)
    if has - kind.known:
        extra = ", ".join(sorted(has - kind.known))
        raise ValueError(f"{op}: {path} is {type(module).__name__} with {extra}, which is not known; looked for {LOOKED_FOR}")
    return kind


# ------------------------------------------------------------------------------------------------ a call


def _arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call by name, the first (the tokens) left out."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the call itself will tell, or a forward without signature
        bound = {f"argument {i + 1}": value for i, value in enumerate(args)} | kwargs
    named = dict(list(bound.items())[1:])
    inner = [named.pop(name) for name in ("args", "kwargs") if name in named]
    for more in inner:
        named |= more if isinstance(more, dict) else {f"argument {i + 2}": value for i, value in enumerate(more)}
    return named


def _tensors(value) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_tensors, value)))


def call_of(op: str, path: str, kind: Kind, module: nn.Module, args: tuple, kwargs: dict) -> Call:
    """What a run of a layer was given, from its pre-hook. ValueError for tensors beside the tokens that are not known."""
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{op}: {path} is given {found}, looked for tokens (B, N, C) or (B, H, W, C)")
    given = _arguments(module, args, kwargs)
    beside = [name for name, value in given.items() if (_tensors(value) and name not in kind.given) or (name == "is_causal" and value)]
    if beside:
        raise ValueError(f"{op}: {path} was called with {', '.join(beside)} beside the tokens, which is not known")
    if kind.name == "LIFE":
        return Call(module, x, _life_grid(module, given), {})
    return Call(module, x, None, given) if x.dim() == 3 else Call(module, x.flatten(1, 2), tuple(x.shape[1:3]), given)


def _life_grid(module: nn.Module, given: dict) -> tuple[int, int]:
    """The call's own, or the one that the model runs with."""
    grid = next((value for name, value in given.items() if name == "grid" and value is not None), None)
    return module.grid_holder.grid if grid is None else grid
