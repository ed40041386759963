"""The correctness policy, in one place, for the tests and the benchmarks.

Oracle: the op's reference in float64 on the same values. An implementation may be off by

    2 * (error of the reference run in the op's dtype) + eps(dtype) * max|oracle|      in the max norm,

times sqrt(terms) on the second part for long sums (dW, db, matrix products), whose order differs between libraries.
Integer-valued inputs must match bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lifeops import registry
from lifeops.ops.token_dwconv.samples import Maker
from lifeops.ops.token_dwconv.spec import DTYPES
from lifeops.registry import Op

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
ULP = {torch.bfloat16: 2.0**-7}  # what Triton's interpreter loses by truncating to bfloat16


def tensors(out) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def to_double(args: tuple) -> tuple:
    """The same call in float64: tensors and the dtypes asked for."""

    def cast(arg):
        if isinstance(arg, torch.Tensor) and arg.is_floating_point():
            return arg.double()
        return torch.float64 if isinstance(arg, torch.dtype) else arg

    return tuple(cast(a) for a in args)


def oracle(op: Op, args: tuple) -> tuple[torch.Tensor, ...]:
    return tensors(op.reference(*to_double(args)))


def max_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    if got.shape != expected.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if not got.numel():
        return 0.0
    difference = (got.double() - expected.double()).abs().max().item()
    return float("inf") if difference != difference else difference


def tolerance(expected: torch.Tensor, baseline: torch.Tensor, dtype: torch.dtype, terms: int = 1, truncates: bool = False) -> float:
    """How far a result of ``dtype`` may be from ``expected``, given what the reference reaches in that dtype."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    slack = EPS[dtype] * scale * (terms**0.5 if dtype in (torch.float32, torch.float64) else 1.0)
    if dtype == torch.float64:
        slack *= 16  # the oracle is no more precise than the result: two orders of summing K*K terms differ
    if truncates:
        slack += ULP.get(dtype, 0.0) * scale
    return 2 * max_error(baseline, expected) + slack


def check(op: Op, args: tuple, got, *, terms: int = 1, truncates: bool = False) -> None:
    """Raise AssertionError unless ``got`` follows the policy for this call."""
    expected, baseline, got = oracle(op, args), tensors(op.reference(*args)), tensors(got)
    # sums of truncated values are off by an ulp for every term
    truncated = terms * ULP.get(got[0].dtype, 0.0) * expected[0].abs().max().item() if truncates and expected[0].numel() else 0.0
    for i, (g, e, b) in enumerate(zip(got, expected, baseline, strict=True)):
        if g.dtype != b.dtype:
            raise AssertionError(f"{op.name}: output {i} has dtype {g.dtype}, expected {b.dtype}")
        judged = got[0].dtype if i in op.kept else g.dtype
        error, allowed = max_error(g, e), tolerance(e, b, judged, terms, truncates)
        allowed += truncated if g.dtype != got[0].dtype else 0.0
        if not error <= allowed:
            raise AssertionError(f"{op.name}: output {i} is off by {error:.3e}, allowed {allowed:.3e}")


def check_exact(op: Op, args: tuple, got) -> None:
    """Raise unless integer-valued inputs gave exactly the oracle's values."""
    for i, (g, e) in enumerate(zip(tensors(got), oracle(op, args), strict=True)):
        if not torch.equal(g.double(), e):
            raise AssertionError(f"{op.name}: output {i} differs at {int((g.double() != e).sum())} of {e.numel()} places")


def make(op: Op, sample, dtype: torch.dtype, *, backend: str = "", device: str = "cpu", integers: bool = False, seed: int = 0) -> tuple:
    """The schema's arguments of one sample."""
    return op.make(sample, Maker(seed, dtype, device, integers), backend)


def cases(backend: str, *, tiny_only: bool = False, dtypes=DTYPES) -> Iterator[tuple[Op, object, torch.dtype]]:
    """Every (op, sample, dtype) that ``backend`` has an implementation for."""
    registry.load(backend)
    for op in registry.ops.values():
        if backend not in op.impls:
            continue
        for sample in op.samples():
            if tiny_only and not sample.tiny:
                continue
            for dtype in (d for d in dtypes if d in op.impls[backend].dtypes):
                yield op, sample, dtype
