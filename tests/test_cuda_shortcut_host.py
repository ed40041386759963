# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the DW shortcut's step, run on the CPU as test_cuda_act_host.py runs the convolutions; the oracle is the ops'
reference in float64. The shim also counts what is launched.
"""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cuda_tools import DTYPES, ChannelActParams, ChannelRows, GradWeightParams
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.channel.batch_norm import affine_of
from lifeops.ops.dw_shortcut import spec
from test_cuda_act_host import assert_close, nans, strided
from test_cuda_channel_host import place
from test_cuda_host import compile_shim, make, pointer

EPS = 1e-3


class Norm(ctypes.Structure):
    """ShimNorm of tests/cuda_shim/dw_shortcut.cpp."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("running_mean", "running_var", "gamma", "beta", "mean", "var", "affine")]
        + [("eps", ctypes.c_double), ("n", ctypes.c_double), ("C", ctypes.c_int64), ("parameters", ctypes.c_int32)]
    )  # fmt: skip


class Grad(ctypes.Structure):
    """ShimGrad of tests/cuda_shim/dw_shortcut.cpp."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("weight", "mean", "affine", "x", "dx", "dbias", "dgamma", "dbeta")]
        + [("multiprocessors", ctypes.c_int32)]
    )  # fmt: skip


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda_shortcut_shim") / "dw_shortcut.so"
    compile_shim(out, "-Og", "-shared", "-fPIC", "dw_shortcut.cpp")
    return ctypes.CDLL(str(out))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_training_norm(shim, dtype, full):
    """Mean, unbiased variance and affine in three launches, from chunks of 64 tokens."""
    for B, H, W, P, C in ((3, 13, 11, 2, 12), (1, 1, 1, 0, 5), (20, 5, 3, 1, 132)):
        wide, x = accumulate_dtype(dtype), make((B, P + H * W, C), dtype, 1)
        gamma, beta = (make((C,), dtype, 2 + i) if full else None for i in range(2))
        mean, var, affine = nans(C, dtype=wide), nans(C, dtype=wide), nans(3, C, dtype=wide)
        none = ChannelRows(None, 0, 0)
        s = ChannelActParams(0, place(x, H * W), none, none, none, B, H * W, C, DTYPES.index(dtype), 4, *[None] * 6, C, C)
        norm = Norm(None, None, *map(pointer, (gamma, beta, mean, var, affine)), EPS, B * H * W, C, DTYPES.index(dtype))
        assert shim.shim_dw_shortcut_norm(ctypes.byref(s), ctypes.byref(norm), DTYPES.index(dtype)) == 3
        weight = torch.zeros(C, 1, 1, 1, dtype=torch.float64)
        doubles = (None if t is None else t.double() for t in (gamma, beta))
        _, *want = spec.reference(x.double(), x.double(), weight, None, *doubles, EPS, H, W, P, "reference")
        for got, value in zip((mean, var, affine), want, strict=True):
            assert_close(got, value, B * H * W, dtype)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_evaluation_norm(shim, dtype, running):
    C, parameters = 130, torch.float32
    gamma, beta, mean, var = (make((C,), parameters, i) for i in range(4))
    var, affine = var.abs() + 0.1, nans(3, C, dtype=accumulate_dtype(dtype))
    values = (mean, var) if running else (None, None)
    norm = Norm(*map(pointer, (*values, gamma, beta)), None, None, pointer(affine), EPS, 1, C, DTYPES.index(parameters))
    assert shim.shim_dw_shortcut_norm(None, ctypes.byref(norm), DTYPES.index(dtype)) == 1
    want = affine_of(*(t.double() for t in (mean, var, gamma, beta)), EPS)[:2] if running else (gamma.double(), beta.double())
    for got, value in zip(affine, want, strict=False):
        assert_close(got, value, 1, dtype)


CASES = [(2, 5, 7, 1, 64, 3), (3, 9, 16, 2, 66, 5), (1, 12, 15, 0, 33, 7), (2, 2, 3, 1, 5, 3), (1, 4, 5, 1, 3, 9)]


def check_gradients(shim, dtype, B, H, W, P, C, K, need_dx=True, lay_out=lambda t: t):
    wide, weights = accumulate_dtype(dtype), torch.float32 if dtype == torch.bfloat16 else dtype
    x, dy = (lay_out(make((B, P + H * W, C), dtype, i)) for i in (1, 2))
    weight, mean, affine = make((C, 1, K, K), weights, 3), make((C,), wide, 4), make((3, C), wide, 5)
    dx, dw = nans(B, P + H * W, C, dtype=dtype), nans(C, 1, K, K, dtype=wide)
    some = [nans(C, dtype=wide) for _ in range(3)]
    g = GradWeightParams(
        *map(pointer, (dy, x, dw, None)), B, H, W, C, *x.stride()[:2], *dy.stride()[:2], K, P, P,
        *(DTYPES.index(t) for t in (dtype, weights, weights)),
    )  # fmt: skip
    s = Grad(*map(pointer, (weight, mean, affine, x, dx if need_dx else None, *some)), 2)
    assert shim.shim_dw_shortcut_grad(ctypes.byref(g), ctypes.byref(s)) == 4 + need_dx
    doubles = (t.double() for t in (dy, x, weight, mean, affine))
    want_dx, *want = spec.reference_bwd(*doubles, H, W, P, True, "reference")
    for got, value in zip((dw, *some), want, strict=True):
        assert_close(got, value, B * H * W * K, dtype)
    if need_dx:
        assert_close(dx, want_dx, K**2, dtype)
    else:
        assert dx.isnan().all()


@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}_{}x{}_P{}_C{}_K{}".format(*c))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_gradients(shim, dtype, case):
    """Five launches for the gradients of everything."""
    check_gradients(shim, dtype, *case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_gradients_of_views(shim, dtype):
    """Slices with NaN around; without dx a launch less."""
    check_gradients(shim, dtype, *CASES[0], need_dx=False)
    check_gradients(shim, dtype, 2, 6, 8, 1, 6, 3, lay_out=strided)
    check_gradients(shim, dtype, 2, 6, 8, 1, 8, 3, lay_out=lambda t: t[:1].expand(2, -1, -1))
