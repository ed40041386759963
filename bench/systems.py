"""What each system runs: lifeops and its baselines as callables on the same tensors, and the check of their outputs.

Baselines are written as people write them. ``eager``: slice the patches, view them as a map, conv2d, view back, cat the prefix
(LIFE: the authors' module). ``onednn``: the bare convolution on a ready channels-last map, a floor without any token handling.
``plain``: the ordinary C -> 3C projection by the better of F.linear and a channels-last 1x1 convolution, the price of no
locality. ``compiled``: torch.compile of ``eager``. ``block``: the Transformer block without the shortcut around it. ``mlp``:
LayerNorm and the plain MLP that LocalViT's feed-forward replaces. ``sdpa``: torch's attention alone, without a local term.
``clone``: a copy of the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F

import lifeops
from bench.problems import Problem
from lifeops import config, registry, testing, torchlib
from lifeops.models.deit import Attention, Block
from lifeops.nn import DWShortcut, LifeAttention, LifeQKV, LocalityFeedForward
from lifeops.nn.eager_dw_shortcut import EagerDWShortcut
from lifeops.nn.eager_life import EagerLifeAttention
from lifeops.nn.eager_localvit import EagerLocalityFeedForward

Variants = dict[str, Callable[[], object]]


def build(p: Problem) -> tuple[Variants, Callable[[], None]]:
    """The variants of a problem, and a check that raises AssertionError if lifeops' result is wrong on the timed tensors."""
    torch.manual_seed(0)
    return BUILDERS[p.system](p)


def _eager_dwconv(x, w, p: Problem):
    map_ = x[:, p.P :].transpose(1, 2).reshape(p.B, p.C, p.H, p.W)
    y = F.conv2d(map_, w, padding=p.K // 2, groups=p.C)
    return torch.cat((x[:, : p.P], y.flatten(2).transpose(1, 2)), 1)


def _token_dwconv(p: Problem):
    dtype = getattr(torch, p.dtype)
    x, w = torch.randn(p.B, p.P + p.H * p.W, p.C).to(dtype), torch.randn(p.C, 1, p.K, p.K).to(dtype) / p.K
    dy = torch.randn_like(x)
    map_ = x[:, p.P :].transpose(1, 2).reshape(p.B, p.C, p.H, p.W).contiguous(memory_format=torch.channels_last)
    d_map = torch.randn_like(map_)

    def ours(x, w):
        return lifeops.token_dwconv(x, w, grid=(p.H, p.W), num_prefix_tokens=p.P)

    clone = {"clone": lambda: x.clone()}
    if p.mode == "fwd":
        variants = {
            "lifeops": lambda: ours(x, w),
            "eager": lambda: _eager_dwconv(x, w, p),
            "onednn": lambda: F.conv2d(map_, w, padding=p.K // 2, groups=p.C),
            **clone,
        }
        args = x, w, None, None, p.H, p.W, p.P, "keep", ""
        return _no_grad(variants), lambda: _check("token_dwconv", args)
    dw_args = dy, x, p.K, p.H, p.W, p.P, "keep", dtype, None, ""
    if p.mode == "dw":
        conv = ([1, 1], [p.K // 2] * 2, [1, 1], False, [0, 0], p.C, [False, True, False])
        variants = {
            "lifeops": lambda: torch.ops.lifeops.token_dwconv_bwd_dw(*_asked(dw_args)),
            "onednn": lambda: torch.ops.aten.convolution_backward(d_map, map_, w, None, *conv),
            **clone,
        }
        return _no_grad(variants), lambda: _check("token_dwconv_bwd_dw", dw_args, terms=p.B * p.H * p.W)
    leaves = x.requires_grad_(), w.requires_grad_()
    variants = {
        "lifeops": lambda: torch.autograd.grad(ours(*leaves), leaves, dy),
        "eager": lambda: torch.autograd.grad(_eager_dwconv(*leaves, p), leaves, dy),
    }
    dx_args = dy, w.detach(), p.H, p.W, p.P, "keep", ""

    def check():
        _check("token_dwconv_bwd_dx", dx_args)
        _check("token_dwconv_bwd_dw", (dy, x.detach(), *dw_args[2:]), terms=p.B * p.H * p.W)

    return variants, check


def _no_grad(variants: Variants) -> Variants:
    return {name: torch.no_grad()(fn) for name, fn in variants.items()}


def _asked(args: tuple) -> tuple:
    """An operator's arguments, the last of them the backend that an enclosing ``lifeops.use_backend`` asks for."""
    return (*args[:-1], config.requested_backend(None))


def _check(name: str, args: tuple, terms: int = 1) -> None:
    """The correctness policy on at most two samples of the batch (a float64 oracle of all of them takes longer than the timing)."""
    op, args = registry.ops[name], _asked(args)
    args = tuple(a[:2] if isinstance(a, torch.Tensor) and a.dim() == 3 else a for a in args)
    with torch.no_grad():
        testing.check(op, args, torchlib.overload(op)(*args), terms=terms)


def _life_inputs(p: Problem):
    dtype = getattr(torch, p.dtype)
    x = torch.randn(p.B, p.P + p.H * p.W, p.C).to(dtype)
    heads = p.C // 64
    return x, heads, dtype, torch.randn(p.B, p.P + p.H * p.W, 3 * p.C).to(dtype)


def _plain(x, weight, bias):
    """The plain projection on both library paths; the report takes the better one."""
    kernel = weight.detach()[:, :, None, None].clone().requires_grad_(weight.requires_grad)
    return {
        "plain_linear": (lambda: F.linear(x, weight, bias), (x, weight, bias)),
        "plain_conv1x1": (lambda: F.conv2d(x.transpose(1, 2).unsqueeze(3), kernel, bias).squeeze(3).transpose(1, 2), (x, kernel, bias)),
    }


def _life_qkv(p: Problem):
    x, heads, dtype, dy = _life_inputs(p)
    eager = EagerLifeAttention(p.C, heads, p.P).to(dtype).qkv
    ours = LifeQKV(p.C, heads, p.P).to(dtype)
    ours.load_state_dict(eager.state_dict())
    linear = torch.nn.Linear(p.C, 3 * p.C).to(dtype)
    grid = p.H, p.W
    if p.mode == "fwdbwd":
        x.requires_grad_()  # modules get a view of it: FlopCounterMode's hooks cannot stand leaves under autograd.grad
    d_scales = [t.contiguous() for t in dy.chunk(3, -1)]
    runs = {
        "lifeops": (lambda: ours.scales(x, grid), (x, *ours.parameters()), d_scales),
        "eager": (lambda: torch.cat(eager(x.view_as(x), grid), -1), (x, *eager.parameters()), dy),
        **{name: (fn, leaves, dy) for name, (fn, leaves) in _plain(x, linear.weight, linear.bias).items()},
    }

    def check():
        expected, got = eager(x, grid), ours(x, grid)
        for a, e in zip(got, expected, strict=True):
            limit = (1e-5 if dtype == torch.float32 else 4e-2) * e.abs().max()
            assert (a - e).abs().max() <= limit, f"life_qkv is off by {(a - e).abs().max():.2e}, allowed {limit:.2e}"

    return _modes(p, runs), check


def _local_attention(p: Problem):
    dtype, h = getattr(torch, p.dtype), p.C // 64
    qkv = torch.randn(p.B, p.P + p.H * p.W, 3, h, 64).to(dtype)
    q, k, v = (t.detach() for t in qkv.permute(2, 0, 3, 1, 4))
    w, b, dy = torch.randn(p.C, 1, p.K, p.K).to(dtype) / p.K, torch.randn(p.C).to(dtype), torch.randn(*qkv.shape[:2], p.C).to(dtype)
    leaves = q, k, v, w, b
    if p.mode == "fwdbwd":
        for t in leaves:
            t.requires_grad_()

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def eager():
        map_ = v.transpose(1, 2).flatten(2)[:, p.P :].transpose(1, 2).reshape(p.B, p.C, p.H, p.W)
        local = F.conv2d(map_, w, b, padding=p.K // 2, groups=p.C).flatten(2).transpose(1, 2)
        return sdpa() + F.pad(local, (0, 0, p.P, 0))

    runs = {
        "lifeops": (lambda: lifeops.local_attention(q, k, v, w, b, grid=(p.H, p.W), num_prefix_tokens=p.P), leaves, dy),
        "sdpa": (sdpa, leaves[:3], dy),
        "eager": (eager, leaves, dy),
    }

    def check():
        op = registry.ops["local_attention"]
        args = *(t[:1].detach() for t in (q, k, v)), w.detach(), b.detach(), *[None] * 3, p.H, p.W, p.P, 0.125, 0.0, ""
        with torch.no_grad():
            testing.check(op, args, torchlib.overload(op)(*args), terms=p.P + p.H * p.W)

    return _modes(p, runs), check


def _life_attention(p: Problem):
    x, heads, dtype, dy = _life_inputs(p)
    eager = EagerLifeAttention(p.C, heads, p.P).to(dtype)
    ours = LifeAttention(p.C, heads, p.P).to(dtype)
    ours.load_state_dict(eager.state_dict())
    grid, dy = (p.H, p.W), dy[..., : p.C].contiguous()
    if p.mode == "fwdbwd":
        x.requires_grad_()
    runs = {
        "lifeops": (lambda: ours(x.view_as(x), grid), (x, *ours.parameters()), dy),
        "eager": (lambda: eager(x.view_as(x), grid), (x, *eager.parameters()), dy),
    }

    def check():
        a, e = ours(x, grid), eager(x, grid)
        limit = (1e-5 if dtype == torch.float32 else 4e-2) * e.abs().max()
        assert (a - e).abs().max() <= limit, f"life_attention is off by {(a - e).abs().max():.2e}, allowed {limit:.2e}"

    return _modes(p, runs), check


def _mlp(dim: int) -> torch.nn.Module:
    layers = torch.nn.LayerNorm(dim), torch.nn.Linear(dim, 4 * dim), torch.nn.GELU(), torch.nn.Linear(4 * dim, dim)
    return torch.nn.Sequential(*layers)


def _localvit_ffn(p: Problem):
    dtype, grid = getattr(torch, p.dtype), (p.H, p.W)
    x, dy = (torch.randn(p.B, p.P + p.H * p.W, p.C).to(dtype) for _ in range(2))
    eager = EagerLocalityFeedForward(p.C, reduction=p.C, num_prefix_tokens=p.P).to(dtype)
    ours = LocalityFeedForward(p.C, reduction=p.C, num_prefix_tokens=p.P).to(dtype)
    ours.load_state_dict(eager.state_dict())
    mlp = _mlp(p.C).to(dtype)
    reference = copy.deepcopy(eager).double().train(p.mode == "fwdbwd")
    if p.mode == "fwd":
        lifeops.fuse_(ours.eval()), eager.eval(), mlp.eval()
    else:
        x.requires_grad_()
    compiled = torch.compile(copy.deepcopy(eager))
    runs = {
        "lifeops": (lambda: ours(x.view_as(x), grid), (x, *ours.parameters()), dy),
        "eager": (lambda: eager(x.view_as(x), grid), (x, *eager.parameters()), dy),
        "compiled": (lambda: compiled(x, grid), (x, *compiled.parameters()), dy),
        "mlp": (lambda: x + mlp(x.view_as(x)), (x, *mlp.parameters()), dy),
    }

    return _modes(p, runs), lambda: _compare(p, ours, reference, x)


def _compare(p: Problem, ours, reference, *inputs) -> None:
    """``ours`` against ``reference``, a float64 module, on the tensors that are timed."""
    with torch.no_grad():
        e, a = reference(*(x.double() for x in inputs), (p.H, p.W)), ours(*inputs, (p.H, p.W)).double()
    limit = (1e-5 if p.dtype == "float32" else 4e-2) * e.abs().max()
    assert (a - e).abs().max() <= limit, f"{p.system} is off by {(a - e).abs().max():.2e}, allowed {limit:.2e}"


def _shortcuts(p: Problem):
    """The authors' module, ours with the same weights and running statistics, and a float64 copy of the former."""
    eager = EagerDWShortcut(p.C, p.K or 3, p.P)
    for norm in eager.batchnorms:
        torch.nn.init.uniform_(norm.running_mean), torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    eager = eager.to(getattr(torch, p.dtype)).train(p.mode == "fwdbwd")
    ours = DWShortcut(p.C, p.K or 3, p.P).to(getattr(torch, p.dtype)).train(p.mode == "fwdbwd")
    ours.load_state_dict(eager.state_dict())
    return eager, ours, copy.deepcopy(eager).double()


def _dw_shortcut(p: Problem):
    """What the shortcut itself costs: x and a block's output in, their sum out."""
    x, y, dy = (torch.randn(p.B, p.P + p.H * p.W, p.C).to(getattr(torch, p.dtype)) for _ in range(3))
    eager, ours, reference = _shortcuts(p)
    grid = p.H, p.W
    if p.mode == "fwdbwd":
        x.requires_grad_(), y.requires_grad_()
    compiled = torch.compile(copy.deepcopy(eager))
    runs = {
        "lifeops": (lambda: ours(x.view_as(x), y.view_as(y), grid), (x, y, *ours.parameters()), dy),
        "eager": (lambda: eager(x.view_as(x), y.view_as(y), grid), (x, y, *eager.parameters()), dy),
        "compiled": (lambda: compiled(x, y, grid), (x, y, *compiled.parameters()), dy),
        "clone": (lambda: x.clone(), (x,), dy),
    }
    return _modes(p, runs), lambda: _compare(p, ours, reference, x, y)


def _dw_shortcut_block(p: Problem):
    """A ViT block with the shortcut, with the authors', and alone."""
    dtype, grid = getattr(torch, p.dtype), (p.H, p.W)
    x, dy = (torch.randn(p.B, p.P + p.H * p.W, p.C).to(dtype) for _ in range(2))
    block = Block(p.C, Attention(p.C, p.C // 64, qkv_bias=True), 4.0, 1e-6, torch.nn.Identity()).to(dtype).train(p.mode == "fwdbwd")
    eager, ours, reference = _shortcuts(p)
    if p.mode == "fwdbwd":
        x.requires_grad_()
    leaves = x, *block.parameters()
    runs = {
        "lifeops": (lambda: ours(x.view_as(x), block(x.view_as(x), grid), grid), (*leaves, *ours.parameters()), dy),
        "eager": (lambda: eager(x.view_as(x), block(x.view_as(x), grid), grid), (*leaves, *eager.parameters()), dy),
        "block": (lambda: block(x.view_as(x), grid), leaves, dy),
    }
    wide = copy.deepcopy(block).double()
    return _modes(p, runs), lambda: _compare(p, lambda x, g: ours(x, block(x, g), g), lambda x, g: reference(x, wide(x, g), g), x)


def _modes(p: Problem, runs) -> Variants:
    if p.mode == "fwd":
        return _no_grad({name: fn for name, (fn, _, _) in runs.items()})

    def step(fn, leaves, grad):
        return lambda: torch.autograd.grad(fn(), leaves, grad)

    return {name: step(*run) for name, run in runs.items()}


BUILDERS = {
    "token_dwconv": _token_dwconv, "life_qkv": _life_qkv, "local_attention": _local_attention, "life_attention": _life_attention,
    "localvit_ffn": _localvit_ffn, "dw_shortcut": _dw_shortcut, "dw_shortcut_block": _dw_shortcut_block,
}  # fmt: skip


def better_plain(times: dict[str, float]) -> dict[str, float]:
    """One entry "plain", the better of its paths, beside the others."""
    paths = [t for name, t in times.items() if name.startswith("plain_")]
    return {**times, **({"plain": min(paths)} if paths else {})}
