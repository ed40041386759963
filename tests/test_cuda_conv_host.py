# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the general token convolution, run on the CPU as test_cuda_host.py runs those of token_dwconv; the oracle is their
reference in float64."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import test_cuda_host
from cuda_tools import DTYPES, ConvGradWeightParams, ConvParams, ConvShape
from lifeops import geometry, testing
from lifeops.ops.token_conv import spec
from test_cuda_host import assert_close, compile_shim, pointer

SAMPLES = [s for s in spec.strided_op.samples() if s.tiny and s.B * s.H * s.W and s.dy_layout not in ("transpose", "scalar")]


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda_conv_shim") / "token_conv.so"
    compile_shim(out, "-Og", "-shared", "-fPIC", "token_conv.cpp")
    return ctypes.CDLL(str(out))


def shape_of(kernel, H, W, sh, sw, ph, pw):
    small = geometry.filtered_grid("", H, W, kernel, (sh, sw), (ph, pw))
    return ConvShape(H, W, *small, *kernel, sh, sw, ph, pw)


def _number(dtype):
    return DTYPES.index(dtype or torch.float32)


def _run(shim, x, weight, bias, C, m, shape, x_prefix, y_prefix, y_tokens, prefix, transpose):
    y = torch.full((x.shape[0], y_tokens, C if transpose else C * m), float("nan"), dtype=x.dtype)
    p = ConvParams(
        *map(pointer, (x, weight, bias, y)), x.shape[0], C, m, shape, *x.stride()[:2], *y.stride()[:2], x_prefix, y_prefix,
        int(prefix != "keep"), transpose, False, *map(_number, (x.dtype, weight.dtype, None if bias is None else bias.dtype)),
    )  # fmt: skip
    _run.K = shim.shim_token_conv(ctypes.byref(p), test_cuda_host.MULTIPROCESSORS)
    return y


def strided(shim, x, weight, bias, H, W, P, sh, sw, ph, pw, prefix, backend=""):
    shape, kept = shape_of(weight.shape[2:], H, W, sh, sw, ph, pw), 0 if prefix == "drop" else P
    C = x.shape[2]
    return _run(shim, x, weight, bias, C, weight.shape[0] // C, shape, P, kept, kept + shape.rows * shape.columns, prefix, False)


def transpose(shim, x, weight, bias, m, H, W, P, sh, sw, ph, pw, prefix, backend=""):
    shape, kept = shape_of(weight.shape[2:], H, W, sh, sw, ph, pw), 0 if prefix == "drop" else P
    return _run(shim, x, weight, bias, x.shape[2] // m, m, shape, kept, P, P + H * W, prefix, True)


def grad_weight(shim, dy, x, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, weight_dtype, bias_dtype, backend=""):
    shape, kept, C, channels = shape_of((Kh, Kw), H, W, sh, sw, ph, pw), 0 if prefix == "drop" else P, x.shape[2], dy.shape[2]
    dw = torch.full((channels, 1, Kh, Kw), float("nan"), dtype=weight_dtype)
    db = None if bias_dtype is None else torch.full((channels,), float("nan"), dtype=bias_dtype)
    p = ConvGradWeightParams(
        *map(pointer, (dy, x, dw, db)), x.shape[0], C, channels // C, shape, *x.stride()[:2], *dy.stride()[:2], P, kept,
        *map(_number, (x.dtype, weight_dtype, bias_dtype)),
    )  # fmt: skip
    grad_weight.K = shim.shim_token_conv_grad_weight(ctypes.byref(p))
    return dw, torch.empty(0) if db is None else db


RUN = {spec.STRIDED: strided, spec.TRANSPOSE: transpose, spec.BWD_DW: grad_weight}
OPS = [spec.strided_op, spec.transpose_op, spec.bwd_dw_op]


def _check(shim, op, args, terms=1, exact=False):
    """-> K of the tile kernel that ran."""
    got = testing.tensors(RUN[op.name](shim, *args))
    for mine, expected in zip(got, testing.oracle(op, args), strict=True):
        if exact:
            assert torch.equal(mine.double(), expected)
        elif expected.numel():
            assert_close(mine, expected, terms, args[0].dtype)
    return grad_weight.K if op is spec.bwd_dw_op else _run.K


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_samples(shim, op, sample):
    """In float32, and in bfloat16 beside float32 filters."""
    terms = op.reduces(sample) if op.reduces else sample.Kh * sample.Kw * sample.m
    _check(shim, op, testing.make(op, sample, torch.float32), terms)
    _check(shim, op, testing.make(op, sample._replace(weight_dtype=torch.float32), torch.bfloat16), terms)


# (sample, K of the tile kernels of forward, transpose and dW): every kernel, tiles with and without a border, several strips and segments
PLAIN = next(s for s in SAMPLES if s.name == "plain")
TILES = [
    (PLAIN._replace(name="s2", H=19, W=37, C=132), (3, 3, 3)),
    (PLAIN._replace(name="s2_wide_padding", H=5, W=9, C=8, ph=4, pw=5), (3, 3, 3)),
    (PLAIN._replace(name="s2_two_channels", H=7, W=9, C=70), (0, 3, 0)),
    (PLAIN._replace(name="s4", H=23, W=27, C=68, sh=4, sw=4), (3, 3, 3)),
    (PLAIN._replace(name="s8", H=37, W=44, sh=8, sw=8, prefix="zero"), (3, 0, 3)),
    (PLAIN._replace(name="s1_valid", H=10, W=21, C=66, sh=1, sw=1, ph=0, pw=0), (3, 3, 3)),
    (PLAIN._replace(name="s1_wide_padding", H=4, W=3, C=4, sh=1, sw=1, ph=4, pw=0, prefix="drop"), (3, 0, 3)),
    (PLAIN._replace(name="even", H=11, W=18, C=35, m=2, P=2, prefix="zero"), (3, 0, 0)),
    (PLAIN._replace(name="even_s1", H=5, W=9, C=3, m=4, P=0, sh=1, sw=1), (3, 0, 0)),
    (PLAIN._replace(name="odd_multiplier", H=5, W=9, C=4, m=3, P=0), (0, 0, 0)),
    (PLAIN._replace(name="k2", H=9, W=18, C=66, Kh=2, Kw=2, ph=0, pw=0), (0, 2, 0)),
    (PLAIN._replace(name="k2_padded", H=9, W=7, C=6, Kh=2, Kw=2), (0, 2, 0)),
    (PLAIN._replace(name="k4", H=12, W=22, C=6, Kh=4, Kw=4, sh=4, sw=4, ph=1, pw=2, prefix="zero"), (0, 4, 0)),
    (PLAIN._replace(name="odd_channels", C=7), (0, 0, 0)),
]


@pytest.mark.parametrize(("sample", "kernels"), TILES, ids=lambda v: v.name if hasattr(v, "name") else "")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_tiles(shim, sample, kernels, dtype):
    terms = sample.Kh * sample.Kw * sample.m, sample.Kh * sample.Kw * sample.m, spec.bwd_dw_op.reduces(sample)
    ran = tuple(_check(shim, op, testing.make(op, sample, dtype), n) for op, n in zip(OPS, terms, strict=True))
    assert ran == ((0, 0, 0) if dtype == torch.float64 else kernels)


@pytest.mark.parametrize("sample", [PLAIN, PLAIN._replace(sh=1, sw=1), PLAIN._replace(Kh=4, Kw=2), PLAIN._replace(m=2, P=0)], ids=str)
def test_integers_are_exact(shim, sample):
    for op in OPS:
        _check(shim, op, testing.make(op, sample._replace(B=1), torch.bfloat16, integers=True), exact=True)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_weight_dtype(shim, weight_dtype):
    for op in OPS:
        _check(shim, op, testing.make(op, PLAIN._replace(weight_dtype=weight_dtype), torch.float32), 24)


def test_views_of_a_wider_tensor(shim):
    """Pairs of channels that do not lie on a pair of elements take the kernel for anything; NaN lies everywhere around."""
    for layout, K in (("slice", 0), ("chunk", 3)):
        for op in OPS:
            args = testing.make(op, PLAIN._replace(x_layout=layout, dy_layout=layout), torch.bfloat16)
            assert _check(shim, op, args, 24) == K


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("sample", [PLAIN, PLAIN._replace(Kh=2, Kw=2, ph=0, pw=0), PLAIN._replace(sh=1, sw=1)], ids=["s2", "k2", "s1"])
def test_what_is_not_finite_reaches_its_windows(shim, value, sample):
    for op in OPS[:2]:
        args = testing.make(op, sample, torch.float32)
        args[0][1, 5, 3] = value
        (expected,) = testing.oracle(op, args)
        got = RUN[op.name](shim, *args)
        assert torch.equal(got.isfinite(), expected.isfinite())
        assert torch.equal(got.isnan(), expected.isnan())


def test_batch_and_device_do_not_matter(shim, monkeypatch):
    """Sample 2 alone equals sample 2 of four, bit for bit, on a device of any size; dW is the same twice."""
    sample = PLAIN._replace(B=4, H=19, W=18)
    for op in OPS[:2]:
        args = testing.make(op, sample, torch.float32)
        y = RUN[op.name](shim, *args)
        for multiprocessors in (1, 132):
            monkeypatch.setattr(test_cuda_host, "MULTIPROCESSORS", multiprocessors)
            assert torch.equal(RUN[op.name](shim, *args), y)
            assert torch.equal(RUN[op.name](shim, args[0][2:3], *args[1:]), y[2:3])
    args = testing.make(spec.bwd_dw_op, sample, torch.float32)
    assert all(map(torch.equal, grad_weight(shim, *args), grad_weight(shim, *args)))


def test_strides_beyond_32_bits(shim):
    for op in OPS:
        args = list(testing.make(op, PLAIN._replace(B=1), torch.float32))
        for i in range(2 if op is spec.bwd_dw_op else 1):
            args[i] = args[i].as_strided(args[i].shape, (2**40, *args[i].stride()[1:]))
        assert _check(shim, op, tuple(args), 24) == 0
