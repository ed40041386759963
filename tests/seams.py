"""The fused modules as their layers compute them, written down apart from the library: every layer is called, on contiguous maps."""

import torch
import torch.nn.functional as F

from lifeops.nn import DWShortcut, LifeAttention, LocalAttention, LocalityFeedForward

GRID, P, C = (4, 5), 2, 12


def _maps(t, grid):
    return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], *grid).clone(memory_format=torch.contiguous_format)


def _tokens(maps):
    if maps.shape[0] == 1:  # torch's CPU batch norm reads the gradient of one image in the wrong order where it is a view of tokens
        maps = maps.index_select(0, torch.zeros(1, dtype=torch.long))  # its gradient is added to fresh zeros
    return maps.flatten(2).transpose(1, 2)


def _attention(q, k, v, h, drop):
    q, k, v = (t.unflatten(2, (h, -1)).transpose(1, 2) for t in (q, k, v))
    p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (drop(p) @ v).transpose(1, 2).flatten(2)


def _scale(scale, z, grid):
    patches = _tokens(scale.depthwise(_maps(z[:, P:], grid)))
    return scale.pointwise(torch.cat((z[:, :P], patches), 1).transpose(1, 2)[..., None])[..., 0].transpose(1, 2)


def life(m, x, grid=GRID):
    z1 = m.qkv.scale1(x)
    z2 = _scale(m.qkv.scale2, z1, grid)
    z3 = _scale(m.qkv.scale3, z2, grid)
    q, k, v = (torch.cat(parts, 2) for parts in zip(*(z.chunk(3, -1) for z in (z1, z2, z3)), strict=True))
    if m.qkv.norm is not None:
        q, k, v = map(m.qkv.norm, (q, k, v))
    return m.proj_drop(m.proj(_attention(q, k, v, m.num_heads, m.attn_drop)))


def local_attention(m, x, grid=GRID):
    q, k, v = m.qkv(x).chunk(3, -1)
    y = _attention(q, k, v, m.num_heads, m.attn_drop)
    y = torch.cat((y[:, :P], y[:, P:] + _tokens(m.local(_maps(v[:, P:], grid)))), 1)
    return m.proj_drop(m.proj(m.norm(y)))


def locality_ffn(m, x, grid=GRID):
    t = _maps(x[:, P:], grid)
    for layer in m.conv:
        if hasattr(layer, "fc"):
            t = t * layer.fc(t.mean((2, 3)))[:, :, None, None]
        elif type(layer).__name__ == "ECALayer":
            t = t * layer.conv(t.mean((2, 3))[:, None])[:, 0].sigmoid()[:, :, None, None]
        else:
            t = layer(t)
    return torch.cat((x[:, :P], x[:, P:] + _tokens(t)), 1)


def shortcut(m, x, grid=GRID, y=None):
    y = x.tanh() if y is None else y
    t = sum(conv(norm(F.gelu(_maps(x[:, P:], grid)))) for conv, norm in zip(m.convs, m.batchnorms, strict=True))
    return torch.cat((y[:, :P], y[:, P:] + _tokens(t)), 1)


SYSTEMS = {  # name: (build, oracle)
    "LifeAttention": (lambda: LifeAttention(C, 3, P), life),
    "LifeAttention, heads across scales": (lambda: LifeAttention(C, 2, P, qkv_norm=True), life),
    "LocalAttention": (lambda: LocalAttention(C, 3, num_prefix_tokens=P, scale_norm=True), local_attention),
    "LocalityFeedForward": (lambda: LocalityFeedForward(C, 2.0, num_prefix_tokens=P), locality_ffn),
    "LocalityFeedForward, relu6": (lambda: LocalityFeedForward(C, 2.0, "relu6", num_prefix_tokens=P), locality_ffn),
    "LocalityFeedForward, hs+eca": (lambda: LocalityFeedForward(C, 2.0, "hs+eca", num_prefix_tokens=P), locality_ffn),
    "DWShortcut": (lambda: DWShortcut(C, 3, P), shortcut),
    "DWShortcut, two kernels": (lambda: DWShortcut(C, (3, 5), P), shortcut),
}


def build(name, dtype=torch.float64, seed=0):
    """(module with random weights and running statistics, its oracle, call(module, x, grid))."""
    torch.manual_seed(seed)
    module, oracle = SYSTEMS[name][0]().to(dtype), SYSTEMS[name][1]
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if value.is_floating_point() and value.dim() < 2:
                value.copy_(torch.rand_like(value) + 0.5 if "var" in key else 0.3 * torch.randn_like(value) + ("weight" in key))
    return module, oracle, call


def call(module, x, grid=GRID):
    return module(x, x.tanh(), grid) if isinstance(module, DWShortcut) else module(x, grid)


def tokens(grid=GRID, dtype=torch.float64, seed=1, batch=3):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, P + grid[0] * grid[1], C, generator=draw, dtype=dtype)


def gradients(module, y, x):
    """Of a loss that weights every element of y on its own, by name, x's under ""."""
    module.zero_grad()
    draw = torch.Generator().manual_seed(2)
    (y * torch.randn(y.shape, generator=draw, dtype=y.dtype)).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"": x.grad, **{name: g.clone() for name, g in found.items()}}


