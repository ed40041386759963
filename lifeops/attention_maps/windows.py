"""Attention inside the windows of a grid, and the merging of tokens: recorded during a forward pass, walked back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.attention_maps.pass_check import PassCheck
from lifeops.attention_maps.protocol import Options, Tokens
from lifeops.hosts.attention import Kind, call_of
from lifeops.hosts.heads import tokens_given
from lifeops.hosts.projections import merge_point
from lifeops.hosts.windows import Windows, by_window, grid_given
from lifeops.ops.rollout_step import roll


class WindowLayer:
    """Attention inside shifted windows of a grid: small matrices, (B * windows, h, n, n). ``padded_first``: see :class:`Windows`."""

    attends, loses = True, True  # what falls on padding is lost

    def __init__(self, path: str, grid: tuple[int, int], sizes: tuple[tuple[int, int], tuple[int, int]], padded_first: bool = False):
        self.path, self.grid, self.padded_first = path, grid, padded_first
        self.window, self.shift = sizes
        self.attention: Tensor | None = None
        self.reads = self.gives = Tokens(0, grid)

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

    @property
    def device(self) -> torch.device:
        return self.attention.device

    @property
    def dtype(self) -> torch.dtype:
        return self.attention.dtype


class MergeLayer:
    """A 2 x 2 patch merging: a token's weight goes to its parts alike."""

    attends, loses = False, False

    def __init__(self, path: str, grid: tuple[int, int]):
        self.path, self.grid = path, grid
        self.reads, self.gives = Tokens(0, grid), Tokens(0, (-(-grid[0] // 2), -(-grid[1] // 2)))

    def back(self, r: Tensor, options: Options) -> Tensor:
        H, W = self.grid
        coarse = r.unflatten(2, (-(-H // 2), -(-W // 2)))
        fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :H, :W]
        parts = [torch.tensor([2] * (n - n % 2) + [1] * (n % 2), dtype=r.dtype, device=r.device) for n in (H, W)]  # an odd edge
        return (fine / (parts[0][:, None] * parts[1])).flatten(2)


# ------------------------------------------------------------------------------------------------ recording


def merge_hook(records: list, path: str):
    """Notes the grid of what is merged."""

    def enter(module, args, kwargs):
        records.append(MergeLayer(path, grid_given(args, kwargs)))

    return enter


@contextlib.contextmanager
def _unfused(attention: nn.Module) -> Iterator[None]:
    """A fused kernel would skip the softmax."""
    fused = getattr(attention, "fused_attn", None)
    if fused:
        attention.fused_attn = False
    try:
        yield
    finally:
        if fused:
            attention.fused_attn = fused


class _Recorder:
    """The hooks on one block; ``kind``: how its attention is read, None where a softmax shows it."""

    def __init__(self, records: list, path: str, windows: Windows, kind: Kind | None, check: PassCheck | None):
        self.records, self.path, self.windows, self.kind, self.check = records, path, windows, kind, check
        self.seen: dict[str, Tensor] = {}

    def enter(self, module, args, kwargs) -> None:
        x = tokens_given(args, kwargs)
        self.seen.clear()
        self.seen["x"] = x
        self.records.append(WindowLayer(self.path, grid_given(args, kwargs), self.windows.sizes, self.windows.padded_first))
        if self.check is not None:
            self.check.enter(self.path, module, x)

    def normed(self, module, args, output) -> None:
        self.seen.setdefault("normed", output)

    def attend(self, module, args, kwargs) -> None:
        layer, x = self.records[-1], tokens_given(args, kwargs)
        layer.window, layer.shift = self.windows.sizes
        if self.kind is not None:
            x = self._read(layer, module, args, kwargs)
        if self.check is not None:
            found = (self.seen.get("normed"), self.seen["x"])
            maps = [None if t is None else t.unflatten(1, layer.grid) if t.dim() == 3 else t for t in found]
            self.check.windows(self.path, layer, x, *maps)

    def _read(self, layer: WindowLayer, module, args, kwargs) -> Tensor:
        """The attention of every window is computed again, as the pass goes."""
        call = by_window(call_of("rollout", self.path, self.kind, module, args, kwargs))
        with contextlib.nullcontext() if self.check is None else self.check.watch.quiet(), torchlib.without_autocast(call.x):
            heads = self.kind.read(call, False)
            layer.attention = heads.weights(heads.scores(slice(None)))
        if self.check is not None:
            self.check.begin(self.path, call, self.kind.read)
        return call.x

    def softmax(self, module, args, output) -> None:
        self.records[-1].attention = output

    def leave(self, module, args, output) -> None:
        self.check.leave(self.seen.pop("x"), output)

    def hooks(self) -> list:
        windows, attention, check = self.windows, self.windows.attention, self.check
        handles = [windows.block.register_forward_pre_hook(self.enter, with_kwargs=True)]
        handles.append(attention.register_forward_pre_hook(self.attend, with_kwargs=True))
        if self.kind is None:
            handles.append(windows.softmax.register_forward_hook(self.softmax))
        if check is None:
            return handles
        handles.append(windows.block.register_forward_hook(self.leave))
        if windows.norm is not None:
            handles.append(windows.norm.register_forward_hook(self.normed))
        if self.kind is not None:
            handles.append(attention.register_forward_hook(lambda module, args, output: check.end(module, output)))
            if (point := merge_point(attention)) is not None:
                handles.append(point.register_forward_pre_hook(check.merged))
        return handles


@contextlib.contextmanager
def window_hooks(records: list, path: str, windows: Windows, kind: Kind | None, check: PassCheck | None) -> Iterator[None]:
    """Records the runs of a block with windows while it is open."""
    with contextlib.ExitStack() as stack:
        if kind is None:
            stack.enter_context(_unfused(windows.attention))
        stack.callback(lambda handles: [handle.remove() for handle in handles], _Recorder(records, path, windows, kind, check).hooks())
        yield
