"""From an Op to a torch operator: the only file that touches torch.library.

One operator per op (``torch.ops.lifeops.<name>``) is what autograd, torch.compile, export and the FLOP counter see; the
backend is chosen inside it. ``Library.define/impl`` costs about a third of ``torch.library.custom_op`` per call.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable

import torch

from lifeops import config, registry
from lifeops.after_import import after_import
from lifeops.errors import KernelNotBuilt, NotSupported
from lifeops.registry import Op

if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10):  # pip says so, too, unless it is told --no-deps
    raise ImportError(f"lifeops needs torch 2.10 or newer, found torch {torch.__version__}")

_LIB = torch.library.Library("lifeops", "DEF")
_functions: dict[str, Callable] = {}
"""Per op what ``torch.ops.lifeops.<op>`` is where a gradient is wanted; without one torch differentiates the reference."""

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
# Asked here: torch.compile of torch 2.10 does not trace the question
_AUTOCAST_AVAILABLE = {kind: torch._C._is_autocast_available(kind) for kind in ("cpu", "cuda", "xpu", "mps", "meta")}
_NOTHING = contextlib.nullcontext()


def _transformed() -> bool:
    """Whether a compiler or a torch.func transform is at work, which need the entry that torch documents."""
    return _is_compiling() or _functorch_active()


def wants_grad(args) -> bool:
    """Whether autograd records what happens to ``args``."""
    if torch.is_grad_enabled():
        for a in args:  # any() would make a generator first: half the time of an answer
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    return False


def exporting() -> bool:
    """Whether torch.export or an ONNX exporter writes down a program."""
    if _is_compiling():
        return _torch_exports()
    return _tracing() is not None and torch.onnx.is_in_onnx_export()


def _torch_exports() -> bool:
    """torch.compiler.is_exporting(), which torch.compile of torch 2.10 takes for True: what that function returns."""
    return torch.compiler._is_exporting_flag


def captured() -> bool:
    """Whether a program is being written down, by an exporter or by torch.jit.trace, that Python's autograd Functions cannot be in."""
    return _torch_exports() if _is_compiling() else _tracing() is not None


def tracing() -> bool:
    """Whether torch.jit.trace writes down a program: sizes are tensors then."""
    return not _is_compiling() and _tracing() is not None


def calls_layers() -> bool:
    """Whether a torch.func transform is at work or a program is written down, which have no place for Functions that are differentiable
    once: modules call their layers.
    """
    return _functorch_active() or captured()


def may_be_one(size) -> bool:
    """Whether a size is 1 or, where a program for any size is written down, could be: asking would fix it to the example's."""
    if not isinstance(size, torch.SymInt):
        return size == 1
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # sympy comes with it

    return guard_or_true(size == 1)


def sizes_are_numbers(fn):
    """Decorates what looks at sizes that torch.jit.trace has tensors for: a program belongs to its grid, torch need not warn of that."""

    @functools.wraps(fn)
    def run(*args, **kwargs):
        if not tracing():
            return fn(*args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return fn(*args, **kwargs)

    return run


def seen_by_torch() -> bool:
    """Whether something looks at operators as they pass the dispatcher: compilers, tracers, transforms, modes, the profiler."""
    return _transformed() or _dispatch_modes() > 0 or _tracing() is not None or _profiling()


def modes_look_on() -> bool:
    """Whether dispatch modes see every operator: counters, selective checkpointing."""
    return _dispatch_modes() > 0


def _foreign_mode() -> bool:
    """Whether a dispatch mode of another library looks on, which knows torch's operators alone: ptflops' counter, say. One that wants to
    see lifeops' own says so with an attribute ``sees_lifeops``.
    """
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(type(m).__module__.partition(".")[0] != "torch" and not hasattr(m, "sees_lifeops") for m in modes)


def _foreigner_looks_on() -> bool:
    return not _is_compiling() and _dispatch_modes() > 0 and _foreign_mode()


def _by_torch(args) -> bool:
    """Whether the call has to be written in torch's own operators: in programs, which then run where lifeops is not, and under modes that
    know no others. A backend that was asked for is kept.
    """
    return not args[-1] and (exporting() or _foreigner_looks_on())


def caller(op: Op) -> Callable:
    """The torch operator of ``op`` for autograd Functions, whose forward and backward record no gradients.

    Where nothing looks on, it is the kernel at once: the dispatcher calls Python twice for one operator, 30 to 60 µs on the host.
    """
    operator, kernel = overload(op), _kernel(op)

    def call(*args):
        if seen_by_torch() or not {*map(type, args)} <= _PLAIN or args[0].is_meta:
            if _by_torch(args):
                op.check(*args)
                return op.reference(*args)
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
        try:
            return fn(*_contiguous_channels(args, sequences))
        except KernelNotBuilt as error:  # nothing has run: the next best backend, or NotSupported where this one was asked for
            registry.set_not_built(op, plan[0], op.problem(*args), error)
            return run(*args)
        except (RuntimeError, MemoryError) as error:
            _name_failure(error, op.name, plan[0])
            raise

    return run


def _name_failure(error: Exception, op: str, backend: str) -> None:
    """Puts op and backend in front of what an error says. It stays the same object: who waits for OutOfMemoryError gets one."""
    said = str(error)
    if not isinstance(error, NotSupported) and error.args in ((said,), ()) and ": backend '" not in said:
        error.args = (f"{op}: backend {backend!r} failed: {said or type(error).__name__}",)


def _autograd(op: Op):
    """The operator where autograd records: its Function or, of those that have none, torch's derivative of the formula."""

    def run(*args):
        if wants_grad(args):
            return _functions.get(op.name, op.reference)(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(op)(*args)

    return run


def set_autograd(op: Op, function: Callable) -> None:
    """``function(*args)`` is ``torch.ops.lifeops.<op>`` with gradients: in programs that were exported or traced, and called directly."""
    _functions[op.name] = function


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
    """Define the operator of ``op``: kernel, fake, gradient and FLOP formula."""
    registry.add(op)
    _LIB.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(op.name, _kernel(op), "CompositeExplicitAutograd")
    _LIB.impl(op.name, _autograd(op), "Autograd")
    torch.library.register_fake(f"lifeops::{op.name}", _fake(op), lib=_LIB)

    after_import("torch.utils.flop_counter", lambda: _register_flops(op))


def set_vmap(op: Op, rule) -> None:
    """``rule(info, in_dims, *args) -> (outputs, out_dims)`` for torch.func.vmap."""
    torch.library.register_vmap(f"lifeops::{op.name}", rule, lib=_LIB)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for ``device``; devices that have none, such as meta, raise in torch."""
    kind = device.type
    available = _AUTOCAST_AVAILABLE[kind] if kind in _AUTOCAST_AVAILABLE else torch._C._is_autocast_available(kind)
    return available and torch.is_autocast_enabled(kind)


def without_autocast(x: torch.Tensor):
    """A context in which nothing on ``x``'s device is cast."""
    if not autocast_enabled(x.device):
        return _NOTHING
    return torch.autocast(x.device.type, enabled=False)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype conv2d would cast ``x`` to under the current autocast, or None (autocast off, or x is float64)."""
    if not autocast_enabled(x.device) or x.dtype == torch.float64 or not x.is_floating_point():
        return None
    return torch.get_autocast_dtype(x.device.type)


def builds_graph(*tensors) -> bool:
    """Whether autograd, a compiler or a torch.func transform has to see what happens to ``tensors`` (or None)."""
    return _transformed() or wants_grad(tensors)


def below_autograd(call: Callable, *args):
    """``call(*args)`` where nothing is recorded: past the operators' autograd, which would only find that out again."""
    # compilers trace no such guard, a program has to record, and other libraries' modes know convolution, not the conv2d above it
    if seen_by_torch() and (_transformed() or captured() or _foreigner_looks_on()):
        return call(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return call(*args)


def apply(function: type[torch.autograd.Function], fallback, *args):
    """``function.apply(*args)``, or ``fallback(*args)`` (the op alone) where no graph is being built or a program written down.

    ``Function.apply`` binds its arguments with ``inspect.signature`` on every call of a setup_context Function: 150 to 180 µs
    on the host, more than a small kernel. Compilers and torch.func transforms need that entry; eager mode does not.
    """
    if seen_by_torch():
        if captured():
            return fallback(*args)
        if _transformed():
            return function.apply(*args)
        if not wants_grad(args):
            return below_autograd(fallback, *args)
    elif not wants_grad(args):  # nobody looks on: asked once for all of the above
        with torch._C._AutoDispatchBelowAutograd():
            return fallback(*args)
    return super(torch.autograd.Function, function).apply(*args)


class _Once(torch.autograd.Function):
    """The first ``count`` tensors; a gradient through them is an error."""

    @staticmethod
    def forward(ctx, message, count, *tensors):
        ctx.message = message
        return tensors[:count]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(ctx.message)


def once_differentiable(name: str, instead: str) -> Callable:
    """Decorates a Function's ``backward``: a derivative of what it returns raises. torch's decorator of that name drops it in silence
    where the incoming gradient is a constant, as in a gradient penalty. What the returned gradients depend on has to be among the saved
    tensors, as the very inputs: that is how a derivative with respect to them gets here.
    """
    message = f"{name}: differentiable once, a second derivative was asked for; {instead}"

    def decorate(backward):
        @functools.wraps(backward)
        def run(ctx, *grads):
            with torch.no_grad():
                out = backward(ctx, *grads)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return out
            found = [g for g in out if g is not None]
            on = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]  # or autograd would go past it
            marked = iter(_Once.apply(message, len(found), *found, *on, torch.empty(0, requires_grad=True)))
            return tuple(None if g is None else next(marked) for g in out)

        return run

    return decorate


def _overlaps(shape, stride) -> bool:
    """Whether some elements of such a tensor may share memory."""
    reach = 0
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += (size - 1) * step
    return False


def like_parameter(grad: torch.Tensor | None, shape, stride) -> torch.Tensor | None:
    """``grad`` with the parameter's shape and strides, those of dimensions of size 1 too: DistributedDataParallel's buckets expect them.
    A parameter that is an expanded or overlapping view gets a gradient in a layout of its own.
    """
    if grad is None:
        return None
    grad = grad.reshape(shape)
    if _is_compiling() or grad.stride() == stride or _overlaps(shape, stride):  # a compiler chooses layouts itself
        return grad
    return torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)
