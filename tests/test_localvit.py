"""LocalViT: the authors' numbers, batch norm's behaviour, what is saved, folding, bad input."""

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

import lifeops
from lifeops.models import localvit
from lifeops.nn import LocalityFeedForward
from lifeops.nn.eager_localvit import EagerLocalityFeedForward
from lifeops.nn.localvit import ACTS
from test_life import GOLDEN, saved_bytes

BACKENDS = ["triton"] if os.environ.get("LIFEOPS_TEST_BACKEND") == "triton" else ["reference", "cpu"]  # triton: test_triton_ops.py
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
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, backend, P):
    """Outputs, gradients and running statistics of the authors' module to 1e-10; prefix tokens pass untouched."""
    d = golden_with_act(name)
    module = LocalityFeedForward(8, 4.0, d["act"], 4, num_prefix_tokens=P).double().train(bool(d["training"]))
    module.load_state_dict(_state(d, "param."))
    x, g = _tokens(d["x"], P).requires_grad_(), _tokens(d["g"], P)
    assert module._fast(x, (3, 4))
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
    raw = np.load(GOLDEN / f"{name}.npz")
    tensors = {k: torch.from_numpy(np.asarray(raw[k])) for k in raw if raw[k].dtype.kind != "U"}
    return {**tensors, "act": str(raw["act"]) if "act" in raw else None}


def _module(act="hs+se", P=2, dim=12, **options):
    torch.manual_seed(0)
    return _randomised(LocalityFeedForward(dim, 2.0, act, 4, num_prefix_tokens=P, **options).double())


def _randomised(module):
    """Batch-norm statistics and affine values that a fresh module does not have."""
    for key, value in module.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.dtype.is_floating_point and value.dim() == 1:
            value.normal_()
    return module


def _both(module, x, grid, g):
    """(output, input gradient, parameter gradients, state) on the fast and on the composed path."""
    out = []
    for name in ("_run", "_composed"):
        m = copy.deepcopy(module)
        leaf = x.clone().requires_grad_()
        y = getattr(m, name)(leaf, grid)
        y.backward(g)
        out.append((y, leaf.grad, *[p.grad for p in m.parameters()], *m.state_dict().values()))
    return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_fast_path_is_the_composed_path(act, training):
    module = _module(act).train(training)
    x, g = torch.randn(3, 2 + 12, 12, dtype=torch.float64), torch.randn(3, 14, 12, dtype=torch.float64)
    for fast, plain in zip(*_both(module, x, (3, 4), g), strict=True):
        _close(fast, plain, 1e-11)


@pytest.mark.parametrize("dim", [192, 384])
def test_saved_bytes(dim):
    """At most a quarter of the authors' module in a training step; nothing hides in a ctx attribute."""
    x = torch.randn(2, 197, dim, requires_grad=True)
    ours, eager = LocalityFeedForward(dim, 4.0, "hs+se", dim), EagerLocalityFeedForward(dim, 4.0, dim)
    assert saved_bytes(ours, x) <= 0.25 * saved_bytes(eager, x)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_eager_baseline_is_the_authors(mode):
    d = golden_with_act(f"localvit_ffn_hs_se_{mode}")
    module = EagerLocalityFeedForward(8, 4.0, 4).double().train(mode == "train")
    module.load_state_dict(_state(d, "param."))
    x = _tokens(d["x"], 1).requires_grad_()
    y = module(x, (5, 5))
    y.backward(_tokens(d["g"], 1))
    _close(y, _tokens(d["y"], 1))
    _close(x.grad[:, 1:], _tokens(d["grad_x"], 0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("training", [True, False])
def test_low_precision(dtype, tolerance, training):
    """Outputs and gradients stay near the float64 plain path, relative to their largest value."""
    module = _module().train(training)
    x, g = torch.randn(4, 2 + 30, 12, dtype=torch.float64), torch.randn(4, 32, 12, dtype=torch.float64)
    _, plain = _both(module, x, (5, 6), g)
    low = copy.deepcopy(module).to(dtype)
    for norm in low._norms():
        norm.float()
    leaf = x.to(dtype).requires_grad_()
    y = low._run(leaf, (5, 6))
    assert y.dtype == dtype
    y.backward(g.to(dtype))
    got = y, leaf.grad, *[p.grad for p in low.parameters()]
    for a, e in zip(got, plain[: len(got)], strict=True):
        assert (a.double() - e).abs().max() <= tolerance * e.abs().max().clamp_min(1)


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 0.1}])
@pytest.mark.parametrize("frozen", [(), (0, 1, 2), (1,)])
def test_batch_norm_options(options, frozen):
    """Momentum, cumulative average, no running statistics, frozen norms: three steps and an evaluation, as nn.BatchNorm2d's."""
    torch.manual_seed(1)
    module = LocalityFeedForward(12, 2.0, "hs+se", 4).double()
    for i in (1, 4, 8):
        channels = module.conv[i].num_features
        module.conv[i] = nn.BatchNorm2d(channels, **options).double()
    module = _randomised(module) if module.conv[1].running_var is not None else module
    twin = copy.deepcopy(module)
    for m in (module, twin):
        for index in frozen:
            m._norms()[index].eval()
    for _ in range(3):
        x = torch.randn(2, 1 + 12, 12, dtype=torch.float64)
        _close(module._run(x, (3, 4)), twin._composed(x, (3, 4)), 1e-11)
    module.eval(), twin.eval()
    _close(module._run(x, (3, 4)), twin._composed(x, (3, 4)), 1e-11)
    for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
        _close(a, b, 1e-11)


def test_large_mean_keeps_the_variance():
    """Statistics are shifted sums: a mean of 1e4 beside a deviation of 1 does not cancel in float32."""
    x = torch.randn(4, 50, 24) + 1e4
    mean, m2 = torch.ops.lifeops.channel_stats(x, "none", 50, "")
    expected = x.double().var((0, 1), unbiased=False)
    torch.testing.assert_close(m2.double() / 200, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 1)), rtol=1e-6, atol=0)


def test_needs_input_grad():
    """Frozen parameters get no gradient and the rest theirs; a frozen input costs no dx."""
    module = _module().train()
    x = torch.randn(2, 2 + 12, 12, dtype=torch.float64)
    expected = _both(module, x, (3, 4), torch.ones(2, 14, 12, dtype=torch.float64))[1]
    names = [name for name, _ in module.named_parameters()]
    for kept in names:
        twin = copy.deepcopy(module)
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name == kept)
        twin._run(x, (3, 4)).sum().backward()
        _close(dict(twin.named_parameters())[kept].grad, expected[2 + names.index(kept)], 1e-10)


def test_double_backward_is_refused():
    x = torch.randn(2, 2 + 12, 12, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(_module().train()(x, (3, 4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="LocalityFeedForward: differentiable once, a second derivative was asked for"):
        g.sum().backward()


def test_transforms_take_the_composed_path():
    module = _module().eval()
    x = torch.randn(3, 2, 2 + 12, 12, dtype=torch.float64)
    _close(torch.func.vmap(lambda t: module(t, (3, 4)))(x), torch.stack([module(t, (3, 4)) for t in x]), 1e-11)


@pytest.mark.parametrize("act", ACTS)
def test_fuse(act):
    """Three batch norms folded: the same outputs, no norm left, and gradients still flow."""
    module = _module(act).eval()
    x = torch.randn(2, 2 + 12, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x, (3, 4))
        fused = lifeops.fuse_(copy.deepcopy(module))
        _close(fused(x, (3, 4)), expected, 1e-11)
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(p.grad is None for p in fused.parameters())
    fused(x, (3, 4)).sum().backward()
    for name, parameter in fused.named_parameters():
        leaf = copy.deepcopy(fused)
        leaf.zero_grad()
        leaf._composed(x, (3, 4)).sum().backward()
        _close(parameter.grad, dict(leaf.named_parameters())[name].grad, 1e-10)


def test_fuse_refuses_training_mode():
    with pytest.raises(ValueError, match=r"conv.1 takes its statistics from the batch: call .eval\(\) first"):
        lifeops.fuse_(_module().train())


def test_fuse_gives_back_what_holds_nothing_to_fold():
    plain = nn.Linear(2, 2)
    assert lifeops.fuse_(plain) is plain


@pytest.mark.parametrize("options", [{"wo_dp_conv": True}, {"dp_first": True}])
@pytest.mark.parametrize("act", ["relu6", "hs+se", "hs+eca"])
def test_ablations(act, options):
    """Without the convolution, or with it on C channels before the expansion: both train, fold and follow the paper's order."""
    module = _module(act, **options).train()
    x = torch.randn(2, 2 + 12, 12, dtype=torch.float64, requires_grad=True)
    module(x, (3, 4)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    convolutions = [c for c in module.conv if isinstance(c, nn.Conv2d) and c.groups > 1]
    assert [c.in_channels for c in convolutions] == ([12] if "dp_first" in options else [])
    module.eval()
    expected = module(x, (3, 4))
    _close(lifeops.fuse_(module)(x, (3, 4)), expected, 1e-11)


def test_bad_input():
    with pytest.raises(ValueError, match=r"act must be one of 'relu6', 'hs', .*, got 'gelu'"):
        LocalityFeedForward(8, act="gelu")
    with pytest.raises(ValueError, match="reduction must be between 1 and the 32 hidden channels, got 33"):
        LocalityFeedForward(8, reduction=33)
    with pytest.raises(ValueError, match="at least 1, got 8"):
        LocalityFeedForward(8, expand_ratio=0)
    module = LocalityFeedForward(8, act="hs")
    with pytest.raises(ValueError, match=r"must be P \+ H\*W = 1 \+ 3\*4 = 13, got 12"):
        module(torch.randn(2, 12, 8), (3, 4))
    with pytest.raises(ValueError, match=r"x must have shape \(B, N, 8\), got \(2, 13, 9\)"):
        module(torch.randn(2, 13, 9), (3, 4))
    with pytest.raises(ValueError, match="the grid is unknown"):
        module(torch.randn(2, 13, 8))
    with pytest.raises(ValueError, match=r"expected more than 1 value per channel when training, got \(1, 2, 8\) with a 1x1 grid"):
        module(torch.randn(1, 2, 8), (1, 1))
    assert module.eval()(torch.randn(1, 2, 8), (1, 1)).shape == (1, 2, 8)  # evaluation before any training step
    assert module.train()(torch.randn(0, 13, 8), (3, 4)).shape == (0, 13, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast(dtype):
    """The chain runs in autocast's dtype, the residual stream keeps its own; gradients have the parameters' dtypes."""
    module = LocalityFeedForward(8, act="hs+se").to(dtype)
    x = torch.randn(2, 13, 8, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, (3, 4))
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == p.dtype for p in module.parameters())
    torch.testing.assert_close(y, copy.deepcopy(module)(x, (3, 4)), rtol=0, atol=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training):
    torch._dynamo.reset()
    module = LocalityFeedForward(8, act="hs+se").train(training)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in ((3, 4), (5, 2)):
        x = torch.randn(2, 1 + grid[0] * grid[1], 8, requires_grad=True)
        y, expected = compiled(x, grid), twin(x, grid)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))
    for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("variant", "parameters", "macs"),
    [
        ("tiny_mlp4_act3_r192", 5_908_696, 1.2665),
        ("tiny_mlp4_act3_r4", 9_376_168, 1.2699),
        ("tiny_mlp6_act1", 7_655_080, 1.6213),
        ("small_mlp4_act3_r384", 22_433_176, 4.6174),
    ],
)
def test_published_sizes(variant, parameters, macs):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = localvit(variant).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e9, 4) == macs


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_official_checkpoint(backend):
    """The authors' logits to 1e-10; sizes, activation and reduction come from the tensors."""
    d = golden_with_act("localvit_deit_c16_d2")
    model = lifeops.load_official({"model": _state(d, "param.")}, num_heads=4)
    assert (model.blocks[0].conv.act, model.blocks[0].conv.attention, model.num_prefix_tokens) == ("hs+se", "se", 1)
    with lifeops.use_backend(backend):
        _close(model(d["x"]), d["y"])
        with torch.no_grad():
            _close(model(d["x"]), d["y"])
            _close(lifeops.fuse_(model)(d["x"]), d["y"])


KINDS = [("tiny_mlp6_act1", "relu6"), ("tiny_mlp4_act3_r4", "hs+se"), ("tiny_mlp4_act3_r192", "hs+eca")]


@pytest.mark.parametrize(("variant", "act"), KINDS)
def test_official_checkpoints_of_every_kind(variant, act):
    """A state dict is enough to build its model again; heads are C // 48."""
    model = _randomised(localvit(variant, act=act, depth=2, img_size=32, num_classes=5)).eval()
    x = torch.randn(2, 3, 32, 32)
    twin = lifeops.load_official(model.state_dict())
    assert twin.blocks[0].attn.num_heads == 4
    torch.testing.assert_close(twin(x), model(x))


def test_unknown_variant():
    with pytest.raises(ValueError, match="variant must be one of 'tiny_mlp4_act3_r192'"):
        localvit("localvit_small")
