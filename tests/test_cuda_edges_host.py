# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU, as test_cuda_act_host.py runs them: NaN, infinities and hard statistics."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import test_cuda_act_host as convolution
import test_cuda_channel_host as channels
from lifeops.ops.channel import activations
from test_nan import EDGES, _same
from test_stats import PLACES, _check

NOTHING = convolution.Step()


def _library(folder, name):
    out = folder / f"{name}.so"
    convolution.compile_shim(out, "-Og", "-shared", "-fPIC", f"{name}.cpp")
    return ctypes.CDLL(str(out))


@pytest.fixture(scope="module")
def shims(tmp_path_factory):
    """Of the channel passes and of the convolutions."""
    folder = tmp_path_factory.mktemp("cuda_edges")
    return _library(folder, "channel_act"), _library(folder, "token_dwconv_act")


def _problem(H, W, C, K, P=0, B=1):
    return convolution.Problem(B, H, W, P, C, K, "keep", False, False, 0)


@pytest.mark.parametrize("act", activations.ACTS)
def test_activations(shims, act):
    x = torch.tensor(EDGES)[None, :, None].repeat(1, 1, 20)
    ones, weight, s = torch.ones_like(x), torch.ones(20, 1, 1, 1), _problem(2, 7, 20, 1)
    value, slope = activations.value(x.double(), act).float(), activations.derivative(x.double(), act).float()
    step = convolution.Step(act=act)
    _same(channels.run(shims[0], "act", x, len(EDGES), act=act)[0], value, torch.float32)
    _same(channels.run(shims[0], "grad", x, len(EDGES), dy=ones, act=act)[0], slope, torch.float32)
    for around in ((step, NOTHING), (NOTHING, step)):
        _same(convolution.forward(shims[1], s, x, weight, None, None, *around, False, False)[0], value, torch.float32)
    _same(convolution.grad_input(shims[1], s, ones, x, weight, step)[0], slope, torch.float32)


@pytest.mark.parametrize("K", [3, 5, 7])
def test_one_patch_reaches_its_window(shims, K):
    s, act = _problem(9, 15, 64, K, P=1, B=2), convolution.Step(act="relu6")
    x = torch.randn(2, 1 + 9 * 15, 64)
    x[1, 1 + 4 * 15 + 7, 33] = torch.nan
    expected = torch.zeros(2, 9, 15, 64, dtype=torch.bool)
    expected[1, 4 - K // 2 : 5 + K // 2, 7 - K // 2 : 8 + K // 2, 33] = True
    y, pool, stats, vec = convolution.forward(shims[1], s, x, torch.ones(64, 1, K, K), None, None, act, act)
    assert vec > 0
    assert torch.equal(y[:, 1:].isnan(), expected.flatten(1, 2))
    assert torch.equal(pool.isnan(), expected.any(1).any(1))
    assert torch.equal(stats.isnan(), expected.any(0).any(0).any(0).expand(2, 64))


@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__[1:])
def test_statistics(shims, place):
    """Of the channel pass, of a tile kernel, and of the one for any problem."""
    torch.manual_seed(0)
    x = torch.randn(3, 9 * 50, 64)
    place(x)
    _check(x, *channels.run(shims[0], "stats", x, x.shape[1])[0])
    for K in (1, 3):
        weight = torch.zeros(64, 1, K, K)
        weight[:, 0, K // 2, K // 2] = 1
        y, _, stats, vec = convolution.forward(shims[1], _problem(9, 50, 64, K, B=3), x, weight, None, None, NOTHING, NOTHING, False)
        assert (vec > 0) == (K == 3)
        _check(y, *stats)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_infinity_shows(shims, value):
    x = torch.randn(3, 70, 8)
    x[1, 33, 2] = value
    weight, s = torch.ones(8, 1, 1, 1), _problem(7, 10, 8, 1, B=3)
    _, pool, (mean, m2), _ = convolution.forward(shims[1], s, x, weight, None, None, NOTHING, NOTHING)
    for m, s in ((mean, m2), channels.run(shims[0], "stats", x, 70)[0]):
        assert torch.equal(m.isfinite(), torch.arange(8) != 2)
        assert torch.equal(s.isnan(), torch.arange(8) == 2)
        assert bool(m[2].isnan()) == (value != value)
    assert torch.equal(pool.isfinite().logical_not().nonzero(), torch.tensor([[1, 2]]))
