"""The general depth-wise convolution over patch tokens, its transpose and its weight gradient; prefix tokens bypass them.

With strides (sh, sw), paddings (ph, pw), a kernel Kh x Kw and a channel multiplier m, from the fine grid H x W to the coarse one
H' = floor((H + 2 ph - Kh) / sh) + 1, W' alike:

    strided     y[b, P + r*W' + q, c*m + l] = bias[c*m + l] + sum_{i,j} weight[c*m + l, 0, i, j] * x[b, P + u*W + v, c]
    transpose   x[b, P + u*W + v, c] = bias[c] + sum_{l,i,j} weight[c*m + l, 0, i, j] * y[b, P + r*W' + q, c*m + l]
    bwd_dw      dw[c*m + l, 0, i, j] = sum_{b,r,q} dy[b, P + r*W' + q, c*m + l] * x[b, P + u*W + v, c]

    where u = r*sh + i - ph and v = q*sw + j - pw

with zeros outside the grids. H and W are the fine grid in all three. ``prefix`` is that of the strided map, and the transpose is its
adjoint: "keep" copies the P rows both ways, "zero" writes zeros both ways, "drop" leaves them out of y and writes zeros into x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops import geometry, torchlib
from lifeops.ops.full_precision import full_precision
from lifeops.ops.token_conv import samples as cases
from lifeops.ops.token_dwconv import spec as plain
from lifeops.registry import Op

NAME = "token_dwconv"
STRIDED, TRANSPOSE, BWD_DW = f"{NAME}_strided", f"{NAME}_transpose", f"{NAME}_strided_bwd_dw"


class Problem(NamedTuple):
    """What the choice of a backend may depend on. C: channels of the fine side."""

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    C: int
    m: int
    Kh: int
    Kw: int
    sh: int
    sw: int
    ph: int
    pw: int


# ------------------------------------------------------------------------------------------------ checks


def check_steps(op, kernel, stride, padding):
    for name, values, least in (("kernel size", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        if min(values) < least:
            raise ValueError(f"{op}: the {name} must be at least {least}, got {tuple(values)}")


def coarse(op, H, W, kernel, sh, sw, ph, pw):
    """The coarse grid, everything checked."""
    check_steps(op, kernel, (sh, sw), (ph, pw))
    return geometry.filtered_grid(op, H, W, kernel, (sh, sw), (ph, pw))


def _check_multiplied(op, m, P, prefix):
    plain._check_prefix(op, prefix)
    if prefix == "keep" and m != 1 and P != 0:
        raise ValueError(
            f'{op}: prefix="keep" copies rows, which needs as many channels on both sides, got a channel multiplier of {m}'
            ' (prefix="zero" or "drop", or num_prefix_tokens=0)'
        )


def _check_weight(op, weight, C):
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f"{op}: weight must have shape (m*C, 1, Kh, Kw) as in nn.Conv2d(groups=C), got {tuple(weight.shape)}")
    if C and (weight.shape[0] < C or weight.shape[0] % C):
        raise ValueError(f"{op}: weight.shape[0] must be the {C} channels of the sequence or a multiple of them, got {weight.shape[0]}")


def _check_bias(op, bias, channels, x):
    if bias is not None:
        if tuple(bias.shape) != (channels,):
            raise ValueError(f"{op}: bias must have shape ({channels},), got {tuple(bias.shape)}")
        plain._check_companion(op, "bias", bias, x)


def check(x, weight, bias, H, W, P, sh, sw, ph, pw, prefix, backend, op=STRIDED):
    plain._check_sequence(op, "x", x, H, W, P)
    _check_weight(op, weight, x.shape[2])
    plain._check_companion(op, "weight", weight, x)
    _check_multiplied(op, _multiplier(weight.shape[0], x.shape[2]), P, prefix)
    _check_bias(op, bias, weight.shape[0], x)
    coarse(op, H, W, weight.shape[2:], sh, sw, ph, pw)


def check_transpose(x, weight, bias, m, H, W, P, sh, sw, ph, pw, prefix, backend, op=TRANSPOSE):
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f"{op}: weight must have shape (m*C, 1, Kh, Kw) as in nn.ConvTranspose2d(groups=C), got {tuple(weight.shape)}")
    small = coarse(op, H, W, weight.shape[2:], sh, sw, ph, pw)
    plain._check_sequence(op, "x", x, *small, plain._rows(H, W, P, prefix))
    plain._check_companion(op, "weight", weight, x)
    if weight.shape[0] != x.shape[2]:
        raise ValueError(f"{op}: weight.shape[0] must be the {x.shape[2]} channels of the sequence, got {weight.shape[0]}")
    if m < 1 or x.shape[2] % m:
        raise ValueError(f"{op}: the channel multiplier must divide the {x.shape[2]} channels of the sequence, got {m}")
    _check_multiplied(op, m, P, prefix)
    _check_bias(op, bias, x.shape[2] // m, x)


def check_bwd_dw(dy, x, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, weight_dtype, bias_dtype, backend, op=BWD_DW):
    small = coarse(op, H, W, (Kh, Kw), sh, sw, ph, pw)
    plain._check_sequence(op, "dy", dy, *small, plain._rows(H, W, P, prefix))
    plain._check_sequence(op, "x", x, H, W, P)
    plain._check_companion(op, "x", x, dy)
    fits = dy.shape[2] == x.shape[2] if not x.shape[2] else dy.shape[2] >= x.shape[2] and dy.shape[2] % x.shape[2] == 0
    if x.dtype != dy.dtype or x.shape[0] != dy.shape[0] or not fits:
        got = f"{tuple(x.shape)} {x.dtype} and {tuple(dy.shape)} {dy.dtype}"
        raise ValueError(f"{op}: x (B, N, C) and dy (B, N', m*C) must agree in B, C and dtype, got {got}")
    _check_multiplied(op, _multiplier(dy.shape[2], x.shape[2]), P, prefix)


def _multiplier(many, few):
    return many // few if few else 1


# ------------------------------------------------------------------------------------------------ references


def _spare(H, W, kernel, sh, sw, ph, pw):
    """Rows and columns at the end of the fine grid that no window reaches: torch's ``output_padding``."""
    small = geometry.filtered_grid(TRANSPOSE, H, W, kernel, (sh, sw), (ph, pw))
    steps = zip((H, W), small, kernel, (sh, sw), (ph, pw), strict=True)
    return small, [size - ((few - 1) * step - 2 * pad + taps) for size, few, taps, step, pad in steps]


@full_precision
def reference(x, weight, bias, H, W, P, sh, sw, ph, pw, prefix, backend):
    """The formula with torch's conv2d, computed in the wider of x's and the weight's dtype."""
    B, C = x.shape[0], x.shape[2]
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if B * C * H * W == 0:
        h, w = geometry.filtered_grid(STRIDED, H, W, weight.shape[2:], (sh, sw), (ph, pw))
        patches = x.new_empty((B, h * w, weight.shape[0]))
    else:
        map_, bias = plain._to_map(x, H, W, P).to(dtype), None if bias is None else bias.to(dtype)
        y = torch.nn.functional.conv2d(map_, weight.to(dtype), bias, (sh, sw), (ph, pw), groups=C)
        patches = plain._to_tokens(y).to(x.dtype)
    return plain._with_prefix(patches, x, P, "zero" if prefix == "keep" and weight.shape[0] != C else prefix)  # then there are none


@full_precision
def reference_transpose(x, weight, bias, m, H, W, P, sh, sw, ph, pw, prefix, backend):
    B, C, rows = x.shape[0], x.shape[2] // m, plain._rows(H, W, P, prefix)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)  # torch adds taps up in half precision
    if B * C * H * W == 0:
        patches = x.new_empty((B, H * W, C))
    else:
        (h, w), spare = _spare(H, W, weight.shape[2:], sh, sw, ph, pw)
        map_, bias = plain._to_map(x, h, w, rows).to(dtype), None if bias is None else bias.to(dtype)
        y = torch.nn.functional.conv_transpose2d(map_, weight.to(dtype), bias, (sh, sw), (ph, pw), spare, groups=C)
        patches = plain._to_tokens(y).to(x.dtype)
    if prefix == "keep" and m == 1:
        return plain._with_prefix(patches, x, P, "keep")
    return torch.cat((patches.new_zeros(B, P, C), patches), 1)


@full_precision
def reference_bwd_dw(dy, x, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, weight_dtype, bias_dtype, backend):
    C, many, rows = x.shape[2], dy.shape[2], plain._rows(H, W, P, prefix)
    # bfloat16's is not written where a tap sees padding alone: findings/bf16_depthwise_weight_gradient.sh
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight_dtype), torch.float32)
    h, w = geometry.filtered_grid(BWD_DW, H, W, (Kh, Kw), (sh, sw), (ph, pw))
    if x.shape[0] * H * W * C == 0:
        dw = x.new_zeros((many, 1, Kh, Kw), dtype=weight_dtype)
    else:
        maps = plain._to_map(dy, h, w, rows).to(dtype), plain._to_map(x, H, W, P).to(dtype)
        conv = (None, [sh, sw], [ph, pw], [1, 1], False, [0, 0], C, [False, True, False])
        dw = torch.ops.aten.convolution_backward(*maps, x.new_empty((many, 1, Kh, Kw), dtype=dtype), *conv)[1]
        dw = dw.to(weight_dtype).contiguous()
    if bias_dtype is None:
        return dw, x.new_empty((0,))
    return dw, plain.reference_bwd_db(dy, h, w, P, prefix, bias_dtype, backend)


# ------------------------------------------------------------------------------------------------ fakes, costs


def fake(x, weight, bias, H, W, P, sh, sw, ph, pw, prefix, backend):
    h, w = geometry.filtered_grid(STRIDED, H, W, weight.shape[2:], (sh, sw), (ph, pw))
    return x.new_empty((x.shape[0], plain._rows(h, w, P, prefix) + h * w, weight.shape[0]))


def fake_transpose(x, weight, bias, m, H, W, P, *rest):
    return x.new_empty((x.shape[0], P + H * W, x.shape[2] // m))


def fake_bwd_dw(dy, x, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, weight_dtype, bias_dtype, backend):
    dw = x.new_empty((dy.shape[2], 1, Kh, Kw), dtype=weight_dtype)
    return dw, x.new_empty((0,)) if bias_dtype is None else x.new_empty((dy.shape[2],), dtype=bias_dtype)


def _places(H, W, kernel, sh, sw, ph, pw):
    h, w = geometry.filtered_grid(STRIDED, H, W, kernel, (sh, sw), (ph, pw))
    return h * w


def flops(x, weight, bias, H, W, P, sh, sw, ph, pw, *rest):
    """2 Kh Kw per coarse place and channel, padded taps included, as torch's FLOP counter counts conv2d. Shapes, not tensors."""
    return 2 * plain._size(weight) * x[0] * _places(H, W, weight[2:], sh, sw, ph, pw)


def flops_transpose(x, weight, bias, m, H, W, P, sh, sw, ph, pw, *rest):
    return 2 * plain._size(weight) * x[0] * _places(H, W, weight[2:], sh, sw, ph, pw)


def flops_bwd_dw(dy, x, Kh, Kw, H, W, P, sh, sw, ph, pw, *rest):
    return 2 * dy[2] * Kh * Kw * x[0] * _places(H, W, (Kh, Kw), sh, sw, ph, pw)


def _problem(t, weight_dtype, C, m, kernel, steps):
    return Problem(t.device, t.dtype, weight_dtype, C, m, *kernel, *steps)


GEOMETRY = "SymInt H, SymInt W, SymInt P, SymInt sh, SymInt sw, SymInt ph, SymInt pw, str prefix"


def _reduces(sample):
    h, w = geometry.filtered_grid(BWD_DW, sample.H, sample.W, (sample.Kh, sample.Kw), (sample.sh, sample.sw), (sample.ph, sample.pw))
    return sample.B * h * w


strided_op = Op(
    STRIDED,
    f"{STRIDED}(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}, str backend) -> Tensor",
    reference,
    check,
    fake,
    problem=lambda x, w, bias, H, W, P, sh, sw, ph, pw, *rest: _problem(
        x, w.dtype, x.shape[2], _multiplier(w.shape[0], x.shape[2]), w.shape[2:], (sh, sw, ph, pw)
    ),
    flops=flops,
    samples=cases.samples,
    make=cases.make_strided,
    is_empty=lambda x, weight, bias, H, W, *rest: plain._empty(x, H, W),
)
transpose_op = Op(
    TRANSPOSE,
    f"{TRANSPOSE}(Tensor x, Tensor weight, Tensor? bias, SymInt m, {GEOMETRY}, str backend) -> Tensor",
    reference_transpose,
    check_transpose,
    fake_transpose,
    problem=lambda x, w, bias, m, H, W, P, sh, sw, ph, pw, *rest: _problem(x, w.dtype, x.shape[2] // m, m, w.shape[2:], (sh, sw, ph, pw)),
    flops=flops_transpose,
    samples=cases.samples,
    make=cases.make_transpose,
    is_empty=lambda x, weight, bias, m, H, W, *rest: plain._empty(x, H, W),
)
bwd_dw_op = Op(
    BWD_DW,
    f"{BWD_DW}(Tensor dy, Tensor x, SymInt Kh, SymInt Kw, {GEOMETRY}, ScalarType weight_dtype, ScalarType? bias_dtype,"
    " str backend) -> (Tensor, Tensor)",
    reference_bwd_dw,
    check_bwd_dw,
    fake_bwd_dw,
    problem=lambda dy, x, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, weight_dtype, *rest: _problem(
        x, weight_dtype, x.shape[2], _multiplier(dy.shape[2], x.shape[2]), (Kh, Kw), (sh, sw, ph, pw)
    ),
    flops=flops_bwd_dw,
    samples=cases.samples,
    make=cases.make_bwd_dw,
    reduces=_reduces,
    is_empty=lambda dy, x, Kh, Kw, H, W, *rest: plain._empty(x, H, W),
)
for op in (strided_op, transpose_op, bwd_dw_op):
    torchlib.install(op)
