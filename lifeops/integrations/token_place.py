"""Where a model's patches stand among its tokens: their embedding is followed, operator by operator, to where the tokens are read."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lifeops import geometry
from lifeops.integrations.pass_watch import EMBEDDED, Watch


def tokens_of(output) -> Tensor:
    """What comes first of several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _told(output, tokens: int) -> int:
    """How many of ``tokens`` are patches, by the grid that comes beside them; all where none does."""
    beside = output[1] if isinstance(output, (tuple, list)) and len(output) == 2 else None
    return math.prod(beside) if isinstance(beside, (tuple, list)) else tokens


def chosen(patches: int) -> Tensor:
    """About half of the patches, in no pattern: an order that maps them to themselves is not met by chance."""
    mask = torch.rand(patches, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:1], mask[1:][-1:] = True, False
    return mask


def rows_at(rows: Tensor, mask: Tensor) -> list[int]:
    """Where ``rows`` (N,) are ``mask`` (n,) and nothing else."""
    n = len(mask)
    return [s for s in range(len(rows) - n + 1) if rows.sum() == mask.sum() and torch.equal(rows[s : s + n], mask)]


class Place:
    """One forward pass of a model with the patch embedding ``embed``; ``op`` is who asks."""

    def __init__(self, op: str, watch: Watch, embed: nn.Module):
        self.op, self.watch, self.embed = op, watch, embed
        self.mask: Tensor | None = None  # the patches that are followed
        self.batch = 0

    def embedded(self, module, args, output) -> None:
        """A hook on the patch embedding."""
        x, name = tokens_of(output), f"{type(module).__name__}, the patch embedding,"
        if self.mask is not None:
            raise ValueError(f"{self.op}: {name} ran twice in one forward pass")
        if not isinstance(x, Tensor) or x.dim() not in (3, 4):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{self.op}: {name} must give tokens or maps, got {got}")
        first = x.dim() == 4 and geometry.channels_first(module, x)
        size = x.shape[1:2] if x.dim() == 3 else x.shape[2:4] if first else x.shape[1:3]
        before = x.shape[1] - _told(output, x.shape[1]) if x.dim() == 3 else 0  # NaFlexViT's prefix tokens
        self.mask, self.batch = chosen(size.numel() - before).to(x.device), x.shape[0]
        with self.watch.quiet():
            mask = torch.cat((self.mask.new_zeros(before), self.mask)).view(size)
            self.watch.follow(x, x.masked_fill(mask if first else mask[..., None], float("nan")))
            self.watch.mark(x, {EMBEDDED})

    def follow(self, x: Tensor, prefix: int) -> None:
        """Follow the same patches on from ``x`` (B, N, C), where they come behind ``prefix`` tokens."""
        with self.watch.quiet():
            mask = torch.nn.functional.pad(self.mask, (prefix, 0))
            self.watch.follow(x, x.masked_fill(mask[:, None], float("nan")))

    def check(self, path: str, x: Tensor, prefix: int, grid: tuple[int, int]) -> None:
        """Raise unless in ``x``, which ``path`` reads, the patches of ``grid`` come in order behind ``prefix`` tokens, and nothing more."""
        if self.mask is None:
            raise ValueError(f"{self.op}: {path} runs before {type(self.embed).__name__}, the patch embedding, has run")
        if x.shape[0] != self.batch:
            raise ValueError(f"{self.op}: {path} has a batch of {x.shape[0]}, the patch embedding one of {self.batch}: windows or crops")
        if not self.batch:
            return
        shadow, n = self.watch.shadow_of(x), len(self.mask)
        if shadow is None:
            lost = f" (lost at {self.watch.lost})" if self.watch.lost else ""
            raise ValueError(f"{self.op}: the patches' way from the embedding to {path} cannot be followed{lost}")
        with self.watch.quiet():
            rows = shadow[0].isnan().any(-1).flatten()
            starts, N, (H, W) = rows_at(rows, self.mask), len(rows), grid
        if not (prefix in starts and N == prefix + n == prefix + H * W):
            raise ValueError(f"{self.op}: {self._why(path, starts, N, n, prefix, grid, bool(rows.any()))}")

    @staticmethod
    def _why(path: str, starts: list[int], N: int, n: int, prefix: int, grid: tuple[int, int], arrived: bool) -> str:
        H, W = grid
        counted = f"{prefix} prefix tokens and a {H} x {W} grid are {prefix + H * W} tokens, the layers have {N}"
        found = counted if prefix + H * W != N else f"{path} does not read the {n} patches as tokens {prefix} to {N - 1} in their order"
        if starts and starts[0] + n < N:
            s = starts[0]
            return f"{found}: tokens {s} to {s + n - 1} are the patches, and {N - s - n} come behind them, which is not known"
        if starts:
            return f"{found}: in {path} tokens {starts[0]} to {N - 1} are the {n} patches (give num_prefix_tokens=…)"
        if not arrived:
            return f"{found}: none of the {n} patches can be followed there"
        if n > N:
            return f"{found}: of {n} patches some are dropped (turn patch dropout off)"
        return f"{found}: the patches are shuffled, dropped, packed or mixed before it"
