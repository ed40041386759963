"""The modules of CvT, MViT, EdgeViT, RegionViT, SiT and their like, and their losses, as :mod:`fuzz.systems` has the first four systems:
plain float64, differentiable by autograd, apart from the library.
"""

from fractions import Fraction
from math import floor

import torch
import torch.nn.functional as F

from fuzz.oracle import gelu, maps, tokens
from fuzz.systems import batch_norm, heads


def dense(p, name, t):
    """The linear layer, or 1 x 1 convolution, ``name`` over the last dimension."""
    return F.linear(t, p[f"{name}.weight"].flatten(1), p.get(f"{name}.bias"))


def layer_norm(p, name, t, eps=1e-5):
    return F.layer_norm(t, t.shape[-1:], p[f"{name}.weight"].flatten(), p[f"{name}.bias"].flatten(), eps)


def depthwise(p, name, m, stride=1):
    """The depth-wise convolution ``name`` of maps, padding K // 2."""
    w = p[f"{name}.weight"]
    if 0 in m.shape[2:]:
        return m + 0 * sum(t.sum() for n, t in p.items() if n.startswith(f"{name}."))
    return F.conv2d(m, w, p.get(f"{name}.bias"), stride, [k // 2 for k in w.shape[2:]], groups=m.shape[1])


def spread(p, name, m):
    """The transposed one, kernel and stride the same: every place times a filter of its channel."""
    w, B, (H, W) = p[f"{name}.weight"][:, 0], m.shape[0], m.shape[2:]
    y = torch.einsum("bcyx,cij->bcyixj", m, w).reshape(B, len(w), H * w.shape[1], W * w.shape[2])
    return y + p[f"{name}.bias"][:, None, None]


def joined(y):
    return y.transpose(1, 2).flatten(2)


def attention(q, k, v, scale, bias=0.0):
    return (scale * q @ k.transpose(-1, -2) + bias).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ CvT, MViT


def conv_projection(p, x, H, W, P, h, method, K, stride_q, stride_kv, train):
    """nn.ConvProjectionAttention and, in training, its running statistics."""
    seen = []

    def projected(part, stride):
        m = maps(x, H, W)
        if method == "dw_bn":
            m = batch_norm(p, f"conv_proj_{part}.bn", depthwise(p, f"conv_proj_{part}.conv", m, stride), train, seen)
        elif method == "avg" and part != "q" and H * W:  # as many windows as begin inside the map or the padding before it
            m = F.avg_pool2d(m, K, stride, K // 2, ceil_mode=True)
        return heads(dense(p, f"proj_{part}", torch.cat((x[:, :P], tokens(m)), 1)), h)

    q, k, v = projected("q", stride_q), projected("k", stride_kv), projected("v", stride_kv)
    return dense(p, "proj", joined(attention(q, k, v, x.shape[2] ** -0.5))), seen


def pooled(p, part, t, H, W, P, mode, kernel, stride, eps):
    """(heads (B, n, P + H*W, c) pooled and normed, their grid)."""
    if (*kernel, *stride) == (1, 1, 1, 1):
        return t, (H, W)
    m = t[:, :, P:].transpose(2, 3).flatten(0, 1).unflatten(2, (H, W))
    padding = [k // 2 for k in kernel]
    if mode == "max":
        m = F.max_pool2d(m, kernel, stride, padding)
    elif mode == "avg":
        m = F.avg_pool2d(m, kernel, stride, padding, count_include_pad=True)
    else:
        m = depthwise(p, f"pool_{part}", m, stride)
    t = torch.cat((t[:, :, :P], m.flatten(2).unflatten(0, t.shape[:2]).transpose(2, 3)), 2)
    return (t if mode in ("max", "avg") else layer_norm(p, f"norm_{part}", t, eps)), tuple(m.shape[2:])


def _distance(table, queries, keys, resize):
    """(queries, keys, d): rows of a table of one axis, of this size or made for another."""
    rows = 2 * max(queries, keys) - 1
    if resize == "middle" and len(table) > rows:
        table = table[(len(table) - rows) // 2 :][:rows]
    elif len(table) != rows:
        table = F.interpolate(table.T[None], rows, mode="linear", align_corners=False)[0].T
    a, b = max(Fraction(keys, queries), Fraction(1)), max(Fraction(queries, keys), Fraction(1))
    return torch.stack([table[[floor(i * a - j * b + (keys - 1) * b) for j in range(keys)]] for i in range(queries)])


def pooling_parts(p, x, H, W, P, h, mode, kernels, strides, pool_first, eps):
    """(q, k, v) and (their grids); ``kernels`` and ``strides`` of q, k and v."""
    found = []
    whole = None if pool_first else dense(p, "qkv", x).chunk(3, 2)
    for i, part in enumerate("qkv"):
        t = whole[i] if whole else x
        t, grid = pooled(p, part, heads(t, 1 if mode == "conv_unshared" else h), H, W, P, mode, kernels[i], strides[i], eps)
        found.append((heads(dense(p, part, joined(t)), h) if pool_first else t, grid))
    return zip(*found, strict=True)


def pooling_attention(p, x, H, W, P, h, mode, kernels, strides, pool_first, eps, residual, residual_prefix, resize):
    """nn.PoolingAttention."""
    (q, k, v), (q_grid, k_grid, _) = pooling_parts(p, x, H, W, P, h, mode, kernels, strides, pool_first, eps)
    bias = 0.0
    if "rel_pos_h" in p:
        down, across = (_distance(p[f"rel_pos_{n}"], a, b, resize) for n, a, b in zip("hw", q_grid, k_grid, strict=True))
        at = q[:, :, P:].unflatten(2, q_grid)
        bias = torch.einsum("bnyxd,yid->bnyxi", at, down)[..., :, None] + torch.einsum("bnyxd,xjd->bnyxj", at, across)[..., None, :]
        bias = F.pad(bias.flatten(4).flatten(2, 3), (P, 0, P, 0))
    y = attention(q, k, v, q.shape[3] ** -0.5, bias)
    if residual:
        first = 0 if residual_prefix else P
        y = torch.cat((y[:, :, :first], y[:, :, first:] + q[:, :, first:]), 2)
    return dense(p, "proj", joined(y))


def least_lead(t, H, W, P, kernel, stride):
    """By how much a window's largest value leads its second, at least, of heads (B, n, P + H*W, c) in all windows of max pooling."""
    m = t[:, :, P:].transpose(2, 3).flatten(0, 1).unflatten(2, (H, W))
    (kh, kw), (sh, sw) = kernel, stride
    m = F.pad(m, (kw // 2, kw // 2, kh // 2, kh // 2), value=-torch.inf)
    windows = m.unfold(2, kh, sh).unfold(3, kw, sw).flatten(4)
    if windows.shape[-1] < 2 or not windows.numel():
        return torch.inf
    first, second = windows.topk(2).values.unbind(-1)
    return (first - second).min().item()


# ------------------------------------------------------------------------------------------------ EdgeViT, RegionViT


def local_agg(p, x, H, W, P, train):
    """nn.LocalAgg, and its running statistics."""
    seen = []

    def mixed(m, name):
        return torch.einsum("bchw,oc->bohw", m, p[f"{name}.weight"].flatten(1)) + p[f"{name}.bias"][:, None, None]

    m = maps(x, H, W)
    m = m + depthwise(p, "pos_embed", m)
    m = m + mixed(depthwise(p, "attn", mixed(batch_norm(p, "norm1", m, train, seen), "conv1")), "conv2")
    m = m + mixed(gelu(mixed(batch_norm(p, "norm2", m, train, seen), "mlp.fc1")), "mlp.fc2")
    return torch.cat((x[:, :P], tokens(m)), 1), seen


def global_sparse(p, x, H, W, P, h, r):
    """nn.GlobalSparseAttention."""
    t = torch.cat((x[:, :P], tokens(maps(x, H, W)[:, :, ::r, ::r])), 1) if r > 1 else x
    q, k, v = (heads(s, h) for s in dense(p, "qkv", t).chunk(3, 2))
    y = joined(attention(q, k, v, q.shape[3] ** -0.5))
    if r > 1:
        y = torch.cat((y[:, :P], tokens(spread(p, "LocalProp", maps(y, H // r, W // r)))), 1)
        y = layer_norm(p, "norm", y)
    return dense(p, "proj", y)


def padded_windows(gh, gw, w, H, W, authors):
    """(gh * gw, 1 + w², 1 + w²): which tokens of a window, the region's first, attend to which."""
    found, at = torch.ones(gh, gw, 1 + w * w, 1 + w * w, dtype=torch.bool), [divmod(i, w) for i in range(w * w)]
    above, left = (torch.tensor([True, *(i[axis] < w - more for i in at)]) for axis, more in ((0, gh * w - H), (1, gw * w - W)))
    for y in range(gh):
        for x in range(gw):
            if authors:  # the two are joined in the corner, where both hold
                if y == gh - 1 and x == gw - 1:
                    found[y, x] = (above[:, None] & above) | (left[:, None] & left)
                elif y == gh - 1 or x == gw - 1:
                    real = above if y == gh - 1 else left
                    found[y, x] = real[:, None] & real
            else:
                found[y, x] = torch.tensor([True, *(y * w + i < H and x * w + j < W for i, j in at)])
    return found.flatten(0, 1)


def regional(p, x, h, w, windows, mask):
    """nn.RegionalAttention; a query that sees nothing has the mean of all values."""
    q, k, v = (heads(t, h) for t in dense(p, "qkv", x).chunk(3, 2))
    s = q.shape[3] ** -0.5 * q @ k.transpose(-1, -2)
    if windows:
        n, row = 2 * w - 1, torch.arange(w)
        step = (row - row[:, None] + w // 2) % n  # of query's and key's row or column
        index = (step[:, None, :, None] * n + step[None, :, None, :]).reshape(w * w, w * w)
        s = s + F.pad(p["rel_pos"][:, index], (1, 0, 1, 0))
    if mask is not None:
        see = mask.repeat(len(x) // len(mask), 1, 1)[:, None].expand_as(s)
        s = torch.where(see.any(-1, keepdim=True), torch.where(see, s, -torch.inf), 0.0)
    return dense(p, "proj", joined(s.softmax(-1) @ v))


def downsampled(p, x, H, W):
    """nn.TwoGridDownsampling of one of its grids."""
    t = gelu(layer_norm(p, "proj.0", x))
    return tokens(F.conv2d(maps(t, H, W), p["proj.2.weight"], p["proj.2.bias"], 2, 1, groups=x.shape[2]))


# ------------------------------------------------------------------------------------------------ smoothing, slimming, shared weights


def smoothed(x, H, W, P, sigma, K, padding):
    """nn.TokenSmoothing; without a blur the tokens themselves, so that a NaN stays where it is."""
    if not sigma and padding == K // 2:
        return x
    i = torch.arange(K, dtype=torch.float64) - (K - 1) / 2
    g = torch.exp(-((i / sigma) ** 2) / 2) if sigma else (i == 0).double()
    w = (g[:, None] * g / g.sum() ** 2).expand(x.shape[2], 1, K, K)
    return torch.cat((x[:, :P], tokens(F.conv2d(maps(x, H, W), w, None, 1, padding, groups=x.shape[2]))), 1)


def slimmed(p, x, P):
    """nn.TokenSlimming."""
    patches = x[:, P:]
    scores = p["scale"] * dense(p, "weight.3", gelu(dense(p, "weight.1", layer_norm(p, "weight.0", patches))))
    return torch.cat((x[:, :P], scores.softmax(1).transpose(1, 2) @ patches), 1)


def grown(p, x):
    """(nn.ReverseTokenSlimming, the least standard deviation that its second norm divides by)."""
    t = layer_norm(p, "norm1", x).transpose(1, 2)
    t = dense(p, "mlp1.fc2", gelu(dense(p, "mlp1.fc1", t))).transpose(1, 2)
    y = t + dense(p, "mlp2.fc2", gelu(dense(p, "mlp2.fc1", layer_norm(p, "norm2", t))))
    return y, t.detach().var(-1, unbiased=False).min().sqrt().item() if t.numel() else torch.inf


def shared_conv(p, x, H, W, P, offsets, qkv, out):
    """nn.SharedConvAttention: a dense convolution whose tap at head h's neighbour is W_O,h W_V,h."""
    w_out, w_in = p[f"mhsa.{out}.weight"], p[f"mhsa.{qkv}.weight"].chunk(3)[2]
    d, reach = w_out.shape[1] // len(offsets), max(abs(n) for o in offsets for n in o)
    products = [w_out[:, h * d :][:, :d] @ w_in[h * d :][:d] for h in range(len(offsets))]
    places = torch.zeros(len(offsets), 2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
    for h, (dy, dx) in enumerate(offsets):
        places[h, reach + dy, reach + dx] = 1
    kernel = torch.einsum("hoc,hij->ocij", torch.stack(products), places)
    m = maps(x, H, W)
    y = tokens(F.conv2d(m, kernel, padding=reach)) if m.numel() else x.new_zeros(len(x), H * W, len(w_out))
    return torch.cat((x[:, :P] @ sum(products).T, y), 1) + p[f"mhsa.{out}.bias"]


# ------------------------------------------------------------------------------------------------ PVTv2, pyramids


def conv_feed_forward(p, x, H, W, P, relu):
    """(nn.ConvFeedForward, what its ReLU reads)."""
    first = dense(p, "fc1", x)
    t = F.relu(first) if relu else first
    t = torch.cat((t[:, :P], tokens(depthwise(p, "dwconv.dwconv", maps(t, H, W)))), 1)
    return dense(p, "fc2", gelu(t)), first


def patch_embed(p, m, stride, padding):
    """nn.OverlapPatchEmbed."""
    return layer_norm(p, "norm", tokens(F.conv2d(m, p["proj.weight"], p["proj.bias"], stride, padding)))


def pyramid(p, x, H, W, P, patch_size, strides, eps):
    """nn.TokenPyramid."""
    found = []
    for i, s in enumerate(strides):
        m, conv = maps(dense(p, f"levels.{i}.proj", x[:, P:]), H, W), f"levels.{i}.conv"
        m = spread(p, conv, m) if s < patch_size else depthwise(p, conv, m, s // patch_size)
        y = layer_norm(p, f"levels.{i}.norm", dense(p, f"levels.{i}.mix", gelu(m.permute(0, 2, 3, 1))), eps)
        found.append(y.permute(0, 3, 1, 2))
    return tuple(found)


# ------------------------------------------------------------------------------------------------ dense relative localisation


def relative_localization(p, x, H, W, P, mode, signed, normalize, pairs):
    """(losses.dense_relative_localization, how near it comes to where a slope jumps)."""
    a, b = pairs
    if not len(x):
        return x.sum() + 0 * sum(t.sum() for t in p.values()), torch.inf
    image = torch.arange(len(x))[:, None]
    t, near = torch.cat([x[image, P + at[..., 0] * W + at[..., 1]] for at in (a, b)], 2), torch.inf
    for i in (0, 2):
        t = dense(p, f"layers.{i}", t)
        near = min([near, *t.detach().abs().flatten().tolist()])
        t = F.relu(t)
    t = dense(p, "layers.4", t)
    total = 0.0
    for axis, n in enumerate((H, W)):
        d = a[..., axis] - b[..., axis]
        goal = d + n - 1 if signed else d.abs()
        if mode == "l1":
            divisor = {"paper": n, "none": 1, "code": max(1, 2 * n - 2 if signed else n - 1)}[normalize]
            off = t[..., axis] - goal.double() / divisor
            near = min([near, *off.detach().abs().flatten().tolist()])
            total = total + off.abs().mean() / 2
            continue
        log_p = dense(p, f"unshared.{axis}", t).log_softmax(-1)
        if mode == "ce":
            total = total - log_p.gather(-1, goal[..., None]).mean()
            continue
        places = torch.arange(log_p.shape[-1], dtype=torch.float64)
        mean = (log_p.exp() * places).sum(-1)
        variance = (log_p.exp() * (places - mean[..., None]) ** 2).sum(-1) + 1e-8
        total = total + ((mean - goal) ** 2 / variance + 1e-3 * variance.log()).mean()
    return total, near
