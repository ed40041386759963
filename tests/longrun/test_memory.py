"""Calls of ever other shapes: nothing grows, no cache has no bound. The whole of it: `make longrun ARGS="memory"`."""

import ctypes
import itertools

import pytest
import torch

from lifeops import registry
from lifeops.nn.grids import GridHolder
from longrun import memory
from longrun.calls import Calls

FEW = {"resident": 10_000, "heap": 4000, "blocks": 2, "tensors": 0}  # added by a call, of some thousand


def test_nothing_grows():
    marks = memory.measure(3000, entries=16)
    assert marks[-1].calls == 3000
    assert memory.grown(marks, FEW) == []
    assert all(m.cached <= 4096 for m in marks)


class _Leak:
    def __init__(self, kind):
        self.kind, self.kept = kind, []

    def __iter__(self):
        for _ in itertools.count():
            yield self._call

    def _call(self):
        if self.kind == "objects":
            self.kept.append([object() for _ in range(4)])
        elif self.kind == "tensors":
            self.kept.append(torch.ones(2))
        else:
            ctypes.CDLL(None).malloc(10_000)


@pytest.mark.parametrize(("kind", "seen"), [("objects", "blocks"), ("tensors", "tensors"), ("malloc", "heap")])
def test_a_leak_is_seen(kind, seen):
    found = memory.grown(memory.watch(_Leak(kind), 400, marks=8), FEW)
    assert any(line.startswith(seen) for line in found), found


def test_every_cache_has_a_bound():
    assert len(memory.lru_caches()) >= 6
    assert memory.unbounded() == []
    plans = [name for name, c in memory.containers().items() if isinstance(c, registry._Plans)]
    assert {"lifeops.registry.plans", "lifeops.registry._choice", "lifeops.registry._not_built", "lifeops.registry._warned"} <= {*plans}


def test_a_full_cache_starts_afresh():
    plans = registry._Plans()
    for i in range(10_000):
        plans[i] = i
        assert len(plans) <= 4096
        assert plans[i] == i


def test_what_modules_keep_does_not_depend_on_shapes():
    """Every dict, list, set and cache of the library after fifty calls of everything and after four hundred more."""
    calls = iter(Calls(1))
    for call in [*Calls(0).kinds, *itertools.islice(calls, 50)]:
        call()
    before = memory.sizes()
    assert len(before) > 10
    for call in itertools.islice(calls, 400):
        call()
    few = len(registry.ops)  # what is noted of an operator when it is first called
    assert {name: (before[name], n) for name, n in memory.sizes().items() if n > max(few, before[name])} == {}


def test_grids_that_a_model_has_seen():
    holder = GridHolder()
    for side in range(1, 2000):
        with holder.use((side, side)):
            assert holder.grid == (side, side)
    assert len(holder._seen) == 2
