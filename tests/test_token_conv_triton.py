"""The Triton kernels of the general token convolution and of pooling without a GPU: what only they have in the interpreter, and what they
compile to.

The registry's own cases run in the interpreter from tests/test_triton_ops.py; here the interpreter and the compiler each get a process
of their own. One check by hand: TRITON_INTERPRET=1 pytest -o "python_functions=check_*" tests/test_token_conv_triton.py
"""

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from test_triton_budgets import python
from test_triton_ops import _interpreted

FILE = Path(__file__)
SAMPLES = ("s8", "spare", "even_same", "rectangle", "wide_padding", "multiplied_zero", "average_inside", "max_up", "skip_s4")

Case = namedtuple("Case", "name B H W P C m K s p prefix", defaults=("keep",))
CASES = (
    Case("two_segments", 1, 3, 35, 1, 3, 1, (3, 3), (2, 2), (1, 1)),
    Case("masked_channels", 1, 3, 4, 1, 70, 1, (3, 3), (2, 2), (1, 1), "drop"),
    Case("doubled", 1, 3, 4, 0, 35, 2, (3, 3), (2, 2), (1, 1), "zero"),
    Case("four_times", 1, 4, 5, 2, 9, 4, (2, 3), (1, 2), (0, 1), "zero"),
    Case("six_times", 1, 4, 5, 0, 5, 6, (3, 2), (2, 1), (1, 0), "zero"),
    Case("one_axis", 2, 7, 6, 1, 4, 1, (6, 1), (3, 1), (5, 0)),
    Case("long_stride", 1, 37, 20, 1, 2, 1, (2, 3), (35, 17), (0, 1)),
    Case("looped", 1, 9, 20, 1, 3, 1, (7, 5), (2, 1), (3, 2)),
    Case("looped_doubled", 1, 8, 7, 0, 3, 2, (6, 6), (1, 2), (2, 3), "zero"),
)
PLAIN = Case("plain", 3, 6, 7, 1, 5, 1, (3, 3), (2, 2), (1, 1))


def test_in_the_interpreter():
    _interpreted(FILE.name, "", "-o", "python_functions=check_*")


def test_registry_cases_in_the_interpreter():
    ops = "strided or transpose or token_pool"
    _interpreted("test_ops.py", f"test_oracle and float32 and ({ops}) and ({' or '.join(f'-{s}-' for s in SAMPLES)})")


def _draw(case, dtype=torch.float32, integers=False):
    """(x, weight, bias, dy)."""
    from lifeops.geometry import filtered_grid

    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        if integers:
            return torch.randint(-1, 2, shape, generator=generator).to(dtype)
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)

    rows, columns = filtered_grid("", case.H, case.W, case.K, case.s, case.p)
    few, many = (0 if case.prefix == "drop" else case.P) + rows * columns, case.C * case.m
    return tensor(case.B, case.P + case.H * case.W, case.C), tensor(many, 1, *case.K), tensor(many), tensor(case.B, few, many)


def _expected(case, x, weight, bias, dy):
    """y, dx, dw and db in float64 by autograd through conv2d."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    map_ = leaves[0][:, case.P :].transpose(1, 2).unflatten(2, (case.H, case.W))
    y = torch.nn.functional.conv2d(map_, *leaves[1:], case.s, case.p, groups=case.C).flatten(2).transpose(1, 2)
    if case.prefix == "keep":
        y = torch.cat((leaves[0][:, : case.P], y), 1)
    if case.prefix == "zero":
        y = torch.cat((y.new_zeros(case.B, case.P, y.shape[2]), y), 1)
    y.backward(dy.double())
    return y.detach(), *(t.grad for t in leaves)


def _computed(case, x, weight, bias, dy):
    from lifeops.kernels.token_conv import token_dwconv_strided, token_dwconv_transpose
    from lifeops.kernels.token_conv_grad import token_dwconv_strided_bwd_dw

    place = case.H, case.W, case.P, *case.s, *case.p, case.prefix
    y = token_dwconv_strided(x, weight, bias, *place, "triton")
    dx = token_dwconv_transpose(dy, weight, None, case.m, *place, "triton")
    return y, dx, *token_dwconv_strided_bwd_dw(dy, x, *case.K, *place, weight.dtype, bias.dtype, "triton")


def _compare(case, tensors, tolerance):
    for got, want in zip(_computed(case, *tensors), _expected(case, *tensors), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def check_values(case, poison):
    _compare(case, _draw(case), 2.0**-20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def check_integers_are_exact(dtype, poison):
    for K, s in (((3, 3), (2, 2)), ((6, 5), (3, 2))):
        case = PLAIN._replace(B=1, C=2, K=K, s=s)
        _compare(case, _draw(case, dtype, integers=True), 0.0)


def check_a_bias_of_the_transpose(poison):
    from lifeops.kernels.token_conv import token_dwconv_transpose

    _, weight, _, y = _draw(PLAIN)
    bias, place = torch.rand(PLAIN.C), (PLAIN.H, PLAIN.W, PLAIN.P, *PLAIN.s, *PLAIN.p, "zero", "triton")
    difference = token_dwconv_transpose(y, weight, bias, 1, *place) - token_dwconv_transpose(y, weight, None, 1, *place)
    assert not difference[:, :1].any()
    torch.testing.assert_close(difference[:, 1:], bias.expand(difference[:, 1:].shape), rtol=0, atol=1e-6)


def check_strides_beyond_32_bits(poison):
    case = PLAIN._replace(B=1)
    x, weight, bias, dy = _draw(case)
    x, dy = (t.as_strided(t.shape, (2**40, *t.stride()[1:])) for t in (x, dy))
    _compare(case, (x, weight, bias, dy), 2.0**-20)


def check_samples_do_not_see_their_batch_and_sums_repeat():
    x, weight, bias, dy = _draw(PLAIN)
    first, again = (_computed(PLAIN, x, weight, bias, dy) for _ in range(2))
    assert all(map(torch.equal, first, again))
    alone = _computed(PLAIN._replace(B=1), x[1:2], weight, bias, dy[1:2])
    assert torch.equal(alone[0], first[0][1:2])
    assert torch.equal(alone[1], first[1][1:2])


def check_several_parts_are_summed(monkeypatch, poison):
    from lifeops.kernels import token_dwconv_grad

    monkeypatch.setattr(token_dwconv_grad, "PROGRAMS", 2)
    case = PLAIN._replace(H=31)  # 48 jobs of 8 in 6 tiles
    _compare(case, _draw(case), 2.0**-20)


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def check_what_is_not_finite_reaches_its_windows(value):
    """And nothing else: neither a padded tap nor one that a phase does not have."""
    for case in (PLAIN, PLAIN._replace(K=(4, 3), s=(3, 4), p=(2, 1))):
        x, weight, bias, dy = _draw(case)
        x[1, 9, 3] = dy[1, 3, 2] = value
        for got, want in list(zip(_computed(case, x, weight, bias, dy), _expected(case, x, weight, bias, dy), strict=True))[:2]:
            assert torch.equal(got.isfinite(), want.isfinite())
            assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def check_the_largest(dtype, poison):
    """Equal numbers, windows of minus infinities, several NaN: torch's places."""
    from lifeops.kernels.token_pool import token_pool, token_pool_bwd
    from lifeops.ops.token_pool import spec

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (2, 1 + 9 * 8, 5), generator=generator).to(dtype)
    for value in (-torch.inf, torch.nan):
        x[torch.rand(x.shape, generator=generator) < 0.3] = value
    for window in ((3, 3, 9, 8, 1, 2, 2, 1, 1), (2, 5, 9, 8, 1, 1, 3, 1, 2), (1, 3, 9, 8, 1, 2, 5, 0, 0)):
        place = "max", *window, "keep", True, True, "triton"
        want = spec.reference(x, *place)
        assert torch.equal(token_pool(x, *place).nan_to_num(7.0), want.nan_to_num(7.0))
        dy = torch.randint(-2, 3, want.shape, generator=generator).to(dtype)
        assert torch.equal(token_pool_bwd(dy, x, *place), spec.reference_bwd(dy, x, *place))


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def check_the_mean(dtype, count_include_pad):
    """Windows in the corners and, rounded up, past the padding: torch's divisors, forward and backward."""
    from lifeops.kernels.token_pool import token_pool, token_pool_bwd
    from lifeops.ops.token_pool import spec

    x = torch.rand(2, 1 + 7 * 8, 5, dtype=dtype)
    for window in ((3, 3, 7, 8, 1, 2, 2, 1, 1), (2, 5, 7, 8, 1, 1, 3, 1, 2), (4, 2, 7, 8, 1, 3, 2, 2, 0)):
        place = *window, "keep", True, count_include_pad, "triton"
        want = spec.reference(x, "avg", *place)
        torch.testing.assert_close(token_pool(x, "avg", *place), want)
        dy = torch.rand_like(want)
        torch.testing.assert_close(token_pool_bwd(dy, None, "avg", *place), spec.reference_bwd(dy, None, "avg", *place))


def check_reasons_against():
    from lifeops.kernels import token_conv, token_conv_grad, token_pool
    from lifeops.ops.token_conv.spec import Problem
    from lifeops.ops.token_pool.spec import Problem as Pool

    cpu, steps = torch.device("cpu"), (9, 9, 0, 0)
    for supports in (token_conv.supports, token_conv_grad.supports):
        assert supports(Problem(cpu, torch.bfloat16, torch.float32, 8, 3, 15, 1, *steps)) == []
        assert len(supports(Problem(torch.device("meta"), torch.int32, torch.int8, 8, 3, 1, 16, *steps))) == 4
    assert token_pool.supports(Pool(cpu, torch.float16, "max", 8, 15, 15, *steps)) == []
    assert len(token_pool.supports(Pool(torch.device("meta"), torch.int32, "avg", 8, 16, 2, *steps))) == 3


RATIO = 1.35  # of the instructions per output element, stride 2 to stride 1


def test_compiled_for_hopper():
    """The exit status says whether spills, instructions or registers exceed the budget; `make budgets` compiles the rest."""
    pairs = [(f"{kind}-3-1", f"{kind}-3-2") for kind in ("strided", "transpose", "dws")]
    names = [*sum(pairs, ()), "strided-3-2-m2", "pool-max-3-2", "poolbwd-max-3-2"]
    costs = {c["name"]: c for c in json.loads(python("-m", "bench.budgets", "--arch", "90", "--json", "--only", ",".join(names)))}
    assert all(cost["spilled"] == 0 for cost in costs.values())
    for one, two in pairs:
        assert costs[two]["per_element"] <= RATIO * costs[one]["per_element"]


GRIDS = """
import json
from bench import budgets, conv_arguments as launches

sides = (1, 2, 3, 5, 7, 8, 13, 14, 16, 17, 28, 31, 56, 64)
print(json.dumps([
    len({budgets.specialisation(*launch(*variant, 1 + side, side)[:2]) for side in sides})
    for launch, *variant in (
        (launches.strided, 3, 2, 1, 384), (launches.strided, 3, 1, 2, 384), (launches.transpose, 3, 2, 1, 384),
        (launches.grad, 3, 2, 1, 384), (launches.pool, "max", 3, 2, 384), (launches.pool_bwd, "avg", 3, 2, 384),
    )
]))
"""


def test_any_grid_needs_at_most_two_variants():
    assert max(json.loads(python("-c", GRIDS))) <= 2
