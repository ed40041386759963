"""Running a user's model, or a part of it, without leaving a trace: to look at what it does before something is done to it."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import nn

from lifeops.hosts.patch_order import in_order
from lifeops.nn.grids import GridHolder

HOOKS = tuple(name for name in vars(nn.Module()) if name.startswith(("_forward_", "_backward_")) and "hooks" in name)


@contextlib.contextmanager
def forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """``forward`` in place of the module's own."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _without_users(hooks: dict[str, OrderedDict]) -> dict[str, OrderedDict]:
    """Only the hooks that tell a converted model's modules their grid, and put its patches on it."""
    hooked = ((key, hook) for found in hooks.values() for key, hook in found.items())
    own = {key for key, hook in hooked if hook is in_order or isinstance(getattr(hook, "__self__", None), GridHolder)}
    return {name: OrderedDict((key, hook) for key, hook in found.items() if key in own) for name, found in hooks.items()}


def _fill(module: nn.Module, hooks: dict[str, OrderedDict]) -> None:
    """Give the hooks to the module's own dicts: handles, replacements and fused modules hold on to these."""
    for name, content in hooks.items():
        found = module.__dict__[name]
        found.clear()
        found.update(content)


@contextlib.contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, no hooks of the user's, no gradient, no autocast; all of it and the random numbers as before afterwards."""
    modules = {id(m): m for model in models for m in model.modules()}.values()
    before = [(m, m.training, {name: OrderedDict(m.__dict__[name]) for name in HOOKS}) for m in modules]
    devices = {p.device for model in models for p in model.parameters()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == "cuda"]))
        stack.enter_context(torch.no_grad())
        for device in {d.type for d in devices}:
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            for m, _, hooks in before:
                m.training = False
                _fill(m, _without_users(hooks))
            yield
        finally:
            for m, training, hooks in before:
                m.training = training
                _fill(m, hooks)


def can_run(model: nn.Module) -> bool:
    """Whether there are numbers: not on the meta device, not offloaded, not under a mode that makes fake ones."""
    fake = torch._C._len_torch_dispatch_stack() > 0 or torch.compiler.is_compiling()
    tensors = [*model.parameters(), *model.buffers()]
    return bool(tensors) and not fake and not any(t.is_meta or isinstance(t, torch._subclasses.FakeTensor) for t in tensors)


def of_several_precisions(model: nn.Module) -> bool:
    return len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1
