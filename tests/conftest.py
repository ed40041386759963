"""Shared set-up: strict numerics, NaN in every fresh buffer, and torchvision's missing operators for timm on a CPU torch."""

import contextlib
import importlib.util

import pytest
import torch

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

_TORCHVISION = None  # a Library is undone when it is collected


def declare_torchvision_ops() -> None:
    """timm imports torchvision, whose compiled operators a CPU torch lacks; declaring two of them is enough to import it."""
    global _TORCHVISION
    if _TORCHVISION is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, AttributeError):
        _TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
        for schema in ("nms(Tensor dets, Tensor scores, float t) -> Tensor", "qnms(Tensor dets, Tensor scores, float t) -> Tensor"):
            _TORCHVISION.define(schema)


def _poisoned(allocate):
    def run(*args, **kwargs):
        out = allocate(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and not isinstance(out, torch._subclasses.FakeTensor) else out

    return run


@contextlib.contextmanager
def poisoned():
    """Every buffer the library allocates starts as NaN, so that an element it forgets to write shows."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        patch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
        yield


@pytest.fixture
def poison():
    with poisoned():
        yield


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
