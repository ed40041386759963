# SPDX-License-Identifier: Apache-2.0
"""The CUDA channel passes, run on the CPU as test_cuda_act_host.py runs the convolutions; the oracle is their reference in float64."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cuda_tools import DTYPES, ChannelActParams, ChannelRows
from lifeops.ops.channel import act as reference
from lifeops.ops.channel import activations
from lifeops.ops.channel.act import accumulate_dtype
from test_cuda_act_host import assert_close, nans, strided
from test_cuda_host import compile_shim, make, pointer

PASSES = ("stats", "act", "pool", "sums", "grad")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda_channel_shim") / "channel_act.so"
    compile_shim(out, "-Og", "-shared", "-fPIC", "channel_act.cpp")
    return ctypes.CDLL(str(out))


def place(t, patches):
    """The last ``patches`` rows of a sequence, or nothing."""
    if t is None:
        return ChannelRows(None, 0, 0)
    return ChannelRows(t.data_ptr() + (t.shape[1] - patches) * t.stride(1) * t.element_size(), *t.stride()[:2])


def run(shim, name, x, patches, *, dy=None, residual=None, act="none", scale=None, shift=None, gate=None, pool_grad=None, a=None, b=None):
    """-> result, channels per thread."""
    B, _, C = x.shape
    lead = 0 if residual is None else residual.shape[1] - patches
    y = nans(B, lead + patches, C, dtype=x.dtype) if name in ("act", "grad") else None
    shape = {"stats": (2, C), "pool": (B, C), "sums": (5, B, C)}.get(name)
    out = None if shape is None else nans(*shape, dtype=accumulate_dtype(x.dtype))
    sequences = (place(t, patches) for t in (x, dy, residual, y))
    values = map(pointer, (scale, shift, gate, pool_grad, a, b))
    p = ChannelActParams(PASSES.index(name), *sequences, B, patches, C, DTYPES.index(x.dtype), activations.ACTS.index(act), *values, C, C)
    vec = shim.shim_channel_act(ctypes.byref(p), ctypes.c_int64(lead), ctypes.c_void_p(pointer(out)))
    return (y if out is None else out), vec


def wanted(name, x, patches, *, dy=None, residual=None, act="none", scale=None, shift=None, gate=None, pool_grad=None, a=None, b=None):
    x, dy, residual, scale, shift, gate, pool_grad, a, b = (
        None if t is None else t.double() for t in (x, dy, residual, scale, shift, gate, pool_grad, a, b)
    )
    if name == "stats":
        return torch.stack(reference.stats_of(activations.value(reference.patch_rows(x, patches), act)))
    if name == "act":
        return reference.reference_act(x, scale, shift, gate, residual, act, patches, None)
    if name == "pool":
        return reference.reference_pool(x, scale, shift, act, patches, None)
    if name == "sums":
        return reference.reference_sums(dy, x, scale, shift, act, patches, None)
    return reference.reference_grad(dy, x, scale, shift, gate, pool_grad, a, b, act, patches, None)


def problem(name, B, patches, C, lead, dtype, act, full, lay_out=lambda t: t):
    """Arguments of a pass; `full` with everything that may be absent."""
    acc = accumulate_dtype(dtype)
    draw = lambda seed, *shape: make(shape, acc, seed)  # noqa: E731
    kwargs = {"act": act}
    if full and name != "stats":
        kwargs |= {"scale": draw(1, C), "shift": draw(2, C)}
    if full and name in ("act", "grad"):
        kwargs |= {"gate": draw(3, B, C)}
    if full and name == "act":
        kwargs |= {"residual": lay_out(make((B, lead + patches, C), dtype, 4))}
    if full and name == "grad":
        kwargs |= {"pool_grad": draw(5, B, C), "a": draw(6, C), "b": draw(7, C)}
    if name in ("sums", "grad"):
        kwargs |= {"dy": lay_out(make((B, lead + patches, C), dtype, 8))}
    return lay_out(make((B, lead + patches, C), dtype, 9)), kwargs


def check(shim, name, x, patches, kwargs):
    got, vec = run(shim, name, x, patches, **kwargs)
    n = x.shape[0] * patches if name == "stats" else patches if name in ("pool", "sums") else 1
    want = wanted(name, x, patches, **kwargs)
    for g, w in zip(got, want, strict=True) if name in ("stats", "sums") else [(got, want)]:
        assert_close(g, w, n, x.dtype)
    again, _ = run(shim, name, x, patches, **kwargs)
    assert torch.equal(got, again)
    return vec


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_matches_reference(shim, dtype, name):
    for act in activations.ACTS:
        for full in (True, False):
            for B, patches, C, lead in ((2, 70, 132, 2), (3, 1, 5, 0), (1, 131, 6, 1)):
                x, kwargs = problem(name, B, patches, C, lead, dtype, act, full)
                assert check(shim, name, x, patches, kwargs) == (4 if C % 4 == 0 and dtype != torch.float64 else 1)


@pytest.mark.parametrize("name", PASSES)
def test_strided_views(shim, name):
    """Slices with NaN around, images and tokens interleaved; then an odd stride and a batch of one image."""
    for dtype in (torch.float64, torch.float16):
        x, kwargs = problem(name, 2, 9, 12, 2, dtype, "hardswish", True, strided)
        check(shim, name, x, 9, kwargs)
        odd = nans(2, 11, 13, dtype=dtype)
        odd[..., 1:] = x
        assert check(shim, name, odd[..., 1:], 9, kwargs) == 1
        check(shim, name, x[:1].expand(2, -1, -1), 9, kwargs)


def test_statistics_with_a_large_mean(shim):
    x = 1000 + 0.01 * make((3, 200, 8), torch.float32, 1)
    got, _ = run(shim, "stats", x, 200)
    torch.testing.assert_close(got.double(), wanted("stats", x, 200), rtol=1e-5, atol=0)
