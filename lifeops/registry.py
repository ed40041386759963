"""Ops, their implementations per backend, and the choice between them. No torch.library in here."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lifeops import config
from lifeops.arguments import FLOATS
from lifeops.errors import FallbackWarning, NotSupported, warn


class Cost(NamedTuple):
    """Compulsory traffic (each input read once, each output written once) and floating point operations (MAC = 2)."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Op:
    """What one op is. ``reference``, ``fake`` and ``check`` take the schema's arguments.

    ``problem(*args)`` is the hashable key that ``supports`` and the choice of a backend see. ``make(sample, …)`` builds the
    arguments of one named sample and ``samples`` lists them: tests and benchmarks are generated from these two.
    """

    name: str
    schema: str
    reference: Callable
    check: Callable
    fake: Callable
    problem: Callable[..., tuple]
    flops: Callable[..., int]
    samples: Callable[[], Sequence[Any]] = tuple
    make: Callable | None = None
    reduces: Callable[[Any], int] | None = None  # terms of long sums (dW, db, matrix products): sqrt(terms) tolerance
    is_empty: Callable[..., bool] = lambda *args: False
    exact: Callable[[Any], bool] = lambda sample: True  # integer inputs must give the oracle's bits
    kept: tuple[int, ...] = ()  # outputs that only backward reads: judged in the first output's dtype
    impls: dict[str, Impl] = field(default_factory=dict, compare=False)

    def cost(self, *args) -> Cost:
        """Compulsory traffic and arithmetic of one call: every tensor argument read once, every output written once."""
        read = [a for a in args if isinstance(a, torch.Tensor)]
        out = self.fake(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        moved = sum(t.numel() * t.element_size() for t in (*read, *(out if isinstance(out, tuple) else (out,))))
        return Cost(moved, self.flops(*(a.shape if isinstance(a, torch.Tensor) else a for a in args)))


@dataclass(frozen=True)
class Impl:
    """One backend's implementation: a function with the op's schema signature."""

    op: str
    backend: str
    fn: Callable
    supports: Callable[[Any], list[str]]
    priority: int
    strided: bool = False  # reads any channel stride itself
    dtypes: tuple[torch.dtype, ...] = FLOATS


class _Plans(dict):
    """A cache that starts afresh rather than grow without end where every call has another shape."""

    def __setitem__(self, key, value) -> None:
        if len(self) >= 4096:
            self.clear()
        super().__setitem__(key, value)


BACKEND_PRIORITY = {"reference": 0, "triton": 10, "cpu": 20, "cuda": 20}

ops: dict[str, Op] = {}
_LOADERS = {"cpu": "lifeops.native", "cuda": "lifeops.native", "triton": "lifeops.kernels"}
_tried: set[str] = set()
_unavailable: dict[str, str] = {}
_choice = _Plans()
"""(op, request, problem, settings) to the implementation that runs it."""
plans = _Plans()
"""What torchlib found out about calls it has seen; forgotten whenever an implementation is registered."""
_not_built = _Plans()
"""(op, backend, problem) to why its kernel could not be built when it was first called for."""
_warned = _Plans()
"""(op, why) of the fallbacks that were warned of."""


def add(op: Op) -> Op:
    """Enter an op and its reference."""
    if op.name in ops:
        raise ValueError(f"op {op.name!r} is registered already")
    ops[op.name] = op
    op.impls["reference"] = Impl(op.name, "reference", op.reference, lambda problem: [], 0, strided=True)
    return op


def register(
    op: str, backend: str, fn: Callable, *, supports: Callable[[Any], list[str]], priority: int,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:  # fmt: skip
    """Enter ``fn`` as ``backend``'s implementation of ``op``; ``supports(problem)`` returns every reason why not. ``dtypes`` are
    those it has kernels for: what the tests run and the table in docs/backends.md lists.
    """
    config.check_backend("register", backend)
    if op not in ops:
        raise ValueError(f"no op {op!r} to register a {backend!r} implementation for; known: {', '.join(ops)}")
    ops[op].impls[backend] = Impl(op, backend, fn, supports, priority, dtypes=dtypes)
    forget_choices()


def forget_choices() -> None:
    """Choose again for every problem."""
    _choice.clear()
    plans.clear()


def set_unavailable(backend: str, reason: str) -> None:
    """Say why ``backend`` has nothing to offer on this machine."""
    _unavailable[backend] = reason


def unavailable(backend: str) -> str | None:
    load(backend)
    return _unavailable.get(backend)


def load(backend: str) -> None:
    """Import what registers ``backend``, once. A missing backend is noted with its reason, never an import error."""
    module = _LOADERS.get(backend)
    if module is None or module in _tried:
        return
    _tried.add(module)
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package raises anything: AttributeError, RuntimeError, OSError, …
        for name, where in _LOADERS.items():
            if where == module:
                set_unavailable(name, f"{module} cannot be imported: {one_line(error)}")


def set_not_built(op: Op, backend: str, problem, error: Exception) -> None:
    """From now on ``backend`` does not run ``problem``: its kernel cannot be built here."""
    _not_built[op.name, backend, problem] = str(error)
    forget_choices()


def one_line(error: BaseException) -> str:
    """An error in one line, at most 300 characters: its type and the last lines of what it says."""
    said = " ".join(str(error).split())
    kind = type(error).__name__
    return kind if not said else f"{kind}: {said}" if len(said) <= 300 else f"{kind}: … {said[-300:]}"


def reasons_against(op: Op, backend: str, problem) -> list[str]:
    """Every reason why ``backend`` cannot run ``problem``; empty if it can. Errors inside ``supports`` propagate."""
    load(backend)
    impl = op.impls.get(backend)
    if impl is None:
        return [_unavailable.get(backend, f"it has no implementation of {op.name}")]
    not_built = _not_built.get((op.name, backend, problem)) if _not_built else None
    return [not_built] if not_built else impl.supports(problem)


def _preferred(problem) -> tuple[str, ...]:
    """Backends worth loading when nothing is asked for, best first is decided by priority."""
    return {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(problem.device.type, ())


def select(op: Op, request: str, problem) -> Impl:
    """The implementation that runs ``problem``: the one asked for, or the best that supports it (cached)."""
    key = (op.name, request, problem, config.settings)
    impl = _choice.get(key)
    if impl is None:
        impl = _choice[key] = _insisted(op, request, problem) if request else _best(op, problem)
    return impl


def _insisted(op: Op, backend: str, problem) -> Impl:
    reasons = reasons_against(op, backend, problem)
    if reasons:
        raise NotSupported(op.name, backend, reasons)
    return op.impls[backend]


def _best(op: Op, problem) -> Impl:
    wanted = config.settings.backend
    candidates = _preferred(problem)
    refused = {b: reasons_against(op, b, problem) for b in dict.fromkeys((*candidates, *([wanted] if wanted else [])))}
    if wanted and not refused[wanted]:
        return op.impls[wanted]
    usable = [op.impls[b] for b in candidates if not refused[b]] or [op.impls["reference"]]
    best = max(usable, key=lambda impl: impl.priority)
    missed = {wanted: refused[wanted]} if wanted else (refused if best.backend == "reference" else {})
    if missed:
        _fall_back(op, best, missed)
    return best


def _fall_back(op: Op, best: Impl, missed: dict[str, list[str]]) -> None:
    why = "; ".join(f"{backend}: {', '.join(reasons)}" for backend, reasons in missed.items())
    if config.settings.strict:
        raise NotSupported(op.name, "/".join(missed), [f"{why} (LIFEOPS_STRICT=1 forbids to fall back to {best.backend})"])
    if (op.name, why) not in _warned:
        _warned[op.name, why] = True
        warn(f"lifeops: {op.name} runs on the slower {best.backend!r} backend. {why}", FallbackWarning)


class Explanation(NamedTuple):
    """Which backend runs one op, why each of the others does not, and which inputs are copied first."""

    op: str
    chosen: str
    reasons: dict[str, list[str]]
    copies: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen}"]
        for backend, reasons in self.reasons.items():
            if backend != self.chosen:
                lines.append(f"  not {backend}: {'; '.join(reasons) or 'supported, but lower priority'}")
        lines += [f"  copies {name}: its channels are not contiguous" for name in self.copies]
        return "\n".join(lines)


def explain_op(op: Op, request: str, problem, copies: tuple[str, ...] = ()) -> Explanation:
    reasons = {backend: reasons_against(op, backend, problem) for backend in config.BACKENDS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        impl = select(op, request, problem)
    return Explanation(op.name, impl.backend, reasons, () if impl.strided else copies)
