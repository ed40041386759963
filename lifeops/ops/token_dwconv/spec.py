"""token_dwconv: depth-wise convolution over the patch tokens of a sequence; prefix tokens bypass it.

    y[b, P + r*W + q, c] = bias[c] + residual[b, P + r*W + q, c]
                           + sum_{i,j < K} weight[c, 0, i, j] * x[b, P + (r + i - K//2)*W + (q + j - K//2), c]

with zero padding outside the grid. Prefix rows (the first P) are copied ("keep"), zero ("zero") or absent ("drop").
Because the map is bilinear in x and weight, its three gradients close over the same four ops:

    dX = conv of dy with the mirrored filter      dW[c, i, j] = sum_{b,r,q} dy[b, r, q, c] * x[b, r + i - K//2, q + j - K//2, c]
    db[c] = sum_{b,r,q} dy[b, r, q, c]            d(residual) = dy
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops import geometry, torchlib
from lifeops.arguments import FLOATS, check_choice, check_floating
from lifeops.ops.full_precision import full_precision
from lifeops.ops.token_dwconv import samples as cases
from lifeops.registry import Op

NAME = "token_dwconv"
DTYPES = FLOATS
PREFIX = ("keep", "zero", "drop")


class Problem(NamedTuple):
    """What the choice of a backend may depend on. ``weight_dtype`` is None and K is 0 for the bias gradient."""

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    C: int
    K: int


# ------------------------------------------------------------------------------------------------ checks


def check_rows(op, name, t):
    """(B, N, C), floating point."""
    if t.dim() != 3:
        raise ValueError(f"{op}: {name} must have shape (B, N, C), got {tuple(t.shape)}")
    check_floating(op, name, t)


def _check_sequence(op, name, t, H, W, P):
    check_rows(op, name, t)
    geometry.check_tokens(op, name, t.shape[1], H, W, P)


def _check_weight(op, weight, x):
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"{op}: weight must have shape (C, 1, K, K) as in nn.Conv2d(groups=C), got {tuple(weight.shape)}")
    if weight.shape[0] != x.shape[2]:
        raise ValueError(f"{op}: weight.shape[0] must be the {x.shape[2]} channels of the sequence, got {weight.shape[0]}")
    if weight.shape[2] % 2 == 0:
        raise ValueError(f"{op}: the kernel size must be odd, got K = {weight.shape[2]}")
    _check_companion(op, "weight", weight, x)


def _check_companion(op, name, t, x):
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on the sequence's device {x.device}, got {t.device}")
    check_floating(op, name, t)


def _check_prefix(op, prefix):
    check_choice(op, "prefix", prefix, PREFIX)


def _rows(H, W, P, prefix):
    """Prefix rows of the output side."""
    return 0 if prefix == "drop" else P


def check(x, weight, bias, residual, H, W, P, prefix, backend, op=NAME):
    _check_prefix(op, prefix)
    _check_sequence(op, "x", x, H, W, P)
    _check_weight(op, weight, x)
    if bias is not None:
        if bias.shape != x.shape[2:]:
            raise ValueError(f"{op}: bias must have shape ({x.shape[2]},), got {tuple(bias.shape)}")
        _check_companion(op, "bias", bias, x)
    if residual is not None:
        expected = (x.shape[0], _rows(H, W, P, prefix) + H * W, x.shape[2])
        if tuple(residual.shape) != expected:
            raise ValueError(f"{op}: residual must have the output's shape {expected}, got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:
            raise TypeError(f"{op}: residual.dtype must be x.dtype = {x.dtype}, got {residual.dtype}")
        _check_companion(op, "residual", residual, x)


def check_bwd_dx(dy, weight, H, W, P, prefix, backend, op=f"{NAME}_bwd_dx"):
    _check_prefix(op, prefix)
    _check_sequence(op, "dy", dy, H, W, _rows(H, W, P, prefix))
    _check_weight(op, weight, dy)


def check_bwd_dw(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, backend, op=f"{NAME}_bwd_dw"):
    _check_prefix(op, prefix)
    _check_sequence(op, "dy", dy, H, W, _rows(H, W, P, prefix))
    _check_sequence(op, "x", x, H, W, P)
    _check_companion(op, "x", x, dy)
    if x.dtype != dy.dtype or x.shape[0] != dy.shape[0] or x.shape[2] != dy.shape[2]:
        raise ValueError(f"{op}: x and dy must agree in B, C and dtype, got {tuple(x.shape)} {x.dtype} and {tuple(dy.shape)} {dy.dtype}")
    if K % 2 == 0:
        raise ValueError(f"{op}: the kernel size must be odd, got K = {K}")


def check_bwd_db(dy, H, W, P, prefix, bias_dtype, backend):
    _check_prefix("token_dwconv_bwd_db", prefix)
    _check_sequence("token_dwconv_bwd_db", "dy", dy, H, W, _rows(H, W, P, prefix))


# ------------------------------------------------------------------------------------------------ references


def _to_map(t, H, W, P):
    """Patch rows of (B, P + H*W, C) as (B, C, H, W)."""
    return t[:, P:].transpose(1, 2).reshape(t.shape[0], t.shape[2], H, W)


def _to_tokens(y):
    return y.flatten(2).transpose(1, 2)


def _with_prefix(patches, rows, P, prefix):
    """``patches`` behind the prefix rows of ``rows``, behind zeros, or alone."""
    if prefix == "drop":
        return patches.contiguous()
    head = rows[:, :P] if prefix == "keep" else patches.new_zeros(patches.shape[0], P, patches.shape[2])
    return torch.cat((head, patches), 1)


def _convolution(map_, weight, bias=None):
    return torch.nn.functional.conv2d(map_, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


@full_precision
def reference(x, weight, bias, residual, H, W, P, prefix, backend):
    """The formula with torch's conv2d, computed in the wider of x's and the weight's dtype."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    patches = x.new_empty((x.shape[0], 0, x.shape[2]))
    if x.shape[0] * H * W * x.shape[2]:
        map_ = _to_map(x, H, W, P).to(dtype)
        y = _convolution(map_, weight.to(dtype), None if bias is None else bias.to(dtype))
        patches = _to_tokens(y).to(x.dtype)
    elif H * W:
        patches = x.new_empty((x.shape[0], H * W, x.shape[2]))
    y = _with_prefix(patches, x, P, prefix)
    return y if residual is None else y + residual


@full_precision
def reference_bwd_dx(dy, weight, H, W, P, prefix, backend):
    dtype = torch.promote_types(dy.dtype, weight.dtype)
    rows = _rows(H, W, P, prefix)
    patches = dy[:, rows:]
    if patches.numel():
        dx = _convolution(_to_map(dy, H, W, rows).to(dtype), weight.to(dtype).flip(-1, -2))
        patches = _to_tokens(dx).to(dy.dtype)
    return _with_prefix(patches, dy, P, "keep" if prefix == "keep" else "zero")


@full_precision
def reference_bwd_dw(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, backend):
    C, rows = x.shape[2], _rows(H, W, P, prefix)
    dtype = torch.promote_types(x.dtype, weight_dtype)
    if x.shape[0] * H * W * C == 0:
        dw = x.new_zeros((C, 1, K, K), dtype=weight_dtype)
    else:
        args = _to_map(dy, H, W, rows).to(dtype), _to_map(x, H, W, P).to(dtype), x.new_empty((C, 1, K, K), dtype=dtype)
        conv = (None, [1, 1], [K // 2, K // 2], [1, 1], False, [0, 0], C, [False, True, False])
        dw = torch.ops.aten.convolution_backward(*args, *conv)[1].to(weight_dtype).contiguous()
    if bias_dtype is None:
        return dw, x.new_empty((0,))
    return dw, reference_bwd_db(dy, H, W, P, prefix, bias_dtype, backend)


def reference_bwd_db(dy, H, W, P, prefix, bias_dtype, backend):
    accumulate = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy[:, _rows(H, W, P, prefix) :].sum((0, 1), dtype=accumulate).to(bias_dtype)


# ------------------------------------------------------------------------------------------------ fakes, costs


def fake(x, weight, bias, residual, H, W, P, prefix, backend):
    return x.new_empty((x.shape[0], _rows(H, W, P, prefix) + H * W, x.shape[2]))


def fake_bwd_dx(dy, weight, H, W, P, prefix, backend):
    return dy.new_empty((dy.shape[0], P + H * W, dy.shape[2]))


def fake_bwd_dw(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, backend):
    dw = x.new_empty((x.shape[2], 1, K, K), dtype=weight_dtype)
    return dw, x.new_empty((0,)) if bias_dtype is None else x.new_empty((x.shape[2],), dtype=bias_dtype)


def fake_bwd_db(dy, H, W, P, prefix, bias_dtype, backend):
    return dy.new_empty((dy.shape[2],), dtype=bias_dtype)


def _size(shape):
    n = 1
    for s in shape:
        n *= s
    return n


def flops(x, weight, bias, residual, H, W, P, *rest):
    """2 K² per patch element, padded taps included, as torch's FLOP counter counts conv2d. Shapes, not tensors."""
    return 2 * _size(weight) * x[0] * H * W


def flops_bwd_dx(dy, weight, H, W, *rest):
    return 2 * _size(weight) * dy[0] * H * W


def flops_bwd_dw(dy, x, K, H, W, *rest):
    return 2 * x[2] * K * K * x[0] * H * W


def _empty(x, H, W):
    return x.shape[0] * H * W * x.shape[2] == 0


GEOMETRY = "SymInt H, SymInt W, SymInt P, str prefix"

fwd_op = Op(
    NAME,
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {GEOMETRY}, str backend) -> Tensor",
    reference,
    check,
    fake,
    problem=lambda x, weight, *rest: Problem(x.device, x.dtype, weight.dtype, x.shape[2], weight.shape[2]),
    flops=flops,
    samples=cases.samples,
    make=cases.make_fwd,
    is_empty=lambda x, weight, bias, residual, H, W, *rest: _empty(x, H, W),
)
bwd_dx_op = Op(
    f"{NAME}_bwd_dx",
    f"{NAME}_bwd_dx(Tensor dy, Tensor weight, {GEOMETRY}, str backend) -> Tensor",
    reference_bwd_dx,
    check_bwd_dx,
    fake_bwd_dx,
    problem=lambda dy, weight, *rest: Problem(dy.device, dy.dtype, weight.dtype, dy.shape[2], weight.shape[2]),
    flops=flops_bwd_dx,
    samples=cases.samples,
    make=cases.make_bwd_dx,
    is_empty=lambda dy, weight, H, W, *rest: _empty(dy, H, W),
)
bwd_dw_op = Op(
    f"{NAME}_bwd_dw",
    f"{NAME}_bwd_dw(Tensor dy, Tensor x, SymInt K, {GEOMETRY}, ScalarType weight_dtype, ScalarType? bias_dtype,"
    " str backend) -> (Tensor, Tensor)",
    reference_bwd_dw,
    check_bwd_dw,
    fake_bwd_dw,
    problem=lambda dy, x, K, H, W, P, prefix, weight_dtype, *rest: Problem(x.device, x.dtype, weight_dtype, x.shape[2], K),
    flops=flops_bwd_dw,
    samples=cases.samples,
    make=cases.make_bwd_dw,
    reduces=lambda sample: sample.B * sample.H * sample.W,
    is_empty=lambda dy, x, K, H, W, *rest: _empty(x, H, W),
)
bwd_db_op = Op(
    f"{NAME}_bwd_db",
    f"{NAME}_bwd_db(Tensor dy, {GEOMETRY}, ScalarType bias_dtype, str backend) -> Tensor",
    reference_bwd_db,
    check_bwd_db,
    fake_bwd_db,
    problem=lambda dy, *rest: Problem(dy.device, dy.dtype, None, dy.shape[2], 0),
    flops=lambda *shapes: 0,
    samples=cases.samples,
    make=cases.make_bwd_db,
    reduces=lambda sample: sample.B * sample.H * sample.W,
    is_empty=lambda dy, H, W, *rest: _empty(dy, H, W),
)
for op in (fwd_op, bwd_dx_op, bwd_dw_op, bwd_db_op):
    torchlib.install(op)
