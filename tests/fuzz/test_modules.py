"""The modules, in training and evaluation, with the gradients of their parameters and the running statistics they leave behind."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzz import harness, systems
from fuzz.cases import DTYPES
from fuzz.test_public import compare, few_tokens, plans
from lifeops import nn

pytestmark = pytest.mark.skipif(harness.INTERPRETED, reason="the operators below are fuzzed there")
TRAIN = {"train": st.booleans()}


def state_of(module, plan):
    """Random parameters and running statistics by name."""
    found = {}
    for i, (name, t) in enumerate(module.state_dict().items()):
        if t.is_floating_point():
            draw = torch.Generator().manual_seed(plan.seed + i)
            value = torch.randn(t.shape, generator=draw, dtype=torch.float64) * (0.5 if t.dim() < 2 else max(1, t[0].numel()) ** -0.5)
            value = value.abs() + 0.5 if "running_var" in name else value + ("weight" in name and t.dim() == 1)
            found[name] = value.to(t.dtype)
    return found


def _library(module, grid):
    """The module as a function of its inputs and its state; running statistics come out behind the result."""

    def run(x, y=None, **state):
        state = {n: t.clone() if "running" in n else t for n, t in state.items()}  # updated in place
        out = torch.func.functional_call(module, state, (x, grid) if y is None else (x, y, grid))
        return (out, *(t for n, t in state.items() if "running" in n)) if module.training else (out,)

    return run


def _module(what, plan, module, formula, **inputs):
    """Compare. One bit of ``plan.need`` for each input, one for all parameters."""
    state = state_of(module, plan)
    parameters = [n for n in state if "running" not in n]
    need = [n for i, n in enumerate(inputs) if plan.need >> i & 1] + parameters * (plan.need >> 3 & 1)

    def in_float64(x, y=None, **p):
        out, statistics = formula(x, p) if y is None else formula(x, y, p)
        return (out, *statistics)

    compare(what, plan, _library(module, (plan.H, plan.W)), in_float64, inputs, state, need)


# ------------------------------------------------------------------------------------------------ LIFE and local attention

HEADS = {"h": st.sampled_from((1, 2, 3, 3, 6)), "d": st.integers(1, 12)}


@given(plans({**HEADS, "scale1": st.booleans(), "qkv_norm": st.booleans(), "recompute": st.booleans()}, other=("",)))
def test_life_attention(plan):
    plan = few_tokens(plan)
    o, P = plan.options, plan.P
    dim, tokens = o["h"] * o["d"], P + plan.H * plan.W
    if dim < 3 or tokens < 2:
        return
    scale1 = o["scale1"] and dim % 3 == 0
    options = {"qkv_norm": o["qkv_norm"], "recompute": o["recompute"], "aux_key": "scale1" if scale1 else "multiscale"}
    module = nn.LifeAttention(dim, o["h"], P, **options, dtype=DTYPES[plan.dtype])

    def formula(x, p):
        return systems.life_attention(p, x, plan.H, plan.W, P, o["h"], scale1, o["qkv_norm"]), ()

    _module("nn.LifeAttention", plan, module, formula, x=plan.draw(plan.B, tokens, dim))


@given(plans({**HEADS, "K": st.sampled_from((1, 3, 5)), "qkv_bias": st.booleans()}, other=("",)))
def test_local_attention_module(plan):
    plan = few_tokens(plan)
    o, P = plan.options, plan.P
    dim, tokens = o["h"] * o["d"], P + plan.H * plan.W
    if tokens < 2:
        return
    module = nn.LocalAttention(dim, o["h"], o["K"], P, qkv_bias=o["qkv_bias"], dtype=DTYPES[plan.dtype])

    def formula(x, p):
        return systems.local_attention(p, x, plan.H, plan.W, P, o["h"]), ()

    _module("nn.LocalAttention", plan, module, formula, x=plan.draw(plan.B, tokens, dim))


# ------------------------------------------------------------------------------------------------ LocalViT and the DW shortcut


LOCALITY = {"act": st.sampled_from(("relu6", "hs", "hs+se", "hs+eca", "hs+ecah")), "ratio": st.sampled_from((1.0, 2.0, 4.0))}


@given(plans({**TRAIN, **LOCALITY}, other=("",)))
def test_locality_feed_forward(plan):
    o, P, H, W = plan.options, plan.P, plan.H, plan.W
    plan = plan._replace(dtype=plan.dtype if "16" not in plan.dtype else "float32")  # in half precision rounding decides at the kinks
    if o["train"] and plan.B * H * W < 8:  # the variance of a few values says little
        return
    dim = min(16, max(4, plan.C))
    module = nn.LocalityFeedForward(dim, o["ratio"], o["act"], num_prefix_tokens=P, dtype=DTYPES[plan.dtype]).train(o["train"])
    x = plan.draw(plan.B, P + H * W, dim)
    state = {n: t.double() for n, t in state_of(module, plan).items()}
    if plan.B * H * W and systems.distance_to_kinks(state, x.double(), H, W, o["act"], o["train"]) < 1e-4:
        return

    def formula(x, p):
        return systems.locality(p, x, H, W, P, o["act"], o["train"])

    _module("nn.LocalityFeedForward", plan, module, formula, x=x)


@given(plans({**TRAIN, "kernels": st.sampled_from(((3,), (1,), (5,), (3, 5), (3, 5, 7))), "wide": st.booleans()}, other=("",)))
def test_dw_shortcut(plan):
    o, P, H, W = plan.options, plan.P, plan.H, plan.W
    if o["train"] and plan.B * H * W < 8:
        return
    dtype = torch.float32 if o["wide"] and "16" in plan.dtype else DTYPES[plan.dtype]  # parameters wider than the tokens
    module = nn.DWShortcut(plan.C, o["kernels"], P, dtype=dtype).train(o["train"])

    def formula(x, y, p):
        return systems.shortcut(p, x, y, H, W, P, len(o["kernels"]), o["train"])

    x = plan.draw(plan.B, P + H * W, plan.C)
    _module("nn.DWShortcut", plan, module, formula, x=x, y=x.roll(1, 1) * 1.5 if x.numel() else x.clone())
