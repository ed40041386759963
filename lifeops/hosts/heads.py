"""What an attention layer attends with, and what one run of it was given; the rotation of its q and k, what is added to its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.nn.rotary import rotate
from lifeops.ops.channel.act import accumulate_dtype

MASKS = ("attn_mask", "attention_mask", "shared_rel_pos_bias", "shared_rel_pos", "relative_position_bias")  # added to the scores
_TOKENS = ("x", "hidden_states", "input_feature")
ROTATIONS = ("rope", "position_embeddings")
Bias = Callable[[slice | Tensor], Tensor]  # some query rows to (b or 1, h or 1, n or 1, N)


class Heads(NamedTuple):
    """What a layer attends with: q (b, h, n, d), k and v (b, h, N, d); ``mix``: what mixes the heads before and behind the softmax.

    ``plus_q``: q is added to what is attended, from this row on; None: nowhere.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    scale: float | None
    bias: tuple[Bias, ...] = ()
    mix: tuple[nn.Linear, nn.Linear] | None = None
    plus_q: int | None = None

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


def tokens_given(args: tuple, kwargs: dict):
    """What an attention, a block or a merging is called with first."""
    return args[0] if args else next((kwargs[name] for name in _TOKENS if name in kwargs), None)


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

    def alone(self, op: str, path: str, image: int, count: int) -> Call:
        """Of one image, of which the first ``count`` tokens are there and the rest is padding. ValueError if these attend to padding."""
        N, given = self.x.shape[1], {}
        masks = [name for name in MASKS if isinstance(self.given.get(name), Tensor)]
        own = lambda t: t[image : image + 1] if t.dim() == 4 and len(t) == len(self.x) else t  # noqa: E731
        hidden = [_hides(own(self.given[name]), count) for name in masks]
        if count < N and not any(hidden):
            raise ValueError(f"{op}: {path} attends to the padding of image {image}: no mask of its call hides tokens {count} to {N - 1}")
        for name, value in self.given.items():
            if name in masks:
                kept = own(value)[..., :count, :count]
                value = kept if additive(kept).any() else None
            elif name in ROTATIONS and value is not None:
                value = own(value)[..., : count - N + value.shape[-2], :]
            given[name] = value
        return self._replace(x=self.x[image : image + 1, :count], given=given)

    def tensors(self) -> list[Tensor]:
        """Everything that a later reading needs unchanged."""
        beside = [t for value in self.given.values() for t in (value if isinstance(value, (tuple, list)) else (value,))]
        return [self.x, *(t for t in beside if isinstance(t, Tensor))]


def _hides(mask: Tensor, count: int) -> bool:
    """Whether the mask (…, n or 1, N) hides the keys from ``count`` on from every query before them."""
    mask = additive(mask)
    return bool((mask[..., :count, count:] <= torch.finfo(mask.dtype).min / 2).all())


def normed(norm: nn.Module | None, t: Tensor) -> Tensor:
    """t (b, h, N, d) by a norm over d or, as wide as they are together, over the joined heads."""
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.numel() == t.shape[1] * t.shape[3] != t.shape[3]:
        return norm(t.transpose(1, 2).flatten(2)).unflatten(2, (t.shape[1], -1)).transpose(1, 2)
    return t if norm is None else norm(t)


# ------------------------------------------------------------------------------------------------ rotation


def rotated(call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k turned by the angles that come with the call or that the layer holds."""
    rope, halves = call.given.get("rope"), getattr(call.module, "rotate_half", False)  # timm: sines, then cosines
    if rope is None and isinstance(getattr(call.module, "rope", None), nn.Module):  # timm's SAM
        rope, halves = call.module.rope.get_embed(), False
    elif rope is None and (angles := call.given.get("position_embeddings")) is not None:  # transformers: cosines, then sines
        rope, halves = torch.cat(angles[::-1], -1), True
    return (q, k) if rope is None else (rotate(q, rope, halves), rotate(k, rope, halves))


# ------------------------------------------------------------------------------------------------ bias


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask as what is added to the scores; a bool one, which says who is attended to, in ``dtype``."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask


def given_bias(t: Tensor) -> Bias:
    """A bias or a mask as fused attention takes it."""
    t = additive(t)
    return lambda rows: t if t.dim() < 2 or t.shape[-2] == 1 else t[..., rows, :]


def table_bias(table: Tensor, index: Tensor) -> Bias:
    """One row of ``table`` (n, h) for each distance, ``index`` (N, N) the distances."""
    return lambda rows: table[index[rows]].permute(2, 0, 1)


def _axis(table: Tensor, size: int) -> Tensor:
    """(size, size, d): for two places of an axis the vector of their distance, resized as SAM does it."""
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.mT[None], size=2 * size - 1, mode="linear")[0].mT
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at + size - 1]


def of_axes(q: Tensor, tables: Iterable[Tensor], places: Iterable[Tensor]) -> Tensor:
    """(b, h, n, H*W): the product of queries (b, h, n, d) with a vector per row distance and one per column distance; ``tables``, of rows
    and of columns, hold those of every place of an axis, ``places`` the queries' own.
    """
    down, across = (torch.einsum("bhnd,nkd->bhnk", q, table[place]) for table, place in zip(tables, places, strict=True))
    return (down[..., :, None] + across[..., None, :]).flatten(-2)


def _axes_bias(module: nn.Module, q: Tensor, grid: tuple[int, int]) -> Bias:
    """SAM: q's product with a vector per row distance and one per column distance."""
    H, W = grid
    tables = [_axis(table.to(q.dtype), size) for table, size in ((module.rel_pos_h, H), (module.rel_pos_w, W))]

    def bias(rows):
        at = torch.arange(H * W, device=q.device)[rows]
        return of_axes(q[:, :, rows], tables, (at // W, at % W))

    return bias


def module_bias(module: nn.Module, given: dict, tokens: int) -> Tensor | None:
    """The layer's own relative positions, a module of transformers: Swin's, or Data2Vec's for the image's ``resolution``, which comes with
    the call; None where it has no such.
    """
    own = getattr(module, "relative_position_bias", None)
    if not isinstance(own, nn.Module) or "resolution" not in given:
        return own() if isinstance(own, nn.Module) else None
    patch = module.config.patch_size
    size = tuple(n // patch for n in given["resolution"])
    return own(size, given.get("interpolate_pos_encoding", False), dim_size=tokens)


def _own_bias(call: Call, q: Tensor) -> list[Bias]:
    module = call.module
    if getattr(module, "relative_position_bias_table", None) is not None:  # timm's BEiT
        return [table_bias(module.relative_position_bias_table, module.relative_position_index)]
    own = module_bias(module, call.given, q.shape[2])
    if own is not None:
        return [given_bias(own)]
    if getattr(module, "rel_pos_h", None) is not None:
        return [_axes_bias(module, q, call.grid)]
    return []


def added(call: Call, q: Tensor) -> tuple[Bias, ...]:
    """What the layer adds to scale q kᵀ: relative positions of its own, and what came with the call."""
    if isinstance(getattr(call.module, "rel_pos", None), nn.Module):  # timm's rel-pos ViTs: instead of a shared one
        return (given_bias(call.module.rel_pos.get_bias()),)
    given = [call.given[name] for name in MASKS if isinstance(call.given.get(name), Tensor)]
    return (*_own_bias(call, q), *map(given_bias, given))


def relative(module: nn.Module) -> set[str]:
    """The names of its relative and rotary positions, as far as :func:`added` and :func:`rotated` read them."""
    index, known = getattr(module, "relative_position_index", None), set()
    if isinstance(index, Tensor) and index.dim() == 2:
        known.add("relative_position_bias_table")
    if hasattr(getattr(module, "rope", None), "get_embed"):
        known.add("rope")
    if hasattr(getattr(module, "rel_pos", None), "get_bias"):
        known.add("rel_pos")
    if isinstance(getattr(module, "relative_position_bias", None), nn.Module) and hasattr(getattr(module, "config", None), "patch_size"):
        known.add("relative_position_bias")
    if all(isinstance(getattr(module, name, None), Tensor) for name in ("rel_pos_h", "rel_pos_w")):
        known |= {"rel_pos_h", "rel_pos_w"}
    return known
