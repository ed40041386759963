"""Every operator of the registry on every backend at hand: values, special values, and the same bits whatever the circumstances."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzz import examples, harness
from fuzz.cases import arguments, cases, largest_kernel, names
from lifeops import registry

SMALL = {"norm_affine", "norm_gradients"}  # C numbers, by torch's operators but for Triton: tests/test_ops.py has all there is to them
OPS = [name for name in registry.ops if harness.BACKEND in registry.ops[name].impls and name not in SMALL]
SPECIAL = torch.nan, torch.inf, -torch.inf


def test_every_operator_has_an_oracle():
    assert set(harness.ORACLES) == set(registry.ops) - SMALL


# ------------------------------------------------------------------------------------------------ values


def _values(case):
    if harness.out_of_time(case.op):
        return
    harness.check(*harness.settled(case))


@pytest.mark.parametrize("name", OPS)
def test_values(name):
    @given(cases(name, harness.BACKEND))
    def found(case):
        _values(case)

    found()


@pytest.mark.skipif(harness.INTERPRETED, reason="found on the CPU")
@pytest.mark.parametrize("case", examples.VALUES, ids=lambda case: case.op)
def test_what_was_found(case):
    _values(case)


# ------------------------------------------------------------------------------------------------ NaN and infinities

UNJUDGED = {  # padded taps of an infinite or NaN gradient: 0 * inf or nothing, as convolutions differ
    "token_dwconv_bwd_dw": (0,), "token_dwconv_act_bwd_dw": (0,), "token_dwconv_act_bwd": (1,), "dw_shortcut_bwd": (1,),
    "local_attention": (1, 2), "token_dwconv_strided_bwd_dw": (0,),
}  # fmt: skip
NOT_PLANTED = {"weight", "dw2", "dw3", "attn", "lse", "attn_mask"}
NAN_ALONE = "local_attention", "local_attention_bwd", "dw_shortcut_bwd", "rollout_step"  # 0 * inf or not: where does a product underflow


def _plant(case, args, value, which, where):
    """Put ``value`` into one element of one argument; its name."""
    named = zip(names(registry.ops[case.op]), args, strict=True)
    open_ = {n: a for n, a in named if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel() and n not in NOT_PLANTED}
    if "local_attention_bwd" in case.op:
        open_ = {"dy": open_["dy"]} if "dy" in open_ else {}
    if not open_:
        return None
    name = [*open_][which % len(open_)]
    t = open_[name]
    t[tuple(torch.unravel_index(torch.tensor(where % t.numel()), t.shape))].fill_(value)
    return name


def _special(case, value, which, where):
    if case.op in NAN_ALONE:
        value = torch.nan
    if "mask" in case.sample:
        case = case._replace(sample={**case.sample, "mask": "", "key_mask": False})
    if case.backend == "reference" and "float16" in case.dtype:
        case = case._replace(dtype="float32", other="")  # torch's convolution in half precision multiplies neighbours of a window with 0
    case, args = harness.settled(case)
    _plant(case, args, value, which, where)
    if not harness.out_of_time(f"{case.op}, special values"):
        harness.check(case, args, judged={*range(9)} - {*UNJUDGED.get(case.op, ())})


PLACES = st.sampled_from(SPECIAL), st.integers(0, 20), st.integers(0, 2**16)


@pytest.mark.parametrize("name", OPS)
def test_special_values(name):
    @given(cases(name, harness.BACKEND, ("normal", "lattice")), *PLACES)
    def found(case, value, which, where):
        _special(case, value, which, where)

    found()


@pytest.mark.skipif(harness.INTERPRETED, reason="found on the CPU")
@pytest.mark.parametrize("plan", examples.SPECIAL, ids=lambda plan: plan[0].op)
def test_what_was_found_of_special_values(plan):
    _special(*plan)


# ------------------------------------------------------------------------------------------------ the same bits

SAME_BITS = [n for n in OPS if n.startswith(("token_", "channel", "dw_shortcut", "rollout"))]  # all but those with torch's products
BY_IMAGE = {  # the outputs that one image alone has, and the dimension of the images
    "token_dwconv": {0: 0}, "token_dwconv_bwd_dx": {0: 0}, "token_dwconv_act": {0: 0}, "token_dwconv_act_bwd_dx": {0: 0},
    "token_dwconv_act_bwd": {0: 0}, "channel_act": {0: 0}, "channel_act_pool": {0: 0}, "channel_act_sums": {0: 1},
    "channel_act_grad": {0: 0},
    "dw_shortcut_eval": {0: 0}, "rollout_step": {0: 0}, "token_dwconv_strided": {0: 0}, "token_dwconv_transpose": {0: 0},
    "token_pool": {0: 0}, "token_pool_bwd": {0: 0},
}  # fmt: skip
IMAGES = {"x", "dy", "residual", "block_output", "gate", "pool_grad", "r", "q", "k"}


@pytest.mark.skipif(harness.INTERPRETED, reason="threads are the CPU's")
@pytest.mark.parametrize("name", SAME_BITS)
def test_same_bits_at_any_number_of_threads_and_every_run(name):
    @given(cases(name), st.lists(st.integers(1, 4), min_size=2, max_size=3))
    def found(case, counts):
        if largest_kernel(case) > 15 or harness.out_of_time(f"{name}, same bits"):  # torch's convolution: not promised
            return
        case, args = case._replace(backend="cpu"), arguments(case)
        args = (*args[:-1], case.backend)
        first, *others = (harness.run(case._replace(threads=n), args) for n in (case.threads, *counts))
        for other in others:
            assert all(map(harness.same_bits, first, other)), f"{name}: other bits at {counts} threads than at {case.threads}"

    found()


@pytest.mark.skipif(harness.INTERPRETED, reason="threads are the CPU's")
@pytest.mark.parametrize("name", BY_IMAGE)
def test_an_image_alone_has_the_bits_it_has_in_its_batch(name):
    @given(cases(name), st.integers(0, 8))
    def found(case, which):
        args = (*arguments(case)[:-1], "cpu")
        images = {n: a for n, a in zip(names(registry.ops[name]), args, strict=True) if n in IMAGES and isinstance(a, torch.Tensor)}
        count = len(next(iter(images.values())))
        if not count or largest_kernel(case) > 15 or harness.out_of_time(f"{name}, an image alone"):
            return
        b = which % count
        alone = [a[b : b + 1] if n in images else a for n, a in zip(names(registry.ops[name]), args, strict=True)]
        together, one = harness.run(case, args), harness.run(case, tuple(alone))
        for i, dim in BY_IMAGE[name].items():
            if together[i].numel():
                assert harness.same_bits(together[i].narrow(dim, b, 1), one[i]), f"{name}, output {i}: image {b} of {count}"

    found()
