"""What strided, transposed and multiplied convolution and pooling must give: tap by tap, in plain float64 arithmetic."""

import torch
import torch.nn.functional as F

from fuzz.oracle import maps, none, tokens, with_prefix


def size(n, k, s, p, up=False):
    """Windows of k that start every s from -p on; rounded up, those that start on the grid or its leading padding count, too."""
    starts = range(-p, n if up else n + p - k + 1, s)
    inside = [a for a in starts if a + k <= n + p]
    return len(inside) + (up and len(starts) > len(inside) and inside[-1] + k < n + p if inside else up)


def shape(H, W, k, s, p, up=False):
    return tuple(size(*axis, up) if H * W else 0 for axis in zip((H, W), k, s, p, strict=True))


def windows(m, k, s, p, small, filler=0.0):
    """For every tap in row-major order the values that it sees, (B, C, H', W')."""
    need = [(n - 1) * step + taps - side - pad for n, step, taps, side, pad in zip(small, s, k, m.shape[2:], p, strict=True)]
    padded = F.pad(m, (p[1], max(0, need[1]), p[0], max(0, need[0])), value=filler)
    for i in range(k[0]):
        for j in range(k[1]):
            yield padded[:, :, i : i + (small[0] - 1) * s[0] + 1 : s[0], j : j + (small[1] - 1) * s[1] + 1 : s[1]]


def conv(m, weight, s, p):
    """(B, C, H, W) to (B, m C, H', W')."""
    k, many = weight.shape[2:], len(weight)
    small = shape(*m.shape[2:], k, s, p)
    if 0 in (*small, *m.shape):
        return m.new_zeros(len(m), many, *small) + 0 * weight.sum()
    m = m.repeat_interleave(many // m.shape[1], 1)
    return sum(w[:, None, None] * v for w, v in zip(weight.flatten(1).T, windows(m, k, s, p, small), strict=True))


def _grads(dy, m, weight, s, p):
    if not m.numel():
        return torch.zeros_like(m), torch.zeros_like(weight)
    m, weight = m.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(conv(m, weight, s, p), (m, weight), dy)


def token_dwconv_strided(o, x, weight, bias, H, W, P, sh, sw, ph, pw, prefix, backend):
    x = o.size(x)
    y = tokens(conv(maps(x, H, W), o.size(weight), (sh, sw), (ph, pw)))
    y = y if bias is None else y + o.size(bias)
    return (y if not P else with_prefix(y, x if x.shape[2] == y.shape[2] else y.new_zeros(len(y), P, y.shape[2]), P, prefix),)


def _behind(patches, rows, P, prefix):
    """A gradient behind its prefix rows."""
    if not P:
        return patches
    return torch.cat((rows[:, :P] if prefix == "keep" else patches.new_zeros(len(patches), P, patches.shape[2]), patches), 1)


def token_dwconv_transpose(o, x, weight, bias, m, H, W, P, sh, sw, ph, pw, prefix, backend):
    x, small = o.size(x), shape(H, W, weight.shape[2:], (sh, sw), (ph, pw))
    like = x.new_zeros(len(x), x.shape[2] // m, H, W)
    y = tokens(_grads(maps(x, *small), like, o.size(weight), (sh, sw), (ph, pw))[0])
    return (_behind(y if bias is None else y + o.size(bias), x, P, prefix),)


def token_dwconv_strided_bwd_dw(o, dy, x, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, weight_dtype, bias_dtype, backend):
    dy, x, small = o.size(dy), o.size(x), shape(H, W, (Kh, Kw), (sh, sw), (ph, pw))
    dy = maps(dy, *small)
    dw = _grads(dy, maps(x, H, W), x.new_zeros(dy.shape[1], 1, Kh, Kw), (sh, sw), (ph, pw))[1]
    return dw, none(x) if bias_dtype is None else dy.sum((0, 2, 3))


# ------------------------------------------------------------------------------------------------ pooling


def _divisors(H, W, k, s, p, small, include):
    """(H', W'): places of every window on the grid, or on the padded grid."""
    margin = p if include else (0, 0)
    counts = []
    for n, side, taps, step, pad, more in zip(small, (H, W), k, s, p, margin, strict=True):
        first = torch.arange(n, dtype=torch.float64) * step - pad
        counts.append((first + taps).clamp(max=side + more) - first.clamp(min=-more))
    return counts[0][:, None] * counts[1]


def _chosen(m, k, s, p, small):
    """(values, taps) of the maxima: NaN before all, then the first of the largest."""
    best, tap = m.new_full((*m.shape[:2], *small), -torch.inf), m.new_full((*m.shape[:2], *small), -1.0)
    for t, (v, inside) in enumerate(zip(windows(m, k, s, p, small), windows(torch.ones_like(m), k, s, p, small), strict=True)):
        take = (inside > 0) & ((v > best) | v.isnan() | (tap < 0))
        best, tap = torch.where(take, v, best), torch.where(take, float(t), tap)
    return best, tap


def token_pool(o, x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, up, include, backend):
    k, s, p, x = (Kh, Kw), (sh, sw), (ph, pw), x if mode == "max" else o.size(x)
    small, m = shape(H, W, k, s, p, up), maps(x, H, W)
    if 0 in (*small, *m.shape):
        y = m.new_zeros(*m.shape[:2], *small)
    elif mode == "max":
        y = o.size(_chosen(m, k, s, p, small)[0])
    else:
        y = sum(windows(m, k, s, p, small)) / _divisors(H, W, k, s, p, small, include)
    return (with_prefix(tokens(y), o.size(x), P, prefix),)


def token_pool_bwd(o, dy, x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, up, include, backend):
    k, s, p, dy = (Kh, Kw), (sh, sw), (ph, pw), o.size(dy)
    small = shape(H, W, k, s, p, up)
    g, m = maps(dy, *small), dy.new_zeros(len(dy), dy.shape[2], H, W)
    if m.numel():
        shares = [g / _divisors(H, W, k, s, p, small, include)] * (Kh * Kw)
        if mode == "max":
            taps = _chosen(maps(x, H, W), k, s, p, small)[1]
            shares = [torch.where(taps == t, g, 0.0) for t in range(Kh * Kw)]
        m.requires_grad_()
        with torch.enable_grad():
            m = torch.autograd.grad([*windows(m, k, s, p, small)], m, shares)[0]
    return (_behind(tokens(m), dy, P, prefix),)


ORACLES = {
    f.__name__: f for f in (token_dwconv_strided, token_dwconv_transpose, token_dwconv_strided_bwd_dw, token_pool, token_pool_bwd)
}
