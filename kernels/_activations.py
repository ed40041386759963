"""Activations in Triton: value and derivative on blocks in the accumulator's dtype."""

import triton
import triton.language as tl


@triton.jit
def _clamped(v, low: tl.constexpr, high: tl.constexpr):
    return tl.minimum(tl.maximum(v, low), high)


@triton.jit
def activate(v, ACT: tl.constexpr):
    """f(v). h-swish is v * clamp(v/6 + 1/2, 0, 1): the clamp to [0, 1] is free in an FMA."""
    if ACT == "relu6":
        v = _clamped(v, 0.0, 6.0)
    elif ACT == "hardswish":
        v = v * _clamped(v * (1 / 6) + 0.5, 0.0, 1.0)
    elif ACT == "gelu":
        v = v * (0.5 + 0.5 * tl.erf(v * 0.7071067811865476))
    return v


@triton.jit
def through(x, scale, shift, ACT: tl.constexpr):
    """A prologue: f(scale x + shift), or with gelu_first scale gelu(x) + shift."""
    if ACT == "gelu_first":
        return scale * activate(x, "gelu") + shift
    else:
        return activate(scale * x + shift, ACT)


@triton.jit
def derivative(v, ACT: tl.constexpr):
    """f'(v), with torch's choices at the kinks."""
    d = tl.full(v.shape, 1.0, v.dtype)
    if ACT == "relu6":
        d = tl.where((v > 0) & (v < 6), 1.0, 0.0).to(v.dtype)
    elif ACT == "hardswish":
        d = tl.where(v <= -3, 0.0, tl.where(v < 3, v * (1 / 3) + 0.5, 1.0)).to(v.dtype)
    elif ACT == "gelu":
        d = 0.5 + 0.5 * tl.erf(v * 0.7071067811865476) + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
    return d
