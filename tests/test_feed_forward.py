"""Two dense layers with GELU or QuickGELU between them: values, gradients, what is kept, and where the layers are called instead."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

import lifeops
from lifeops.cost.model_cost import saved_bytes
from lifeops.nn.feed_forward import FeedForward
from lifeops.ops.feed_forward import feed_forward


def _close(a, b, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def _module(quick, bias=True):
    torch.manual_seed(0)
    module = FeedForward(6, 10, quick).double()
    if not bias:
        module.fc1.bias = module.fc2.bias = None
    return module


def _formula(module, x):
    h = F.linear(x, module.fc1.weight, module.fc1.bias)
    a = F.gelu(h) if isinstance(module.act, torch.nn.GELU) else h * torch.sigmoid(1.702 * h)
    return F.linear(a, module.fc2.weight, module.fc2.bias)


@pytest.mark.parametrize("tokens", [(2, 30), (1, 5)])  # enough that QuickGELU's factors go into the weights, and not
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quick", [True, False])
def test_values_and_gradients(quick, bias, tokens):
    module = _module(quick, bias)
    x = torch.randn(*tokens, 6, dtype=torch.float64, requires_grad=True)
    assert module._fast(x) == (tokens == (2, 30) or not quick)
    leaves = (x, *module.parameters())
    y, expected = module(x), _formula(module, x)
    _close(y, expected)
    grads, truth = (torch.autograd.grad(t.square().sum(), leaves) for t in (y, expected))
    for a, b in zip(grads, truth, strict=True):
        _close(a, b)
    with torch.no_grad():
        _close(module(x), expected)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_frozen_parameters(act):
    """Whatever needs a gradient gets its own, and nothing else."""
    shapes = (2, 30, 6), (10, 6), (10,), (4, 10), (4,)
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    full = [v.clone().requires_grad_() for v in values]
    h = F.linear(full[0], full[1], full[2])
    expected = torch.autograd.grad(F.linear((F.gelu if act == "gelu" else F.silu)(h), full[3], full[4]).square().sum(), full)
    for wanted in itertools.product((False, True), repeat=5):
        if not any(wanted):
            continue
        leaves = [v.clone().requires_grad_(w) for v, w in zip(values, wanted, strict=True)]
        feed_forward(*leaves, act, "").square().sum().backward()
        for leaf, w, truth in zip(leaves, wanted, expected, strict=True):
            assert (leaf.grad is not None) == w
            if w:
                _close(leaf.grad, truth)


@pytest.mark.parametrize("quick", [True, False])
def test_only_the_hidden_tokens_are_kept(quick):
    module, x = _module(quick).float(), torch.randn(2, 300, 6, requires_grad=True)
    kept = 4 * 2 * 300 * 10 + quick * 4 * 2 * 60  # QuickGELU: and two weights with its factors
    assert saved_bytes(lambda: module(x), (x, *module.parameters())) == kept


@pytest.mark.parametrize("quick", [True, False])
def test_where_layers_are_called(quick):
    """Hooks, autocast, half precision, maps, transforms, compilers: the same numbers."""
    module = _module(quick)
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    expected = module(x)
    hooked = copy.deepcopy(module)
    hooked.act.register_forward_hook(lambda *_: None)
    assert not lifeops.explain(hooked)[0].fused
    _close(hooked(x), expected)
    _close(module(x[:, :, None])[:, :, 0], expected)
    _close(torch.func.vmap(module)(x[:, None])[:, 0], expected)
    torch._dynamo.reset()
    _close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    low = copy.deepcopy(module).bfloat16()
    assert (low(x.bfloat16()).double() - expected).abs().max() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        y = module.float()(x.float())
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).abs().max() < 0.05


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 30, 6, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(_module(False)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="feed forward: differentiable once, a second derivative was asked for"):
        g.sum().backward()
    with pytest.raises(ValueError, match="feed_forward: act must be 'gelu' or 'silu', got 'relu'"):
        feed_forward(x, torch.ones(2, 6), None, torch.ones(2, 2), None, "relu", "")
