"""The public functions and modules in plain float64, differentiable by autograd, apart from the library (never imported here)."""

import math

import torch
import torch.nn.functional as F

from fuzz import oracle, oracle_attention
from fuzz.oracle import Exact


def convolve(x, weight, bias, residual, before, after, H, W, P, prefix, pool, stats):
    """token_dwconv with everything around it; ``before`` and ``after`` (scale, shift, act)."""
    out = oracle.token_dwconv_act(Exact, x, weight, bias, *before, *after, residual, H, W, P, prefix, pool, stats, "")
    return tuple(t for t, wanted in zip(out, (True, pool, stats, stats), strict=True) if wanted)


def attention(q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p):
    """local_attention; tokens that do not exist are zero, and so is what comes out there."""
    if key_mask is not None:
        q, k, v = (torch.where(key_mask[:, None, :, None], t, 0.0) for t in (q, k, v))
    y = oracle_attention.local_attention(Exact, q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, True, "")[0]
    return y if key_mask is None else torch.where(key_mask[:, :, None], y, 0.0)


def life_qkv(x, w1, b1, dw2, pw2, dw3, pw3, H, W, P, scale1_key):
    """(q, k, v)."""
    scales = oracle.life_qkv(Exact, x, w1, b1, dw2, pw2, dw3, pw3, H, W, P, scale1_key, False, "")[:3]
    return tuple(torch.cat(parts, 2) for parts in zip(*(z.chunk(3, 2) for z in scales), strict=True))


def heads(t, h):
    """(B, N, C) as (B, h, N, C / h)."""
    return t.unflatten(2, (h, -1)).transpose(1, 2)


def life_attention(p, x, H, W, P, h, scale1_key, qkv_norm):
    """nn.LifeAttention from its state dict ``p``."""
    names = "scale1.weight", "scale1.bias", *(f"scale{s}.{step}.weight" for s in (2, 3) for step in ("depthwise", "pointwise"))
    weights = [p[f"qkv.{n}"] for n in names]
    weights = [w.flatten(1) if "pointwise" in n else w for n, w in zip(names, weights, strict=True)]
    qkv = life_qkv(x, *weights, H, W, P, scale1_key)
    if qkv_norm:
        qkv = [F.layer_norm(t, t.shape[2:], p["qkv.norm.weight"], p["qkv.norm.bias"], 1e-5) for t in qkv]
    q, k, v = (heads(t, h) for t in qkv)
    y = attention(q, k, v, None, None, None, None, None, H, W, P, q.shape[-1] ** -0.5, 0.0)
    return F.linear(y, p["proj.weight"], p["proj.bias"])


def local_attention(p, x, H, W, P, h):
    """nn.LocalAttention."""
    q, k, v = (heads(t, h) for t in F.linear(x, p["qkv.weight"], p.get("qkv.bias")).chunk(3, 2))
    y = attention(q, k, v, p["local.weight"], p["local.bias"], None, None, None, H, W, P, q.shape[-1] ** -0.5, 0.0)
    return F.linear(y, p["proj.weight"], p["proj.bias"])


def running(p, name, t):
    """Running mean and variance behind a training step of a batch norm that reads ``t``."""
    found = t.mean((0, 2, 3)), t.var((0, 2, 3), unbiased=True)
    return tuple((0.9 * p[f"{name}.{n}"] + 0.1 * new).detach() for n, new in zip(("running_mean", "running_var"), found, strict=True))


def batch_norm(p, name, t, train, seen=None):
    """Batch norm of (B, C, H, W); the running statistics go to ``seen``."""
    if train and seen is not None:
        seen += running(p, name, t)
    mean, var = (t.mean((0, 2, 3)), t.var((0, 2, 3), unbiased=False)) if train else (p[f"{name}.running_mean"], p[f"{name}.running_var"])
    scale = p[f"{name}.weight"] * (var + 1e-5).rsqrt()
    return (t - mean[:, None, None]) * scale[:, None, None] + p[f"{name}.bias"][:, None, None]


def _gate(p, kind, m):
    if kind == "se":
        m = F.linear(F.relu(F.linear(m, p["conv.6.fc.0.weight"], p["conv.6.fc.0.bias"])), p["conv.6.fc.2.weight"], p["conv.6.fc.2.bias"])
    elif kind:
        w = p["conv.6.conv.weight"]
        m = F.conv1d(m[:, None], w, padding=w.shape[-1] // 2)[:, 0]
    return torch.sigmoid(m) if kind == "eca" else (m + 3).clamp(0, 6) / 6


def locality(p, x, H, W, P, act, train):
    """nn.LocalityFeedForward and, in training, its running statistics; ``act`` as the authors name it."""
    seen = []
    name, _, kind = act.partition("+")
    f = oracle.VALUES["relu6" if name == "relu6" else "hardswish"]
    last = 7 if kind else 6
    product = lambda t, i: torch.einsum("bchw,oc->bohw", t, p[f"conv.{i}.weight"].flatten(1))  # noqa: E731
    t = f(batch_norm(p, "conv.1", product(oracle.maps(x, H, W), 0), train, seen))
    t = f(batch_norm(p, "conv.4", oracle.conv(t, p["conv.3.weight"]), train, seen))
    if kind:
        t = t * _gate(p, kind, t.sum((2, 3)) / max(1, H * W))[:, :, None, None]
    t = batch_norm(p, f"conv.{last + 1}", product(t, last), train, seen)
    return torch.cat((x[:, :P], x[:, P:] + oracle.tokens(t)), 1), seen


def shortcut(p, x, y, H, W, P, kernels, train):
    """nn.DWShortcut with several kernels, and its running statistics."""
    g, total, seen = oracle.gelu(oracle.maps(x, H, W)), 0, []
    for i in range(kernels):
        v = batch_norm(p, f"batchnorms.{i}", g, train, seen)
        total = total + oracle.conv(v, p[f"convs.{i}.weight"]) + p[f"convs.{i}.bias"][:, None, None]
    return torch.cat((y[:, :P], y[:, P:] + oracle.tokens(total)), 1), seen


def distance_to_kinks(p, x, H, W, act, train):
    """How near, relatively, what LocalViT's activations and gate read comes to where their slopes jump."""
    name, _, kind = act.partition("+")
    kinks = oracle.KINKS["relu6" if name == "relu6" else "hardswish"]
    near = math.inf
    f = oracle.VALUES["relu6" if name == "relu6" else "hardswish"]
    t = torch.einsum("bchw,oc->bohw", oracle.maps(x, H, W), p["conv.0.weight"].flatten(1))
    for norm, conv in (("conv.1", "conv.3"), ("conv.4", None)):
        t = batch_norm(p, norm, t, train)
        near = min(near, *((t - kink).abs().min().item() for kink in kinks))
        t = f(t) if conv is None else oracle.conv(f(t), p[f"{conv}.weight"])
    if kind in ("se", "ecah"):
        s = _gate(p, kind, t.sum((2, 3)) / max(1, H * W))
        near = min(near, s.abs().min().item(), (s - 1).abs().min().item()) if ((s > 0) & (s < 1)).all() else near
    return near
