"""The compiled strided convolution, its adjoint and weight gradient, and pooling, as native.py registers them."""

from __future__ import annotations

import functools

import torch

from lifeops import geometry
from lifeops.native_args import contiguous, isa, mode, rows

_PLACE = "int H, int W, int out_h, int out_w, int sh, int sw, int ph, int pw"
SCHEMAS = {
    "token_conv": f"lifeops_native::token_conv(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y, {_PLACE}, int x_prefix, int y_prefix,"
    " int prefix_mode, bool transpose, int isa) -> ()",
    "token_conv_grad_weight": f"lifeops_native::token_conv_grad_weight(Tensor dy, Tensor x, Tensor(a!) dw, Tensor(b!)? db, {_PLACE},"
    " int dy_prefix, int x_prefix, int isa) -> ()",
    "token_pool": f"lifeops_native::token_pool(Tensor x, Tensor? pooled, Tensor(a!) y, bool max, int Kh, int Kw, {_PLACE}, int x_prefix,"
    " int y_prefix, int prefix_mode, bool count_include_pad, bool backward, int isa) -> ()",
}


@functools.lru_cache(maxsize=1024)
def _place(op, kernel, H, W, sh, sw, ph, pw, ceil_mode=False):
    """H, W, H', W' and the steps, and H'*W'."""
    small = geometry.filtered_grid(op, H, W, kernel, (sh, sw), (ph, pw), ceil_mode)
    return (H, W, *small, sh, sw, ph, pw), small[0] * small[1]


def _strided(x, weight, bias, H, W, P, sh, sw, ph, pw, prefix, backend):
    place, patches = _place("token_dwconv_strided", weight.shape[2:], H, W, sh, sw, ph, pw)
    kept = rows(P, prefix)
    y = x.new_empty((x.shape[0], kept + patches, weight.shape[0]))
    torch.ops.lifeops_native.token_conv(x, contiguous(weight), contiguous(bias), y, *place, P, kept, mode(prefix), False, isa())
    return y


def _transpose(x, weight, bias, m, H, W, P, sh, sw, ph, pw, prefix, backend):
    place, _ = _place("token_dwconv_transpose", weight.shape[2:], H, W, sh, sw, ph, pw)
    y = x.new_empty((x.shape[0], P + H * W, x.shape[2] // m))
    torch.ops.lifeops_native.token_conv(x, contiguous(weight), contiguous(bias), y, *place, rows(P, prefix), P, mode(prefix), True, isa())
    return y


def _strided_bwd_dw(dy, x, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, weight_dtype, bias_dtype, backend):
    place, _ = _place("token_dwconv_strided_bwd_dw", (Kh, Kw), H, W, sh, sw, ph, pw)
    dw = x.new_empty((dy.shape[2], 1, Kh, Kw), dtype=weight_dtype)
    db = None if bias_dtype is None else x.new_empty((dy.shape[2],), dtype=bias_dtype)
    torch.ops.lifeops_native.token_conv_grad_weight(dy, x, dw, db, *place, rows(P, prefix), P, isa())
    return dw, x.new_empty((0,)) if db is None else db


def _pool(x, mode_, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend):
    place, patches = _place("token_pool", (Kh, Kw), H, W, sh, sw, ph, pw, ceil_mode)
    kept = rows(P, prefix)
    y = x.new_empty((x.shape[0], kept + patches, x.shape[2]))
    window = mode_ == "max", Kh, Kw, *place
    torch.ops.lifeops_native.token_pool(x, None, y, *window, P, kept, mode(prefix), count_include_pad, False, isa())
    return y


def _pool_bwd(dy, x, mode_, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend):
    place, _ = _place("token_pool_bwd", (Kh, Kw), H, W, sh, sw, ph, pw, ceil_mode)
    dx = dy.new_empty((dy.shape[0], P + H * W, dy.shape[2]))
    window = mode_ == "max", Kh, Kw, *place
    torch.ops.lifeops_native.token_pool(dy, x, dx, *window, rows(P, prefix), P, mode(prefix), count_include_pad, True, isa())
    return dx


IMPLEMENTATIONS = {  # op: (native operator, function)
    "token_dwconv_strided": ("token_conv", _strided),
    "token_dwconv_transpose": ("token_conv", _transpose),
    "token_dwconv_strided_bwd_dw": ("token_conv_grad_weight", _strided_bwd_dw),
    "token_pool": ("token_pool", _pool),
    "token_pool_bwd": ("token_pool", _pool_bwd),
}
