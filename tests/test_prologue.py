"""token_dwconv with prologue and epilogue: gradients, transforms, compile, errors. The kernels themselves are in test_ops.py."""

import pytest
import torch
import torch.nn.functional as F

import lifeops
from lifeops import ChannelAct, torchlib
from lifeops.ops.channel.activations import ACTS

GRID = (4, 5)


def _problem(P=2, C=6, K=3, B=2):
    torch.manual_seed(0)
    scales, shifts = [torch.randn(C) + 1 for _ in range(2)], [torch.randn(C) for _ in range(2)]
    draw = [torch.randn(B, P + 20, C), torch.randn(C, 1, K, K), torch.randn(C), scales[0], shifts[0], scales[1], shifts[1]]
    return [t.double().requires_grad_() for t in draw]


def _value(v, act):
    return {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "gelu": F.gelu}[act](v)


def _expected(x, w, b, s, t, s2, t2, act, out_act, P):
    """By hand: the activation on the map, torch's convolution with zero padding after it, the rest."""
    maps = _value(x[:, P:] * s + t, act).transpose(1, 2).unflatten(2, GRID)
    z = F.conv2d(maps, w, b, padding=w.shape[-1] // 2, groups=w.shape[0]).flatten(2).transpose(1, 2)
    return _value(z * s2 + t2, out_act)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("out_act", ["none", "hardswish"])
def test_values_and_gradients(act, out_act, backend):
    leaves = _problem()
    x, w, b, s, t, s2, t2 = leaves
    residual = torch.randn(2, 22, 6).double()
    with lifeops.use_backend(backend):
        steps = {"prologue": ChannelAct(s, t, act), "epilogue": ChannelAct(s2, t2, out_act), "pool": True, "stats": True}
        got = lifeops.token_dwconv(x, w, b, grid=GRID, num_prefix_tokens=2, residual=residual, **steps)
        with torch.no_grad():
            fused = lifeops.token_dwconv(x, w, b, grid=GRID, num_prefix_tokens=2, residual=residual, **steps)
    y = _expected(*leaves, act, out_act, 2)
    expected = torch.cat((x[:, :2], y), 1) + residual, y.sum(1), y.mean((0, 1)), y.var((0, 1), unbiased=False) * 40
    for a, f, e in zip(got, fused, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)
    weights = [torch.randn_like(e) for e in expected]
    ours = torch.autograd.grad(got, leaves, weights)
    for a, e in zip(ours, torch.autograd.grad(expected, leaves, weights), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize(("P", "prefix"), [(0, "keep"), (2, "keep"), (2, "drop")])
def test_an_epilogue_alone(P, prefix, act, backend):
    """The plain convolution and an activation, as in the feed-forwards of PVT v2 and Segformer."""
    x, w, b, *_ = _problem(P)
    residual = torch.randn(2, 20 + (P if prefix == "keep" else 0), 6, dtype=torch.float64, requires_grad=True)
    step = {"prefix": prefix, "residual": residual, "epilogue": ChannelAct(act=act), "backend": backend}
    y = lifeops.token_dwconv(x, w, b, grid=GRID, num_prefix_tokens=P, **step)
    one, zero = torch.ones(6).double(), torch.zeros(6).double()
    patches = _expected(x, w, b, one, zero, one, zero, "none", act, P)
    expected = (torch.cat((x[:, :P], patches), 1) if prefix == "keep" else patches) + residual
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy, leaves = torch.randn_like(y), [x, w, b, residual]
    for a, e in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("frozen", "expected"), [(False, {"token_dwconv_act_bwd"}), (True, {"token_dwconv_bwd_dx", "channel_act_grad"})]
)
def test_backward_of_an_epilogue_alone(frozen, expected):
    """One pass that keeps x alone; with frozen weights the plain convolution's gradient and the activation's."""
    x, w, b, *_ = _problem(2)
    saved = []
    for t in (w, b):
        t.requires_grad_(not frozen)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lifeops.token_dwconv(x, w, b, grid=GRID, num_prefix_tokens=2, epilogue=ChannelAct(act="gelu"))
    assert frozen or {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, w, b)}
    torchlib.last_backend.clear()
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert {name for name, backend in torchlib.last_backend.items() if backend == "cpu"} == expected
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.square().sum().backward()


def _run(x, w, b, s, t, *_):
    return lifeops.token_dwconv(x, w, b, grid=GRID, num_prefix_tokens=2, prologue=ChannelAct(s, t, "hardswish"))


def test_gradcheck():
    assert torch.autograd.gradcheck(_run, _problem())


@pytest.mark.parametrize("wanted", range(5))
def test_needs_input_grad(wanted):
    leaves = _problem()
    expected = torch.autograd.grad(_run(*leaves).square().sum(), leaves[wanted])
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wanted)
    torch.testing.assert_close(torch.autograd.grad(_run(*leaves).square().sum(), leaves[wanted]), expected)


def test_only_the_pre_activation_is_kept():
    x, w, b, s, t, *_ = _problem()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        _run(x, w, b, s, t)
    assert set(kept) <= {leaf.data_ptr() for leaf in (x, w, b, s, t)}


def test_transforms():
    leaves = [leaf.detach() for leaf in _problem()]
    x = torch.randn(3, *leaves[0].shape).double()
    got = torch.func.vmap(lambda v: _run(v, *leaves[1:]))(x)
    torch.testing.assert_close(got, torch.stack([_run(v, *leaves[1:]) for v in x]))
    gradient = torch.func.grad(lambda v: _run(v, *leaves[1:]).square().sum())(leaves[0])
    (expected,) = torch.autograd.grad(_run(x0 := leaves[0].clone().requires_grad_(), *leaves[1:]).square().sum(), x0)
    torch.testing.assert_close(gradient, expected)


def test_compiled():
    torch._dynamo.reset()
    leaves = _problem()
    compiled = torch.compile(_run, fullgraph=True, dynamic=True, backend="aot_eager")
    y, expected = compiled(*leaves), _run(*leaves)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaves[:5]), torch.autograd.grad(expected.sum(), leaves[:5]))


def test_autocast():
    leaves = [leaf.detach().float() for leaf in _problem()]
    with torch.autocast("cpu", torch.bfloat16):
        y = _run(*leaves)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), _run(*leaves), rtol=0.05, atol=0.3)


def test_bad_input():
    x, w, b, s, t, _, _ = _problem()
    run = lambda prologue: lifeops.token_dwconv(x, w, b, grid=GRID, num_prefix_tokens=2, prologue=prologue)  # noqa: E731
    known = "'none', 'relu', 'relu6', 'hardswish', 'gelu', 'gelu_first'"
    with pytest.raises(ValueError, match=f"prologue.act must be one of {known}, got 'silu'"):
        run(ChannelAct(s, t, "silu"))
    with pytest.raises(TypeError, match=r"prologue must be a lifeops.ChannelAct\(scale, shift, act\), got str"):
        run("gelu")
    with pytest.raises(ValueError, match=r"scale must have shape \(6,\), dtype torch.float64 on cpu, got \(5,\)"):
        run(ChannelAct(s[:5], t))


def test_explain():
    x, w, *_ = _problem()
    steps = {"prologue": ChannelAct(act="gelu"), "epilogue": ChannelAct(act="relu6")}
    report = lifeops.explain("token_dwconv", x, w, grid=GRID, num_prefix_tokens=2, **steps)
    assert [r.op for r in report[:3]] == ["token_dwconv_act", "token_dwconv_act_bwd_dx", "token_dwconv_act_bwd_dw"]
    assert {r.op for r in report[3:]} == {"channel_act", "channel_act_sums", "channel_act_grad"}
