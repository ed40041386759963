"""Cases of every operator, drawn from the fields of the registry's own samples; a case prints as the Python that makes it again."""

import os
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from fuzz.layouts import KEEPING, LAYOUTS, lay_out
from lifeops import registry
from lifeops.ops.channel.activations import ACTS, PROLOGUES
from lifeops.ops.token_dwconv.samples import Maker

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ISAS = tuple(os.environ.get("LIFEOPS_FUZZ_ISAS", "baseline avx2 avx512").split())  # one alone: tests/sanitized.py
VALUES = "lattice", "normal", "offset", "wide", "tiny", "huge"
SIDES = st.one_of(st.integers(1, 7), st.integers(1, 20), st.just(1), st.sampled_from((0, 31, 32, 33, 48, 65)))
SMALL = st.one_of(st.integers(1, 5), st.integers(0, 1))
CHANNELS = st.one_of(st.integers(1, 48), st.integers(1, 16), st.integers(49, 160), st.just(0))
KERNELS = st.sampled_from((1, 3, 3, 3, 5, 5, 7, 7, 9, 11, 13, 15, 17))
SIDES_OF_KERNELS, STEPS = st.integers(1, 5) | st.sampled_from((7, 15, 16)), st.integers(1, 4) | st.just(8)

FIELDS = {
    "B": SMALL, "H": SIDES, "W": SIDES, "P": st.integers(0, 5), "C": CHANNELS, "K": KERNELS, "lead": st.integers(0, 5),
    "patches": st.one_of(st.integers(0, 70), st.just(1)), "h": st.integers(1, 5), "d": st.one_of(st.integers(1, 33), st.just(64)),
    "R": st.integers(0, 9), "N": st.one_of(st.integers(1, 40), st.just(130)), "prefix": st.sampled_from(("keep", "zero", "drop")),
    "act": st.sampled_from(ACTS), "out_act": st.sampled_from(ACTS), "head_fusion": st.sampled_from(("mean", "max", "min")),
    "discard_ratio": st.sampled_from((0.0, 0.0, 0.1, 0.29, 0.5, 0.9)), "scale": st.sampled_from((1.0, 0.125, 8.0)),
    "m": st.sampled_from((1, 1, 2, 3)), "Kh": SIDES_OF_KERNELS, "Kw": SIDES_OF_KERNELS, "sh": STEPS, "sw": STEPS,
    "ph": st.integers(0, 3), "pw": st.integers(0, 3), "mode": st.sampled_from(("max", "avg")),
    "mask": st.sampled_from(("", "float", "bool", "batch", "shared", "dead")), "rows": st.sampled_from(("dense", "one", "uniform")),
}  # fmt: skip


class Case(NamedTuple):
    """One call of an operator. ``sample``: fields of its registry sample that are not the defaults. ``layouts``: of its tensors in turn."""

    op: str
    sample: dict
    dtype: str = "float32"
    other: str = ""  # the dtype of parameters that may have one of their own; "": the tokens'
    values: str = "normal"
    layouts: tuple = ("contiguous",)
    isa: str = "avx512"
    threads: int = 1
    backend: str = "cpu"
    seed: int = 0


def _field(name, default):
    if isinstance(default, bool):
        return st.booleans()
    if name == "residual":  # a share, of rollout_step
        return st.sampled_from((0.0, 0.3, 0.5, 1.0))
    return FIELDS[name]


def _work(op, s):
    """About the numbers that a case computes with."""
    s = {**{"B": 2, "H": 3, "W": 4, "P": 1, "C": 8, "K": 3, "h": 2, "d": 16, "N": 21, "patches": 12}, **s}
    if "attention" in op:
        return s["B"] * s["h"] * (s["P"] + s["H"] * s["W"]) ** 2 + s["h"] * s["d"] * s["K"] ** 2 * s["H"] * s["W"]
    if op.startswith("rollout"):
        return s["B"] * s["h"] * s["N"] ** 2
    if op.startswith("channel"):
        return s["B"] * s["patches"] * s["C"]
    taps = s["Kh"] * s["Kw"] * s.get("m", 1) if "Kh" in s else s["K"] ** 2
    return s["B"] * s["H"] * s["W"] * s["C"] * max(4, taps // 4)


def samples(op, most):
    """Fields of a sample of ``op``, those of the sample inside it among them."""
    like = op.samples()[0]
    found = {**type(like)._field_defaults, **type(getattr(like, "base", like))._field_defaults}
    options = {n: _field(n, default) for n, default in found.items() if n not in ("tiny", "weight_dtype") and not n.endswith("layout")}
    if op.name == "life_qkv":
        options["C"] = st.one_of(st.integers(3, 50), st.integers(1, 16).map(lambda n: 3 * n))
    elif op.name.startswith("token_dwconv_act"):
        options["act"] = st.sampled_from(PROLOGUES)
    if op.name.startswith("dw_shortcut"):
        options |= {"prefix": st.just("zero"), "residual": st.just(True)}
    if "mask" in found:
        options["K"] = st.sampled_from((0, 1, 3, 5, 7))
    return st.fixed_dictionaries(options).map(lambda s: _valid(op.name, s, most))


def _valid(name, s, most):
    if s.get("scale1_key"):
        s["C"] -= s["C"] % 3
    while _work(name, s) > most:
        key = max(("B", "H", "W", "C", "N", "d", "K", "Kh", "Kw"), key=lambda n: s.get(n, 0))
        s[key] = 3 if key == "K" else s[key] // 2
        if s.get("scale1_key") and key == "C":
            s["C"] -= s["C"] % 3
    if name == "life_qkv":
        s["C"] = max(3, s["C"])
    if "sh" in s:
        _fitting(s)
    if not s.get("B", 1):
        s.pop("key_mask", None)  # the samples hide a whole image
    return s


def _fitting(s):
    """Kernels that fit the padded grid, and prefix rows that can be kept."""
    for kernel, side, pad in (("Kh", "H", "ph"), ("Kw", "W", "pw")):
        if "mode" in s:  # torch's poolings take no more
            s[pad] = min(s[pad], s[kernel] // 2)
        if s["H"] * s["W"]:
            s[kernel] = min(s[kernel], s[side] + 2 * s[pad])
        if "mode" in s:
            s[pad] = min(s[pad], s[kernel] // 2)
            s[kernel] = min(s[kernel], max(1, s[side]))
            s[pad] = min(s[pad], s[kernel] // 2)
    if s.get("m", 1) > 1 and s["prefix"] == "keep":
        s["prefix"] = "zero"


def largest_kernel(case):
    return max(case.sample.get(n, 0) for n in ("K", "Kh", "Kw"))


def _runnable(case):
    """On the reference where there is no kernel for that size; without denormals where torch's convolution flushes them, and without
    scores past any exponential.
    """
    if largest_kernel(case) > 15:
        case = case._replace(backend="reference")
    flushes = case.values == "tiny" and case.backend == "reference" and "float16" in case.dtype + case.other
    return case._replace(values="wide") if flushes or (case.values == "huge" and "d" in case.sample) else case


def cases(name, backend="cpu", values=VALUES):
    """Of the operator ``name``, a quarter of them on the reference."""
    op = registry.ops[name]
    dtypes = [n for n, d in DTYPES.items() if d in op.impls[backend].dtypes]
    most = 2_000 if backend == "triton" else 200_000  # its interpreter takes about a second
    return st.builds(
        Case, st.just(name), samples(op, most), st.sampled_from(dtypes), st.sampled_from(("", "", *DTYPES)), st.sampled_from(values),
        st.lists(st.one_of(st.just("contiguous"), st.sampled_from(LAYOUTS)), min_size=1, max_size=6).map(tuple),
        st.sampled_from(ISAS), st.integers(1, 4), st.sampled_from((backend, backend, backend, "reference")), st.integers(0, 2**20),
    ).map(_runnable)  # fmt: skip


# ------------------------------------------------------------------------------------------------ tensors of a case


class Draw(Maker):
    """What makes the registry's arguments, with other values."""

    def __init__(self, seed, dtype, values):
        super().__init__(seed, dtype, integers=values == "lattice")
        self.values = values

    def __call__(self, *shape, dtype=None, scale=2):
        dtype = dtype or self.dtype
        if self.values == "lattice":
            return super().__call__(*shape, dtype=dtype, scale=scale)
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.values == "offset":
            t = 0.05 * t + 1.5
        elif self.values == "wide":
            t = t * 2.0 ** torch.randint(-6, 7, shape, generator=self.generator)
        elif self.values in ("tiny", "huge"):  # some: denormal, or near the end of the range
            info = torch.finfo(dtype)
            to = info.tiny / 8 if self.values == "tiny" else info.max / 4
            t = torch.where(torch.rand(shape, generator=self.generator) < 0.1, t.clamp(-3, 3) * to, t)
        return t.to(dtype)


def names(op):
    """Of the schema's arguments."""
    return [a.strip().split(" ")[-1] for a in op.schema[op.schema.index("(") + 1 : op.schema.index(") ->")].split(",")]


OWN_DTYPE = {"weight", "bias", "gamma", "beta", "dw2", "dw3", "attn_mask"}  # and the running statistics of dw_shortcut_eval


def arguments(case):
    """The schema's arguments."""
    op, dtype = registry.ops[case.op], DTYPES[case.dtype]
    like = op.samples()[0]
    fields = dict(case.sample)
    if hasattr(like, "base"):
        base = {n: fields.pop(n) for n in tuple(fields) if n in type(like.base)._fields}
        fields["base"] = like.base._replace(**base)
    sample = like._replace(**fields)
    args = list(op.make(sample, Draw(case.seed, dtype, case.values), case.backend))
    own = OWN_DTYPE | ({"mean", "var"} if case.op == "dw_shortcut_eval" else set())
    turns = torch.randint(0, 100, (len(args),), generator=torch.Generator().manual_seed(case.seed)).tolist()
    tied = {"attn", "lse"} if case.op == "local_attention_bwd" else set()
    for i, (name, value) in enumerate(zip(names(op), args, strict=True)):
        if case.other and name in ("weight_dtype", "bias_dtype") and value is not None:
            args[i] = DTYPES[case.other]
        if not isinstance(value, torch.Tensor):
            continue
        if case.other and name in own and value.is_floating_point():
            most = min(torch.finfo(d).max for d in (value.dtype, DTYPES[case.other])) / 4
            value = value.clamp(-most, most).to(DTYPES[case.other])
        layout = case.layouts[i % len(case.layouts)]
        shared = case.op != "local_attention_bwd" or name == "dy" or layout in KEEPING
        args[i] = lay_out(value, layout if (shared and name not in tied) or layout in KEEPING else "slice", turns[i])
    return tuple(args)
