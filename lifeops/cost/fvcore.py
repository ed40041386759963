"""lifeops' operators for fvcore's counters, which read torch.jit graphs; fvcore itself is not imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lifeops import registry
from lifeops.registry import Op


def _argument(value) -> Any:
    """A jit Value as FLOP formulas want it: a tensor's shape, or a constant; None where the graph does not tell."""
    return value.type().sizes() if value.isCompleteTensor() else value.toIValue()


def _arguments(name: str, inputs) -> list:
    """Those of a node whose tensors have shapes and whose numbers are constants."""
    args = [_argument(v) for v in inputs]
    for i, (arg, value) in enumerate(zip(args, inputs, strict=True)):
        if arg is None and not isinstance(value.type(), torch._C.NoneType):
            raise ValueError(
                f"fvcore_handles: argument {i} of {name} must have a shape or be a constant in the graph, got {value.type()};"
                " fvcore's own traces have all shapes, torch.jit.trace drops those of a module's parameters"
            )
    return args


def _handle(op: Op) -> Callable:
    def macs(inputs, outputs):
        return op.flops(*_arguments(f"lifeops::{op.name}", inputs)) // 2

    return macs


def _attention_macs(inputs, outputs):
    """q kᵀ and p v of aten::scaled_dot_product_attention: q (…, N, d), k (…, M, d), v (…, M, e)."""
    q, _, v = (value.type().sizes() for value in inputs[:3])
    products = q[-2] * v[-2] * (q[-1] + v[-1])
    for n in q[:-2]:
        products *= n
    return products


def fvcore_handles() -> dict[str, Callable]:
    """Handles for ``fvcore.nn.FlopCountAnalysis`` by operator name: ``handle(inputs, outputs)`` -> multiply-accumulates (fvcore: 1 each).

    One for every lifeops operator, and one for torch's ``aten::scaled_dot_product_attention``, which fvcore counts as nothing::

        from fvcore.nn import FlopCountAnalysis

        model.eval()
        with torch.no_grad():
            analysis = FlopCountAnalysis(model, images).set_op_handle(**lifeops.fvcore_handles())
            print(analysis.total(), analysis.by_operator())

    ``eval()`` and ``no_grad()`` are needed around the counting, not the construction alone: where gradients are wanted a graph has
    an autograd Function (``prim::PythonOp.LifeQKV``) in place of the operator, which fvcore reports as unsupported and counts as 0.
    fvcore adds 5 per element of a layer norm and 2 of a batch norm; norms inside lifeops' operators are elementwise and count as 0.
    """
    handles = {f"lifeops::{op.name}": _handle(op) for op in registry.ops.values()}
    return {**handles, "aten::scaled_dot_product_attention": _attention_macs}
