"""What a benchmark problem is made of: variants over the same inputs, how a mode runs one, and the check of its results.

The oracle of a variant is its ``truth`` in float64 on the very tensors that are timed. An op is compared on ``narrow`` parts of
them (all channels of two images, all images of a few channels: exact, and cheap), by the tests' own policy; a module on all of
them, by the largest error relative to the largest value, ``RELATIVE``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

import lifeops
from bench.problems import HOSTS, KINKED, Problem, level_of
from lifeops import testing

Inputs = dict[str, torch.Tensor]
Run = Callable[[], object]
RELATIVE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 6e-2}
DEEP = 10  # times that for a whole model: a dozen layers and batch norms of few images
JUMPS = {system: 50 for system in KINKED if system in HOSTS}  # times that: of millions of values some lie within rounding of a kink,
JUMPS |= {"localvit_swin_tiny": 100}  # of more of them where windows of 7 ask for larger images,
JUMPS |= {"mvitv2_tiny": 10, "sit_tiny": 4}  # a maximum's gradient goes to one of two tokens, and many gradients cancel


def own_dy(i: Inputs):
    return i["dy"]


@dataclass(frozen=True)
class Variant:
    """``forward(inputs)`` and what it differentiates by: the inputs it ``reads`` and its ``parameters``, sorted by name.

    ``truth`` says who is right about it: a variant in float64, or None for ``forward`` itself on float64 inputs. ``result`` is the
    result's name in ``Case.narrow``. ``compiled``: no operator calls can be counted in it. ``own``, of a truth: the same in plain
    PyTorch in the problem's dtype; where half precision takes it far off, twice its error is allowed, as the tests' policy does.
    """

    forward: Callable[[Inputs], object]
    reads: tuple[str, ...] = ("x",)
    parameters: tuple[torch.Tensor, ...] = ()
    truth: Variant | None = None
    dy: Callable[[Inputs], object] = own_dy
    result: str = "y"
    own: Variant | None = None
    compiled: bool = False

    def leaves(self, i: Inputs) -> tuple[torch.Tensor, ...]:
        return (*(i[name] for name in self.reads), *self.parameters)


Pick = Callable[[str, torch.Tensor, bool], "torch.Tensor | None"]


@dataclass(frozen=True)
class Case:
    """All variants of a problem. ``draw()`` makes fresh random inputs; ``narrow`` parts of them (name, tensor, is a result) are
    checked, None leaving a result out; an op (``policy``) by the tests' policy with ``terms(name)``, the length of its sums.
    """

    problem: Problem
    draw: Callable[[], Inputs]
    variants: dict[str, Variant]
    narrow: Sequence[Pick] = ()
    policy: bool = False
    terms: Callable[[str], int] = field(default=lambda name: 1)


def parameters_of(module: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    return tuple(t for _, t in sorted(module.named_parameters()) if t.requires_grad)


def of_module(module: torch.nn.Module, call: Callable, reads=("x",), **options) -> Variant:
    """A variant that calls ``call(module, inputs)``."""
    return Variant(lambda i: call(module, i), reads, parameters_of(module), **options)


def on_backend(v: Variant, backend: str) -> Variant:
    """``v`` with lifeops' ops on ``backend``."""

    def forward(i):
        with lifeops.use_backend(backend):
            return v.forward(i)

    return replace(v, forward=forward, truth=v.truth or v)


def outputs(out) -> tuple[torch.Tensor, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


# ------------------------------------------------------------------------------------------------ modes


def differentiable(i: Inputs) -> Inputs:
    return {name: t if name == "dy" or not t.is_floating_point() else t.detach().requires_grad_() for name, t in i.items()}


def inputs_of(case: Case, seed: int) -> Inputs:
    """Fresh random inputs as the problem's mode reads them."""
    torch.manual_seed(seed)
    i = case.draw()
    return differentiable(i) if case.problem.mode in ("bwd", "fwdbwd") else i


def runner(v: Variant, mode: str, i: Inputs) -> Run:
    """One timed call. fwd, dw: the forward without autograd; fwdbwd: forward and gradients; bwd: gradients of a graph built here."""
    if mode in ("fwd", "dw"):
        return torch.no_grad()(lambda: v.forward(i))
    leaves, dy = v.leaves(i), v.dy(i)
    if mode == "fwdbwd":
        return lambda: torch.autograd.grad(v.forward(i), leaves, dy)
    out = v.forward(i)
    return lambda: torch.autograd.grad(out, leaves, dy, retain_graph=True)


# ------------------------------------------------------------------------------------------------ check


def _names(v: Variant, mode: str) -> list[str]:
    """Names of what ``runner`` returns, for ``narrow``."""
    return [v.result] if mode in ("fwd", "dw") else [*v.reads, *["parameter"] * len(v.parameters)]


def _double(i: Inputs) -> Inputs:
    return {k: _cast(t) if isinstance(t, torch.Tensor) else [_cast(u) for u in t] for k, t in i.items()}


def _cast(t: torch.Tensor) -> torch.Tensor:
    t = t.detach()
    return t.double() if t.is_floating_point() else t


def _narrowed(i: Inputs, pick: Pick | None, grad: bool) -> Inputs:
    if pick is not None:
        i = {k: pick(k, t.detach(), False) for k, t in i.items()}
    return differentiable(i) if grad else i


def limit(case: Case, name: str, expected: torch.Tensor, baseline: torch.Tensor | None, dtype: torch.dtype) -> float:
    terms = case.terms(name)
    deep = DEEP if level_of(case.problem.system) == "model" else 1
    deep *= JUMPS.get(case.problem.system, 1)
    relative = deep * RELATIVE[dtype] * terms**0.5 * expected.abs().max().item() if expected.numel() else 0.0
    if baseline is None:
        return relative
    return (
        min(relative, testing.tolerance(expected, baseline, dtype, terms))
        if case.policy
        else max(relative, 2 * testing.max_error(baseline, expected))
    )


def check(case: Case, v: Variant, i: Inputs, known: dict) -> None:
    """Raise AssertionError where ``v``'s result on ``i`` is wrong. ``known`` keeps what was computed for variants of one truth."""
    p, truth = case.problem, v.truth or v
    dtype = getattr(torch, p.dtype)
    got = outputs(runner(v, p.mode, i)())
    names = _names(v, p.mode)
    for n, pick in enumerate(case.narrow or (None,)):
        if (id(truth), n) not in known:
            known[id(truth), n] = (*_oracle(case, truth, i, pick), truth)
        expected, baseline, _ = known[id(truth), n]
        repeated = names * len(got) if len(names) == 1 else names
        for name, g, e, b in zip(repeated, got, expected, baseline, strict=True):
            g = g if pick is None else pick(name, g, True)
            if g is None:
                continue
            error, allowed = testing.max_error(g, e), limit(case, name, e, b, dtype)
            if not error <= allowed:
                raise AssertionError(f"{p.system} {p.mode}: {name} is off by {error:.2e}, allowed {allowed:.2e}")


def _oracle(case: Case, truth: Variant, i: Inputs, pick: Pick | None):
    """The truth's results in float64 and, for the policy, in the problem's own dtype."""
    grad = case.problem.mode in ("bwd", "fwdbwd")
    mode = "fwdbwd" if grad else case.problem.mode
    small = _narrowed(i, pick, grad)
    expected = outputs(runner(truth, mode, differentiable(_double(small)) if grad else _double(small))())
    half = getattr(torch, case.problem.dtype) in (torch.float16, torch.bfloat16)
    plain = truth if case.policy else truth.own if half else None
    own = outputs(runner(plain, mode, small)()) if plain else [None] * len(expected)
    return [e.detach() for e in expected], own
