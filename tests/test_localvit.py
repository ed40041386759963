"""LocalViT: the authors' numbers, batch norm's behaviour, what is saved, folding, bad input."""

import copy

import pytest
import torch

import lifeops
from lifeops.nn import LocalityFeedForward
from lifeops.nn.localvit import ACTS
from test_life import golden

NAMES = [f"localvit_ffn_{act}_{mode}" for act in ("relu6", "hs", "hs_se", "hs_eca", "hs_ecah") for mode in ("eval", "train")]


def _state(d, prefix):
    return {k.removeprefix(prefix): v for k, v in d.items() if k.startswith(prefix)}


def _close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def _tokens(t, P):
    """Maps (B, C, H, W) as tokens behind P prefix tokens."""
    patches = t.flatten(2).transpose(1, 2)
    return torch.cat((torch.arange(P * t.shape[1], dtype=t.dtype).view(1, P, t.shape[1]).expand(len(t), -1, -1), patches), 1)


@pytest.mark.parametrize("P", [0, 1, 2])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, backend, P):
    """Outputs, gradients and running statistics of the authors' module to 1e-10; prefix tokens pass untouched."""
    d = golden_with_act(name)
    module = LocalityFeedForward(8, 4.0, d["act"], 4, num_prefix_tokens=P).double().train(bool(d["training"]))
    module.load_state_dict(_state(d, "param."))
    x, g = _tokens(d["x"], P).requires_grad_(), _tokens(d["g"], P)
    assert module._fast(x)
    with lifeops.use_backend(backend):
        y = module(x, (5, 5))
    y.backward(g)
    _close(y, _tokens(d["y"], P))
    _close(x.grad[:, P:], _tokens(d["grad_x"], 0))
    assert torch.equal(x.grad[:, :P], g[:, :P])
    for key, parameter in module.named_parameters():
        _close(parameter.grad, d[f"grad.{key}"])
    for key, value in module.state_dict().items():
        _close(value, d[f"after.{key}"])
    if not module.training:
        with torch.no_grad(), lifeops.use_backend(backend):
            _close(module(_tokens(d["x"], P), (5, 5)), _tokens(d["y"], P))


def golden_with_act(name):
    import numpy as np

    from test_life import GOLDEN

    raw = np.load(GOLDEN / f"{name}.npz")
    tensors = {k: torch.from_numpy(np.asarray(raw[k])) for k in raw if raw[k].dtype.kind != "U"}
    return {**tensors, "act": str(raw["act"])}


def _module(act="hs+se", P=2, dim=12, **options):
    torch.manual_seed(0)
    module = LocalityFeedForward(dim, 2.0, act, 4, num_prefix_tokens=P, **options).double()
    for key, value in module.state_dict().items():
        if key.endswith(("running_var",)):
            value.uniform_(0.5, 2)
        elif value.dtype.is_floating_point and value.dim() == 1:
            value.normal_()
    return module


def _both(module, x, grid, g):
    """(output, input gradient, parameter gradients, state) on the fast and on the plain path."""
    out = []
    for run in (module._run, module._plain):
        m = copy.deepcopy(module)
        leaf = x.clone().requires_grad_()
        y = (m._run if run == module._run else m._plain)(leaf, grid)
        y.backward(g)
        out.append((y, leaf.grad, *[p.grad for p in m.parameters()], *m.state_dict().values()))
    return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_fast_path_is_the_plain_path(act, training):
    module = _module(act).train(training)
    x, g = torch.randn(3, 2 + 12, 12, dtype=torch.float64), torch.randn(3, 14, 12, dtype=torch.float64)
    for fast, plain in zip(*_both(module, x, (3, 4), g), strict=True):
        _close(fast, plain, 1e-11)
