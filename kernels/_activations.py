"""Activations in Triton: value and derivative on blocks in the accumulator's dtype."""

import triton
import triton.language as tl


@triton.jit
def _clamped(v, low: tl.constexpr, high: tl.constexpr):
    return tl.minimum(tl.maximum(v, low), high)


@triton.jit
def _lower_tail(a):
    """Φ(-a) = 2^Q(a), a >= 0, with the polynomial that csrc/cpu/activations.h tells more about: half the instructions of tl.erf."""
    q = a * -1.88478896e-06 + 2.7811071e-05
    q = q * a - 0.00013004143
    q = q * a - 0.000276501078
    q = q * a + 0.00725329714
    q = q * a - 0.0526358001
    q = q * a - 0.459157318
    q = q * a - 1.15111244
    return tl.exp2(q * a - 0.999999821)


@triton.jit
def _log_slope(a):
    """Q'(a) ln 2, the derivative of log Φ(-a)."""
    s = a * -1.04514893e-05 + 0.000134940157
    s = s * a - 0.00054082711
    s = s * a - 0.000958279707
    s = s * a + 0.0201104097
    s = s * a - 0.109453067
    s = s * a - 0.636527181
    return s * a - 0.797890365


@triton.jit
def activate(v, ACT: tl.constexpr):
    """f(v). h-swish is v * clamp(v/6 + 1/2, 0, 1): the clamp to [0, 1] is free in an FMA. NaN stays."""
    if ACT == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu6":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        v = tl.minimum(v, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "hardswish":
        v = v * _clamped(v * (1 / 6) + 0.5, 0.0, 1.0)
    elif ACT == "gelu":
        if v.dtype == tl.float64:
            v = v * (0.5 + 0.5 * tl.erf(v * 0.7071067811865476))
        else:
            t = _lower_tail(tl.abs(v))
            v = v * tl.where(v < 0, t, 1.0 - t)
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
    if ACT == "relu":
        d = tl.where(v <= 0, 0.0, 1.0).to(v.dtype)  # 1 at NaN
    elif ACT == "relu6":
        d = tl.where((v > 0) & (v < 6), 1.0, 0.0).to(v.dtype)
    elif ACT == "hardswish":
        d = tl.where(v <= -3, 0.0, tl.where(v >= 3, 1.0, v * (1 / 3) + 0.5)).to(v.dtype)
    elif ACT == "gelu":
        if v.dtype == tl.float64:
            d = 0.5 + 0.5 * tl.erf(v * 0.7071067811865476) + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
        else:
            t = _lower_tail(tl.abs(v))
            t += tl.abs(v) * t * _log_slope(tl.minimum(tl.abs(v), 16.0))  # which would overflow where the tail is 0
            d = tl.where(v < 0, t, 1.0 - t)  # NaN at the infinities, as torch's
    return d
