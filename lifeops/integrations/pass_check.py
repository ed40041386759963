"""What :func:`lifeops.rollout` takes for granted, checked during the forward pass that it records; see :mod:`pass_watch` for how.

A ValueError says what was found and where. Nothing of the size N x N is held, and the model computes what it would have computed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lifeops import geometry
from lifeops.integrations.attention_check import LayerCheck, attended, drops, off, some_images
from lifeops.integrations.pass_watch import EMBEDDED, Watch


def _tokens(output) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _chosen(patches: int) -> Tensor:
    """About half of the patches, in no pattern: an order that maps them to themselves is not met by chance."""
    mask = torch.rand(patches, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:1], mask[1:][-1:] = True, False
    return mask


class PassCheck:
    """``layers``: the modules that are known to attend or to merge; ``parts``: see :mod:`vit_parts`."""

    def __init__(self, model: nn.Module, parts, layers: list[nn.Module]):
        named = list(model.named_modules(remove_duplicate=False))
        known = {id(layer) for layer in layers}
        self.parts, self.embed = parts, parts.embed
        self.watch = Watch({id(m): path for path, m in reversed(named)}, known)
        self.places = Counter(id(m) for _, m in named if id(m) in known)  # how often the model holds each
        self.ran: Counter[int] = Counter()
        self.last: str | None = None  # the path of the layer that ran last
        self.count, self.patches, self.batch = 0, None, 0
        self.open: list[LayerCheck] = []

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Operators of the check itself."""
        before, self.watch.paused = self.watch.paused, True
        try:
            yield
        finally:
            self.watch.paused = before

    # -------------------------------------------------------------------------------------------- the embedding

    def embedded(self, module, args, output) -> None:
        """A hook on the patch embedding."""
        x = _tokens(output)
        if self.patches is not None:
            raise ValueError(f"rollout: {type(module).__name__}, the patch embedding, ran twice in one forward pass")
        if not isinstance(x, Tensor) or x.dim() not in (3, 4):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"rollout: {type(module).__name__}, the patch embedding, must give tokens or maps, got {got}")
        first = x.dim() == 4 and geometry.channels_first(module, x)
        size = x.shape[1:2] if x.dim() == 3 else x.shape[2:4] if first else x.shape[1:3]
        self.patches, self.batch = _chosen(size.numel()).to(x.device), x.shape[0]
        with self.quiet():
            mask = self.patches.view(size)
            self.watch.follow(x, x.masked_fill(mask if first else mask[..., None], float("nan")))
            self.watch.mark(x, {EMBEDDED})

    def _check_place(self, path: str, x: Tensor, prefix: int) -> None:
        """Whether the patches stand behind ``prefix`` tokens, in their order, and nothing behind them."""
        if self.patches is None:
            raise ValueError(f"rollout: {path} attends before {type(self.embed).__name__}, the patch embedding, has run")
        shadow, n = self.watch.shadow_of(x), len(self.patches)
        if x.shape[0] != self.batch:
            raise ValueError(f"rollout: {path} has a batch of {x.shape[0]}, the patch embedding one of {self.batch}: windows or crops")
        if shadow is None or not self.batch:
            if self.batch:
                lost = f" (lost at {self.watch.lost})" if self.watch.lost else ""
                raise ValueError(f"rollout: the patches' way from the embedding to {path} cannot be followed{lost}")
            return
        rows = shadow[0].isnan().any(-1).flatten()
        N, (H, W) = len(rows), self.parts.grid()
        starts = [s for s in range(N - n + 1) if rows.sum() == self.patches.sum() and torch.equal(rows[s : s + n], self.patches)]
        if prefix in starts and N == prefix + n == prefix + H * W:
            return
        raise ValueError(f"rollout: {self._why(path, starts, N, n, prefix, (H, W), bool(rows.any()))}")

    @staticmethod
    def _why(path: str, starts: list[int], N: int, n: int, prefix: int, grid: tuple[int, int], arrived: bool) -> str:
        H, W = grid
        counted = f"{prefix} prefix tokens and a {H} x {W} grid are {prefix + H * W} tokens, the layers have {N}"
        found = counted if N != prefix + H * W else f"{path} does not read the {n} patches as tokens {prefix} to {N - 1} in their order"
        if starts and starts[0] + n < N:
            s = starts[0]
            return f"{found}: tokens {s} to {s + n - 1} are the patches, and {N - s - n} come behind them, which roll-out does not know"
        if starts:
            return f"{found}: tokens {starts[0]} to {N - 1} are the {n} patches (give num_prefix_tokens=…)"
        if not arrived:
            return f"{found}: none of the {n} patches can be followed there"
        if N < n:
            return f"{found}: of {n} patches some are dropped (turn patch dropout off)"
        return f"{found}: the patches are shuffled, dropped, packed or mixed before it"

    # -------------------------------------------------------------------------------------------- the layers

    def enter(self, path: str, module: nn.Module, x: Tensor, prefix: int) -> None:
        """A known layer is about to run on ``x``, which begins with ``prefix`` other tokens."""
        self.ran[id(module)] += 1
        if self.ran[id(module)] > self.places[id(module)]:
            raise ValueError(f"rollout: {path} ran {self.ran[id(module)]} times in one forward pass, which is no chain of layers")
        for event in self.watch.attended[:1]:
            before = "the first layer" if self.last is None else self.last
            where = f"before {path}" if self.last is None else f"between {before} and {path}"
            raise ValueError(f"rollout: {event.path} attends or mixes tokens in a way that is not known: {event.what}, {where}")
        if self.last is None:
            with self.quiet():
                self._check_place(path, x, prefix)
        elif self.count - 1 not in self.watch.marks(x):
            raise ValueError(f"rollout: {path} does not read what {self.last} gave: they stand side by side, and roll-out chains layers")
        for event in self.watch.moved[:1]:
            raise ValueError(f"rollout: {event.path} moves tokens before {path}: {event.what}")
        self.last = path

    def leave(self, x: Tensor, output) -> None:
        self.watch.mark(_tokens(output), {*self.watch.marks(x), self.count})
        self.count += 1
        self.watch.attended, self.watch.moved = [], []

    def begin(self, path: str, module: nn.Module, x: Tensor, read) -> None:
        """Compute some rows of the layer's attention."""
        if drops(module) or not x.numel():
            self.open.append(LayerCheck(path, module, None, x))
            self.open[-1].done = True
            return
        with self.quiet():
            images = some_images(x.shape[0])
            q, k, v, scale = read(x[images])
            self.open.append(LayerCheck(f"rollout: {path}", module, attended(q, k, v, scale, images), x))

    def merged(self, module, args) -> None:
        """A pre-hook on a layer's merge point."""
        if self.open and not self.open[-1].done and args:
            with self.quiet():
                self.open[-1].merged(args[0])

    def end(self, module, output) -> None:
        with self.quiet():
            self.open.pop().ended(output)

    def windows(self, path: str, layer, x: Tensor, *maps: Tensor) -> None:
        """The attention of a window block is given the windows of one of ``maps`` as roll-out cuts them."""
        with self.quiet():
            for m in (m for m in maps if m is not None and len(m)):
                own = layer._windows(m[:1].permute(0, 3, 1, 2)).transpose(1, 2)
                if off(x[: len(own)], own) == 0:
                    return
        raise ValueError(f"rollout: {path} does not attend inside windows of {layer.window} shifted by {layer.shift} as timm's Swin does")

    def finish(self) -> None:
        """Self-attention behind the last known layer is a layer too; a pooling by a few queries is a head."""
        for event in (e for e in self.watch.attended if e.square):
            raise ValueError(f"rollout: {event.path} attends in a way that is not known: {event.what}, behind {self.last}")
