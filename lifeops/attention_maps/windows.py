"""Attention inside the windows of a grid, and the merging of tokens: recorded during a forward pass, walked back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.hosts.attention import Kind, call_of
from lifeops.hosts.heads import Call
from lifeops.hosts.host import PARTS
from lifeops.integrations.attention_check import merge_point
from lifeops.integrations.pass_check import PassCheck
from lifeops.ops.rollout_step import roll


class Options(NamedTuple):
    """How a layer's heads become one matrix: see :func:`lifeops.rollout_step`."""

    head_fusion: str
    residual: float
    discard_ratio: float
    backend: str | None


class WindowLayer:
    """Attention inside shifted windows of a grid: small matrices, (B * windows, h, n, n).

    ``padded_first``: the grid is padded to whole windows and then shifted (transformers), else the other way round (timm).
    """

    attends = True

    def __init__(self, block: nn.Module, grid: tuple[int, int], padded_first: bool = False):
        self.grid, self.padded_first, self.attention = grid, padded_first, None
        self.tokens = grid[0] * grid[1]
        self.sizes(block)

    def sizes(self, block: nn.Module) -> None:
        sizes = block.window_size, getattr(block, "shift_size", 0)
        self.window, self.shift = (tuple(n) if isinstance(n, (tuple, list)) else (n, n) for n in sizes)

    def _shifted(self, r: Tensor) -> Tensor:
        return r.roll((-self.shift[0], -self.shift[1]), (2, 3))

    def windows(self, r: Tensor) -> Tensor:
        """(B, R, H, W) to (B * windows, R, n), shifted and padded as the block does it."""
        (H, W), (h, w) = self.grid, self.window
        r = F.pad(r if self.padded_first else self._shifted(r), (0, -W % w, 0, -H % h))
        r = self._shifted(r) if self.padded_first else r
        return r.unflatten(3, (-1, w)).unflatten(2, (-1, h)).permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(0, 2)

    def _grid(self, r: Tensor, batch: int) -> Tensor:
        """The way back; what fell on padding is lost."""
        (H, W), (h, w) = self.grid, self.window
        r = r.unflatten(0, (batch, -(-H // h), -(-W // w))).unflatten(4, (h, w)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        if self.padded_first:
            return r.roll(self.shift, (2, 3))[:, :, :H, :W]
        return r[:, :, :H, :W].roll(self.shift, (2, 3))

    def back(self, r: Tensor, options: Options) -> Tensor:
        own = self.windows(r.unflatten(2, self.grid))
        out = roll(own, self.attention.to(r.dtype), 0, *options[:3])
        return self._grid(out, len(r)).flatten(2)


class MergeLayer:
    """A 2 x 2 patch merging: a token's weight goes to its parts alike."""

    attends = False

    def __init__(self, grid: tuple[int, int]):
        self.grid = grid

    def back(self, r: Tensor, options: Options) -> Tensor:
        H, W = self.grid
        coarse = r.unflatten(2, (-(-H // 2), -(-W // 2)))
        fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :H, :W]
        parts = [torch.tensor([2] * (n - n % 2) + [1] * (n % 2), dtype=r.dtype, device=r.device) for n in (H, W)]  # an odd edge
        return (fine / (parts[0][:, None] * parts[1])).flatten(2)


# ------------------------------------------------------------------------------------------------ recording


def is_window_block(module: nn.Module) -> bool:
    has = all(hasattr(module, name) for name in ("window_size", "shift_size", "attn"))
    return has and isinstance(getattr(module.attn, "softmax", None), nn.Module)


def _window_checks(records: list, path: str, block: nn.Module, check: PassCheck, seen: dict[str, Tensor]) -> list:
    """Hooks that compare what the attention is given with the windows of the block's input, normed before (Swin) or after (Swin 2)."""

    def attend(module, args):
        check.windows(path, records[-1], args[0], seen.pop("normed", None), seen["x"])

    def leave(module, args, output):
        check.leave(seen.pop("x"), output)

    hooks = [block.attn.register_forward_pre_hook(attend), block.register_forward_hook(leave)]
    if isinstance(getattr(block, "norm1", None), nn.Module):
        hooks.append(block.norm1.register_forward_hook(lambda module, args, output: seen.update(normed=output)))
    return hooks


@contextlib.contextmanager
def window_hooks(records: list, path: str, block: nn.Module, check: PassCheck | None, handles: list) -> Iterator[None]:
    """Takes the block's attention behind its softmax, which a fused kernel would skip."""
    seen: dict[str, Tensor] = {}

    def enter(module, args):
        seen.clear()
        records.append(WindowLayer(module, tuple(args[0].shape[1:3])))
        if check is not None:
            seen["x"] = args[0]
            check.enter(path, module, args[0], 0)

    def softmax(module, args, output):
        records[-1].attention = output

    handles += [block.register_forward_pre_hook(enter), block.attn.softmax.register_forward_hook(softmax)]
    if check is not None:
        handles += _window_checks(records, path, block, check, seen)
    fused = getattr(block.attn, "fused_attn", None)
    if fused:
        block.attn.fused_attn = False
    try:
        yield
    finally:
        if fused:
            block.attn.fused_attn = fused


def is_merge(module: nn.Module) -> bool:
    return type(module).__name__.endswith("PatchMerging") and hasattr(module, "reduction")


def merge_hook(records: list):
    """Notes the grid of a merging's maps (timm), or the one it is called with beside its tokens (transformers)."""

    def enter(module, args, kwargs):
        x = args[0] if args else kwargs["input_feature"]
        records.append(MergeLayer(tuple(x.shape[1:3]) if x.dim() == 4 else _dimensions(args, kwargs)))

    return enter


# ------------------------------------------------------------------------------------------------ windows read from the call


def _dimensions(args: tuple, kwargs: dict) -> tuple[int, int]:
    return tuple(int(n) for n in (args[1] if len(args) > 1 else kwargs["input_dimensions"]))


def window_attention(block: nn.Module) -> nn.Module | None:
    """The module that is given windows in a block of transformers' Swin or of either library's SAM; None if it is no such block."""
    shift = getattr(block, "shift_size", None)
    if not isinstance(getattr(block, "window_size", None), int) or not block.window_size:
        return None
    attention = getattr(block, "attn", None) if shift is None else getattr(block, "attention", None)
    inner = getattr(attention, "self", attention)
    return inner if isinstance(inner, nn.Module) else None


def _by_window(call: Call) -> Call:
    """The mask (windows, n, n) of an image for every image."""
    mask = call.given.get("attention_mask")
    if mask is None:
        return call
    return call._replace(given={**call.given, "attention_mask": mask.repeat(len(call.x) // len(mask), 1, 1)[:, None]})


def hook_windows(records: list, path: str, block: nn.Module, kind: Kind, check: PassCheck | None, handles: list) -> None:
    """The attention of every window is computed again from what the attention module is given, as the pass goes."""
    attention, seen = window_attention(block), {}

    def enter(module, args, kwargs):
        seen.clear()
        seen["x"] = args[0] if args else kwargs["hidden_states"]
        maps = seen["x"].dim() == 4
        records.append(WindowLayer(module, tuple(seen["x"].shape[1:3]) if maps else _dimensions(args, kwargs), padded_first=True))
        if check is not None:
            check.enter(path, module, seen["x"], 0)

    def attend(module, args, kwargs):
        layer, call = records[-1], _by_window(call_of("rollout", path, kind, module, args, kwargs))
        layer.sizes(block)  # a block makes its window smaller for a small grid
        with contextlib.nullcontext() if check is None else check.watch.quiet(), torchlib.without_autocast(call.x):
            heads = kind.read(call, False)
            layer.attention = heads.weights(heads.scores(slice(None)))
        if check is not None:
            check.begin(path, call, kind.read)
            maps = [None if t is None else t.unflatten(1, layer.grid) if t.dim() == 3 else t for t in (seen.get("normed"), seen["x"])]
            check.windows(path, layer, call.x, *maps)

    handles += [block.register_forward_pre_hook(enter, with_kwargs=True), attention.register_forward_pre_hook(attend, with_kwargs=True)]
    if check is not None:
        norm = next(m for m in (getattr(block, name, None) for name in PARTS["norm1"]) if m is not None)
        handles += [
            norm.register_forward_hook(lambda module, args, output: seen.setdefault("normed", output)),
            attention.register_forward_hook(lambda module, args, output: check.end(module, output)),
            block.register_forward_hook(lambda module, args, output: check.leave(seen.pop("x"), output)),
        ]
        if (point := merge_point(attention)) is not None:
            handles.append(point.register_forward_pre_hook(check.merged))
