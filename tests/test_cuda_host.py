# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of token_dwconv, run on the CPU: the .cuh files compiled by g++ against tests/cuda_shim.

The planning, the choice of the kernel, the index arithmetic, the barriers and the rounding are those of the GPU.
What is not covered: memory coalescing, ptxas, and everything about time.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from cuda_tools import DTYPES, FwdParams, GradWeightParams, compile_for_host

MULTIPROCESSORS = 2  # few, so that small problems already give a warp several tiles


def compile_shim(out: Path, *flags: str) -> None:
    reason = compile_for_host(out, *flags)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda_shim") / "token_dwconv.so"
    compile_shim(out, "-Og", "-shared", "-fPIC", "token_dwconv.cpp")
    return ctypes.CDLL(str(out))


def pointer(t):
    return None if t is None else t.data_ptr()


def forward(shim, x, weight, bias, residual, H, W, P, prefix, flip=False, y_prefix=None, x_prefix=None):
    B, C = x.shape[0], x.shape[2]
    x_prefix = P if x_prefix is None else x_prefix
    y_prefix = (0 if prefix == "drop" else P) if y_prefix is None else y_prefix
    y = torch.full((B, y_prefix + H * W, C), float("nan"), dtype=x.dtype)
    r = y if residual is None else residual
    p = FwdParams(
        *map(pointer, (x, weight, bias, residual, y)), B, H, W, C, *x.stride()[:2], *y.stride()[:2], *r.stride()[:2],
        weight.shape[-1], x_prefix, y_prefix, int(prefix != "keep"), flip, DTYPES.index(x.dtype),
        DTYPES.index(weight.dtype), 0 if bias is None else DTYPES.index(bias.dtype),
    )  # fmt: skip
    forward.vec = shim.shim_token_dwconv(ctypes.byref(p), MULTIPROCESSORS)
    return y


def grad_weight(shim, dy, x, K, H, W, dy_prefix, x_prefix, weight_dtype, bias_dtype):
    B, C = dy.shape[0], dy.shape[2]
    dw = None if x is None else torch.full((C, 1, K, K), float("nan"), dtype=weight_dtype)
    db = None if bias_dtype is None else torch.full((C,), float("nan"), dtype=bias_dtype)
    p = GradWeightParams(
        *map(pointer, (dy, x, dw, db)), B, H, W, C, *(dy if x is None else x).stride()[:2], *dy.stride()[:2],
        K, x_prefix, dy_prefix, DTYPES.index(dy.dtype), DTYPES.index(weight_dtype), DTYPES.index(bias_dtype or dy.dtype),
    )  # fmt: skip
    grad_weight.vec = shim.shim_token_dwconv_grad_weight(ctypes.byref(p))
    return dw, db


def patches(t, P, H, W):
    """(B, P+H*W, C) tokens -> (B, C, H, W) map in float64."""
    return t[:, P:].double().transpose(1, 2).reshape(t.shape[0], -1, H, W)


def tokens(m):
    return m.flatten(2).transpose(1, 2)


def reference_forward(x, weight, bias, residual, H, W, P, prefix):
    bias = None if bias is None else bias.double()
    y = tokens(F.conv2d(patches(x, P, H, W), weight.double(), bias, padding=weight.shape[-1] // 2, groups=x.shape[2]))
    if prefix != "drop":
        head = x[:, :P].double()
        y = torch.cat((head if prefix == "keep" else torch.zeros_like(head), y), 1)
    return y if residual is None else y + residual.double()


def reference_backward(dy, x, weight, H, W, P, prefix):
    """dx, dw, db in float64."""
    K, C = weight.shape[-1], x.shape[2]
    g = patches(dy, 0 if prefix == "drop" else P, H, W)
    dx, dw, db = torch.ops.aten.convolution_backward(
        g, patches(x, P, H, W), weight.double(), [C], [1, 1], [K // 2, K // 2], [1, 1], False, [0, 0], C, [True] * 3
    )
    head = dy[:, :P].double() if prefix == "keep" else torch.zeros(x.shape[0], P, C, dtype=torch.float64)
    return torch.cat((head, tokens(dx)), 1), dw, db


def assert_close(got, want, terms, dtype):
    """Sums in float or double, rounded once: half an ulp of the result and eps * sqrt(terms) of the sum."""
    assert not got.isnan().any(), "an element was not written"
    eps_sum = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    scale = max(want.abs().max().item(), 1.0)
    limit = scale * (torch.finfo(got.dtype).eps + 4 * eps_sum * terms**0.5)
    error = (got.double() - want).abs().max().item()
    assert error <= limit, f"error {error:.3g} > {limit:.3g}"


def make(shape, dtype, seed, integers=False):
    g = torch.Generator().manual_seed(seed)
    t = torch.randint(-1, 2, shape, generator=g) if integers else torch.randn(shape, generator=g, dtype=torch.float64)
    return t.to(dtype)


def check_all(shim, x, dy, weight, bias, residual, H, W, P, prefix, exact=False):
    """Forward, dX, dW and db of one problem; -> vec of the forward and the dW kernel that ran."""
    K, B = weight.shape[-1], x.shape[0]
    compare = (lambda got, want, *_: torch.testing.assert_close(got.double(), want, rtol=0, atol=0)) if exact else assert_close
    y = forward(shim, x, weight, bias, residual, H, W, P, prefix)
    forward_vec = forward.vec
    compare(y, reference_forward(x, weight, bias, residual, H, W, P, prefix), K * K, x.dtype)
    dx, dw, db = reference_backward(dy, x, weight, H, W, P, prefix)
    dy_prefix = 0 if prefix == "drop" else P
    got = forward(shim, dy, weight, None, None, H, W, P, prefix, flip=True, y_prefix=P, x_prefix=dy_prefix)
    compare(got, dx, K * K, x.dtype)
    bias_dtype = None if bias is None else bias.dtype
    got_dw, got_db = grad_weight(shim, dy, x, K, H, W, dy_prefix, P, weight.dtype, bias_dtype)
    compare(got_dw, dw, B * H * W, x.dtype)
    if bias is not None:
        compare(got_db, db, B * H * W, x.dtype)
    again = grad_weight(shim, dy, x, K, H, W, dy_prefix, P, weight.dtype, bias_dtype)[0]
    assert torch.equal(got_dw, again), "dW is not deterministic"
    return forward_vec, grad_weight.vec


def problem(B, H, W, P, C, K, dtype, weight_dtype, bias, residual, prefix, integers=False):
    y_rows = (0 if prefix == "drop" else P) + H * W
    return (
        make((B, P + H * W, C), dtype, 1, integers),
        make((B, y_rows, C), dtype, 2, integers),
        make((C, 1, K, K), weight_dtype, 3, integers),
        make((C,), weight_dtype, 4, integers) if bias else None,
        make((B, y_rows, C), dtype, 5, integers) if residual else None,
        H, W, P, prefix,
    )  # fmt: skip


# (B, H, W, P, C, K, prefix, bias, residual, vec): every kernel variant and every edge of the planning.
PROBLEMS = [
    (2, 5, 7, 1, 64, 3, "keep", True, False, 2),  # one tile wide, a partial strip
    (1, 8, 16, 2, 66, 5, "zero", True, True, 2),  # two tiles of 8, a slab with two channels
    (2, 4, 11, 5, 8, 3, "keep", False, True, 2),  # a moved segment
    (1, 9, 14, 0, 64, 7, "keep", True, True, 2),  # two tiles of 7
    (1, 5, 17, 1, 6, 7, "drop", True, False, 2),  # three segments, the second moved to keep its halo whole
    (3, 6, 10, 1, 33, 5, "drop", False, False, 1),  # odd C
    (1, 3, 8, 2, 3, 3, "zero", True, True, 1),  # strip smaller than a tile
    (2, 2, 8, 1, 3, 7, "keep", True, True, 1),  # kernel larger than the grid
    (2, 8, 2, 1, 4, 3, "keep", True, False, 0),  # narrow: the kernel for any grid
    (1, 3, 9, 0, 6, 7, "keep", True, False, 0),  # 7 < W < 7 + 3: no segments with whole halos
    (2, 1, 1, 1, 1, 3, "keep", True, True, 0),
    (1, 1, 1, 0, 64, 7, "drop", True, False, 0),
    (2, 3, 4, 2, 5, 1, "keep", True, True, 0),
    (1, 4, 5, 1, 33, 9, "zero", True, True, 0),
    (1, 2, 7, 1, 2, 15, "keep", True, False, 0),
]


@pytest.mark.parametrize("case", PROBLEMS, ids=lambda c: f"B{c[0]}_{c[1]}x{c[2]}_P{c[3]}_C{c[4]}_K{c[5]}_{c[6]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_matches_reference(shim, dtype, case):
    B, H, W, P, C, K, prefix, bias, residual, vec = case
    # bfloat16 is run with a float filter (autocast), the others with their own type.
    weight_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    ran = check_all(shim, *problem(B, H, W, P, C, K, dtype, weight_dtype, bias, residual, prefix))
    expected = 0 if dtype == torch.float64 else vec
    assert ran == (expected, expected)


@pytest.mark.parametrize("K", [3, 5, 7, 9])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
def test_integers_are_exact(shim, dtype, K):
    """Values -1, 0, 1: every sum stays below 256, so nothing may be rounded."""
    check_all(shim, *problem(1, 7, 8, 1, 6, K, dtype, dtype, True, True, "keep", integers=True), exact=True)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_weight_dtype(shim, weight_dtype):
    check_all(shim, *problem(1, 5, 8, 1, 10, 3, torch.float32, weight_dtype, True, False, "keep"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_strided_views(shim, dtype):
    """Slices of wider tensors, images and tokens interleaved, expanded batches; NaN everywhere around."""
    B, H, W, P, C, K = 2, 6, 8, 1, 6, 3
    args = list(problem(B, H, W, P, C, K, dtype, dtype, True, True, "keep"))
    for i in (0, 1, 4):
        t = args[i]
        wide = torch.full((t.shape[1] + 2, B, C + 8), float("nan"), dtype=dtype)
        view = wide[1:-1, :, 4 : 4 + C].transpose(0, 1)
        view.copy_(t)
        args[i] = view
    check_all(shim, *args)
    args[0] = args[0][:1].expand(B, -1, -1)
    args[1] = args[1][:, :1].expand(-1, P + H * W, -1)
    check_all(shim, *args)
    odd = torch.full((B, P + H * W, C + 1), float("nan"), dtype=dtype)  # an odd stride: one channel per thread
    odd[..., 1:] = args[0]
    args[0] = odd[..., 1:]
    assert check_all(shim, *args) == ((1, 1) if dtype == torch.bfloat16 else (0, 0))


def test_db_alone_and_dw_alone(shim):
    x, dy, weight, _, _, H, W, P, _ = problem(3, 7, 9, 2, 40, 3, torch.bfloat16, torch.float32, True, False, "keep")
    _, dw, db = reference_backward(dy, x, weight, H, W, P, "keep")
    assert_close(grad_weight(shim, dy, None, 0, H, W, P, P, torch.float32, torch.bfloat16)[1], db, 3 * H * W, x.dtype)
    got, none = grad_weight(shim, dy, x, 3, H, W, P, P, torch.float32, None)
    assert none is None
    assert_close(got, dw, 3 * H * W, x.dtype)


def test_batch_and_device_do_not_matter(shim, monkeypatch):
    """Forward: sample 2 alone equals sample 2 of four, bit for bit, on a device of any size."""
    x, _, weight, bias, _, H, W, P, _ = problem(4, 5, 8, 1, 6, 5, torch.float32, torch.float32, True, False, "keep")
    y = forward(shim, x, weight, bias, None, H, W, P, "keep")
    for multiprocessors in (1, 132):
        monkeypatch.setattr(sys.modules[__name__], "MULTIPROCESSORS", multiprocessors)
        assert torch.equal(forward(shim, x[2:3], weight, bias, None, H, W, P, "keep"), y[2:3])
        assert torch.equal(forward(shim, x, weight, bias, None, H, W, P, "keep"), y)


# All of UBSan doubles the time to compile; the kernels with a prologue share their addressing with the plain ones.
@pytest.mark.parametrize("source", ["driver.cpp", "driver_act.cpp", "driver_conv.cpp"])
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers(tmp_path, sanitizer, source):
    """A program of its own, since a sanitizer's runtime must be the first library in a process."""
    if sanitizer == "address":
        sanitizer += ",undefined" if source == "driver.cpp" else ",bounds"
    exe = tmp_path / "driver"
    strict = [] if sanitizer == "thread" else ["-fno-sanitize-recover=all"]
    compile_shim(exe, "-O0", "-g1", f"-fsanitize={sanitizer}", *strict, "-DSHIM_ONE_DTYPE", source)
    done = subprocess.run([str(exe)], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is unknown to ThreadSanitizer")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.strip().endswith("ok")
