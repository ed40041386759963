"""The public functions with their gradients: layouts of inputs and upstream gradients, dtypes, options, subsets that need a gradient."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import lifeops
from fuzz import harness, paths, systems
from fuzz.cases import DTYPES, ISAS
from fuzz.layouts import LAYOUTS
from lifeops.ops.channel.activations import ACTS, PROLOGUES

pytestmark = pytest.mark.skipif(harness.INTERPRETED, reason="the operators below are fuzzed there")
SMOOTH = "none", "gelu", "gelu_first"  # where a slope jumps, rounding in half precision decides


class Plan(NamedTuple):
    """One call: sizes, what is drawn for it, and on which machine."""

    B: int = 2
    H: int = 3
    W: int = 4
    P: int = 1
    C: int = 6
    options: dict = {}  # noqa: RUF012
    dtype: str = "float64"
    other: str = ""
    need: int = -1  # bits: which inputs need a gradient
    layouts: tuple = ("contiguous",)
    isa: str = "avx512"
    threads: int = 1
    seed: int = 0

    def draw(self, *shape, other=False, scale=1.0):
        dtype = DTYPES[(other and self.other) or self.dtype]
        seed = self.seed + sum(map(ord, repr(shape))) + 7919 * len(shape)
        return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


CHANNELS = st.integers(1, 40)


def plans(options, channels=CHANNELS, other=("", "float32", "float64")):
    side = st.one_of(st.integers(1, 6), st.just(1), st.sampled_from((0, 17, 33)))
    return st.builds(
        Plan, st.one_of(st.integers(1, 3), st.just(0)), side, side, st.integers(0, 5), channels, st.fixed_dictionaries(options),
        st.sampled_from([*DTYPES]), st.sampled_from(other), st.integers(0, 2**8 - 1),
        st.lists(st.one_of(st.just("contiguous"), st.sampled_from(LAYOUTS)), min_size=1, max_size=7).map(tuple),
        st.sampled_from(ISAS), st.integers(1, 4), st.integers(0, 2**20),
    )  # fmt: skip


def few_tokens(plan):
    """A grid small enough for attention in float64 several times over."""
    return plan if plan.H * plan.W <= 120 else plan._replace(H=min(plan.H, 3))


def compare(what, plan, library, formula, inputs, state=None, need=None, twice=False, floor=1.0):
    """``inputs`` are laid out as planned, ``state`` (parameters of a module) is taken as it is."""
    if harness.out_of_time(what):
        return
    placed = {**paths.laid_out(inputs, plan.layouts, plan.seed % 89), **(state or {})}
    if need is None:
        need = [n for i, (n, t) in enumerate(placed.items()) if plan.need >> i & 1 and t.is_floating_point()]
    settings = {"dtype": DTYPES[plan.dtype], "layouts": plan.layouts, "seed": plan.seed, "isa": plan.isa, "threads": plan.threads}
    paths.compare(library, formula, placed, need, twice=twice, floor=floor, terms=max(1, plan.B * (plan.P + plan.H * plan.W)), **settings)


BACKENDS = st.sampled_from((None, None, "cpu", "reference"))

# ------------------------------------------------------------------------------------------------ token_dwconv

CONVOLVE = {
    "K": st.sampled_from((1, 3, 3, 5, 7, 9)), "prefix": st.sampled_from(("keep", "zero", "drop")), "bias": st.booleans(),
    "residual": st.booleans(), "before": st.sampled_from((None, None, *PROLOGUES)), "after": st.sampled_from((None, None, *ACTS)),
    "affine": st.booleans(), "pool": st.booleans(), "stats": st.booleans(), "twice": st.booleans(), "backend": BACKENDS,
}  # fmt: skip


def convolution(plan):
    B, H, W, P, C, o = plan.B, plan.H, plan.W, plan.P, plan.C, plan.options
    before, after = (a if a in (None, *SMOOTH) or "16" not in plan.dtype else "gelu" for a in (o["before"], o["after"]))
    values = {"x": plan.draw(B, P + H * W, C), "weight": plan.draw(C, 1, o["K"], o["K"], other=True)}
    if o["bias"]:
        values["bias"] = plan.draw(C, other=True)
    if o["residual"]:
        values["residual"] = plan.draw(B, (0 if o["prefix"] == "drop" else P) + H * W, C, scale=2)
    for name, act in (("before", before), ("after", after)):
        if act and o["affine"]:
            values |= {f"{name}_scale": plan.draw(C, scale=0.5).abs() + 0.5, f"{name}_shift": plan.draw(C, scale=0.25)}
    sums = o["pool"], o["stats"] and B * H * W > 1

    def steps(given, make):
        pairs = (("before", before), ("after", after))
        return [make(given.get(f"{n}_scale"), given.get(f"{n}_shift"), act or "none") for n, act in pairs]

    def library(**given):
        prologue, epilogue = (s if a else None for s, a in zip(steps(given, lifeops.ChannelAct), (before, after), strict=True))
        out = lifeops.token_dwconv(
            given["x"], given["weight"], given.get("bias"), grid=(H, W), num_prefix_tokens=P, prefix=o["prefix"],
            residual=given.get("residual"), prologue=prologue, epilogue=epilogue, pool=sums[0], stats=sums[1], backend=o["backend"],
        )  # fmt: skip
        return tuple(t for t in out if t is not None) if isinstance(out, tuple) else (out,)

    def formula(**given):
        around = steps(given, lambda *parts: parts)
        parts = given["x"], given["weight"], given.get("bias"), given.get("residual")
        return systems.convolve(*parts, *around, H, W, P, o["prefix"], *sums)

    twice = o["twice"] and not (before or after or sums[0] or sums[1])
    compare("lifeops.token_dwconv", plan, library, formula, values, twice=twice, floor=4.0 if sums[1] else 1.0)


@given(plans(CONVOLVE))
def test_token_dwconv(plan):
    convolution(plan)


# ------------------------------------------------------------------------------------------------ strides, shared filters, pooling

STEPS = {
    "Kh": st.integers(1, 5), "Kw": st.integers(1, 5), "sh": st.integers(1, 4), "sw": st.integers(1, 4), "ph": st.integers(0, 2),
    "pw": st.integers(0, 2), "prefix": st.sampled_from(("keep", "zero", "drop")), "bias": st.booleans(), "h": st.integers(1, 3),
    "twice": st.booleans(), "backend": BACKENDS,
}  # fmt: skip
FILTERED = {
    **STEPS, "m": st.sampled_from((1, 1, 2)), "shared": st.sampled_from(("", "", "head", "one")),
    "after": st.sampled_from((None, "gelu")),
}  # fmt: skip


def _steps(plan, pooled=False):
    """Kernel, stride and padding that fit the grid, as torch takes them."""
    H, W, o = plan.H, plan.W, plan.options
    padding = [min(p, k // 2) if pooled else p for p, k in ((o["ph"], o["Kh"]), (o["pw"], o["Kw"]))]
    room = [n + p * (1 if pooled else 2) for n, p in zip((H, W), padding, strict=True)]
    kernel = [min(k, n) for k, n in zip((o["Kh"], o["Kw"]), room, strict=True)]
    if pooled:
        padding = [min(p, k // 2) for p, k in zip(padding, kernel, strict=True)]
    return kernel, [o["sh"], o["sw"]], padding


def _heads(plan):
    """(B, N, C) as heads where there are several: views of one tensor."""
    return (lambda t: t.unflatten(2, (plan.options["h"], -1)).transpose(1, 2)) if plan.options["h"] > 1 else lambda t: t


def strided(plan):
    o, B, H, W, P, C = plan.options, plan.B, plan.H, plan.W, plan.P, plan.C * plan.options["h"]
    if not B * H * W:
        return
    kernel, stride, padding = _steps(plan)
    m = 1 if o["shared"] or o["h"] > 1 else o["m"]
    prefix = "zero" if m > 1 and o["prefix"] == "keep" else o["prefix"]
    filters = {"": m * C, "head": plan.C, "one": 1}[o["shared"]]
    values = {"x": plan.draw(B, P + H * W, C), "weight": plan.draw(filters, 1, *kernel, other=True)}
    if o["bias"]:
        values["bias"] = plan.draw(filters, other=True)
    heads, epilogue = _heads(plan), lifeops.ChannelAct(act=o["after"]) if o["after"] else None

    def library(x, weight, bias=None):
        place = {"grid": (H, W), "num_prefix_tokens": P, "prefix": prefix, "backend": o["backend"]}
        y = lifeops.token_dwconv(heads(x), weight, bias, stride=stride, padding=padding, epilogue=epilogue, **place)
        return (y if y.dim() == 3 else y.transpose(1, 2).flatten(2),)

    def formula(x, weight, bias=None):
        times = m * C // filters
        weight, bias = weight.repeat(times, 1, 1, 1), None if bias is None else bias.repeat(times)
        y = torch.nn.functional.conv2d(x[:, P:].transpose(1, 2).unflatten(2, (H, W)), weight, bias, stride, padding, groups=C)
        y = (torch.nn.functional.gelu(y) if o["after"] else y).flatten(2).transpose(1, 2)
        return (y if prefix == "drop" else torch.cat((x[:, :P] if prefix == "keep" else x.new_zeros(B, P, m * C), y), 1),)

    compare("lifeops.token_dwconv, strided", plan, library, formula, values, twice=o["twice"] and not o["after"])


@given(plans(FILTERED))
def test_strided_token_dwconv(plan):
    strided(plan)


def transposed(plan):
    o, B, H, W, P, C = plan.options, plan.B, plan.H, plan.W, plan.P, plan.C
    if not B * H * W or H * W > 200:
        return
    kernel, stride = [o["Kh"], o["Kw"]], [o["sh"], o["sw"]]
    padding = [min(p, (k - 1) // 2) for p, k in zip((o["ph"], o["pw"]), kernel, strict=True)]
    spare = [s - 1 for s in stride]
    values = {"x": plan.draw(B, P + H * W, C), "weight": plan.draw(C, 1, *kernel, other=True)}
    if o["bias"]:
        values["bias"] = plan.draw(C, other=True)

    def library(x, weight, bias=None):
        place = {"grid": (H, W), "num_prefix_tokens": P, "prefix": o["prefix"], "backend": o["backend"]}
        return (lifeops.token_dwconv_transpose(x, weight, bias, stride=stride, padding=padding, output_padding=spare, **place),)

    def formula(x, weight, bias=None):
        map_ = x[:, P:].transpose(1, 2).unflatten(2, (H, W))
        y = torch.nn.functional.conv_transpose2d(map_, weight, bias, stride, padding, spare, groups=C).flatten(2).transpose(1, 2)
        rows = {"keep": x[:, :P], "zero": 0 * x[:, :P].detach(), "drop": x[:, :0]}[o["prefix"]]
        return (torch.cat((rows, y), 1),)

    compare("lifeops.token_dwconv_transpose", plan, library, formula, values, twice=o["twice"])


@given(plans(STEPS))
def test_token_dwconv_transpose(plan):
    transposed(plan)


POOLED = {**STEPS, "mode": st.sampled_from(("max", "avg", "subsample")), "ceil_mode": st.booleans(), "include": st.booleans()}


def pooled(plan):
    o, B, H, W, P, C = plan.options, plan.B, plan.H, plan.W, plan.P, plan.C * plan.options["h"]
    if not B * H * W:
        return
    kernel, stride, padding = ([1, 1], [o["sh"], o["sw"]], [0, 0]) if o["mode"] == "subsample" else _steps(plan, pooled=True)
    heads = _heads(plan)

    def library(x):
        place = {"grid": (H, W), "num_prefix_tokens": P, "prefix": o["prefix"], "backend": o["backend"]}
        window = {"stride": stride, "padding": padding, "ceil_mode": o["ceil_mode"], "count_include_pad": o["include"]}
        y = lifeops.token_pool(heads(x), kernel, mode=o["mode"], **window, **place)
        return (y if y.dim() == 3 else y.transpose(1, 2).flatten(2),)

    def formula(x):
        map_ = x[:, P:].transpose(1, 2).unflatten(2, (H, W))
        if o["mode"] == "max":
            y = torch.nn.functional.max_pool2d(map_, kernel, stride, padding, ceil_mode=o["ceil_mode"])
        else:
            y = torch.nn.functional.avg_pool2d(map_, kernel, stride, padding, o["ceil_mode"], o["include"])
        rows = {"keep": x[:, :P], "zero": x.new_zeros(B, P, C), "drop": x[:, :0]}[o["prefix"]]
        return (torch.cat((rows, y.flatten(2).transpose(1, 2)), 1),)

    compare("lifeops.token_pool", plan, library, formula, {"x": plan.draw(B, P + H * W, C)}, twice=o["twice"])


@given(plans(POOLED))
def test_token_pool(plan):
    pooled(plan)


# ------------------------------------------------------------------------------------------------ local_attention

ATTEND = {
    "h": st.integers(1, 4), "K": st.sampled_from((0, 1, 3, 5)), "bias": st.booleans(),
    "mask": st.sampled_from(("", "", "bool", "float", "row")), "key_mask": st.booleans(),
    "dropout": st.sampled_from((0.0, 0.0, 0.3)), "scale": st.sampled_from((None, 0.5)), "backend": BACKENDS,
}  # fmt: skip


def attention(plan):
    plan = few_tokens(plan)
    B, H, W, P, d, o = plan.B, plan.H, plan.W, plan.P, plan.C, plan.options
    h, N, C = o["h"], P + H * W, o["h"] * plan.C
    if N < 2:  # one key: the gradients of q and k are zero by cancellation
        return
    values = {n: plan.draw(B, h, N, d).roll(i, 2) for i, n in enumerate("qkv")}
    if o["K"]:
        values["weight"] = plan.draw(C, 1, o["K"], o["K"], other=True)
    if o["K"] and o["bias"]:
        values["bias"] = plan.draw(C, other=True)
    if o["mask"]:
        mask = plan.draw(*((1, h, N, N) if o["mask"] != "row" else (N,)), other=True)
        values["attn_mask"] = mask > -0.7 if o["mask"] == "bool" else mask
    if o["key_mask"]:
        values["key_mask"] = plan.draw(B, N).roll(1, 1) > -1
    seed = torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(plan.seed)) if o["dropout"] else None

    def library(q, k, v, weight=None, bias=None, attn_mask=None, key_mask=None):
        return lifeops.local_attention(
            q, k, v, weight, bias, grid=(H, W), num_prefix_tokens=P, scale=o["scale"], attn_mask=attn_mask, key_mask=key_mask,
            dropout_p=o["dropout"], generator=torch.Generator().manual_seed(plan.seed), backend=o["backend"],
        )  # fmt: skip

    def formula(q, k, v, weight=None, bias=None, attn_mask=None, key_mask=None):
        mask = attn_mask if attn_mask is None or attn_mask.dim() == 4 else attn_mask.expand(1, 1, N, N)
        return systems.attention(q, k, v, weight, bias, mask, key_mask, seed, H, W, P, o["scale"] or d**-0.5, o["dropout"])

    compare("lifeops.local_attention", plan, library, formula, values, floor=8.0)


# tokens of q that overlap: torch's kernel took their strides for other ones, or refused those that are expanded
OPTIONS = {"h": 1, "K": 0, "bias": False, "mask": "", "key_mask": False, "dropout": 0.0, "scale": None, "backend": None}


@given(plans(ATTEND, st.integers(1, 20)))
@example(Plan(1, 1, 1, 1, 3, OPTIONS, layouts=("overlap",)))
@example(Plan(2, 4, 5, 1, 16, OPTIONS, "bfloat16", layouts=("overlap", "expand"), seed=2))
def test_local_attention(plan):
    attention(plan)


# ------------------------------------------------------------------------------------------------ life_qkv

LIFE = {
    "bias": st.booleans(), "scale1": st.booleans(), "recompute": st.booleans(), "four": st.booleans(), "twice": st.booleans(),
    "K2": st.sampled_from((1, 3, 3, 5)), "K3": st.sampled_from((3, 5, 5, 7)), "backend": BACKENDS,
}  # fmt: skip


def life(plan):
    B, H, W, P, C, o = plan.B, plan.H, plan.W, plan.P, max(3, plan.C), plan.options
    C -= C % 3 if o["scale1"] else 0
    a, b, c = (3 * (C // 3 + (s < C % 3)) for s in range(3))
    tail = (1, 1) if o["four"] else ()
    values = {"x": plan.draw(B, P + H * W, C), "w1": plan.draw(a, C, scale=C**-0.5)}
    values |= {"b1": plan.draw(a)} if o["bias"] else {}
    values |= {"dw2": plan.draw(a, 1, o["K2"], o["K2"], other=True, scale=1 / o["K2"]), "pw2": plan.draw(b, a, *tail, scale=a**-0.5)}
    values |= {"dw3": plan.draw(b, 1, o["K3"], o["K3"], other=True, scale=1 / o["K3"]), "pw3": plan.draw(c, b, *tail, scale=b**-0.5)}

    def library(x, w1, dw2, pw2, dw3, pw3, b1=None):
        settings = {"aux_key": "scale1" if o["scale1"] else "multiscale", "recompute": o["recompute"], "backend": o["backend"]}
        return lifeops.life_qkv(x, w1, b1, dw2, pw2, dw3, pw3, grid=(H, W), num_prefix_tokens=P, **settings)

    def formula(x, w1, dw2, pw2, dw3, pw3, b1=None):
        return systems.life_qkv(x, w1, b1, dw2, pw2.flatten(1), dw3, pw3.flatten(1), H, W, P, o["scale1"])

    compare("lifeops.life_qkv", plan, library, formula, values, twice=o["twice"])


# the gradient of a weight that is an overlapping view was written into such a layout
OPTIONS = {"bias": False, "scale1": False, "recompute": False, "four": False, "twice": False, "K2": 1, "K3": 3, "backend": None}


@given(plans(LIFE, st.integers(3, 40)))
@example(Plan(1, 1, 1, 0, 3, OPTIONS, need=8, layouts=("overlap",)))
def test_life_qkv(plan):
    life(plan)
