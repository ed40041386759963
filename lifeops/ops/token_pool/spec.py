"""token_pool: pooling over the patch tokens of a sequence; prefix tokens bypass it.

    max    y[b, P + r*W' + q, c] = max of x[b, P + u*W + v, c]      over the window's u in [r*sh - ph, r*sh - ph + Kh), v alike, on the grid
    avg    y[b, P + r*W' + q, c] = sum of them / n

n counts the window's places on the grid, or with ``count_include_pad`` on the padded grid; the grid is geometry.conv_size's, with
``ceil_mode`` rounded up. NaN is larger than any number, and of equal numbers the first in row-major order receives the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lifeops import geometry, torchlib
from lifeops.arguments import check_choice, check_flags
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.full_precision import full_precision
from lifeops.ops.token_conv.spec import check_steps
from lifeops.ops.token_dwconv import spec as plain
from lifeops.ops.token_pool import samples as cases
from lifeops.registry import Op

NAME = "token_pool"
MODES = ("max", "avg")


class Problem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    mode: str
    C: int
    Kh: int
    Kw: int
    sh: int
    sw: int
    ph: int
    pw: int


# ------------------------------------------------------------------------------------------------ checks


def coarse(op, mode, Kh, Kw, H, W, sh, sw, ph, pw, ceil_mode, count_include_pad):
    """The coarse grid, everything checked."""
    check_choice(op, "mode", mode, MODES)
    check_flags(op, ceil_mode=ceil_mode, count_include_pad=count_include_pad)
    check_steps(op, (Kh, Kw), (sh, sw), (ph, pw))
    if 2 * ph > Kh or 2 * pw > Kw:
        raise ValueError(f"{op}: padding must be at most half of the kernel size {(Kh, Kw)}, got {(ph, pw)}")
    return geometry.filtered_grid(op, H, W, (Kh, Kw), (sh, sw), (ph, pw), ceil_mode)


def check(x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend):
    plain._check_prefix(NAME, prefix)
    plain._check_sequence(NAME, "x", x, H, W, P)
    coarse(NAME, mode, Kh, Kw, H, W, sh, sw, ph, pw, ceil_mode, count_include_pad)


def check_bwd(dy, x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend, op=f"{NAME}_bwd"):
    plain._check_prefix(op, prefix)
    small = coarse(op, mode, Kh, Kw, H, W, sh, sw, ph, pw, ceil_mode, count_include_pad)
    plain._check_sequence(op, "dy", dy, *small, plain._rows(H, W, P, prefix))
    if (x is None) is (mode == "max"):
        raise ValueError(f"{op}: x is what the largest are looked for in: mode 'max' takes it and no other")
    if x is not None:
        plain._check_sequence(op, "x", x, H, W, P)
        if (x.shape[0], x.shape[2], x.dtype, x.device) != (dy.shape[0], dy.shape[2], dy.dtype, dy.device):
            got = f"{tuple(x.shape)} {x.dtype} and {tuple(dy.shape)} {dy.dtype}"
            raise ValueError(f"{op}: x and dy must agree in B, C, dtype and device, got {got}")


# ------------------------------------------------------------------------------------------------ references


def largest(x, Kh, Kw, H, W, P, sh, sw, ph, pw, ceil_mode):
    """(values, places) of max pooling, (B, C, H', W') each; a place is u*W + v."""
    return F.max_pool2d(plain._to_map(x, H, W, P), (Kh, Kw), (sh, sw), (ph, pw), ceil_mode=ceil_mode, return_indices=True)


@full_precision
def reference(x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend):
    """torch's pooling of the map; averages in float32 (float64 for float64)."""
    B, C = x.shape[0], x.shape[2]
    if B * C * H * W == 0:
        h, w = geometry.filtered_grid(NAME, H, W, (Kh, Kw), (sh, sw), (ph, pw), ceil_mode)
        patches = x.new_empty((B, h * w, C))
    else:
        map_, window = plain._to_map(x, H, W, P), ((Kh, Kw), (sh, sw), (ph, pw), ceil_mode)
        if mode == "max":
            y = F.max_pool2d(map_, *window[:3], ceil_mode=ceil_mode)
        else:
            y = F.avg_pool2d(map_.to(accumulate_dtype(x.dtype)), *window, count_include_pad)
        patches = plain._to_tokens(y).to(x.dtype)
    return plain._with_prefix(patches, x, P, prefix)


@full_precision
def reference_bwd(dy, x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend):
    B, C, rows = dy.shape[0], dy.shape[2], plain._rows(H, W, P, prefix)
    if B * C * H * W == 0:
        patches = dy.new_zeros((B, H * W, C))
    else:
        h, w = geometry.filtered_grid(NAME, H, W, (Kh, Kw), (sh, sw), (ph, pw), ceil_mode)
        wide, window = plain._to_map(dy, h, w, rows).to(accumulate_dtype(dy.dtype)), ((Kh, Kw), (sh, sw), (ph, pw))
        if mode == "max":
            places = largest(x, Kh, Kw, H, W, P, sh, sw, ph, pw, ceil_mode)[1].flatten(2)
            dx = wide.new_zeros((B, C, H * W)).scatter_add_(2, places, wide.flatten(2)).unflatten(2, (H, W))
        else:
            like = wide.new_empty((B, C, H, W))
            dx = torch.ops.aten.avg_pool2d_backward(wide, like, *window, ceil_mode, count_include_pad, None)
        patches = plain._to_tokens(dx).to(dy.dtype)
    return plain._with_prefix(patches, dy, P, "keep" if prefix == "keep" else "zero")


# ------------------------------------------------------------------------------------------------ fakes, costs


def fake(x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, *rest):
    h, w = geometry.filtered_grid(NAME, H, W, (Kh, Kw), (sh, sw), (ph, pw), ceil_mode)
    return x.new_empty((x.shape[0], plain._rows(h, w, P, prefix) + h * w, x.shape[2]))


def fake_bwd(dy, x, mode, Kh, Kw, H, W, P, *rest):
    return dy.new_empty((dy.shape[0], P + H * W, dy.shape[2]))


WINDOW = (
    "str mode, SymInt Kh, SymInt Kw, SymInt H, SymInt W, SymInt P, SymInt sh, SymInt sw, SymInt ph, SymInt pw, str prefix,"
    " bool ceil_mode, bool count_include_pad, str backend"
)

fwd_op = Op(
    NAME,
    f"{NAME}(Tensor x, {WINDOW}) -> Tensor",
    reference,
    check,
    fake,
    problem=lambda x, mode, Kh, Kw, H, W, P, *steps: Problem(x.device, x.dtype, mode, x.shape[2], Kh, Kw, *steps[:4]),
    flops=lambda *shapes: 0,  # as torch's FLOP counter has it
    samples=cases.samples,
    make=cases.make_fwd,
    exact=lambda s: s.mode == "max",
    is_empty=lambda x, mode, Kh, Kw, H, W, *rest: plain._empty(x, H, W),
)
bwd_op = Op(
    f"{NAME}_bwd",
    f"{NAME}_bwd(Tensor dy, Tensor? x, {WINDOW}) -> Tensor",
    reference_bwd,
    check_bwd,
    fake_bwd,
    problem=lambda dy, x, mode, Kh, Kw, H, W, P, *steps: Problem(dy.device, dy.dtype, mode, dy.shape[2], Kh, Kw, *steps[:4]),
    flops=lambda *shapes: 0,
    samples=cases.samples,
    make=cases.make_bwd,
    exact=lambda s: s.mode == "max",
    is_empty=lambda dy, x, mode, Kh, Kw, H, W, *rest: plain._empty(dy, H, W),
)
for op in (fwd_op, bwd_op):
    torchlib.install(op)
