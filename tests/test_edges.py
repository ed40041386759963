"""Every operator with parameters that are views, tensors on another device, and grids with nothing in them."""

import os

import pytest
import torch

import lifeops
from lifeops import registry, testing, torchlib

BACKEND = os.environ.get("LIFEOPS_TEST_BACKEND", "cpu")
registry.load(BACKEND)
OPS = [n for n in registry.ops if BACKEND in registry.ops[n].impls]


def _names(op):
    return [a.strip().split(" ")[-1] for a in op.schema[op.schema.index("(") + 1 : op.schema.index(") ->")].split(",")]


def _apart(t):
    """The same values, every second element of a larger tensor of NaN."""
    holder = t.new_full([2 * n for n in t.shape], torch.nan)
    view = holder[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_strided_parameters(name, dtype):
    """A tensor argument of any strides gives the bits of a contiguous one."""
    op = registry.ops[name]
    sample = next(s for s in op.samples() if s.tiny)
    args = testing.make(op, sample, dtype, backend=BACKEND)
    expected = testing.tensors(torchlib.overload(op)(*args))
    for i, t in enumerate(args):
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            got = testing.tensors(torchlib.overload(op)(*args[:i], _apart(t), *args[i + 1 :]))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=4 * testing.EPS[dtype], atol=4 * testing.EPS[dtype], msg=_names(op)[i])


@pytest.mark.parametrize("prefix", ["zero", "drop", "keep"])
@pytest.mark.parametrize("C", [16, 21])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_residual_is_the_input(dtype, C, prefix):
    """The same tensor in both places, which the kernels read once, gives what a copy of it gives: its values and the input's."""
    H, W, P = 4, 6, 0 if prefix == "drop" else 2
    size = {"grid": (H, W), "num_prefix_tokens": P, "prefix": prefix}
    x, weight, bias = (torch.randint(-3, 4, s).to(dtype) for s in ((3, P + H * W, C), (C, 1, 5, 5), (C,)))
    patches = x[:, P:].mT.unflatten(2, (H, W)).double()
    y = torch.nn.functional.conv2d(patches, weight.double(), bias.double(), padding=2, groups=C).flatten(2).mT
    expected = torch.cat((x[:, :P].double() * (2 if prefix == "keep" else 1), y + x[:, P:].double()), 1)
    for residual in (x, x.clone()):
        got = lifeops.token_dwconv(x, weight, bias, **size, residual=residual)
        assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("name", OPS)
def test_another_device(name):
    """Refused by name: a tensor on another device than the sequence."""
    op = registry.ops[name]
    sample = next(s for s in op.samples() if s.tiny)
    args = testing.make(op, sample, torch.float32, backend=BACKEND)
    for i, t in enumerate(args):
        if i and isinstance(t, torch.Tensor):
            with pytest.raises(ValueError, match=f"^{name}: "):
                op.check(*args[:i], t.to("meta"), *args[i + 1 :])


@pytest.mark.parametrize("backend", ["reference", BACKEND])
def test_no_channels(backend):
    x, weight, bias = (torch.zeros(shape, requires_grad=True) for shape in ((2, 7, 0), (0, 1, 3, 3), (0,)))
    y = lifeops.token_dwconv(x, weight, bias, grid=(2, 3), num_prefix_tokens=1, backend=backend)
    assert y.shape == x.shape
    assert [g.shape for g in torch.autograd.grad(y.sum(), [x, weight, bias])] == [x.shape, weight.shape, bias.shape]


@pytest.mark.parametrize(("B", "grid", "P"), [(0, (2, 3), 1), (2, (0, 3), 2), (2, (3, 0), 0), (2, (0, 0), 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_nothing_there(dtype, B, grid, P):
    """Empty batches and grids, prefix tokens alone: zero gradients of the parameters, never NaN."""
    C, place = 12, {"grid": grid, "num_prefix_tokens": P}
    x = torch.randn(B, P + grid[0] * grid[1], C, dtype=dtype, requires_grad=True)
    weight, bias, scale = (torch.ones(*s, dtype=dtype, requires_grad=True) for s in ((C, 1, 3, 3), (C,), (C,)))
    wide = scale.to(torch.promote_types(dtype, torch.float32))
    for act in ("relu6", "gelu", "gelu_first"):
        y = lifeops.token_dwconv(x, weight, bias, **place, prologue=lifeops.ChannelAct(wide, wide, act), stats=True, pool=True)
        total = sum(t.sum() for t in (y.y, y.pool, y.mean, y.m2))
        for g in torch.autograd.grad(total, [x, weight, bias, scale]):
            assert g.isfinite().all()
    w = [torch.ones(*s, dtype=dtype, requires_grad=True) for s in ((C, C), (C, 1, 3, 3), (C, C), (C, 1, 5, 5), (C, C))]
    for aux_key in ("multiscale", "scale1"):
        q, k, v = lifeops.life_qkv(x, w[0], None, *w[1:], **place, aux_key=aux_key)
        for g in torch.autograd.grad((q + k + v).sum(), [x, *w]):
            assert g.isfinite().all()
    h = x.detach().unflatten(2, (3, 4)).transpose(1, 2)
    r = torch.zeros(B, 1, x.shape[1], dtype=torch.promote_types(dtype, torch.float32))
    for fusion in ("mean", "max", "min"):
        for ratio in (0.0, 0.5):
            assert lifeops.rollout_step(r, h, h, head_fusion=fusion, discard_ratio=ratio).shape == r.shape
    module = lifeops.nn.DWShortcut(C, 3, P).to(dtype).eval()  # in training a norm of nothing is refused, as torch's is
    y = module(x, x, grid)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [x, *module.parameters()]))


@pytest.mark.parametrize("kind", ["se", "eca", "ecah"])
def test_a_gate_of_nothing(kind):
    from lifeops.ops.channel.gate import gate, gate_backward

    params = (torch.ones(2, 6), torch.ones(2), torch.ones(6, 2), torch.ones(6)) if kind == "se" else (torch.ones(1, 1, 3),)
    m = torch.zeros(0, 6)
    assert gate(kind, m, params).shape == m.shape
    dm, grads = gate_backward(kind, m, m, params)
    assert dm.shape == m.shape
    assert all(g.shape == p.shape and not g.any() for g, p in zip(grads, params, strict=True))


def test_large_kernels_of_life_qkv():
    """Past the compiled kernels' 15 the reference runs, as token_dwconv does; an even or oblong kernel is refused."""
    C, x = 9, torch.randn(1, 1 + 4 * 5, 9)

    def run(dw2, dw3, backend=None):
        w = torch.eye(C)
        with pytest.warns(lifeops.FallbackWarning) if max(dw2.shape[2], dw3.shape[2]) > 15 and not backend else _quiet():
            return lifeops.life_qkv(x, w, None, dw2, w, dw3, w, grid=(4, 5), backend=backend)

    small, large = torch.randn(C, 1, 3, 3), torch.randn(C, 1, 17, 17)
    for kernels in ((large, small), (small, large)):
        registry._warned.clear()
        for a, b in zip(run(*kernels), run(*kernels, "reference"), strict=True):
            assert torch.equal(a, b)
        with pytest.raises(lifeops.NotSupported, match="K = 17"):
            run(*kernels, "cpu")
    for bad in (torch.randn(C, 1, 4, 4), torch.randn(C, 1, 3, 5)):
        for kernels in ((bad, small), (small, bad)):
            with pytest.raises(ValueError, match=r"^life_qkv: dw[23] must have shape \(9, 1, K, K\) with an odd K"):
                run(*kernels)


def _quiet():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.skipif(BACKEND == "triton", reason="a process of its own runs these")
def test_strided_parameters_in_triton():
    pytest.importorskip("triton")
    from test_triton_ops import _interpreted

    assert _interpreted("test_edges.py", "strided_parameters and float32 and token_dwconv and not bwd") == 4
