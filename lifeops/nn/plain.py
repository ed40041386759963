"""Whether the layers inside a fused module are the ones that its kernels compute.

A fused module reads the parameters of its layers without calling them. That is right only as long as each of them is exactly the
layer that the kernel stands for; else the module calls its layers one after another (its composed path), which is what any
exchanged, wrapped, hooked, parametrised, quantised, pruned, sharded or offloaded layer needs. A module lists its layers in
``fused_layers()``: (path, rule), and a rule says why a layer is not what is computed. :func:`is_fused` is asked at every call: it
looks whether anything has changed since the rules were read, in about 2 µs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from operator import itemgetter

import torch
import torch.nn.modules.module as torch_module
from torch import nn

Rule = Callable[[nn.Module], list[str]]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch_module, f"_global{name}") for name in _HOOKS]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, type(None))
_TRACED = "torch._subclasses"  # fake and functional tensors stand for plain ones
_geometry = itemgetter("stride", "padding", "dilation", "groups", "padding_mode")
_values, _bounds = dict.values, itemgetter("min_val", "max_val")
_POOLS = {nn.MaxPool2d: itemgetter("dilation", "return_indices"), nn.AvgPool2d: itemgetter("divisor_override")}
_children, _forward_hooks = itemgetter("_modules"), itemgetter("_forward_hooks")  # the dicts themselves may be exchanged, too
_WATCH = "_lifeops_watch"
LEFT = "_lifeops_left"
"""The attribute of a module that ``accelerate`` left as it was: why."""
_is_compiling = torch.compiler.is_compiling


# ------------------------------------------------------------------------------------------------ rules


def _name(kind: type) -> str:
    """peft's and torch.ao's Linear are called as torch.nn's."""
    return kind.__name__ if kind.__module__.startswith(("torch.nn.", "lifeops.")) else f"{kind.__module__}.{kind.__name__}"


def exactly(*types: type) -> Rule:
    """The layer is of one of these types, not of a subclass, and the class computes what it did when lifeops was imported."""

    def rule(layer):
        if type(layer) in types:
            return _patched(type(layer))
        return [f"it is a {_name(type(layer))}, the kernel computes a {' or '.join(map(_name, types))}"]

    return rule


_METHODS = ("__call__", "_call_impl", "_wrapped_call_impl", "forward", "_conv_forward")
_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity, nn.Dropout, nn.GELU, nn.ReLU, nn.ReLU6, nn.Hardswish,
    nn.Hardsigmoid, nn.Sequential, nn.MaxPool2d, nn.AvgPool2d, nn.ConvTranspose2d,
)  # fmt: skip
_ORIGINAL = {cls: [getattr(cls, name, None) for name in _METHODS] for cls in _LAYERS}


def _patched(cls: type) -> list[str]:
    """Methods of torch's classes that somebody has put others in place of."""
    original = _ORIGINAL.get(cls, ())
    changed = [name for name, method in zip(_METHODS, original, strict=False) if getattr(cls, name, None) is not method]
    return [f"{cls.__name__}.{name} was replaced" for name in changed]


def sequence_of(count: int) -> Rule:
    """So many layers one after another, named by their place."""

    def rule(layers):
        wrong = exactly(nn.Sequential)(layers)
        found = [*layers._modules] if not wrong else []
        fits = found == [str(i) for i in range(count)]
        return wrong or ([] if fits else [f"it has layers {', '.join(found)}, the kernel computes {count}"])

    return rule


def linear_with_bias(layer) -> list[str]:
    """A dense layer that adds a bias."""
    return exactly(nn.Linear)(layer) or ["it has no bias"] * (layer._parameters.get("bias") is None)


def _computed(kind: type):
    """A rule from the values, by attribute, with which the kernel computes a layer of ``kind``: the first of each names them all."""

    def rule_of(wanted: Callable[[nn.Module], dict]) -> Rule:
        @functools.wraps(wanted)
        def rule(layer) -> list[str]:
            wrong = exactly(kind)(layer)
            if wrong:
                return wrong
            values = [(name, getattr(layer, name), fits) for name, fits in wanted(layer).items()]
            return [f"{name} is {value!r}, the kernel computes {fits[0]!r}" for name, value, fits in values if value not in fits]

        return rule

    return rule_of


@_computed(nn.ReLU6)
def relu6(layer) -> dict:
    """min(max(v, 0), 6)."""
    return {"min_val": (0,), "max_val": (6,)}


@_computed(nn.GELU)
def gelu(layer) -> dict:
    """v Φ(v) with the exact error function."""
    return {"approximate": ("none",)}


@_computed(nn.Conv2d)
def pointwise(layer) -> dict:
    """A 1x1 convolution of all channels."""
    return {"kernel_size": ((1, 1),), "stride": ((1, 1),), "padding": ((0, 0), "same", "valid"), "groups": (1,)}


@_computed(nn.Conv2d)
def depthwise(layer) -> dict:
    """A K x K depth-wise convolution, odd K, stride 1, zero 'same' padding."""
    K = layer.kernel_size[0]
    return {
        "kernel_size": ((K, K),) if K % 2 else ("an odd size",), "stride": ((1, 1),), "padding": ((K // 2, K // 2), "same"),
        "dilation": ((1, 1),), "groups": (layer.in_channels,), "out_channels": (layer.in_channels,), "padding_mode": ("zeros",),
    }  # fmt: skip


@_computed(nn.Conv2d)
def multiplying(layer) -> dict:
    """A depth-wise convolution of any kernel size, stride and zero padding, which may make several channels of each."""
    padding = (layer.padding,) if isinstance(layer.padding, tuple) else ("two numbers",)
    return {"padding": padding, "dilation": ((1, 1),), "groups": (layer.in_channels,), "padding_mode": ("zeros",)}


def strided_depthwise(layer) -> list[str]:
    """The same with one channel for each."""
    wrong = multiplying(layer)
    return wrong or ["it has more channels than it is given"] * (layer.out_channels != layer.in_channels)


@_computed(nn.MaxPool2d)
def max_pool(layer) -> dict:
    """The maximum over a window."""
    return {"dilation": (1, (1, 1)), "return_indices": (False,)}


@_computed(nn.AvgPool2d)
def avg_pool(layer) -> dict:
    """The mean over a window."""
    return {"divisor_override": (None,)}


def pool(layer) -> list[str]:
    """What pools each channel on its own: by a filter, a maximum or a mean."""
    return {nn.MaxPool2d: max_pool, nn.AvgPool2d: avg_pool}.get(type(layer), strided_depthwise)(layer)


@_computed(nn.AvgPool2d)
def subsample(layer) -> dict:
    """A mean over windows of one: every stride-th value."""
    return {
        "kernel_size": (1, (1, 1)), "padding": (0, (0, 0)), "ceil_mode": (False,), "divisor_override": (None,),
    }  # fmt: skip


@_computed(nn.ConvTranspose2d)
def transposed_depthwise(layer) -> dict:
    """A transposed depth-wise convolution of any kernel, stride and padding."""
    return {"dilation": ((1, 1),), "groups": (layer.in_channels,), "out_channels": (layer.in_channels,), "padding_mode": ("zeros",)}


@_computed(nn.Conv1d)
def channel_conv(layer) -> dict:
    """A convolution over neighbouring channels, (1, 1, k), without a bias."""
    k = layer.kernel_size[0]
    return {
        "in_channels": (1,), "out_channels": (1,), "stride": ((1,),), "padding": ((k // 2,), "same"), "dilation": ((1,),),
        "padding_mode": ("zeros",), "bias": (None,),
    }  # fmt: skip


def without_bias(rule: Rule) -> Rule:
    """``rule``, and there is no bias."""

    def both(layer):
        bias = layer._parameters.get("bias", layer.__dict__.get("bias"))  # FSDP1 keeps a tensor in place of the parameter
        return [*rule(layer), *["it has a bias, which the kernel does not add"] * (bias is not None)]

    return both


def batch_norm(layer) -> list[str]:
    """A batch norm, or what ``fuse_`` leaves of it."""
    wrong = exactly(nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity)(layer)
    if not wrong and type(layer) is not nn.Identity and None in (layer._parameters.get("weight"), layer._parameters.get("bias")):
        return ["it has no weight or no bias"]
    return wrong


# ------------------------------------------------------------------------------------------------ any layer


def _keeps_names_only(hook) -> bool:
    """torch.utils.module_tracker's, which FlopCounterMode registers: they see that a module runs and change nothing."""
    return type(getattr(hook, "__self__", None)).__module__ == "torch.utils.module_tracker"


def global_hooks() -> list[str]:
    """Hooks registered for all modules that need every layer to be called."""
    found = [hook for hooks in _GLOBAL_HOOKS for hook in hooks.values() if not _keeps_names_only(hook)]
    return [f"{len(found)} hooks are registered for all modules"] if found else []


def _touched(layer: nn.Module) -> list[str]:
    """What was done to a layer beside exchanging it."""
    found = [f"it has {name.strip('_').replace('_', ' ')}" for name in _HOOKS if getattr(layer, name)]
    found += [f"its {name} was replaced (offloaded, patched)" for name in _METHODS if name in layer.__dict__]
    for name in ("weight", "bias"):
        t = layer._parameters.get(name, layer.__dict__.get(name))  # reading a parametrised attribute would compute it
        if not callable(t) and type(t) not in _PLAIN_TENSORS and not type(t).__module__.startswith(_TRACED):
            found.append(f"its {name} is a {type(t).__name__}")
    return found


def _resolve(module: nn.Module, path: str):
    """The layer at ``path`` and the modules on the way to it, the layer left out; None where a name is missing."""
    way, layer = [], module
    for name in path.split("."):
        way.append(layer)
        layer = getattr(layer, "_modules", {}).get(name)
        if layer is None:
            return way, None
    return way, layer


def reasons(module: nn.Module) -> list[str]:
    """Why ``module`` calls its layers one by one; empty if its fused path computes what they do."""
    found = global_hooks()
    for path, rule in module.fused_layers():
        _, layer = _resolve(module, path)
        wrong = ["it is missing"] if layer is None else why_not(layer, rule)
        found += [f"{path}: {why}" for why in wrong]
    return found


# ------------------------------------------------------------------------------------------------ asked at every call


class _Watch:
    """What the answer depends on, flat, so that asking whether it is still so is a few calls into C."""

    def __init__(self, module: nn.Module):
        found = [_resolve(module, path) for path, _ in module.fused_layers()]
        containers = list({id(m): m for way, _ in found for m in way}.values())
        layers = [layer for _, layer in found if layer is not None]
        nodes = list({id(m): m for m in (*containers[1:], *layers)}.values())
        self.owner = module._modules
        self.fused = not reasons(module)
        self.hooks = [*_GLOBAL_HOOKS, *(getattr(m, name) for m in layers for name in _HOOKS[1:])]
        self.layers = [m.__dict__ for m in layers]
        self.inner = [m.__dict__ for m in containers]
        self.dicts = [m.__dict__ for m in nodes]
        self.parameters = [m._parameters for m in layers if m._parameters]
        self.convs = [m.__dict__ for m in layers if isinstance(m, _CONVS)]
        self.bounds = [m.__dict__ for m in layers if type(m) is nn.ReLU6]
        self.pools = [(_POOLS[type(m)], m.__dict__) for m in layers if type(m) in _POOLS]
        self.nodes = nodes
        self.state = self._look()

    def _look(self) -> list:
        found = [*chain.from_iterable(map(_values, map(_children, self.inner)))]
        found += map(type, self.nodes)
        found += map(len, self.dicts)
        found += map(type, chain.from_iterable(map(_values, self.parameters)))
        found += map(_geometry, self.convs)
        if self.bounds:
            found += map(_bounds, self.bounds)
        if self.pools:
            found += [settings(m) for settings, m in self.pools]
        return found

    def holds(self) -> bool:
        """Whether nothing has changed: one list, made anew and compared with the one that was kept."""
        return not (any(self.hooks) or any(map(_forward_hooks, self.layers))) and self._look() == self.state

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` may compute what its layers compute without calling them."""
    if _is_compiling():
        return not reasons(module)
    own = module.__dict__
    watch = own.get(_WATCH)
    if watch is not None and watch.owner is own["_modules"] and watch.holds():
        return watch.fused
    watch = _Watch(module)
    module.__dict__[_WATCH] = watch if watch.holds() else None  # hooks come and go; past nn.Module.__setattr__
    return watch.fused


def forget(module: nn.Module) -> None:
    """Remove what :func:`is_fused` and ``accelerate`` keep on the module."""
    for name in (_WATCH, LEFT):
        module.__dict__.pop(name, None)


def why_not(layer: nn.Module, rule: Rule) -> list[str]:
    """Why one layer is not plainly what ``rule`` describes, hooks for all modules left out."""
    return [*rule(layer), *_touched(layer)]


def is_plain(layer: nn.Module, rule: Rule) -> bool:
    """:func:`is_fused` for one layer, read afresh."""
    return not (why_not(layer, rule) or global_hooks())
