# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels with prologue and epilogue, run on the CPU as test_cuda_host.py runs the plain ones.

The oracle is the reference of lifeops/ops in float64.
"""

import ctypes
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cuda_tools import ACTS, DTYPES, AffineAct, FwdParams, GradWeightParams
from lifeops.ops.channel import activations
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.channel.activations import affine
from lifeops.ops.token_dwconv import spec as dwconv
from test_cuda_host import compile_shim, make, pointer

MULTIPROCESSORS = 2  # few, so that small problems already give a warp several strips


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda_act_shim") / "token_dwconv_act.so"
    compile_shim(out, "-Og", "-shared", "-fPIC", "token_dwconv_act.cpp")
    return ctypes.CDLL(str(out))


class Problem(NamedTuple):
    B: int
    H: int
    W: int
    P: int
    C: int
    K: int
    prefix: str
    bias: bool
    residual: bool
    vec: int
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32


class Step(NamedTuple):
    """scale, shift (or None) and the activation, a name of ACTS."""

    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    act: str = "none"

    def native(self):
        return ctypes.byref(AffineAct(pointer(self.scale), pointer(self.shift), ACTS.index(self.act)))

    def value(self, x):
        if self.act == "gelu_first":
            return affine(activations.value(x, "gelu"), *self.doubles())
        return activations.value(affine(x, *self.doubles()), self.act)

    def doubles(self):
        return [None if t is None else t.double() for t in (self.scale, self.shift)]


def step(s: Problem, act, seed, present=True):
    values = (make((s.C,), accumulate_dtype(s.dtype), seed + i) for i in range(2))
    return Step(*values, act) if present else Step(act=act)


def rows(s: Problem):
    return 0 if s.prefix == "drop" else s.P


def inputs(s: Problem, integers=False):
    """x, dy, weight, bias, residual."""
    N, out = s.P + s.H * s.W, rows(s) + s.H * s.W
    x, dy = make((s.B, N, s.C), s.dtype, 1, integers), make((s.B, out, s.C), s.dtype, 2, integers)
    weight = make((s.C, 1, s.K, s.K), s.weight_dtype, 3, integers) / (1 if integers else s.K)
    bias = make((s.C,), s.weight_dtype, 4, integers) if s.bias else None
    return x, dy, weight, bias, make((s.B, out, s.C), s.dtype, 5, integers) if s.residual else None


def params(s: Problem, x, weight, bias, residual, y, x_prefix, y_prefix, flip):
    r = y if residual is None else residual
    return FwdParams(
        *map(pointer, (x, weight, bias, residual, y)), s.B, s.H, s.W, s.C, *x.stride()[:2], *y.stride()[:2], *r.stride()[:2],
        s.K, x_prefix, y_prefix, int(s.prefix != "keep"), flip, DTYPES.index(x.dtype), DTYPES.index(weight.dtype),
        0 if bias is None else DTYPES.index(bias.dtype),
    )  # fmt: skip


def nans(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def forward(shim, s, x, weight, bias, residual, prologue, epilogue, pool=True, stats=True):
    """-> y, pool, stats, vec of the kernel that ran."""
    y, dtype = nans(s.B, rows(s) + s.H * s.W, s.C, dtype=s.dtype), accumulate_dtype(s.dtype)
    pool = nans(s.B, s.C, dtype=dtype) if pool else None
    stats = nans(2, s.C, dtype=dtype) if stats else None
    p = params(s, x, weight, bias, residual, y, s.P, rows(s), False)
    out = map(ctypes.c_void_p, map(pointer, (pool, stats)))
    vec = shim.shim_token_dwconv_act(ctypes.byref(p), prologue.native(), epilogue.native(), *out, MULTIPROCESSORS)
    return y, pool, stats, vec


def grad_input(shim, s, dy, x, weight, prologue, a=None, b=None):
    """-> dx, sums, vec."""
    dx, sums = nans(s.B, s.P + s.H * s.W, s.C, dtype=s.dtype), nans(2, s.C, dtype=accumulate_dtype(s.dtype))
    p = params(s, dy, weight, None, x, dx, rows(s), s.P, True)
    values = map(ctypes.c_void_p, map(pointer, (a, b, sums)))
    vec = shim.shim_token_dwconv_act_grad_input(ctypes.byref(p), prologue.native(), *values, MULTIPROCESSORS)
    return dx, sums, vec


def grad_weight(shim, s, dy, x, prologue):
    """-> dw, db, vec."""
    dw, db = nans(s.C, 1, s.K, s.K, dtype=s.weight_dtype), nans(s.C, dtype=s.weight_dtype) if s.bias else None
    p = GradWeightParams(
        *map(pointer, (dy, x, dw, db)), s.B, s.H, s.W, s.C, *x.stride()[:2], *dy.stride()[:2], s.K, s.P, rows(s),
        *(DTYPES.index(t) for t in (s.dtype, s.weight_dtype, s.weight_dtype)),
    )  # fmt: skip
    vec = shim.shim_token_dwconv_act_grad_weight(ctypes.byref(p), prologue.native())
    return dw, db, vec


def through(step, x, P):
    """x in float64, its patch rows through the step."""
    x = x.double()
    return torch.cat((x[:, :P], step.value(x[:, P:])), 1)


def reference_forward(s, x, weight, bias, residual, prologue, epilogue):
    """y in float64, and the patches before rounding."""
    bias = None if bias is None else bias.double()
    z = dwconv.reference(through(prologue, x, s.P), weight.double(), bias, None, s.H, s.W, s.P, "drop", None)
    patches = epilogue.value(z)
    y = dwconv._with_prefix(patches, x.double(), s.P, s.prefix)
    return y if residual is None else y + residual.double(), patches


def reference_grad_input(s, dy, x, weight, prologue, a, b):
    """dx and the sums in float64: autograd of the prologue, on du."""
    du = dwconv.reference_bwd_dx(dy.double(), weight.double(), s.H, s.W, s.P, s.prefix, None)
    inner = x[:, s.P :].double().requires_grad_()
    g, first = du[:, s.P :], prologue.act == "gelu_first"
    scale = 1 if prologue.scale is None else prologue.scale.double()
    a, b = (0 if t is None else t.double() for t in (a, b))
    at = activations.value(inner.detach(), "gelu") if first else inner.detach()
    if first:
        (slope,) = torch.autograd.grad(torch.nn.functional.gelu(inner).sum(), inner)
        dx, dv = slope * (scale * g + a + b * at), g
    else:
        dv = g * activations.derivative(affine(inner.detach(), *prologue.doubles()), prologue.act)
        dx = scale * dv + a + b * at
    return torch.cat((du[:, : s.P], dx), 1), torch.stack([(dv * at).sum((0, 1)), dv.sum((0, 1))])


def assert_close(got, want, terms, dtype):
    """Half an ulp of the result and eps * sqrt(terms) of the sum, as in test_cuda_host.py, doubled for what the activations add."""
    assert not got.isnan().any(), "an element was not written"
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    limit = max(want.abs().max().item(), 1.0) * (torch.finfo(got.dtype).eps + 8 * eps * terms**0.5)
    error = (got.double() - want).abs().max().item()
    assert error <= limit, f"error {error:.3g} > {limit:.3g}"


def check_forward(shim, s, args, prologue, epilogue):
    y, pool, stats, vec = forward(shim, s, *args, prologue, epilogue)
    want, patches = reference_forward(s, *args, prologue, epilogue)
    assert_close(y, want, s.K**2, s.dtype)
    n = s.B * s.H * s.W
    stored = patches if args[3] is not None else y[:, rows(s) :].double()  # as stored where y shows it
    slack = 1 if args[3] is None else torch.finfo(s.dtype).eps / torch.finfo(accumulate_dtype(s.dtype)).eps
    assert_close(pool, stored.sum(1), n * slack**2, s.dtype)
    assert_close(stats[0], stored.mean((0, 1)), slack**2, s.dtype)
    assert_close(stats[1], (stored - stored.mean((0, 1))).square().sum((0, 1)), n * slack**2, s.dtype)
    return vec


def check_grad_input(shim, s, dy, x, weight, prologue, a, b):
    dx, sums, vec = grad_input(shim, s, dy, x, weight, prologue, a, b)
    want, want_sums = reference_grad_input(s, dy, x, weight, prologue, a, b)
    assert_close(dx, want, s.K**2, s.dtype)
    assert_close(sums, want_sums, s.B * s.H * s.W, s.dtype)
    return vec


def check_grad_weight(shim, s, dy, x, prologue):
    dw, db, vec = grad_weight(shim, s, dy, x, prologue)
    place, n = (s.H, s.W, s.P, s.prefix), s.B * s.H * s.W
    u = through(prologue, x, s.P)
    want, want_db = dwconv.reference_bwd_dw(dy.double(), u, s.K, *place, torch.float64, torch.float64, None)
    assert_close(dw, want, n, s.dtype)
    if s.bias:
        assert_close(db, want_db, n, s.dtype)
    assert torch.equal(dw, grad_weight(shim, s, dy, x, prologue)[0]), "dW is not deterministic"
    return vec


PROBLEMS = [  # every kernel variant and every edge of the planning
    Problem(2, 5, 7, 1, 64, 3, "keep", True, False, 2),  # one tile wide
    Problem(1, 9, 16, 2, 66, 5, "zero", True, True, 2),  # two tiles of 8, a slab with two channels
    Problem(2, 30, 11, 5, 8, 3, "keep", False, True, 2),  # a moved segment, several strips
    Problem(1, 9, 14, 0, 40, 7, "keep", True, True, 1),  # two tiles of 7
    Problem(1, 12, 17, 1, 6, 7, "drop", True, False, 1),  # three segments, the second moved to keep its halo whole
    Problem(3, 6, 10, 1, 33, 5, "drop", False, False, 1),  # odd C
    Problem(1, 3, 8, 2, 3, 3, "zero", True, True, 1),
    Problem(2, 2, 8, 1, 3, 7, "keep", True, True, 1),  # kernel larger than the grid
    Problem(2, 8, 2, 1, 4, 3, "keep", True, False, 0),  # narrow: the kernel for any grid
    Problem(2, 1, 1, 1, 1, 3, "keep", True, True, 0),
    Problem(1, 14, 5, 1, 33, 9, "zero", True, True, 0),
    Problem(1, 2, 7, 1, 2, 15, "keep", True, False, 0),
]
CASES = pytest.mark.parametrize("case", PROBLEMS, ids=lambda c: f"B{c.B}_{c.H}x{c.W}_P{c.P}_C{c.C}_K{c.K}_{c.prefix}")
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def of_dtype(case, dtype):
    """bfloat16 with a float filter (autocast), the others with their own type."""
    return case._replace(dtype=dtype, weight_dtype=torch.float32 if dtype == torch.bfloat16 else dtype)


@CASES
@TYPES
def test_forward(shim, dtype, case):
    s = of_dtype(case, dtype)
    x, _, *rest = inputs(s)
    acts = [ACTS[(PROBLEMS.index(case) + DTYPES.index(dtype) + i) % len(ACTS)] for i in (0, 2)]
    out_act = "hardswish" if acts[1] == "gelu_first" else acts[1]
    vec = check_forward(shim, s, (x, *rest), step(s, acts[0], 10), step(s, out_act, 20))
    assert vec == (0 if dtype == torch.float64 else case.vec)


@CASES
@TYPES
def test_grad_input(shim, dtype, case):
    s = of_dtype(case, dtype)
    x, dy, weight, _, _ = inputs(s)
    act = ACTS[(PROBLEMS.index(case) + DTYPES.index(dtype)) % len(ACTS)]
    a, b = (make((s.C,), accumulate_dtype(dtype), 30 + i) for i in range(2))
    vec = check_grad_input(shim, s, dy, x, weight, step(s, act, 10), a, b)
    assert vec == (0 if dtype == torch.float64 else case.vec)


@CASES
@TYPES
def test_grad_weight(shim, dtype, case):
    s = of_dtype(case, dtype)
    if s.K > 9:
        s = s._replace(K=1)  # a block per tap: 225 of them would take seconds to start
    x, dy, _, _, _ = inputs(s)
    act = ACTS[(PROBLEMS.index(case) + DTYPES.index(dtype) + 3) % len(ACTS)]
    assert check_grad_weight(shim, s, dy, x, step(s, act, 10)) == (0 if dtype == torch.float64 else case.vec)


ACT = pytest.mark.parametrize("act", ACTS)
TYPICAL = Problem(2, 9, 14, 1, 12, 3, "keep", True, False, 2)


@ACT
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_every_activation(shim, dtype, act):
    """Once with values, once without; as the epilogue too."""
    s = of_dtype(TYPICAL, dtype)
    x, dy, weight, bias, _ = inputs(s)
    out_act = act if act != "gelu_first" else "none"
    for present in (True, False):
        prologue, epilogue = step(s, act, 10, present), step(s, out_act, 20, present)
        check_forward(shim, s, (4 * x, weight, bias, None), prologue, epilogue)
        check_grad_input(shim, s, dy, 4 * x, weight, prologue, None, None)
        check_grad_weight(shim, s, dy, 4 * x, prologue)


def test_nothing_around(shim):
    """Without prologue, epilogue, bias and sums it is the plain convolution."""
    s = of_dtype(TYPICAL, torch.bfloat16)
    x, _, weight, _, _ = inputs(s)
    y, pool, stats, _ = forward(shim, s, x, weight, None, None, Step(), Step(), pool=False, stats=False)
    assert pool is None
    assert stats is None
    assert_close(y, reference_forward(s, x, weight, None, None, Step(), Step())[0], 9, s.dtype)


@pytest.mark.parametrize("K", [3, 5, 7, 9])
def test_integers_are_exact(shim, K):
    """Small integers through relu6: nothing may be rounded."""
    s = Problem(1, 8, 10, 1, 6, K, "keep", True, True, 2, torch.bfloat16, torch.bfloat16)
    x, dy, weight, bias, residual = inputs(s, integers=True)
    prologue, epilogue = (Step(*(torch.randint(-1, 2, (s.C,)).float() for _ in range(2)), "relu6") for _ in range(2))
    y, pool, stats, _ = forward(shim, s, x, weight, bias, residual, prologue, epilogue)
    want, patches = reference_forward(s, x, weight, bias, residual, prologue, epilogue)
    assert torch.equal(y.double(), want)
    assert torch.equal(pool.double(), patches.sum(1))
    dx, sums, _ = grad_input(shim, s, dy, x, weight, prologue)
    want, want_sums = reference_grad_input(s, dy, x, weight, prologue, None, None)
    assert torch.equal(dx.double(), want)
    assert torch.equal(sums.double(), want_sums)
    assert_close(stats[0], patches.mean((0, 1)), 80, torch.float32)
    check = dwconv.reference_bwd_dw(dy.double(), through(prologue, x, s.P), K, s.H, s.W, s.P, s.prefix, *[torch.float64] * 2, None)
    dw, db, _ = grad_weight(shim, s, dy, x, prologue)
    assert torch.equal(dw.double(), check[0].to(dw.dtype).double())
    assert torch.equal(db.double(), check[1].to(db.dtype).double())


def test_statistics_with_a_large_mean(shim):
    """Values around 1000 with a deviation of 0.01: squares of them would leave nothing."""
    s = Problem(3, 20, 14, 0, 4, 3, "keep", True, False, 2)
    x, _, weight, _, _ = inputs(s)
    bias = torch.full((s.C,), 1000.0)
    y, _, stats, _ = forward(shim, s, x, 0.01 * weight, bias, None, Step(), Step())
    y = y.double()
    m2 = (y - y.mean((0, 1))).square().sum((0, 1))
    torch.testing.assert_close(stats[0].double(), y.mean((0, 1)), rtol=1e-7, atol=0)
    torch.testing.assert_close(stats[1].double(), m2, rtol=1e-5, atol=0)


def strided(t):
    """The same values as a slice of a wider tensor, images and tokens interleaved, NaN around."""
    wide = nans(t.shape[1] + 2, t.shape[0], t.shape[2] + 8, dtype=t.dtype)
    view = wide[1:-1, :, 4 : 4 + t.shape[2]].transpose(0, 1)
    view.copy_(t)
    return view


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_strided_views(shim, dtype):
    s = of_dtype(Problem(2, 6, 8, 1, 6, 3, "keep", True, True, 2), dtype)
    x, dy, weight, bias, residual = inputs(s)
    prologue, epilogue = step(s, "hardswish", 10), step(s, "relu6", 20)
    check_forward(shim, s, (strided(x), weight, bias, strided(residual)), prologue, epilogue)
    check_grad_input(shim, s, strided(dy), strided(x), weight, prologue, None, None)
    check_grad_weight(shim, s, strided(dy), strided(x), prologue)
    same = x[:1].expand(s.B, -1, -1)
    check_forward(shim, s, (same, weight, bias, strided(residual)), prologue, epilogue)
    odd = nans(s.B, x.shape[1], s.C + 1, dtype=dtype)  # an odd stride: one channel per thread
    odd[..., 1:] = x
    assert check_grad_input(shim, s, dy, odd[..., 1:], weight, prologue, None, None) == (dtype == torch.bfloat16)


def test_device_does_not_matter(shim, monkeypatch):
    """All results, sums included, are the same bit for bit on a device of any size; y of a sample in any batch."""
    s = of_dtype(Problem(4, 30, 8, 1, 6, 5, "keep", True, False, 2), torch.bfloat16)
    x, dy, weight, bias, _ = inputs(s)
    prologue, epilogue = step(s, "gelu", 10), step(s, "hardswish", 20)

    def run():
        return *forward(shim, s, x, weight, bias, None, prologue, epilogue)[:3], *grad_input(shim, s, dy, x, weight, prologue)[:2]

    first = run()
    for multiprocessors in (1, 132):
        monkeypatch.setattr(sys.modules[__name__], "MULTIPROCESSORS", multiprocessors)
        assert all(map(torch.equal, run(), first))
    one = s._replace(B=1)
    assert torch.equal(forward(shim, one, x[2:3], weight, bias, None, prologue, epilogue)[0], first[0][2:3])
