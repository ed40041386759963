"""Batch statistics where they are hard: outliers first, last, at the start of every task, and a mean far above the spread.

m2 may be off by 2 sqrt(n) 2^-23, relative (csrc/cpu/moments.h says where that comes from), and by what the input's rounding leaves.
"""

import os

import pytest
import torch

import lifeops
from lifeops import config, registry

BACKEND = os.environ.get("LIFEOPS_TEST_BACKEND", "cpu")
INTERPRETED = BACKEND == "triton"
ISAS = ["auto"] if INTERPRETED else ["baseline", "avx2", "avx512"]
BATCH, GRID, C = (2, (9, 16), 3) if INTERPRETED else (5, (24, 50), 35)
registry.load(BACKEND)


def _first(x):
    x[:, 0] = 3e4


def _last(x):
    x[:, -1] = -3e4


def _one(x):
    x[0, 0] = 1e6


def _every_task(x):
    """Whatever the cut into strips, segments and rows, a task starts with one."""
    x[:, ::8] = 1e4 * torch.randn_like(x[:, ::8])


def _every_row(x):
    x[:, :: GRID[1]] = 2e5


def _large_mean(x):
    x.mul_(2.0**-7).add_(1000)


def _constant(x):
    x.fill_(1.1)
    x[:, ::2] = -1.1


PLACES = [_first, _last, _one, _every_task, _every_row, _large_mean, _constant]


def _true(y):
    wide = y.double().flatten(0, 1)
    mean = wide.mean(0)
    return mean, (wide - mean).square().sum(0)


def _check(y, mean, m2):
    true_mean, true = _true(y)
    n = y.shape[0] * y.shape[1]
    assert ((m2.double() - true).abs() <= 2 * n**0.5 * 2.0**-23 * true).all(), ((m2.double() - true) / true).abs().max()
    spread = (true / n).sqrt()
    assert ((mean.double() - true_mean).abs() <= n**0.5 * 2.0**-23 * spread + 2.0**-23 * true_mean.abs()).all()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setattr(config, "settings", config.settings._replace(cpu_isa=request.param))


def _x(place):
    torch.manual_seed(0)
    x = torch.randn(BATCH, GRID[0] * GRID[1], C)
    place(x)
    return x


@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__[1:])
def test_outliers(place, isa):
    """channel_stats and those of what token_dwconv stores, at a grid of several strips and one of several segments."""
    x = _x(place)
    _check(x, *torch.ops.lifeops.channel_stats(x, "none", x.shape[1], BACKEND))
    for grid in (GRID,) if INTERPRETED else (GRID, (8, 150)):
        _check(x, *lifeops.token_dwconv(x, torch.ones(C, 1, 1, 1), grid=grid, stats=True, backend=BACKEND)[2:])


@pytest.mark.parametrize("place", [_first, _large_mean], ids=lambda f: f.__name__[1:])
def test_the_statistics_of_the_dw_shortcut(place, isa):
    """GELU is the identity of large values: the variance behind the norm is that of x."""
    if "dw_shortcut" not in registry.ops or BACKEND not in registry.ops["dw_shortcut"].impls:
        pytest.skip("composed of the operators above")
    x = _x(place).abs() + 20
    _, mean, var, _ = torch.ops.lifeops.dw_shortcut(x, x, torch.ones(C, 1, 1, 1), None, None, None, 1e-5, *GRID, 0, BACKEND)
    _check(x, mean, var * (x.shape[0] * x.shape[1] - 1))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("at", [0, 7, -1])
def test_an_infinity_shows(value, at, isa):
    """The mean is what the reference's is, m2 NaN, and both in that channel alone; the pool likewise."""
    x = _x(lambda x: None)
    x[1, at, 1] = value
    for backend in (BACKEND, "reference"):
        _y, pool, mean, m2 = lifeops.token_dwconv(x, torch.ones(C, 1, 1, 1), grid=GRID, stats=True, pool=True, backend=backend)
        for m, s in ((mean, m2), torch.ops.lifeops.channel_stats(x, "none", x.shape[1], backend)):
            assert torch.equal(m[1].isnan(), torch.tensor(value != value))
            assert s[1].isnan()
            assert m[[0, 2]].isfinite().all()
            assert s[[0, 2]].isfinite().all()
        assert torch.equal(pool.isfinite().logical_not().nonzero(), torch.tensor([[1, 1]]))
        assert torch.equal(pool[1, 1].isnan(), torch.tensor(value != value))


@pytest.mark.skipif(INTERPRETED, reason="a process of its own runs these")
def test_in_triton():
    pytest.importorskip("triton")
    from test_triton_ops import _interpreted

    assert _interpreted("test_stats.py", "outliers or infinity") >= 10
