"""Attention inside the windows of a grid, and the merging of tokens: recorded during a forward pass, walked back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.integrations.pass_check import PassCheck
from lifeops.ops.rollout_step import roll


class Options(NamedTuple):
    """How a layer's heads become one matrix: see :func:`lifeops.rollout_step`."""

    head_fusion: str
    residual: float
    discard_ratio: float
    backend: str | None


class WindowLayer:
    """Attention inside shifted windows of a grid: small matrices, (B * windows, h, n, n), taken as the model computed them."""

    attends = True

    def __init__(self, block: nn.Module, grid: tuple[int, int]):
        self.window, self.shift, self.grid = tuple(block.window_size), tuple(block.shift_size), grid
        self.tokens, self.attention = grid[0] * grid[1], None

    def _windows(self, r: Tensor) -> Tensor:
        """(B, R, H, W) to (B * windows, R, n), rolled and padded as the block does it."""
        (H, W), (h, w) = self.grid, self.window
        r = F.pad(r.roll((-self.shift[0], -self.shift[1]), (2, 3)), (0, -W % w, 0, -H % h))
        return r.unflatten(3, (-1, w)).unflatten(2, (-1, h)).permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(0, 2)

    def _grid(self, r: Tensor, batch: int) -> Tensor:
        """The way back; what fell on padding is lost."""
        (H, W), (h, w) = self.grid, self.window
        r = r.unflatten(0, (batch, -(-H // h), -(-W // w))).unflatten(4, (h, w)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return r[:, :, :H, :W].roll(self.shift, (2, 3))

    def back(self, r: Tensor, options: Options) -> Tensor:
        own = self._windows(r.unflatten(2, self.grid))
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
    return type(module).__name__ == "PatchMerging" and hasattr(module, "reduction")
