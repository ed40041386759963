"""Runs a case under its instruction set and number of threads, counts it, and holds the results against the oracle."""

import contextlib
import os
import time
from collections import Counter

import torch

from conftest import poisoned
from fuzz import bounds, oracle, oracle_attention, oracle_conv
from fuzz.cases import arguments, names
from lifeops import config, registry, testing, torchlib
from lifeops.ops.channel.activations import EXACT

BACKEND = os.environ.get("LIFEOPS_TEST_BACKEND", "cpu")  # triton: in a process of its own, with TRITON_INTERPRET=1
INTERPRETED = BACKEND == "triton"
UNTIL = float(os.environ.get("LIFEOPS_FUZZ_UNTIL", "inf"))  # time.time() after which cases are skipped
ORACLES = {**oracle.ORACLES, **oracle_attention.ORACLES, **oracle_conv.ORACLES}
counted, mismatches = Counter(), Counter()
_called = [""]
registry.load(BACKEND)


def out_of_time(what):
    """Whether the time is up; else one more case of ``what`` is counted."""
    if time.time() > UNTIL:
        return True
    counted[what] += 1
    _called[0] = what
    return False


def mismatch():
    """Count one for what was called last."""
    mismatches[_called[0]] += 1


@contextlib.contextmanager
def machine(isa, threads):
    """This instruction set (or the highest there is below it) and number of threads; fresh buffers are NaN."""
    before, count = config.settings, torch.get_num_threads()
    config.settings = before._replace(cpu_isa=isa)
    torch.set_num_threads(threads)
    try:
        with poisoned():
            yield
    finally:
        config.settings = before
        torch.set_num_threads(count)


def same_bits(a, b):
    """Equal, NaN as NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


# ------------------------------------------------------------------------------------------------ operators


def run(case, args):
    """The operator's outputs; what it was given stays as it was."""
    given = [a for a in args if isinstance(a, torch.Tensor)]
    before = [(a.clone(), a._version) for a in given]
    with machine(case.isa, case.threads), torch.no_grad():
        out = testing.tensors(torchlib.overload(registry.ops[case.op])(*args))
    for a, (values, version) in zip(given, before, strict=True):
        assert a._version == version, "an input was written to"
        assert same_bits(a, values) if a.is_floating_point() else torch.equal(a, values), "an input was written to"
    return out


def _terms(name, args):
    """(numbers added up for one element at most, roundings to the tokens' dtype on the way)."""
    a = dict(zip(names(registry.ops[name]), args, strict=True))
    n = a["patches"] if name.startswith("channel") else a["H"] * a["W"] if "H" in a else 0
    x = next(a[n] for n in ("q", "x", "dy") if a.get(n) is not None)
    n *= x.shape[0]
    if "sh" in a:
        Kh, Kw = (a["Kh"], a["Kw"]) if "Kh" in a else a["weight"].shape[2:]
        return x.shape[0] * (a["H"] + 2 * a["ph"]) * (a["W"] + 2 * a["pw"]) + Kh * Kw * a.get("m", 1) + 24, 0
    K = a["K"] if "K" in a else a["weight"].shape[-1] if a.get("weight") is not None else 0
    if name == "life_qkv":
        return 6 * x.shape[2] + a["dw2"].shape[-1] ** 2 + a["dw3"].shape[-1] ** 2, 5
    if "q" in a:
        _, h, N, d = x.shape
        return 4 * d + 4 * N + 2 * h + K * K + 20, 0 if name == "rollout_step" else 4
    if name == "token_dwconv_act" and a["residual"] is not None:  # added to what is stored
        return n + K * K + 24, 1
    return n + K * K * (2 if name == "dw_shortcut_bwd" else 1) + 24, 0


def _all_sums_exact(case, args, magnitudes):
    rounded = "dw_sh", "local", "roll", "channel_stats", "life", "token_pool"
    if case.values != "lattice" or case.backend != "cpu" or case.op.startswith(rounded):
        return False
    whole = {case.sample.get(n, "none") for n in ("act", "out_act") if n in names(registry.ops[case.op])} <= {*EXACT}
    return whole and not case.sample.get("stats") and all(not m.numel() or m.max() < 2**24 for m in magnitudes)


def _overflows(name, doubles, sizes, tokens):
    """Whether something on the way to the results may be past the end of the dtype it is kept in."""
    top = torch.finfo(tokens).max
    if name == "life_qkv":
        *tensors, _, backend = doubles
        sizes = oracle.life_qkv(oracle.Magnitude, *tensors, True, backend)
    elif name == "dw_shortcut":
        sizes, top = (doubles[0].square(), *sizes[2:]), 0.1 * torch.finfo(bounds.accumulate(tokens)).max / max(1, doubles[0].shape[1])
    elif name == "token_dwconv_act":  # its sums are of y as stored
        sizes = sizes[:1]
    elif name == "token_dwconv_act_bwd":  # the pre-activation, computed again
        _, x, weight, bias, _, H, W, *_ = doubles
        sizes, top = (oracle.pre_activation(oracle.Magnitude, x, weight, bias, H, W),), torch.finfo(bounds.accumulate(tokens)).max
    else:
        return False
    return any(s.numel() and not s.max() < top for s in sizes)


def check(case, args, judged=None):
    """Raise AssertionError with what is wrong."""
    got = run(case, args)
    doubles = testing.to_double(args)
    expected, sizes = (ORACLES[case.op](o, *doubles) for o in (oracle.Exact, oracle.Magnitude))
    terms, stored = _terms(case.op, args)
    first = next(a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
    tokens = args[names(registry.ops[case.op]).index("q")].dtype if "q" in names(registry.ops[case.op]) else first.dtype
    stored += {"reference": 2, "triton": 2}.get(case.backend, 0)
    if _all_sums_exact(case, args, sizes):
        terms = 0
    if _overflows(case.op, doubles, sizes, tokens):
        return
    attends, floor = "q" in names(registry.ops[case.op]), 0.0
    most = max([1.0, *(t.abs().max().item() for t in doubles if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel())])
    if attends:  # exponentials below the normal numbers are zero; stored as tokens are, they are off by half of the smallest number
        floor = torch.finfo(bounds.accumulate(tokens)).tiny * most**4 + bounds.TINY[tokens] * terms * most
    elif case.op == "life_qkv" and tokens.itemsize == 2:  # and so are torch's products, and what is made of them
        floor = torch.finfo(tokens).tiny * terms * most**3
    products = 3 if attends else 1 if case.op.startswith("token_dwconv") and "_act" not in case.op else 2
    planted = any(bool((~a.isfinite()).any()) for a in args if isinstance(a, torch.Tensor))
    assert len(got) == len(expected) == len(sizes)
    for i, triple in enumerate(zip(got, expected, sizes, strict=True)):
        if judged is None or i in judged:
            sums = i > 0 and case.op == "token_dwconv_act"  # of y as stored
            wrong = bounds.judge(*triple, terms=terms, stored=stored + sums, tokens=tokens, planted=planted, products=products, floor=floor)
            assert wrong is None, f"{case.op}, output {i}: {wrong}"


def near_kink(case, args):
    """Whether rounding decides on which side of a kink, or of roll-out's threshold, a value lies."""
    a = dict(zip(names(registry.ops[case.op]), testing.to_double(args), strict=True))
    if case.op == "rollout_step":
        sizes = oracle_attention.score_sizes(a["q"], a["k"], None, a["scale"])
        rows, close = oracle_attention.rollout_rows(*(a[n] for n in ("q", "k", "scale", "head_fusion", "discard_ratio")))
        vanishing = a["residual"] == 0 and rows.numel() and rows.sum(-1).min() < 1e-25  # a row of which nothing is left to divide by
        return vanishing or close < 1e-5 * (1 + (sizes.max().item() if sizes.numel() else 0))
    kinks = oracle.KINKS.get(a.get("act", a.get("out_act")), ())
    if not kinks or case.values == "lattice" or "dy" not in a:
        return False
    if "out_act" in a:
        v, sizes = (oracle.pre_activation(o, *(a[n] for n in ("x", "weight", "bias", "H", "W"))) for o in (oracle.Exact, oracle.Magnitude))
    else:
        v = oracle.affine(a["x"], a.get("scale"), a.get("shift"))
        sizes = oracle.affine(*(oracle.Magnitude.size(a.get(n)) for n in ("x", "scale", "shift")))
    close = 1e-6 * (a["weight"].shape[-1] ** 2 if "out_act" in a else 1)
    return any(bool(((v - kink).abs() <= close * (sizes + abs(kink)) + 1e-35).any()) for kink in kinks)


_SETTLED = {"discard_ratio": 0.0, "head_fusion": "mean"}


def settled(case):
    """(case, arguments), with others where rounding would decide."""
    args = arguments(case)
    if near_kink(case, args):
        case = case._replace(values="lattice", sample={**case.sample, **(_SETTLED if case.op == "rollout_step" else {})})
        args = arguments(case)
    return case, args
