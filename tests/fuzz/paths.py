"""A public call and its gradients beside the same in float64: any layouts of inputs and upstream gradients, any subset that needs one.

The bound is sixteen times what rounding the inputs to their dtype moves the oracle's result (the largest of three drawn roundings, max
norm) and 32 sqrt(tokens) roundings of the result: chains store about five tensors on the way, each rounded like an input, and sum
over all tokens.
"""

import torch

from fuzz import harness
from fuzz.bounds import UNIT
from fuzz.layouts import lay_out

LEAST = 2.0**-50  # the oracle is float64 itself


def laid_out(values, layouts, turn):
    """Tensors by name, each in its layout."""
    return {n: lay_out(t, layouts[i % len(layouts)], turn + i) for i, (n, t) in enumerate(values.items())}


def _results(call, inputs, need, dys, twice):
    """Outputs, and the gradients of those that need one; with ``twice`` those of a random mix of the gradients too."""
    leaves = {n: t.detach().requires_grad_(n in need) for n, t in inputs.items()}
    out = call(**leaves)
    out = out if isinstance(out, tuple) else (out,)
    on = [(y, dy) for y, dy in zip(out, dys(out), strict=True) if y.requires_grad]
    found = list(out)
    if need and on:
        ys, gs = zip(*on, strict=True)
        gs = [g.requires_grad_(twice) for g in gs]
        order = [leaves[n] for n in need]
        grads = torch.autograd.grad(ys, order, gs, create_graph=twice, allow_unused=True)
        found += grads
        again = [g for g in grads if twice and g is not None and g.requires_grad]
        if again:
            found += torch.autograd.grad(again, [*order, *gs], [mixed(g) for g in again], allow_unused=True)
    return [None if t is None else t.detach() for t in found]


def mixed(t):
    """An upstream gradient of ``t``'s shape that does not depend on its values, in eighths, which every dtype holds."""
    return ((torch.arange(t.numel(), dtype=torch.float64) * 0.37).cos() * 8).round().div(8).to(t.dtype).view(t.shape)


def _rounded(t, u, draw):
    return t if not t.is_floating_point() else t * (1 + u * (2 * torch.rand(t.shape, generator=draw, dtype=torch.float64) - 1))


def compare(library, formula, inputs, need, *, dtype, layouts, seed, isa="avx512", threads=1, twice=False, floor=0.0, terms=1):
    """Raise AssertionError where ``library(**inputs)`` or its gradients are not ``formula(**inputs in float64)``'s."""

    def upstream(kind):
        def dys(out):
            draw = torch.Generator().manual_seed(seed)
            values = [torch.randn(y.shape, generator=draw, dtype=torch.float64).to(dtype) for y in out]
            placed = [lay_out(v, layouts[(i + 3) % len(layouts)], seed % 97 + i) for i, v in enumerate(values)]
            return [p.to(y.dtype) if kind is None else p.to(kind) for p, y in zip(placed, out, strict=True)]

        return dys

    with harness.machine(isa, threads):
        got = _results(library, inputs, need, upstream(None), twice)
    u = max(LEAST, UNIT[dtype])
    doubles = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    expected = _results(formula, doubles, need, upstream(torch.float64), twice)
    moved, draw = [0.0] * len(expected), torch.Generator().manual_seed(seed + 1)
    for _ in range(3):
        other = _results(formula, {n: _rounded(t, u, draw) for n, t in doubles.items()}, need, upstream(torch.float64), twice)
        for i, (a, b) in enumerate(zip(expected, other, strict=True)):
            if a is not None and a.numel():
                moved[i] = max(moved[i], (a - b).abs().max().item())
    assert len(got) == len(expected)
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        if e is None or g is None:
            assert e is None or not e.any(), f"result {i}: None, not a gradient"
            assert g is None or not g.any(), f"result {i}: a gradient, not None"
            continue
        assert g.shape == e.shape, f"result {i}: shape {tuple(g.shape)}, not {tuple(e.shape)}"
        if not e.numel():
            continue
        top = e.abs().max().item()
        bound = 16 * moved[i] + 32 * terms**0.5 * max(u, LEAST, UNIT[g.dtype]) * (top + floor) + 2.0**-24 * (dtype == torch.float16)
        off = (g.double() - e).abs().max().item()
        assert off <= bound, f"result {i} is off by {off:.3g} of {top:.3g}, allowed {bound:.3g}"
