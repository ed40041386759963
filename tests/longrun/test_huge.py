"""Tensors past 2^31 elements: the same with the border at 2^20 here; in full where it is asked for, `make longrun ARGS="huge"`."""

import pytest
import torch

from longrun import huge

BORDER = 2**20


@pytest.mark.parametrize("name", huge.OPERATORS)
def test_many_images(name):
    assert huge.many_images(name, BORDER) > BORDER


def test_one_large_image():
    assert huge.large_image(BORDER) > BORDER


class _Wraps:
    """An operator whose offsets are taken modulo the border: what is written past it lands at the start."""

    def __init__(self, call):
        self.call = call

    def __call__(self, *args):
        y = self.call(*args)
        if y.numel() > BORDER:
            flat = y.view(-1)
            flat[: y.numel() - BORDER], flat[BORDER:] = flat[BORDER:].clone(), 0
        return y


def test_a_wrapped_index_is_found(monkeypatch):
    monkeypatch.setattr(huge.torchlib, "overload", lambda op: _Wraps(getattr(torch.ops.lifeops, op.name).default))
    with pytest.raises(AssertionError, match="image 0 has other values"):
        huge.many_images("token_dwconv", BORDER)
