"""The modules of CvT, MViT, EdgeViT, RegionViT, SiT and their like: values, gradients and running statistics, and where a NaN goes."""

import functools

import pytest
import torch
from hypothesis import example, given, settings

from fuzz import harness, paths
from fuzz.family_plans import BUILDERS
from fuzz.test_modules import state_of
from fuzz.test_public import Plan, compare, plans

pytestmark = pytest.mark.skipif(harness.INTERPRETED, reason="the operators below are fuzzed there")
CLOSE = {"float64": 1e-9, "float32": 1e-4, "float16": 0.05, "bfloat16": 0.3}  # to a kink: rounding may decide on which side
FEW = settings(max_examples=8 if settings.default.derandomize else settings.default.max_examples)  # in `make test`


def _called(built, plan):
    """(the module as a function of its inputs and its state, the formula alike, the state)."""
    module = built.module.train(plan.options["train"])
    if plan.options["hooked"]:
        for layer in module.modules():
            if layer is not module and not [*layer.children()]:
                layer.register_forward_hook(lambda layer, args, out: None)
    state = {n: t for n, t in state_of(module, plan).items() if ".proj_cls." not in f".{n}"}  # a second name

    def library(**given):
        args = built.arguments(*(given.pop(n) for n in built.inputs))
        given = {n: t.clone() if "running" in n else t for n, t in given.items()}  # updated in place
        out = torch.func.functional_call(module, given, args)
        out = [t for t in out if isinstance(t, torch.Tensor)] if isinstance(out, (tuple, list)) else [out]
        return (*out, *(t for n, t in given.items() if "running" in n and module.training))

    def formula(**given):
        return built.formula(given, *(given.pop(n) for n in built.inputs))

    return library, formula, state


def _sure(built, plan, close):
    """Whether gradients can be held against the formula: not of torch's own layers in half precision, and no norm of a few numbers, whose
    gradient is what is left of larger ones.
    """
    own = plan.options["hooked"] and "16" in plan.dtype
    norms = [m for m in built.module.modules() if "LayerNorm" in type(m).__name__]
    return close > CLOSE[plan.dtype] and not own and all(m.weight.numel() >= 4 for m in norms)


def values(what, plan, built):
    """Compare, with gradients of any of inputs and parameters where the slopes are sure."""
    library, formula, state = _called(built, plan)
    inputs = paths.laid_out(built.inputs, plan.layouts, plan.seed % 89)
    close = built.near(*({n: t.double() for n, t in state.items()},), *(t.double() for t in inputs.values()))
    names = [*built.inputs, *(n for n in state if "running" not in n)]
    need = [n for i, n in enumerate(names) if plan.need >> i % 8 & 1] if _sure(built, plan, close) else []
    compare(what, plan, library, formula, built.inputs, state, need, floor=built.floor)


def nan(what, plan, built):
    """One number of one token is NaN: the same of what comes out, and nothing else."""
    first, *others = built.inputs
    x = built.inputs[first].clone()
    if not x.numel() or harness.out_of_time(f"{what}, NaN"):
        return
    x.view(-1)[plan.seed % x.numel()] = torch.nan
    built = built._replace(inputs={first: x, **{n: built.inputs[n] for n in others}})
    library, formula, state = _called(built, plan)
    given = {**paths.laid_out(built.inputs, plan.layouts, plan.seed % 89), **state}
    with harness.machine(plan.isa, plan.threads), torch.no_grad():
        got = library(**given)
        expected = formula(**{n: t.double() for n, t in given.items()})
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g.isnan(), e.isnan()), f"{what}: {int(g.isnan().sum())} NaN, not {int(e.isnan().sum())}, of {g.numel()}"


FEW_KEYS = {
    "train": False, "hooked": False, "h": 1, "d": 1, "mode": "conv", "kernel_q": (1, 1), "kernel_kv": (1, 1), "stride_q": (1, 1),
    "stride_kv": (2, 1), "pool_first": False, "residual": False, "residual_prefix": False, "tables": "", "made_for": (1, 1),
    "resize": "interpolate", "qkv_bias": False, "eps": 1e-6,
}  # fmt: skip
UNSHARED = {**FEW_KEYS, "mode": "conv_unshared", "kernel_kv": (3, 3), "stride_kv": (1, 1)}
NOTHING_SEEN = {
    "train": False, "hooked": False, "h": 1, "d": 1, "w": 1, "windows": True, "padded": "authors", "below": 0, "beside": 1,
    "qkv_bias": False,
}  # fmt: skip
EXAMPLES = (  # mismatches that were found
    # torch's attention of few keys gave 0 for a query of NaN
    ("nn.PoolingAttention", Plan(1, 2, 1, 0, 2, FEW_KEYS, isa="baseline", seed=2)),
    # the norm of one token, or of no image, was taken over the tokens
    ("nn.PoolingAttention", Plan(2, 1, 1, 0, 5, UNSHARED)),
    ("nn.PoolingAttention", Plan(0, 1, 1, 0, 1, UNSHARED)),
    # the values' gradient of queries that see nothing was as many times too large as there are keys, the others' was not zero
    ("nn.RegionalAttention", Plan(1, 1, 1, 0, 1, NOTHING_SEEN, need=1)),
    ("nn.RegionalAttention", Plan(1, 1, 1, 0, 1, NOTHING_SEEN)),
)


def _each(what, check, adapt=lambda plan: plan):
    options, build = BUILDERS[what]

    def run(plan):
        built = build(adapt(plan))
        if built is not None:
            check(what, *built)

    for found, plan in EXAMPLES:
        run = example(plan)(run) if found == what else run
    FEW(given(plans(options, other=("",)))(run))()


@pytest.mark.parametrize("what", BUILDERS)
def test_values(what):
    _each(what, values)


def _for_nan(what, plan):
    """In evaluation: in training a batch norm's statistics take it everywhere. Torch's own half-precision convolutions take it to
    neighbours: where one is called, in float32.
    """
    own = plan.options["hooked"] or what == "nn.OverlapPatchEmbed"
    dtype = "float32" if own and "16" in plan.dtype else plan.dtype
    return plan._replace(dtype=dtype, options={**plan.options, "train": False})


@pytest.mark.parametrize("what", BUILDERS)
def test_nan(what):
    _each(what, nan, functools.partial(_for_nan, what))
