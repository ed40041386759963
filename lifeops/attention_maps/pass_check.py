"""What :func:`lifeops.rollout` takes for granted, checked during the forward pass that it records; see :mod:`pass_watch` for how.

A ValueError says what was found and where. Nothing of the size N x N is held, and the model computes what it would have computed.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn

from lifeops.attention_maps.host_pass import HostPass
from lifeops.integrations.attention_check import LayerCheck, attended_by, drops, off, some_images
from lifeops.integrations.pass_watch import Event, Watch
from lifeops.integrations.token_place import Place, tokens_of


class PassCheck:
    """``layers``: the modules that are known to attend or to merge; ``host_pass``: see :mod:`host_pass`."""

    def __init__(self, model: nn.Module, host_pass: HostPass, layers: list[nn.Module]):
        named = list(model.named_modules(remove_duplicate=False))
        known = {id(layer) for layer in layers}
        self.host_pass = host_pass
        self.watch = Watch({id(m): path for path, m in reversed(named)}, known | set(map(id, host_pass.host.pickers)))
        self.places = Counter(id(m) for _, m in named if id(m) in known)  # how often the model holds each
        self.ran: Counter[int] = Counter()
        self.last: str | None = None  # the path of the layer that ran last
        self.place, self.count = Place("rollout", self.watch, host_pass.host.embed), 0
        self.before: set[int] = set()  # the marks of what the last layers read
        self.gave: set[int] = set()  # and of what they gave: one layer, or several side by side
        self.open: list[LayerCheck] = []
        self.masking: set[int] = set()  # the marks of what masks were made by
        self.late, self.tokens = host_pass.host.late, 0  # how many tokens have still to join; how many the last layer read

    # -------------------------------------------------------------------------------------------- the layers

    def enter(self, path: str, module: nn.Module, x: Tensor, beside: bool = False, given: tuple[Tensor, ...] = ()) -> None:
        """A known layer is about to run on ``x``; ``beside`` the one that ran last. ``given``: the masks that it is called with."""
        self.ran[id(module)] += 1
        if self.ran[id(module)] > self.places[id(module)]:
            raise ValueError(f"rollout: {path} ran {self.ran[id(module)]} times in one forward pass, which is no chain of layers")
        marks = self.watch.marks(x)
        where = f"before {path}" if self.last is None else f"between {self.last} and {path}"
        self.masking |= {e.mark for e in self.watch.events} & set().union(*map(self.watch.marks, given))
        for event in self._unaccounted(marks, moves=False):
            raise ValueError(f"rollout: {event.path} attends or mixes tokens in a way that is not known: {event.what}, {where}")
        if not beside:
            self.before, self.gave = self.gave, set()
        if self.last is None:
            self.place.check(path, x, self.host_pass.prefix, self.host_pass.grid)
        elif beside and (self.gave & marks or not self.before <= marks):
            raise ValueError(f"rollout: {path} does not read what {self.last} read, beside which it stands")
        elif not beside and not self.before <= marks:
            raise ValueError(f"rollout: {path} does not read what {self.last} gave: they stand side by side, and roll-out chains layers")
        elif self.late and x.shape[1] != self.tokens:
            self.place.check(path, x, self.host_pass.prefix + self.late, self.host_pass.grid)
            self.late = 0
        for event in self._unaccounted(marks, moves=True):
            raise ValueError(f"rollout: {event.path} moves tokens before {path}: {event.what}")
        self.last, self.tokens = path, x.shape[1]

    def _unaccounted(self, marks, moves: bool) -> list[Event]:
        """What ran since the last layer, unless it made a mask and the tokens, which bear ``marks``, do not depend on it."""
        return [e for e in self.watch.events if e.moves == moves and (e.mark in marks or e.mark not in self.masking)]

    def leave(self, x: Tensor, output) -> None:
        tokens = tokens_of(output)
        self.watch.remark(tokens, {*self.watch.marks(x), self.count})  # not on what its mask was made by
        self.gave.add(self.count)
        self.count += 1
        self.watch.events = [event for event in self.watch.events if event.mark in self.masking]
        if self.late:
            self.place.follow(tokens, self.host_pass.prefix)

    def begin(self, path: str, call, read) -> None:
        """Compute some rows of the attention of a layer's :class:`~lifeops.hosts.heads.Call`."""
        module, x = call.module, call.x
        if drops(module) or not x.numel():
            self.open.append(LayerCheck(path, module, None, x))
            self.open[-1].done = True
            return
        with self.watch.quiet():
            images = some_images(x.shape[0])
            self.open.append(LayerCheck(f"rollout: {path}", module, attended_by(read(call.of(images), True), images), x))

    def merged(self, module, args) -> None:
        """A pre-hook on a layer's merge point."""
        if self.open and not self.open[-1].done and args:
            with self.watch.quiet():
                self.open[-1].merged(args[0])

    def end(self, module, output) -> None:
        with self.watch.quiet():
            self.open.pop().ended(output)

    def windows(self, path: str, layer, x: Tensor, *maps: Tensor) -> None:
        """The attention of a window block is given the windows of one of ``maps`` as roll-out cuts them."""
        with self.watch.quiet():
            for m in (m for m in maps if m is not None and len(m)):
                own = layer.windows(m[:1].permute(0, 3, 1, 2)).transpose(1, 2)
                if off(x[: len(own)], own) == 0:
                    return
        raise ValueError(f"rollout: {path} does not attend inside windows of {layer.window} shifted by {layer.shift} as Swin does")

    def pooled(self, path: str, args: tuple) -> None:
        """A pooling head is about to read what it is called with; :class:`PoolHead` refuses what is not its tokens alone."""
        marks = set().union(*(self.watch.marks(x) for x in args[:1]))
        if args and not self.gave <= marks:
            raise ValueError(f"rollout: {path} does not pool what {self.last} gave")
        for event in self._unaccounted(marks, moves=True):
            raise ValueError(f"rollout: {event.path} moves tokens before {path}: {event.what}")

    def finish(self) -> None:
        """Self-attention behind the last known layer is a layer too; a pooling by a few queries is a head."""
        for event in (e for e in self.watch.events if e.square and self.last is not None):
            raise ValueError(f"rollout: {event.path} attends in a way that is not known: {event.what}, behind {self.last}")
