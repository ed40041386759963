"""LIFE: the authors' numbers, every layout of heads and prefixes, double backward, saved bytes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lifeops
from lifeops import model_cost
from lifeops.nn import LifeAttention, LifeQKV
from lifeops.nn.eager_life import EagerLifeAttention
from lifeops.ops.life_qkv import spec
from lifeops.ops.life_qkv.project_scales import project_scales
from lifeops.ops.life_qkv.spec import scale_dims
from lifeops.testing import Maker

GOLDEN = Path(__file__).parent / "golden"
QKV_FILES = ["life_qkv_c24_p1_5x5", "life_qkv_c24_p1_5x5_norm", "life_qkv_c12_p0_4x4"]


def golden(name):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", QKV_FILES)
def test_qkv_golden(name, backend, recompute):
    """The authors' outputs and gradients to 1e-10, their prefix keys included."""
    d = golden(name)
    module = LifeQKV(d["x"].shape[2], 3, int(d["prefix"]), qkv_norm="norm" in name, aux_key="scale1", recompute=recompute).double()
    module.load_state_dict({k.removeprefix("param."): v for k, v in d.items() if k.startswith("param.")})
    x = d["x"].requires_grad_()
    with lifeops.use_backend(backend):
        qkv = module(x, tuple(d["grid"].tolist()))
    torch.autograd.backward(qkv, (d["gq"], d["gk"], d["gv"]))
    for got, key in zip(qkv, "qkv", strict=True):
        _close(got, d[key])
    _close(x.grad, d["grad_x"])
    for parameter_name, parameter in module.named_parameters():
        _close(parameter.grad, d[f"grad.{parameter_name}"])


def _reference_attention(module, x, grid):
    """softmax(q kᵀ / sqrt(d)) v and the projection, from the formulas."""
    P, (H, W) = module.num_prefix_tokens, grid
    z = [F.linear(x, module.qkv.scale1.weight, module.qkv.scale1.bias)]
    for scale in (module.qkv.scale2, module.qkv.scale3):
        patches = z[-1][:, P:].transpose(1, 2).unflatten(2, (H, W))
        w = scale.depthwise.weight
        conv = F.conv2d(patches, w, padding=w.shape[-1] // 2, groups=w.shape[0]).flatten(2).transpose(1, 2)
        z.append(F.linear(torch.cat((z[-1][:, :P], conv), 1), scale.pointwise.weight[:, :, 0, 0]))
    if module.qkv.aux_key == "scale1" and P:
        prefix_keys = (torch.arange(x.shape[1])[:, None] < P) & (torch.arange(x.shape[2]) // (x.shape[2] // 3) == 1)
        z = [torch.where(prefix_keys, z[0], deeper) for deeper in z]
    q, k, v = (torch.cat([s.chunk(3, -1)[i] for s in z], -1) for i in range(3))
    if module.qkv.norm is not None:
        q, k, v = map(module.qkv.norm, (q, k, v))
    q, k, v = (t.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * module.head_dim**-0.5).softmax(-1)
    return module.proj((weights @ v).transpose(1, 2).flatten(2))


CONFIGS = {
    "cls": {"dim": 12, "num_heads": 3},
    "dist": {"dim": 24, "num_heads": 6, "num_prefix_tokens": 2},
    "registers": {"dim": 12, "num_heads": 3, "num_prefix_tokens": 5},
    "window": {"dim": 12, "num_heads": 3, "num_prefix_tokens": 0},
    "straddle": {"dim": 24, "num_heads": 4, "num_prefix_tokens": 2},
    "one_head": {"dim": 9, "num_heads": 1},
    "dim_32": {"dim": 32, "num_heads": 4, "num_prefix_tokens": 2},
    "dim_10": {"dim": 10, "num_heads": 5},
    "dim_16_h8": {"dim": 16, "num_heads": 8},
    "norm": {"dim": 12, "num_heads": 3, "qkv_norm": True},
    "scale1": {"dim": 12, "num_heads": 3, "aux_key": "scale1", "num_prefix_tokens": 2},
    "recompute": {"dim": 12, "num_heads": 3, "num_prefix_tokens": 2, "recompute": True},
    "scale1_recompute": {"dim": 12, "num_heads": 3, "aux_key": "scale1", "num_prefix_tokens": 2, "recompute": True},
}


def _module(config, seed=0):
    torch.manual_seed(seed)
    module = LifeAttention(**config).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_against_the_formulas(name, backend):
    module, grid = _module(CONFIGS[name]), (3, 4)
    x = Maker(1, torch.float64)(2, module.num_prefix_tokens + 12, module.dim).requires_grad_()
    with lifeops.use_backend(backend):
        y = module(x, grid)
    expected = _reference_attention(module, x, grid)
    _close(y, expected)
    g = torch.randn_like(y)
    inputs = x, *module.parameters()
    for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        _close(a, b)


@pytest.mark.parametrize("name", ["dist", "dim_10", "scale1", "scale1_recompute"])
def test_double_backward(name):
    module = _module(CONFIGS[name]).qkv
    names, values = zip(*[(n, p) for n, p in module.named_parameters()], strict=True)
    x = Maker(1, torch.float64)(1, module.num_prefix_tokens + 6, module.dim).requires_grad_()

    def f(x, *values):
        return sum(t.sin().sum() for t in torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x, (2, 3))))

    assert torch.autograd.gradgradcheck(f, (x, *values), fast_mode=True)


@pytest.mark.parametrize("inputs", [*([i] for i in range(7)), range(7)], ids=str)
@pytest.mark.parametrize("scale1", [False, True])
def test_gradients_of_any_outputs(scale1, inputs):
    """Of each subset of the operator's outputs (three scales and what their convolutions gave), for one input and for all."""
    C, P, (H, W) = 9, 2, (2, 3)
    make, c = Maker(5, torch.float64), 3 * 3
    tensors = [make(2, P + H * W, C), make(c, C), make(c), make(c, 1, 3, 3), make(c, c), make(c, 1, 5, 5), make(c, c)]
    wanted = [tensors[i].requires_grad_() for i in inputs]
    args = (*tensors, H, W, P, scale1, True, "")
    outs = [torch.ops.lifeops.life_qkv(*args), spec.reference(*args)]
    upstream = [make(*t.shape) for t in outs[0]]
    for asked in itertools.product((False, True), repeat=5):
        added = sum(t.sum() for t in wanted)  # so that there always is a gradient
        totals = [added + sum((t * g).sum() for t, g, a in zip(out, upstream, asked, strict=True) if a) for out in outs]
        grads = [torch.autograd.grad(total, wanted, retain_graph=True) for total in totals]
        for got, expected in zip(*grads, strict=True):
            _close(got, expected)


@pytest.mark.parametrize("wanted", [*itertools.product((False, True), repeat=3), None], ids=str)
def test_output_projection(wanted):
    """The projection scale by scale is that of the joined scales: values, gradients of any of (weight, bias, scales), a second derivative;
    without a bias (None), too.
    """
    make = Maker(3, torch.float64)
    weight, bias, parts = make(5, 9), None if wanted is None else make(5), [make(2, 7, width) for width in (2, 3, 4)]
    need = [t for t, asked in ((weight, wanted is None or wanted[0]), (bias, wanted and wanted[1])) if asked]
    need += parts if wanted is None or wanted[2] else parts[1:2]
    for t in need:
        t.requires_grad_()
    outs = project_scales(parts, weight, bias), F.linear(torch.cat(parts, -1), weight, bias)
    _close(*outs)
    upstream = make(*outs[0].shape)
    grads = [torch.autograd.grad(out, need, upstream, retain_graph=True) for out in outs]
    for got, expected in zip(*grads, strict=True):
        _close(got, expected)
    assert torch.autograd.gradgradcheck(lambda *_: project_scales(parts, weight, bias), need, fast_mode=True)


@pytest.mark.parametrize("name", ["dist", "scale1"])
def test_per_sample_gradients(name):
    module = _module(CONFIGS[name])
    parameters = dict(module.named_parameters())
    x = Maker(1, torch.float64)(3, module.num_prefix_tokens + 6, module.dim)

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x[None], (2, 3))).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))
        for g, e in zip(got.values(), expected, strict=True):
            _close(g[i], e)


def test_grid_of_the_call_beats_the_constructors():
    module = LifeAttention(12, 3, 1, grid=(2, 3))
    assert module(torch.randn(1, 7, 12)).shape == (1, 7, 12)
    assert module(torch.randn(1, 13, 12), (4, 3)).shape == (1, 13, 12)
    with pytest.raises(ValueError, match=r"1 \+ 2\*3 = 7, got 13"):
        module(torch.randn(1, 13, 12))


def test_scale_dims_sum_to_the_width():
    for dim in range(3, 40):
        assert sum(scale_dims(dim)) == dim
        assert max(scale_dims(dim)) - min(scale_dims(dim)) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision(dtype):
    module = LifeAttention(24, 3, 2)
    x = torch.randn(2, 22, 24, requires_grad=True)
    expected = module(x, (4, 5))
    with torch.autocast("cpu", dtype=dtype):
        y = module(x, (4, 5))
    assert y.dtype == dtype
    assert (y.float() - expected).abs().max() < 0.02 * expected.abs().max() + 1e-3
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


def test_attention_mask_per_head():
    module = _module(CONFIGS["dist"])
    x = torch.randn(1, 14, 24, dtype=torch.float64)
    mask = torch.randn(1, 6, 14, 14, dtype=torch.float64)
    q, k, v = module.qkv_heads(x, (3, 4))
    expected = module.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
    _close(module(x, (3, 4), attn_mask=mask), expected)


def test_compile_fullgraph():
    torch._dynamo.reset()
    module = LifeAttention(24, 3, 2)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in ((3, 4), (5, 2), (4, 4)):
        x = torch.randn(2, 2 + grid[0] * grid[1], 24, requires_grad=True)
        y, expected = compiled(x, grid), module(x, grid)
        torch.testing.assert_close(y, expected)
        wanted = x, module.proj.weight
        for a, b in zip(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dim", "heads"), [(192, 3), (384, 6), (768, 12)])
def test_saved_bytes(dim, heads):
    """At most 0.65 of the authors' module, 0.5 with recompute; distinct storages, no tensor hidden in a ctx attribute."""
    x = torch.randn(2, 198, dim, requires_grad=True)
    eager = saved_bytes(EagerLifeAttention(dim, heads, 2), x)
    assert saved_bytes(LifeAttention(dim, heads, 2), x) <= 0.65 * eager
    assert saved_bytes(LifeAttention(dim, heads, 2, recompute=True), x) <= 0.5 * eager


def saved_bytes(module, x):
    """Bytes of distinct storages that a forward pass on a 14x14 grid keeps for backward, beside x and the parameters."""
    outputs = []
    saved = model_cost.saved_bytes(lambda: outputs.append(module(x, (14, 14))), (x, *module.parameters()))
    _assert_no_hidden_tensors(outputs[0].grad_fn)
    return saved


def _assert_no_hidden_tensors(node, seen=None):
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return
    seen.add(node)
    for value in getattr(node, "__dict__", {}).values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            assert not isinstance(item, torch.Tensor), f"{node} holds a tensor"
    for parent, _ in node.next_functions:
        _assert_no_hidden_tensors(parent, seen)
