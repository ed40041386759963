"""The Triton kernels, run by Triton's interpreter on tiny problems and compared with plain PyTorch in float64.

The interpreter has to be asked for before Triton is imported, and other tests may compile the same kernels, so the one test
here runs the checks below in a process of their own. One of them by hand:

    TRITON_INTERPRET=1 pytest -o "python_functions=check_*" tests/test_triton_interpreter.py -k whole14
"""

import os
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

pytest.importorskip("triton")

EPS = {torch.float64: 2.0**-48, torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6}  # bf16: truncated

Case = namedtuple("Case", "name B H W P C K prefix bias residual layout", defaults=("keep", True, False, "contiguous"))
CASES = (
    Case("plain", 2, 4, 5, 1, 8, 3),
    Case("one_pixel", 2, 1, 1, 2, 3, 3, "zero", residual=True),
    Case("smaller_than_kernel", 1, 2, 1, 0, 1, 7),
    Case("wide", 1, 2, 8, 0, 3, 5),
    Case("tall", 1, 8, 2, 0, 3, 5, bias=False),
    Case("registers_zero", 2, 2, 3, 5, 4, 3, "zero", residual=True),
    Case("registers_keep", 2, 2, 3, 5, 4, 3, "keep", residual=True),
    Case("drop", 2, 3, 3, 2, 3, 3, "drop", residual=True),
    Case("whole14_odd_rows", 2, 3, 14, 1, 33, 3, residual=True),
    Case("whole14_k7", 1, 3, 14, 1, 4, 7, residual=True),
    Case("whole16", 1, 2, 16, 0, 3, 5),
    Case("whole_rows_and_channels", 1, 3, 14, 1, 32, 3, residual=True),  # nothing is masked
    Case("one_row_of_14", 2, 1, 14, 1, 3, 3),
    Case("two_segments", 1, 2, 17, 1, 3, 3, residual=True),
    Case("k1", 1, 2, 3, 1, 4, 1),
    Case("k9", 1, 2, 3, 1, 1, 9),
    Case("slice", 2, 2, 3, 1, 8, 3, layout="slice", residual=True),
    Case("chunk", 2, 2, 3, 1, 8, 3, layout="chunk", residual=True),
    Case("transposed_batch", 2, 2, 3, 1, 8, 3, layout="transpose", residual=True),
    Case("expanded_batch", 2, 2, 3, 1, 8, 3, layout="expand", residual=True),
    Case("expanded_tokens", 2, 2, 3, 1, 8, 3, "drop", layout="scalar"),
    Case("strides_whole14", 1, 2, 14, 1, 4, 3, layout="slice"),
)


def lay_out(t, layout):
    """The values of ``t`` (B, N, C) in another memory layout, surrounded by NaN where there is room."""
    B, N, C = t.shape
    if layout == "contiguous":
        return t
    if layout == "expand":
        return t[:1].expand(B, N, C)
    if layout == "scalar":
        return t[:1, :1].expand(B, N, C)
    holder = t.new_full({"slice": (B, N + 3, C + 4), "chunk": (B, N, 3 * C), "transpose": (N, B, C)}[layout], float("nan"))
    view = {"slice": holder[:, 2 : 2 + N, 4:], "chunk": holder[:, :, C : 2 * C], "transpose": holder.transpose(0, 1)}[layout]
    view.copy_(t)
    return view


def draw(case, dtype, integers=False):
    """(x, weight, bias, residual, dy); integers small enough for every sum to be exact in float16 and bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape, top=2):
        if integers:
            return torch.randint(-top, top + 1, shape, generator=generator).to(dtype)
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)

    tokens, rows = case.P + case.H * case.W, (0 if case.prefix == "drop" else case.P) + case.H * case.W
    x = lay_out(tensor(case.B, tokens, case.C), case.layout)
    weight, bias = tensor(case.C, 1, case.K, case.K, top=1), tensor(case.C)
    residual, dy = (lay_out(tensor(case.B, rows, case.C, top=1), case.layout) for _ in range(2))
    return x, weight, bias if case.bias else None, residual if case.residual else None, dy


def formula(x, weight, bias, residual, case):
    """token_dwconv in float64, differentiable."""
    B, _, C = x.shape
    map_ = x[:, case.P :].transpose(1, 2).reshape(B, C, case.H, case.W)
    y = torch.nn.functional.conv2d(map_, weight, bias, padding=case.K // 2, groups=C).flatten(2).transpose(1, 2)
    if case.prefix != "drop":
        y = torch.cat((x[:, : case.P] if case.prefix == "keep" else 0 * x[:, : case.P], y), 1)
    return y if residual is None else y + residual


def expected(case, x, weight, bias, residual, dy):
    """{name: value} of y, dx, dw and db in float64."""
    leaves = [t if t is None else t.double().clone().requires_grad_() for t in (x, weight, bias)]
    y = formula(*leaves, None if residual is None else residual.double(), case)
    y.backward(dy.double())
    values = {"y": y.detach(), "dx": leaves[0].grad, "dw": leaves[1].grad}
    values["db"] = dy[:, dy.shape[1] - case.H * case.W :].double().sum((0, 1))
    return values


def computed(case, x, weight, bias, residual, dy):
    """The same from the Triton implementations. db comes with dw if there is a bias, else from its own kernel."""
    from lifeops.kernels import token_dwconv as forward
    from lifeops.kernels import token_dwconv_grad as grad

    grid = case.H, case.W, case.P, case.prefix
    bias_dtype = None if bias is None else bias.dtype
    dw, db = grad.token_dwconv_bwd_dw(dy, x, case.K, *grid, weight.dtype, bias_dtype, "triton")
    assert dw.is_contiguous()
    if bias is None:
        assert db.shape == (0,)
        db = grad.token_dwconv_bwd_db(dy, *grid, weight.dtype, "triton")
    y = forward.token_dwconv(x, weight, bias, residual, *grid, "triton")
    dx = forward.token_dwconv_bwd_dx(dy, weight, *grid, "triton")
    return {"y": y, "dx": dx, "dw": dw, "db": db}


def compare(case, tensors, exact=False):
    want = expected(case, *tensors)
    for name, got in computed(case, *tensors).items():
        assert got.is_contiguous()
        assert got.dtype == (tensors[0].dtype if name in ("y", "dx") else tensors[1].dtype)
        error = (got.double() - want[name]).abs().max().item()
        allowed = 0.0 if exact else EPS[got.dtype] * max(1.0, want[name].abs().max().item())
        assert error <= allowed, f"{case.name}: {name} is off by {error:.2e}, allowed {allowed:.2e}"


def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-o", "python_functions=check_*", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def check_values(case, poison):
    compare(case, draw(case, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def check_dtypes(dtype, poison):
    case = Case("dtypes", 1, 3, 5, 1, 3, 3, residual=True)
    compare(case, draw(case, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [3, 5, 7])
def check_integers_are_exact(dtype, K, poison):
    case = Case("integers", 1, 2, 14, 1, 3, K)
    compare(case, draw(case, dtype, integers=True), exact=True)


def check_weight_of_another_dtype_and_any_strides(poison):
    case = Case("mixed", 1, 2, 3, 1, 4, 3)
    x, weight, bias, residual, dy = draw(case, torch.bfloat16)
    weight, bias = weight.float() + 2.0**-12, bias.float() + 2.0**-12
    compare(case, (x, weight, bias, residual, dy))
    compare(case, (x, weight[:1].expand(4, 1, 3, 3).transpose(-1, -2), bias, residual, dy))


def check_the_largest_kernel(poison):
    from lifeops.kernels.token_dwconv import MAX_KERNEL, token_dwconv

    case = Case("k15", 1, 1, 2, 1, 1, MAX_KERNEL)
    x, weight, bias, _, _ = draw(case, torch.float32)
    want = formula(x.double(), weight.double(), bias.double(), None, case)
    torch.testing.assert_close(token_dwconv(x, weight, bias, None, 1, 2, 1, "keep", "triton").double(), want, rtol=1e-5, atol=1e-6)


def check_db_has_a_kernel_of_its_own(poison):
    from lifeops.kernels import token_dwconv_grad as grad

    dy = torch.rand(2, 2 + 6, 5)
    db = grad.token_dwconv_bwd_db(dy, 2, 3, 2, "keep", torch.float64, "triton")
    torch.testing.assert_close(db, dy[:, 2:].double().sum((0, 1)), rtol=1e-6, atol=0)
    assert db.dtype == torch.float64


def check_what_is_added_to_the_input_gradient(poison):
    """f'(v) (du scale + a): a alone adds no product, which of an infinite input would be NaN."""
    from lifeops.kernels.token_dwconv_act import token_dwconv_act_bwd_dx as kernel
    from lifeops.ops.token_dwconv.act_spec import reference_bwd_dx as reference

    case = Case("shift", 2, 3, 4, 1, 5, 3)
    x, weight, _, _, dy = draw(case, torch.float32)
    scale, shift, a, b = torch.rand(4, case.C) + 0.5
    for act in ("none", "gelu", "gelu_first"):
        for added in ((None, None), (a, None), (a, b)):
            x[1, 4, 2] = torch.inf if added[1] is None and act == "none" else 1.0
            given = (scale, shift, act, *added, case.H, case.W, case.P, case.prefix, "triton")
            for got, want in zip(kernel(dy, x, weight, *given), reference(dy, x, weight, *given), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def check_samples_do_not_see_their_batch_and_sums_repeat():
    case = Case("batch", 3, 3, 4, 1, 3, 3)
    x, weight, bias, residual, dy = draw(case, torch.float32)
    first = computed(case, x, weight, bias, residual, dy)
    again = computed(case, x, weight, bias, residual, dy)
    assert all(torch.equal(first[name], again[name]) for name in first)
    alone = computed(case, x[1:2], weight, bias, residual, dy[1:2])
    assert torch.equal(alone["y"], first["y"][1:2])
    assert torch.equal(alone["dx"], first["dx"][1:2])


def check_strides_beyond_32_bits(poison):
    case = Case("int64", 1, 2, 3, 1, 4, 3)
    x, weight, bias, residual, dy = draw(case, torch.float32)
    far = x.as_strided(x.shape, (2**40, x.stride(1), 1))
    compare(case, (far, weight, bias, residual, dy.as_strided(dy.shape, (2**40, dy.stride(1), 1))))


def check_several_parts_are_summed(monkeypatch, poison):
    from lifeops.kernels import token_dwconv_grad as grad

    monkeypatch.setattr(grad, "PROGRAMS", 2)
    case = Case("parts", 3, 16, 3, 1, 3, 3)  # 24 jobs of 8 in 3 tiles
    assert grad.split(3, 1) == (2, 2)
    compare(case, draw(case, torch.float32))


def check_reasons_against():
    from lifeops.kernels.token_dwconv import supports
    from lifeops.ops.token_dwconv.spec import Problem

    cpu = torch.device("cpu")
    assert supports(Problem(cpu, torch.bfloat16, torch.float32, 8, 15)) == []
    assert supports(Problem(cpu, torch.float32, None, 8, 0)) == []
    assert len(supports(Problem(torch.device("meta"), torch.int32, torch.int8, 8, 17))) == 4
