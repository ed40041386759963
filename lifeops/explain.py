"""``lifeops.explain(op, …)``: which backend runs a call, and every reason why the others do not."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lifeops import registry
from lifeops.arguments import got
from lifeops.nn.plain import LEFT, reasons
from lifeops.ops import rollout_step
from lifeops.ops.life_qkv import function as life_qkv
from lifeops.ops.local_attention import function as local_attention
from lifeops.ops.token_conv import public as token_conv
from lifeops.ops.token_dwconv import public as token_dwconv
from lifeops.ops.token_pool import function as token_pool

_EXPLAINERS = {
    "token_dwconv": token_dwconv.explain,
    "token_dwconv_transpose": token_conv.explain_transpose,
    "token_pool": token_pool.explain,
    "life_qkv": life_qkv.explain,
    "local_attention": local_attention.explain,
    "rollout_step": rollout_step.explain,
}


class Report(list):
    """One :class:`lifeops.registry.Explanation` per torch operator of the call, printed one below the other."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


class Path(NamedTuple):
    """How one fused module runs: ``fused`` or, for the ``reasons``, by calling its layers."""

    path: str
    module: str
    fused: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        head = f"{self.path or 'the module itself'} ({self.module}): {'fused' if self.fused else 'calls its layers'}"
        return "\n".join([head, *(f"  {why}" for why in self.reasons)])


def _explain_module(module: nn.Module) -> Report:
    found = [(path, m, tuple(reasons(m))) for path, m in module.named_modules() if hasattr(m, "fused_layers")]
    found += [(path, m, (f"left as it was: {why}",)) for path, m in module.named_modules() if (why := m.__dict__.get(LEFT))]
    if not found:
        raise ValueError(f"explain: {type(module).__name__} has no module of lifeops inside")
    return Report(Path(path, type(m).__name__, not why, why) for path, m, why in found)


def explain(op: str | nn.Module, *args: object, **kwargs: object) -> Report:
    """Explain ``lifeops.<op>(*args, **kwargs)`` without running it: forward and backward operators, chosen backend, reasons
    against each other one, copies that would be made. Of a module: which of lifeops' modules in it run fused, and which call their
    layers one by one, and why (exchanged layers, hooks, adapters, other paddings, quantised weights).

    >>> print(lifeops.explain("token_dwconv", x, weight, grid=(14, 14), num_prefix_tokens=1))
    >>> print(lifeops.explain(model))

    Raises ValueError for an unknown op, and for a module without any of lifeops'.
    """
    if isinstance(op, nn.Module):
        if args or kwargs:
            raise TypeError("explain: a module is explained without further arguments")
        return _explain_module(op)
    if not isinstance(op, str) or op not in _EXPLAINERS:
        known = ", ".join(map(repr, _EXPLAINERS))
        raise ValueError(f"explain: op must be one of {known}, got {got(op)}; all ops: {', '.join(registry.ops)}")
    return Report(_EXPLAINERS[op](*args, **kwargs))
