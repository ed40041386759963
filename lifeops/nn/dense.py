"""Dense layers by whichever library is faster on this CPU, where they are plainly what they seem."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lifeops import torchlib
from lifeops.nn.plain import Rule, exactly, is_fused
from lifeops.pointwise import product


def _called(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)


def multiplier(module: nn.Module) -> Callable[[Tensor, nn.Module], Tensor]:
    """What gives ``layer(x)`` for the dense layers of ``module``: :func:`lifeops.pointwise.product`, or a call of each where something was
    exchanged or hooked, and under torch.func.
    """
    return product if is_fused(module) and not torchlib.calls_layers() else _called


def linears(*names: str) -> list[tuple[str, Rule]]:
    """``fused_layers`` of a module whose dense layers are called so."""
    return [(name, exactly(nn.Linear)) for name in names]
