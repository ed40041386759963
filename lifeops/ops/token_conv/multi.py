"""``lifeops.token_dwconv_multi``: several filters on one input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lifeops.arguments import check_tensor, got, under
from lifeops.geometry import pair
from lifeops.ops.token_dwconv.public import token_dwconv
from lifeops.options import Backend, Pair, Prefix


def token_dwconv_multi(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None, *, grid: tuple[int, int],
    num_prefix_tokens: int = 0, prefix: Prefix = "keep", strides: int | Sequence[Pair] = 1,
    paddings: int | Sequence[Pair | None] | None = None, backend: Backend | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Several depth-wise convolutions of one input: CvT's q, k and v.

    ``tuple(token_dwconv(x, w, b, stride=s, padding=p, …) for w, b, s, p in zip(weights, biases, strides, paddings))``

    Args:
        x, grid, num_prefix_tokens, prefix, backend: as of :func:`lifeops.token_dwconv`, the same for all.
        weights: a sequence of filters, each as token_dwconv takes it; kernel sizes and multipliers may differ.
        biases: a sequence of as many, (C,) or None each, or None.
        strides, paddings: one for all (an int, or None: K // 2), or a sequence with an entry for each filter (an int, a pair or None).

    Returns a tuple of as many results. Raises ValueError, TypeError: as token_dwconv.
    """
    op = "token_dwconv_multi"
    if not isinstance(weights, (tuple, list)) or not weights:
        raise TypeError(f"{op}: weights must be a sequence of tensors, got {got(weights)}")
    options = {"biases": biases, "strides": strides, "paddings": paddings}
    for name, value in options.items():
        options[name] = value if isinstance(value, (tuple, list)) else [value] * len(weights)
        if len(options[name]) != len(weights):
            raise ValueError(f"{op}: {name} must have an entry for each of the {len(weights)} filters, got {got(value)}")
    place = {"grid": grid, "num_prefix_tokens": num_prefix_tokens, "prefix": prefix, "backend": backend}
    out = []
    for i, (w, b, s, p) in enumerate(zip(weights, *options.values(), strict=True)):
        check_tensor(op, f"weights[{i}]", w)
        check_tensor(op, f"biases[{i}]", b, optional=True)
        stride = pair(op, f"strides[{i}]", s, 1)
        padding = None if p is None else pair(op, f"paddings[{i}]", p, 0)
        with under(f"{op}: weights[{i}]"):
            out.append(token_dwconv(x, w, b, stride=stride, padding=padding, **place))
    return tuple(out)
