"""From an Op to a torch operator: the only file that touches torch.library.

One operator per op (``torch.ops.lifeops.<name>``) is what autograd, torch.compile, export and the FLOP counter see; the
backend is chosen inside it. ``Library.define/impl`` costs about a third of ``torch.library.custom_op`` per call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lifeops import config, registry
from lifeops.after_import import after_import
from lifeops.registry import Op

_LIB = torch.library.Library("lifeops", "DEF")
_DIFFERENTIABLE = "call lifeops.{name}(…) or lifeops.autograd instead: torch.ops.lifeops.{name} has no gradient of its own"

copies = {"count": 0}
"""How many inputs were copied because their channels were not contiguous (see ``lifeops.explain``)."""

last_backend: dict[str, str] = {}
"""The backend that ran each op most recently; tests assert on it."""


def overload(op: Op):
    """The torch operator of ``op``."""
    return getattr(torch.ops.lifeops, op.name).default


_PLAIN = {torch.Tensor, torch.nn.Parameter, torch.dtype, int, float, bool, str, type(None)}
# Looked up once: behind a kernel that has used all of the caches every lookup on the way is a miss.
_is_compiling, _functorch_active = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
_dispatch_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_profiling = torch._C._autograd._profiler_enabled


def _transformed() -> bool:
    """Whether a compiler or a torch.func transform is at work, which need the entry that torch documents."""
    return _is_compiling() or _functorch_active()


def _wants_grad(args) -> bool:
    """Whether autograd records what happens to ``args``."""
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def _seen_by_torch() -> bool:
    """Whether something looks at operators as they pass the dispatcher: compilers, tracers, transforms, modes, the profiler."""
    return _transformed() or _dispatch_modes() > 0 or _tracing() is not None or _profiling()


def caller(op: Op) -> Callable:
    """The torch operator of ``op`` for autograd Functions, whose forward and backward record no gradients.

    Where nothing looks on, it is the kernel at once: the dispatcher calls Python twice for one operator, 30 to 60 µs on the host.
    """
    operator, kernel = overload(op), _kernel(op)

    def call(*args):
        if _seen_by_torch() or not {*map(type, args)} <= _PLAIN or args[0].is_meta:
            return operator(*args)
        return kernel(*args)

    return call


def channels_contiguous(t: torch.Tensor) -> bool:
    return t.stride(-1) == 1 or t.shape[-1] == 1


def _contiguous_channels(args: tuple, sequences: tuple[int, ...]) -> tuple:
    """``args`` as a native backend reads them: one counted copy of every sequence (B, N, C) whose channels lie apart."""
    for i in sequences:
        if not channels_contiguous(args[i]):
            copies["count"] += 1
            args = (*args[:i], args[i].contiguous(), *args[i + 1 :])
    return args


def contiguous_channels(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same for tensors of any rank, for implementations that read more than sequences."""
    return _contiguous_channels(tensors, tuple(range(len(tensors))))


def _plan(op: Op, args: tuple) -> tuple[str, Callable, tuple[int, ...]]:
    """Checked once per shapes, dtypes, devices and settings: the backend, its function, and the sequences it reads in place."""
    op.check(*args)
    if op.is_empty(*args):
        return "reference", op.reference, ()
    impl = registry.select(op, args[-1], op.problem(*args))
    sequences = tuple(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dim() == 3)  # weights may lie anyhow
    return impl.backend, impl.fn, () if impl.strided else sequences


def _kernel(op: Op):
    def run(*args):
        key = (op.name, config.settings, *[(a.shape, a.dtype, a.device) if isinstance(a, torch.Tensor) else a for a in args])
        plan = registry.plans.get(key)
        if plan is None:
            plan = registry.plans[key] = _plan(op, args)
        last_backend[op.name], fn, sequences = plan
        return fn(*_contiguous_channels(args, sequences))

    return run


def _guard(op: Op):
    """A direct call on inputs that need grad must not return a result whose gradient is silently missing."""

    def run(*args):
        if _wants_grad(args):
            raise RuntimeError(_DIFFERENTIABLE.format(name=op.name))
        with torch._C._AutoDispatchBelowAutograd():
            return overload(op)(*args)

    return run


def _fake(op: Op):
    def run(*args):
        op.check(*args)
        return op.fake(*args)

    return run


def _register_flops(op: Op) -> None:
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(getattr(torch.ops.lifeops, op.name))
    def flops(*args, out_shape=None, **kwargs):
        return op.flops(*args)


def install(op: Op) -> None:
    """Define the operator of ``op``: kernel, fake, autograd guard and FLOP formula."""
    registry.add(op)
    _LIB.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(op.name, _kernel(op), "CompositeExplicitAutograd")
    _LIB.impl(op.name, _guard(op), "Autograd")
    torch.library.register_fake(f"lifeops::{op.name}", _fake(op), lib=_LIB)

    after_import("torch.utils.flop_counter", lambda: _register_flops(op))


def set_vmap(op: Op, rule) -> None:
    """``rule(info, in_dims, *args) -> (outputs, out_dims)`` for torch.func.vmap."""
    torch.library.register_vmap(f"lifeops::{op.name}", rule, lib=_LIB)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype conv2d would cast ``x`` to under the current autocast, or None (autocast off, or x is float64)."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64 or not x.is_floating_point():
        return None
    return torch.get_autocast_dtype(device)


def builds_graph(*tensors) -> bool:
    """Whether autograd, a compiler or a torch.func transform has to see what happens to ``tensors`` (or None)."""
    return _transformed() or _wants_grad(tensors)


def apply(function: type[torch.autograd.Function], fallback, *args):
    """``function.apply(*args)``, or ``fallback(*args)`` (the op alone) where no graph is being built.

    ``Function.apply`` binds its arguments with ``inspect.signature`` on every call of a setup_context Function: 150 to 180 µs
    on the host, more than a small kernel. Compilers and torch.func transforms need that entry; eager mode does not.
    """
    if _transformed():
        return function.apply(*args)
    if not _wants_grad(args):
        with torch._C._AutoDispatchBelowAutograd():  # past the guard, which would only ask the same again
            return fallback(*args)
    return super(torch.autograd.Function, function).apply(*args)
