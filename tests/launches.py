"""What a step on Triton would launch, counted without a GPU: the kernels are stubs, and torch's operators are seen as they are called."""

import contextlib
import dataclasses
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from lifeops import registry
from lifeops.kernels import _tile

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "lift_fresh"}
WAITS = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique"}  # the host reads what a device made


def _shares(out, first) -> bool:
    """Whether what may be a view is one: ``to`` and ``reshape`` copy where they have to."""
    parts = out if isinstance(out, (tuple, list)) else [out]
    return all(t.untyped_storage()._cdata == first.untyped_storage()._cdata for t in parts)


def _is_empty(out) -> bool:
    return isinstance(out, torch.Tensor) and out.numel() == 0


class Counted(TorchDispatchMode):
    """``kernels``: lifeops' own, by name. ``torch``: operators of torch that launch something. ``waits``: those the host waits for."""

    sees_lifeops = True

    def __init__(self):
        super().__init__()
        self.kernels, self.torch, self.waits = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if func.namespace == "aten" and name not in ALLOCATIONS and not (func.is_view and _shares(out, args[0])) and not _is_empty(out):
            (self.waits if name in WAITS else self.torch)[name] += 1
        return out

    @property
    def launches(self) -> int:
        return self.kernels.total() + self.torch.total()

    def clear(self) -> None:
        for counter in (self.kernels, self.torch, self.waits):
            counter.clear()


def _seen(fn, counted):
    """``fn``, an implementation, in sight of the mode that has called it."""

    def run(*args):
        with contextlib.nullcontext() if _get_current_dispatch_mode() is counted else counted:
            return fn(*args)

    return run


@contextlib.contextmanager
def counted_launches(monkeypatch):
    """Within it Triton's backend takes any tensors, computes nothing, and tells the ``Counted`` what it would launch."""
    counted = Counted()
    with monkeypatch.context() as patch:
        patch.setattr(_tile, "launch", lambda kernel, programs, on, arguments: counted.kernels.update([kernel.fn.__name__]))
        patch.setattr(_tile, "unsupported", lambda *args: [])
        for op in registry.ops.values():
            if "triton" in op.impls:
                impl = op.impls["triton"]
                patch.setitem(op.impls, "triton", dataclasses.replace(impl, fn=_seen(impl.fn, counted)))
        registry.forget_choices()
        with counted:
            yield counted
    registry.forget_choices()
