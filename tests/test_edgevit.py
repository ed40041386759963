"""EdgeViT: the authors' numbers, both paths, prefix tokens, folding, sizes, checkpoints, bad input."""

import copy

import pytest
import system_checks
import torch
from torch import nn

import lifeops
from lifeops import cli
from lifeops.models import edgevit
from lifeops.models.edgevit import LGLBlock
from lifeops.nn import GlobalSparseAttention, LocalAgg
from lifeops.nn.eager_edgevit import EagerLGLBlock, EagerLocalAgg, EagerSparseAttention
from test_checkpoints import quiet
from test_localvit import _close, _randomised, _state, golden_with_act

AGGS = ["edgevit_localagg_train", "edgevit_localagg_eval"]
SPARSE = [f"edgevit_gsa_r{r}" for r in (1, 2, 4)]
BLOCKS = ["edgevit_lgl_r1_eval", "edgevit_lgl_r2_eval", "edgevit_lgl_r2_train", "edgevit_lgl_r4_eval"]
TINY = {"img_size": 32, "embed_dims": (12, 18), "depths": (1, 2), "num_heads": (2, 3), "num_classes": 5}
TINY |= {"sr_ratios": (2, 1), "patch_size": (4, 2)}


def build(name, agg, sparse, block):
    """The module of a golden file, with its weights; the authors' numbers with maps as tokens."""
    d = golden_with_act(name)
    r, heads = (int(d[key]) if key in d else 0 for key in ("r", "heads"))
    module = agg(8) if name in AGGS else sparse(8, heads, r) if name in SPARSE else block(8, heads, r)
    module.double().train(bool(d["training"])).load_state_dict(_state(d, "param."))
    tokens = {key: d[key].flatten(2).transpose(1, 2) if d[key].dim() == 4 else d[key] for key in ("x", "y", "g", "grad_x")}
    return {**d, **tokens}, module


def agrees(d, module):
    x = d["x"].contiguous().requires_grad_()
    system_checks.agrees(d, module, x, module(x, tuple(d["grid"].tolist())))


def layer_by_layer(module):
    """A copy that calls its layers."""
    module = copy.deepcopy(module)
    for m in module.modules():
        if hasattr(m, "fused_layers"):
            path = next(path for path, _ in m.fused_layers())
            m.get_submodule(path).register_forward_hook(lambda *_: None)
            assert not lifeops.explain(m)[0].fused
    return module


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", AGGS + SPARSE + BLOCKS)
def test_golden(name, backend, fused):
    d, module = build(name, LocalAgg, GlobalSparseAttention, LGLBlock)
    with lifeops.use_backend(backend):
        agrees(d, module if fused else layer_by_layer(module))


@pytest.mark.parametrize("name", AGGS + SPARSE + BLOCKS)
def test_eager_baseline_is_the_authors(name):
    agrees(*build(name, EagerLocalAgg, EagerSparseAttention, EagerLGLBlock))


# ------------------------------------------------------------------------------------------------ the modules


MODULES = {
    "local_agg": lambda P: LocalAgg(12, 2.5, P, kernel_size=3),
    "sparse": lambda P: GlobalSparseAttention(12, 3, 2, P),
    "plain": lambda P: GlobalSparseAttention(12, 3, 1, P, qkv_bias=False),
    "block": lambda P: LGLBlock(12, 3, 2, P),
}


def _module(name, P=2):
    torch.manual_seed(0)
    return _randomised(MODULES[name](P).double())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("P", [0, 1, 3])
@pytest.mark.parametrize("name", MODULES)
def test_both_paths(name, P, training):
    """The fast path is the layers' own: outputs, gradients, running statistics."""
    module, out = _module(name, P).train(training), []
    x = torch.randn(3, P + 24, 12, dtype=torch.float64)
    for m in (copy.deepcopy(module), layer_by_layer(module)):
        leaf = x.clone().requires_grad_()
        y = m(leaf, (4, 6))
        y.square().sum().backward()
        out.append((y, leaf.grad, *[p.grad for p in m.parameters()], *m.state_dict().values()))
    for fast, plain in zip(*out, strict=True):
        _close(fast, plain, 1e-10)


def test_prefix_tokens():
    """They pass the convolutions untouched, and take part in the attention."""
    agg, sparse = _module("local_agg"), _module("sparse")
    x = torch.randn(2, 2 + 24, 12, dtype=torch.float64)
    assert torch.equal(agg(x, (4, 6))[:, :2], x[:, :2])
    _close(agg(x, (4, 6))[:, 2:], _module("local_agg", 0)(x[:, 2:], (4, 6)), 1e-12)
    maps = x[:, 2:].unflatten(1, (4, 6))[:, ::2, ::2].flatten(1, 2)
    q, k, v = sparse.qkv(torch.cat((x[:, :2], maps), 1)).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    y = ((q @ k.mT * 4**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    _close(sparse(x, (4, 6))[:, :2], sparse.proj(sparse.norm(y[:, :2])), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_low_precision(dtype, training):
    x = torch.randn(4, 2 + 24, 12, dtype=torch.float64)
    system_checks.low_precision(_module("block").train(training), x, (4, 6), dtype)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    module = _module("block").float().train(training)
    x = torch.randn(2, 2 + 24, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, (4, 6))
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    expected = copy.deepcopy(module)(x, (4, 6))
    assert (y - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", ["local_agg", "block"])
def test_fuse(name):
    module = _module(name).eval()
    x = torch.randn(2, 2 + 24, 12, dtype=torch.float64)
    fused = lifeops.fuse_(copy.deepcopy(module))
    _close(fused(x, (4, 6)), module(x, (4, 6)), 1e-11)
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(path.fused for path in lifeops.explain(fused))
    with pytest.raises(ValueError, match=r"fuse_: norm1 takes its statistics from the batch: call .eval\(\) first"):
        lifeops.fuse_(module.train())


def test_exchanged_layers():
    x = torch.randn(2, 24, 12, dtype=torch.float64)
    module = _module("sparse", 0)
    module.LocalProp = nn.ConvTranspose2d(12, 12, 3, 2, 1, 1, groups=12).double()
    assert lifeops.explain(module)[0].fused
    _close(module(x, (4, 6)), layer_by_layer(module)(x, (4, 6)), 1e-11)
    module.sampler = nn.AvgPool2d(2)
    assert "kernel_size is 2, the kernel computes 1" in str(lifeops.explain(module))
    agg = _module("local_agg", 0)
    agg.mlp.act = nn.GELU(approximate="tanh")
    assert "approximate is 'tanh'" in str(lifeops.explain(agg))


def test_double_backward_and_transforms():
    x = torch.randn(2, 24, 12, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(_module("local_agg", 0).train()(x, (4, 6)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch norm: differentiable once, a second derivative was asked for"):
        g.sum().backward()
    for name in MODULES:
        module = _module(name).eval()
        xs = torch.randn(3, 2, 2 + 24, 12, dtype=torch.float64)
        _close(torch.func.vmap(lambda t, m=module: m(t, (4, 6)))(xs), torch.stack([module(t, (4, 6)) for t in xs]), 1e-11)


def test_bad_input():
    for make, message in (
        (lambda: LocalAgg(12, 0), "LocalAgg: dim * mlp_ratio must be at least 1, got 12 * 0"),
        (lambda: LocalAgg(12, kernel_size=4), "LocalAgg: kernel_size must be odd, got 4"),
        (lambda: GlobalSparseAttention(12, 5), "GlobalSparseAttention: dim must be a multiple of num_heads, got dim = 12, num_heads = 5"),
        (lambda: GlobalSparseAttention(12, 3, 0), "GlobalSparseAttention: sr_ratio must be at least 1, got 0"),
        (lambda: GlobalSparseAttention(12, 3, 2)(torch.randn(1, 35, 12), (7, 5)), "grid must be a multiple of sr_ratio 2, got (7, 5)"),
        (lambda: LocalAgg(12)(torch.randn(1, 35, 12), (7, 4)), "must be P + H*W = 0 + 7*4 = 28, got 35"),
        (lambda: LocalAgg(12)(torch.randn(1, 1, 12), (1, 1)), "LocalAgg: expected more than 1 value per channel when training"),
        (lambda: LocalAgg(12, 4, 1)(torch.randn(1, 1, 12), (0, 4)), "LocalAgg: expected more than 1 value per channel when training"),
        (lambda: LocalAgg(12)(torch.randn(1, 28, 12)), "the grid is unknown"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            make()
        assert message in str(error.value)
    assert LocalAgg(12, 4, 1).eval()(torch.randn(1, 1, 12), (0, 4)).shape == (1, 1, 12)
    assert LocalAgg(12)(torch.randn(0, 28, 12), (7, 4)).shape == (0, 28, 12)
    assert GlobalSparseAttention(12, 3, 2, 1)(torch.randn(1, 1, 12), (0, 4)).shape == (1, 1, 12)


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("variant", "parameters", "macs"), [("xxs", 4_067_704, 0.5513), ("xs", 6_770_056, 1.1278), ("s", 13_108_168, 1.9110)]
)
def test_published_sizes(variant, parameters, macs):
    from lifeops.cost.model_cost import _evaluated, count_params, without_memory

    with torch.device("meta"):
        model = edgevit(variant).eval().requires_grad_(False)
    assert count_params(model) == parameters
    mode = torch._subclasses.FakeTensorMode()
    without_memory(model, mode)
    with mode:
        found, _ = _evaluated(model, torch.empty(1, 3, 224, 224))
    assert round(found / 1e9, 4) == macs


def tiny(**options):
    torch.manual_seed(0)
    return _randomised(edgevit("xs", **{**TINY, **options})).eval()


def same(loaded, model, size=32):
    x = torch.randn(2, 3, size, size)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("size", [(32, 32), (48, 16), (64, 40)], ids=str)
def test_any_image_size(size):
    model = tiny().double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    y = model(x)
    _close(y, layer_by_layer(model)(x), 1e-10)
    features = model.forward_features(x)
    H, W = model.grid_sizes(size)[-1]
    assert features.shape == (2, H * W, 18)
    _close(y, model.head(model.norm(features.mT[..., None])[..., 0].mean(-1)), 1e-12)
    _close(lifeops.fuse_(model)(x), y, 1e-11)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_model_errors():
    for options, message in (
        (
            {"img_size": 20},
            "edgevit: EdgeViT: the 20 x 20 pixels that stage 1 gets must be multiples of its patch_size 4 times its sr_ratio 2",
        ),
        ({"depths": (1,)}, "edgevit: EdgeViT: depths must be one int for each of the 2 stages, got (1,)"),
        ({"num_heads": (2, 5)}, "edgevit: GlobalSparseAttention: dim must be a multiple of num_heads"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            edgevit("xs", **{**TINY, **options})
        assert message in str(error.value)
    with pytest.raises(ValueError, match="edgevit: variant must be one of 'xxs', 'xs', 's', got 'l'"):
        edgevit("l")
    with pytest.raises(ValueError, match=r"EdgeViT: the 4 x 5 tokens that stage 2 gets must be multiples .*; images are .16, 20"):
        tiny(sr_ratios=(1, 1))(torch.randn(1, 3, 16, 20))


def test_training_step_and_copies():
    model = tiny(drop_path_rate=0.1).train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    rates = [b.SelfAttn.drop_path.drop_prob for s in (1, 2) for b in model.get_submodule(f"blocks{s}")]
    assert rates == pytest.approx([0, 0.05, 0.1])
    model.eval()
    twin = edgevit("xs", **TINY).eval()
    twin.load_state_dict(model.state_dict())
    same(twin, model)
    same(copy.deepcopy(model), model)
    x = torch.randn(2, 3, 32, 32)
    headless = tiny(num_classes=0)
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    torch.testing.assert_close(model.head(headless(x)), model(x))
    assert isinstance(lifeops.fuse_(headless).norm, nn.BatchNorm2d)
    torch.testing.assert_close(model.head(headless(x)), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training):
    system_checks.compiled(tiny().train(training), torch.randn(2, 3, 32, 32))


def test_exported():
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    system_checks.exported(model, x)
    system_checks.traced(model, x)


def test_norms_are_counted():
    from lifeops.cost.model_cost import _evaluated

    model = tiny().requires_grad_(False)
    x = torch.randn(2, 3, 48, 16)
    assert _evaluated(model, x) == _evaluated(layer_by_layer(model), x)


def test_rollout_is_refused():
    with pytest.raises(ValueError, match=r"rollout: blocks1.0.SelfAttn.attn is GlobalSparseAttention, which attends from one token of sev"):
        lifeops.rollout(tiny(), torch.randn(1, 3, 32, 32))


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "mlp_ratio": 2, "img_size": 64, "sr_ratios": (4, 2)}], ids=str)
def test_official(options):
    """All sizes from the tensors; heads from the metadata or the caller."""
    model = tiny(**options)
    state = model.state_dict()
    same(quiet(lifeops.load_official, {"model": state}), model, 64)
    plain = {f"module.{name}": t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    same(quiet(lifeops.load_official, plain, num_heads=2), model, 64)
    with pytest.raises(ValueError, match=r"cannot tell the heads of a model of width 12; pass num_heads=…"):
        lifeops.load_official(plain)
    with pytest.raises(ValueError, match="num_heads must be the model's own, 2 by the checkpoint's metadata, got 4"):
        lifeops.load_official(state, num_heads=4)
    loaded = lifeops.load_official(state, num_classes=3, img_size=64)
    assert (loaded.head.out_features, loaded.img_size) == (3, (64, 64))


@pytest.mark.parametrize(("variant", "heads"), [("xxs", 1), ("s", 1)])
def test_official_files_of_published_sizes(variant, heads):
    model = edgevit(variant, depths=(1, 1, 1, 1)).eval()
    with pytest.warns(UserWarning, match=f"does not tell, so assumed num_heads={heads}; pass num_heads=… to say otherwise"):
        loaded = lifeops.load_official({"model": dict(model.state_dict())})
    assert [m.num_heads for m in loaded.modules() if hasattr(m, "LocalProp")] == [
        m.num_heads for m in model.modules() if hasattr(m, "LocalProp")
    ]
    same(loaded, model, 64)


def test_flops_command(capsys):
    pytest.importorskip("rich")
    assert cli.main(["flops", "edgevit_xxs"]) == 0
    out = capsys.readouterr().out
    assert "│ edgevit" in out
    assert all(number in out for number in ("4.068", "0.5513", "(4.0677 / 0.5513)", "arXiv 2205.03436"))
