"""A pure-Python installation: everything works on the reference, and says why."""

import os

import pytest
import torch

import lifeops
from lifeops import registry, testing, torchlib
from lifeops.cli import info

pytestmark = pytest.mark.skipif(os.environ.get("LIFEOPS_BUILD") != "none", reason="for the installation without kernels (make test-none)")


def test_nothing_compiled_is_there():
    assert "left out by LIFEOPS_BUILD=none" in registry.unavailable("cpu")
    assert "pip install" in registry.unavailable("cpu")


def test_the_reference_runs_and_warns_once():
    registry._warned.clear()
    registry.forget_choices()
    x, w = torch.randn(1, 5, 4), torch.randn(4, 1, 3, 3)
    with pytest.warns(lifeops.FallbackWarning, match=r"token_dwconv runs on the slower 'reference' backend. cpu: left out"):
        lifeops.token_dwconv(x, w, grid=(2, 2), num_prefix_tokens=1)
    assert torchlib.last_backend["token_dwconv"] == "reference"


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in registry.ops.items()])
def test_every_op_runs(op):
    for sample in op.samples():
        args = testing.make(op, sample, torch.float32)
        testing.check(op, args, torchlib.overload(op)(*args), terms=op.reduces(sample) if op.reduces else 1)


def test_info_says_what_is_missing():
    text = info.text()
    assert "missing" in text
    assert "left out by LIFEOPS_BUILD=none" in text
