"""What every operator must give, in plain float64 conv2d, softmax and linear, apart from the library (which is never imported here).

Each formula is run twice. ``Exact`` gives the values. ``Magnitude`` gives, for every element, the sum of the absolute values of all that
was added up on the way, with activations replaced by bounds on their slopes: n roundings of relative size eps move a result by at most
n * eps * magnitude, to first order. That is the tolerance of :mod:`fuzz.bounds`; nothing in it is guessed or measured.
"""

import math

import torch
import torch.nn.functional as F


def gelu(v):
    return torch.where(v == torch.inf, v, 0.5 * v * torch.erfc(-v * math.sqrt(0.5)))


VALUES = {
    "none": lambda v: v,
    "relu": F.relu,
    "relu6": lambda v: v.clamp(0, 6),
    "hardswish": lambda v: v * (v + 3).clamp(0, 6) / 6,
    "gelu": gelu,
}
SLOPES = {
    "none": torch.ones_like,
    "relu": lambda v: 1.0 - (v <= 0).double(),
    "relu6": lambda v: ((v > 0) & (v < 6)).double(),
    "hardswish": lambda v: torch.where(v <= -3, 0.0, torch.where(v >= 3, 1.0, v / 3 + 0.5)),
    "gelu": lambda v: 0.5 * torch.erfc(-v * math.sqrt(0.5)) + v * torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi),
}
KINKS = {"none": (), "relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3), "gelu": (), "gelu_first": ()}


class Exact:
    """The values."""

    size = staticmethod(lambda t: t)
    less = staticmethod(torch.sub)
    act = staticmethod(lambda v, act: VALUES[act](v))
    slope = staticmethod(lambda v, act: SLOPES[act](v))


class Magnitude:
    """Bounds: |f(v)| and |f(u) - f(v)| / |u - v| are at most 1.5 |v| and 1.5, slopes change by at most |u - v|."""

    size = staticmethod(lambda t: None if t is None else t.abs())
    less = staticmethod(torch.add)
    act = staticmethod(lambda v, act: v if act == "none" else 1.5 * v)
    slope = staticmethod(lambda v, act: torch.ones_like(v) if act == "none" else 1.5 + v)


# ------------------------------------------------------------------------------------------------ pieces


def maps(t, H, W):
    """The last H*W tokens as (B, C, H, W)."""
    return t[:, t.shape[1] - H * W :].transpose(1, 2).reshape(t.shape[0], t.shape[2], H, W)


def tokens(t):
    return t.flatten(2).transpose(1, 2)


def conv(m, weight):
    """Depth-wise conv2d of maps, every window times its filter: torch's own takes 20 times as long in float64."""
    if not m.numel():
        return m + 0 * weight.sum()
    windows = F.unfold(m, weight.shape[-1], padding=weight.shape[-1] // 2).unflatten(1, (len(weight), -1))
    return (windows * weight.flatten(1)[:, :, None]).sum(2).view(m.shape)


def conv_grads(dy, m, weight):
    """(dm, dweight) of conv by autograd."""
    if not m.numel():
        return torch.zeros_like(m), torch.zeros_like(weight)
    m, weight = m.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(conv(m, weight), (m, weight), dy)


def affine(v, scale, shift):
    v = v if scale is None else v * scale
    return v if shift is None else v + shift


def before(o, v, scale, shift, act):
    """The prologue."""
    return affine(o.act(v, "gelu"), scale, shift) if act == "gelu_first" else o.act(affine(v, scale, shift), act)


def stats(o, signed, sizes=None):
    """mean and sum of squared deviations over batch and tokens; ``sizes``: by which the values' errors are measured."""
    if not signed.shape[0] * signed.shape[1]:
        return signed.new_zeros(signed.shape[2]), signed.new_zeros(signed.shape[2])
    mean = signed.mean((0, 1))
    apart, sizes = signed - mean, signed.abs() if sizes is None else sizes
    if o is Exact:
        return mean, apart.square().sum((0, 1))
    return sizes.mean((0, 1)), (apart.square() + 2 * apart.abs() * sizes + 2.0**-20 * sizes.square()).sum((0, 1))


def with_prefix(patches, head, P, prefix):
    if prefix == "drop":
        return patches
    return torch.cat((head[:, :P] if prefix == "keep" else torch.zeros_like(head[:, :P]), patches), 1)


def none(t):
    return t.new_empty(0)


# ------------------------------------------------------------------------------------------------ token_dwconv


def token_dwconv(o, x, weight, bias, residual, H, W, P, prefix, backend):
    y = tokens(conv(maps(o.size(x), H, W), o.size(weight)))
    y = with_prefix(y if bias is None else y + o.size(bias), o.size(x), P, prefix)
    return (y if residual is None else y + o.size(residual),)


def token_dwconv_bwd_dx(o, dy, weight, H, W, P, prefix, backend):
    dy = o.size(dy)
    dx = tokens(conv_grads(maps(dy, H, W), torch.zeros_like(maps(dy, H, W)), o.size(weight))[0])
    return (torch.cat((dy[:, :P] if prefix == "keep" else dx.new_zeros(len(dx), P, dx.shape[2]), dx), 1),)


def token_dwconv_bwd_dw(o, dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, backend):
    dy, x = o.size(dy), o.size(x)
    dw = conv_grads(maps(dy, H, W), maps(x, H, W), x.new_zeros(x.shape[2], 1, K, K))[1]
    return dw, none(x) if bias_dtype is None else maps(dy, H, W).sum((0, 2, 3))


def token_dwconv_bwd_db(o, dy, H, W, P, prefix, bias_dtype, backend):
    return (maps(o.size(dy), H, W).sum((0, 2, 3)),)


# ------------------------------------------------------------------------------------------------ with activations


def _patches(o, t, n, scale=None, shift=None):
    """The last n tokens of t, scale and shift, in size."""
    return o.size(t[:, t.shape[1] - n :]), o.size(scale), o.size(shift)


def token_dwconv_act(o, x, weight, bias, scale, shift, act, out_scale, out_shift, out_act, residual, H, W, P, prefix, pool, want, backend):
    n = H * W
    u = before(o, *_patches(o, x, n, scale, shift), act)
    z = tokens(conv(maps(u, H, W), o.size(weight)))
    z = z if bias is None else z + o.size(bias)
    y = o.act(affine(z, o.size(out_scale), o.size(out_shift)), out_act)
    sums = y.sum(1) if pool else none(y)
    both = (none(y), none(y))
    if want and o is Exact:
        both = stats(o, y)
    elif want:  # the values' own sizes, and that every one of them is off
        around = scale, shift, act, out_scale, out_shift, out_act
        true = token_dwconv_act(Exact, x, weight, bias, *around, None, H, W, P, "drop", 0, 0, backend)[0]
        both = stats(o, true, y)
    y = with_prefix(y, o.size(x), P, prefix)
    return y if residual is None else y + o.size(residual), sums, *both


def _inner_slopes(o, x, n, scale, shift, act):
    """(factor of dscale, slope inside, slope outside) of the prologue at the patches."""
    v, scale, shift = _patches(o, x, n, scale, shift)
    if act == "gelu_first":
        return o.act(v, "gelu"), torch.ones_like(v), o.slope(v, "gelu")
    return v, o.slope(affine(v, scale, shift), act), torch.ones_like(v)


def token_dwconv_act_bwd_dx(o, dy, x, weight, scale, shift, act, a, b, H, W, P, prefix, backend):
    head, du = token_dwconv_bwd_dx(o, dy, weight, H, W, P, prefix, backend)[0].split((P, H * W), 1)
    factor, inside, outside = _inner_slopes(o, x, H * W, scale, shift, act)
    dv = du * inside
    dx = affine(dv, o.size(scale), o.size(a))
    dx = dx if b is None else dx + o.size(b) * factor
    return torch.cat((head, dx * outside), 1), (dv * factor).sum((0, 1)), dv.sum((0, 1))


def token_dwconv_act_bwd_dw(o, dy, x, K, scale, shift, act, H, W, P, prefix, weight_dtype, bias_dtype, backend):
    u = before(o, *_patches(o, x, H * W, scale, shift), act)
    return token_dwconv_bwd_dw(o, dy, u, K, H, W, 0, prefix, weight_dtype, bias_dtype, backend)


def pre_activation(o, x, weight, bias, H, W):
    """(B, H*W, C), what an activation behind the convolution is given."""
    z = tokens(conv(maps(o.size(x), H, W), o.size(weight)))
    return z if bias is None else z + o.size(bias)


def token_dwconv_act_bwd(o, dy, x, weight, bias, out_act, H, W, P, prefix, backend):
    head, patches = o.size(dy).split((dy.shape[1] - H * W, H * W), 1)
    dz = torch.cat((head, patches * o.slope(pre_activation(o, x, weight, bias, H, W), out_act)), 1)
    dx = token_dwconv_bwd_dx(o, dz, weight, H, W, P, prefix, backend)
    return *dx, *token_dwconv_bwd_dw(o, dz, x, weight.shape[-1], H, W, P, prefix, None, None if bias is None else bias.dtype, backend)


def channel_stats(o, x, act, patches, backend):
    x = x[:, x.shape[1] - patches :]
    return stats(o, Exact.act(x, act), o.act(x.abs(), act))


def channel_act(o, x, scale, shift, gate, residual, act, patches, backend):
    y = o.act(affine(*_patches(o, x, patches, scale, shift)), act)
    y = y if gate is None else y * o.size(gate)[:, None]
    if residual is None:
        return (y,)
    residual = o.size(residual)
    lead = residual.shape[1] - patches
    return (torch.cat((residual[:, :lead], residual[:, lead:] + y), 1),)


def channel_act_pool(o, x, scale, shift, act, patches, backend):
    return (o.act(affine(*_patches(o, x, patches, scale, shift)), act).sum(1),)


def channel_act_sums(o, dy, x, scale, shift, act, patches, backend):
    dy, x = _patches(o, dy, patches)[0], _patches(o, x, patches)[0]
    v = affine(x, o.size(scale), o.size(shift))
    f, df = o.act(v, act), o.slope(v, act)
    return (torch.stack([t.sum(1) for t in (dy * f, dy * df, dy * df * x, df, df * x)]),)


def channel_act_grad(o, dy, x, scale, shift, gate, pool_grad, a, b, act, patches, backend):
    dy, x = _patches(o, dy, patches)[0], _patches(o, x, patches)[0]
    dv = dy if gate is None else dy * o.size(gate)[:, None]
    dv = dv if pool_grad is None else dv + o.size(pool_grad)[:, None]
    dx = affine(dv * o.slope(affine(x, o.size(scale), o.size(shift)), act), o.size(scale), o.size(a))
    return (dx if b is None else dx + o.size(b) * x,)


# ------------------------------------------------------------------------------------------------ dw_shortcut


def _shortcut(o, x, block_output, weight, bias, scale, shift, H, W, P):
    out = token_dwconv_act(o, x, weight, bias, scale, shift, "gelu_first", None, None, "none", block_output, H, W, P, "zero", 0, 0, "")
    return out[0]


def dw_shortcut(o, x, block_output, weight, bias, gamma, beta, eps, H, W, P, backend):
    n = max(1, x.shape[0] * H * W)
    mean, m2 = stats(Exact, gelu(x[:, P:]))
    rstd = (m2 / n + eps).rsqrt()
    scale = rstd if gamma is None else gamma * rstd
    shift = -mean * scale if beta is None else beta - mean * scale
    if o is Exact:
        y = _shortcut(o, x, block_output, weight, bias, scale, shift, H, W, P)
        return y, mean, m2 / max(1, n - 1), torch.stack((scale, shift, rstd))
    size_mean, size_m2 = stats(o, gelu(x[:, P:]), 1.5 * x[:, P:].abs())
    loose = 2 + size_m2 / n * rstd.square()  # relative, of rstd
    size_shift = (0 if beta is None else beta.abs()) + size_mean * scale.abs() * loose
    y = _shortcut(o, x, block_output, weight, bias, scale.abs() * loose, size_shift, H, W, P)
    return y, size_mean, size_m2 / max(1, n - 1), torch.stack((scale.abs() * loose, size_shift, rstd * loose))


def dw_shortcut_eval(o, x, block_output, weight, bias, mean, var, gamma, beta, eps, H, W, P, backend):
    if var is None:
        return (_shortcut(o, x, block_output, weight, bias, gamma, beta, H, W, P),)
    rstd = (var + eps).rsqrt()
    scale = rstd if gamma is None else o.size(gamma) * rstd
    shift = o.less(torch.zeros_like(mean) if beta is None else o.size(beta), o.size(mean) * scale)
    return (_shortcut(o, x, block_output, weight, bias, scale, shift, H, W, P),)


def dw_shortcut_bwd(o, dy, x, weight, mean, affine, H, W, P, need_dx, backend):
    scale, shift, rstd, mean, n = *o.size(affine), o.size(mean), max(1, x.shape[0] * H * W)
    dy_maps, g = maps(o.size(dy), H, W), maps(o.act(o.size(x), "gelu"), H, W)
    weight = o.size(weight)
    across = conv_grads(dy_maps, g, weight)[1]
    windows = conv_grads(dy_maps, torch.ones_like(g), weight)[1]
    dw = scale[:, None, None, None] * across + shift[:, None, None, None] * windows
    dscale, dshift = ((weight * t).sum((1, 2, 3)) for t in (across, windows))
    dgamma = rstd * o.less(dscale, mean * dshift)
    b = scale * rstd * dgamma / n
    sums = dw, dy_maps.sum((0, 2, 3)), dgamma, dshift
    if not need_dx:
        return none(x), *sums
    b = -b if o is Exact else b
    a = o.less(-scale * dshift / n if o is Exact else scale * dshift / n, b * mean)
    dg = conv_grads(dy_maps, g, weight * scale[:, None, None, None])[0] + a[:, None, None] + b[:, None, None] * g
    dx = tokens(dg) * o.slope(o.size(x[:, P:]), "gelu")
    return torch.cat((torch.zeros_like(x[:, :P]), dx), 1), *sums


# ------------------------------------------------------------------------------------------------ life_qkv


def life_qkv(o, x, w1, b1, dw2, pw2, dw3, pw3, H, W, P, scale1_key, keep, backend):
    x, w1, b1, dw2, pw2, dw3, pw3 = (o.size(t) for t in (x, w1, b1, dw2, pw2, dw3, pw3))
    z1 = F.linear(x, w1, b1)
    d2 = token_dwconv(o, z1, dw2, None, None, H, W, P, "keep", "")[0]
    z2 = F.linear(d2, pw2)
    d3 = token_dwconv(o, z2, dw3, None, None, H, W, P, "keep", "")[0]
    z3 = F.linear(d3, pw3)
    if scale1_key and P:
        d = x.shape[2] // 3
        z2, z3 = (torch.cat((torch.cat((z[:, :P, :d], z1[:, :P, d : 2 * d], z[:, :P, 2 * d :]), 2), z[:, P:]), 1) for z in (z2, z3))
    return z1, z2, z3, *((d2, d3) if keep else (none(x), none(x)))


ORACLES = {
    f.__name__: f
    for f in (
        token_dwconv, token_dwconv_bwd_dx, token_dwconv_bwd_dw, token_dwconv_bwd_db, token_dwconv_act, token_dwconv_act_bwd_dx,
        token_dwconv_act_bwd_dw, token_dwconv_act_bwd, channel_stats, channel_act, channel_act_pool, channel_act_sums, channel_act_grad,
        dw_shortcut, dw_shortcut_bwd, dw_shortcut_eval, life_qkv,
    )
}  # fmt: skip
