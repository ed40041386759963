"""CvT: the authors' numbers, batch norm, both paths, folding, sizes, checkpoints, bad input."""

import copy
import re

import pytest
import system_checks
import torch
from torch import nn

import lifeops
from conftest import declare_torchvision_ops
from lifeops import cli
from lifeops.models import cvt
from lifeops.nn import ConvProjectionAttention
from lifeops.nn.eager_cvt import EagerConvProjectionAttention
from lifeops.nn.feed_forward import FeedForward, QuickGELU
from test_checkpoints import quiet
from test_localvit import _close, _randomised, _state, golden_with_act

NAMES = [f"cvt_attn_{m}" for m in ("dwbn_cls_train", "dwbn_cls_eval", "dwbn_nocls_train", "dwbn_nocls_eval", "avg_cls", "avg_nocls")]
TINY = {"img_size": 32, "embed_dims": (12, 18), "depths": (1, 2), "num_heads": (2, 3), "num_classes": 5}
TINY |= {"patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (2, 1)}


def golden(name):
    """The authors' numbers and our module with their weights."""
    d = golden_with_act(name)
    module = ConvProjectionAttention(12, int(d["heads"]), int(d["prefix"]), method="avg" if "_avg_" in name else "dw_bn")
    module.double().train(bool(d["training"])).load_state_dict(_state(d, "param."))
    return d, module


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, backend, fused):
    d, module = golden(name)
    if not fused:
        module.proj_q.register_forward_hook(lambda *_: None)
    assert lifeops.explain(module)[0].fused == fused
    x = d["x"].requires_grad_()
    with lifeops.use_backend(backend):
        system_checks.agrees(d, module, x, module(x, tuple(d["grid"].tolist())))


@pytest.mark.parametrize("name", NAMES)
def test_eager_baseline_is_the_authors(name):
    d = golden_with_act(name)
    module = EagerConvProjectionAttention(12, int(d["heads"]), int(d["prefix"]), method="avg" if "_avg_" in name else "dw_bn")
    module.double().train(bool(d["training"])).load_state_dict(_state(d, "param."))
    x = d["x"].requires_grad_()
    system_checks.agrees(d, module, x, module(x, tuple(d["grid"].tolist())))


# ------------------------------------------------------------------------------------------------ the module


def _module(P=2, **options):
    torch.manual_seed(0)
    return _randomised(ConvProjectionAttention(12, 3, P, **options).double())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("P", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"kernel_size": 5, "stride_q": 2, "stride_kv": 3}, {"method": "avg"}, {"method": "linear"}])
def test_both_paths(options, P, training):
    """The fast path is the layers' own: outputs, gradients, running statistics, at a grid that strides do not divide."""
    grid, out = (5, 6), []
    module = _module(P, **options).train(training)
    x = torch.randn(3, P + 30, 12, dtype=torch.float64)
    for fused in (True, False):
        m, leaf = copy.deepcopy(module), x.clone().requires_grad_()
        if not fused:
            m.proj.register_forward_hook(lambda *_: None)
        y = m(leaf, grid)
        y.square().sum().backward()
        out.append((y, leaf.grad, *[p.grad for p in m.parameters()], *m.state_dict().values()))
    tokens = lifeops.conv_grid(grid, options.get("kernel_size", 3), options.get("stride_q", 1))
    assert out[0][0].shape == (3, P + tokens[0] * tokens[1], 12)
    for fast, plain in zip(*out, strict=True):
        _close(fast, plain, 1e-10)


def test_the_scale_is_that_of_all_channels():
    """sqrt(C), not sqrt(C / h): with the linear method it is plain attention at another temperature."""
    module = _module(method="linear")
    x = torch.randn(2, 2 + 12, 12, dtype=torch.float64)
    q, k, v = (layer(x).unflatten(2, (3, 4)).transpose(1, 2) for layer in (module.proj_q, module.proj_k, module.proj_v))
    y = ((q @ k.mT / 12**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    _close(module(x, (3, 4)), module.proj(y), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_low_precision(dtype, training):
    x = torch.randn(4, 2 + 30, 12, dtype=torch.float64)
    system_checks.low_precision(_module().train(training), x, (5, 6), dtype)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    module = _module().float().train(training)
    x = torch.randn(2, 2 + 30, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, (5, 6))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    torch.testing.assert_close(y.float(), copy.deepcopy(module)(x, (5, 6)), rtol=0, atol=0.1)


def test_frozen_and_unmoving_norms():
    """Single norms in evaluation mode, other momenta, no running statistics: as nn.BatchNorm2d's, over three steps."""
    module = _module(1).train()
    module.conv_proj_k.bn = nn.BatchNorm2d(12, momentum=None, eps=0.1).double()
    module.conv_proj_v.bn = nn.BatchNorm2d(12, track_running_stats=False).double()
    twin = copy.deepcopy(module)
    twin.proj.register_forward_hook(lambda *_: None)
    for m in (module, twin):
        m.conv_proj_q.bn.eval()
    for _ in range(3):
        x = torch.randn(2, 1 + 12, 12, dtype=torch.float64)
        _close(module(x, (3, 4)), twin(x, (3, 4)), 1e-11)
    for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
        _close(a, b, 1e-11)


def test_fuse():
    module = _module().eval()
    x = torch.randn(2, 2 + 30, 12, dtype=torch.float64)
    fused = lifeops.fuse_(copy.deepcopy(module))
    _close(fused(x, (5, 6)), module(x, (5, 6)), 1e-11)
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert lifeops.explain(fused)[0].fused
    with pytest.raises(ValueError, match=r"fuse_: conv_proj_q.bn takes its statistics from the batch: call .eval\(\) first"):
        lifeops.fuse_(module.train())
    assert isinstance(module.conv_proj_q.bn, nn.BatchNorm2d)


def test_exchanged_layers():
    """What the kernels can stand for they do, with the layers' own strides; else the layers are called."""
    x = torch.randn(2, 1 + 30, 12, dtype=torch.float64)
    module = _module(1).eval()
    for name in ("conv_proj_k", "conv_proj_v"):
        getattr(module, name).conv = nn.Conv2d(12, 12, (2, 3), (3, 1), (1, 0), groups=12).double()
    assert lifeops.explain(module)[0].fused
    y = module(x, (5, 6))
    module.conv_proj_q.conv.padding_mode = "reflect"
    assert "padding_mode is 'reflect'" in str(lifeops.explain(module))
    module.conv_proj_q.conv.padding_mode = "zeros"
    module.proj.register_forward_hook(lambda *_: None)
    _close(module(x, (5, 6)), y, 1e-11)
    module.conv_proj_v.conv = nn.Conv2d(12, 12, 3, 2, 1, groups=12).double()
    with pytest.raises(ValueError, match="conv_proj_k and conv_proj_v must make equally many tokens, got 9 and 10"):
        module(x, (5, 6))
    pools = _module(1, method="avg")
    pools.conv_proj_v.avg = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
    y = pools(x, (5, 6))
    pools.conv_proj_v.avg.divisor_override = 9
    assert "divisor_override is 9" in str(lifeops.explain(pools))
    pools.conv_proj_v.avg.divisor_override = None
    pools.proj.register_forward_hook(lambda *_: None)
    _close(pools(x, (5, 6)), y, 1e-11)


def test_double_backward_and_transforms():
    x = torch.randn(2, 2 + 12, 12, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(_module().train()(x, (3, 4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch norm: differentiable once, a second derivative was asked for"):
        g.sum().backward()
    module = _module().eval()
    xs = torch.randn(3, 2, 2 + 12, 12, dtype=torch.float64)
    _close(torch.func.vmap(lambda t: module(t, (3, 4)))(xs), torch.stack([module(t, (3, 4)) for t in xs]), 1e-11)


def test_bad_input():
    for options, message in (
        ({"method": "max"}, "method must be one of 'dw_bn', 'avg', 'linear', got 'max'"),
        ({"kernel_size": 2}, "kernel_size must be odd, got 2"),
        ({"stride_q": 2, "method": "avg"}, "stride_q must be 1 or None with method 'avg', which does not project it, got 2"),
        ({"stride_kv": 2, "method": "linear"}, "stride_kv must be 1 or None with method 'linear'"),
        ({"stride_kv": 0}, "stride_kv must be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"ConvProjectionAttention: {message}"):
            ConvProjectionAttention(12, 3, **options)
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads"):
        ConvProjectionAttention(12, 5)
    module = ConvProjectionAttention(12, 3)
    with pytest.raises(ValueError, match=r"must be P \+ H\*W = 1 \+ 3\*4 = 13, got 12"):
        module(torch.randn(2, 12, 12), (3, 4))
    with pytest.raises(ValueError, match="the grid is unknown"):
        module(torch.randn(2, 13, 12))
    with pytest.raises(ValueError, match="expected more than 1 value per channel when training, got 1 x 1 patches"):
        module(torch.randn(1, 2, 12), (1, 1))
    with pytest.raises(ValueError, match=r"expected more than 1 value per channel when training.*no patches"):
        module(torch.randn(1, 1, 12), (0, 4))
    assert module.eval()(torch.randn(1, 2, 12), (1, 1)).shape == (1, 2, 12)
    assert module(torch.randn(1, 1, 12), (0, 4)).shape == (1, 1, 12)
    assert module.train()(torch.randn(0, 13, 12), (3, 4)).shape == (0, 13, 12)
    other = ConvProjectionAttention(12, 3, stride_kv=1)
    with pytest.raises(RuntimeError, match="saved with stride_kv=2, this module has stride_kv=1"):
        other.load_state_dict(module.state_dict())


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("variant", "side", "parameters", "macs"),
    [("13", 224, 19_997_480, 4.5661), ("13", 384, 19_997_480, 16.2694), ("21", 224, 31_622_696, 7.1780), ("21", 384, 31_622_696, 24.8491),
     ("w24", 384, 277_196_392, 194.2217)],
)  # fmt: skip
def test_published_sizes(variant, side, parameters, macs):
    from lifeops.cost.model_cost import _evaluated, count_params, without_memory

    with torch.device("meta"):
        model = cvt(variant).eval().requires_grad_(False)
    assert count_params(model) == parameters
    mode = torch._subclasses.FakeTensorMode()
    without_memory(model, mode)
    with mode:
        found, _ = _evaluated(model, torch.empty(1, 3, side, side))
    assert round(found / 1e9, 4) == macs


def tiny(**options):
    torch.manual_seed(0)
    return _randomised(cvt("13", **{**TINY, **options})).eval()


def layer_by_layer(model):
    """A copy that calls its layers."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, (ConvProjectionAttention, FeedForward)):
            (m.proj if hasattr(m, "proj") else m.fc2).register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (45, 30), (64, 20)], ids=str)
def test_any_image_size(size, class_token):
    model = tiny(class_token=class_token).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    y = model(x)
    assert y.shape == (2, 5)
    _close(y, layer_by_layer(model)(x), 1e-10)
    _close(y[:1], model(x[:1]), 1e-12)  # one image keeps its batch axis
    features = model.forward_features(x)
    H, W = model.grid_sizes(size)[-1]
    assert features.shape == (2, class_token + H * W, 18)
    normed = model.norm(features)
    _close(y, model.head(normed[:, 0] if class_token else normed.mean(1)), 1e-12)


def test_model_errors():
    for options, message in (
        ({"img_size": 2}, r"CvT: the kernel \(7, 7\) must fit the grid \(2, 2\)"),
        ({"depths": (1,)}, r"depths must be one int for each of the 2 stages, got \(1,\)"),
        ({"num_heads": (2, 5)}, "ConvProjectionAttention: dim must be a multiple of num_heads"),
        ({"method": "no"}, "method must be one of"),
        ({"patch_padding": (2, -1)}, r"patch_padding\[1\] must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=f"cvt: .*{message}"):
            cvt("13", **{**TINY, **options})
    with pytest.raises(ValueError, match="cvt: variant must be one of '13', '21', 'w24', got '14'"):
        cvt("14")
    with pytest.raises(ValueError, match=r"CvT: x must be images \(B, 3, H, W\), got \(1, 1, 32, 32\)"):
        tiny()(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"CvT: .*must fit the grid \(2, 32\)"):
        tiny()(torch.randn(1, 3, 2, 32))


def test_training_step_and_copies():
    """Every parameter gets a gradient but the dead one; a copy and a round trip of the state dict are the same model."""
    model = tiny().train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert {name.rpartition("blocks.1.attn.")[2] for name in dead} <= {
        "conv_proj_q.conv.weight", "conv_proj_q.bn.weight", "conv_proj_q.bn.bias"
    } | {name for name, _ in model.named_parameters() if name.endswith("proj_k.bias")}  # fmt: skip
    x = torch.randn(2, 3, 32, 32)
    y = model.eval()(x)
    twin = cvt("13", **TINY).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    torch.testing.assert_close(lifeops.fuse_(model)(x), y)


THEIRS = {  # our names, the authors', and those of transformers
    r"^stage(\d)\.": r"cvt.encoder.stages.\1.", r"\.patch_embed\.proj": ".embedding.convolution_embeddings.projection",
    r"\.patch_embed\.norm": ".embedding.convolution_embeddings.normalization", r"\.blocks\.": ".layers.", r"\.norm1": ".layernorm_before",
    r"\.norm2": ".layernorm_after", r"\.conv_proj_(.*)\.conv\.": r".convolution_projection_\1.convolution_projection.convolution.",
    r"\.conv_proj_(.*)\.bn\.": r".convolution_projection_\1.convolution_projection.normalization.", r"\.proj_": ".projection_",
    r"projection_q\.": "projection_query.", r"projection_k\.": "projection_key.", r"projection_v\.": "projection_value.",
    r"\.attn\.(projection|convolution)": r".attention.attention.\1", r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1": ".intermediate.dense", r"\.mlp\.fc2": ".output.dense", "^norm": "layernorm", "^head": "classifier",
}  # fmt: skip


def test_transformers_has_the_same_model():
    """But for its GELU in the place of the authors' QuickGELU."""
    declare_torchvision_ops()
    transformers = pytest.importorskip("transformers")
    same_for_all = {
        "mlp_ratio": 4.0,
        "attention_drop_rate": 0.0,
        "drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "qkv_bias": True,
        "kernel_qkv": 3,
    }
    same_for_all |= {"qkv_projection_method": "dw_bn", "padding_kv": 1, "stride_kv": 2, "padding_q": 1, "stride_q": 1}
    config = transformers.CvtConfig(
        patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1], embed_dim=[12, 18], num_heads=[2, 3], depth=[1, 2], num_labels=5,
        cls_token=[False, True], **{name: [value] * 2 for name, value in same_for_all.items()},
    )  # fmt: skip
    theirs, ours = transformers.CvtForImageClassification(config).double().eval(), tiny().double()
    for m in theirs.modules():
        if hasattr(m, "activation"):
            m.activation = QuickGELU()
    state = {}
    for name, t in ours.state_dict().items():
        for pattern, replacement in THEIRS.items():
            name = re.sub(pattern, replacement, name)
        state[name] = t
    theirs.load_state_dict(state)
    x = torch.randn(2, 3, 45, 30, dtype=torch.float64)
    _close(ours(x), theirs(x).logits, 1e-10)


def test_drop_path_rises():
    rates = [b.drop_path.drop_prob for s in cvt("13", **TINY, drop_path_rate=0.2).stages for b in s.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training):
    system_checks.compiled(tiny().train(training), torch.randn(2, 3, 32, 32))


def test_exported():
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    system_checks.exported(model, x)
    system_checks.traced(model, x)


# ------------------------------------------------------------------------------------------------ checkpoints


def same(loaded, model, size=32):
    x = torch.randn(2, 3, size, size)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    "options", [{}, {"class_token": False, "kernel_size": 5}, {"stride_kv": 1, "qkv_bias": False, "mlp_ratio": 2}], ids=str
)
def test_official(options):
    """All sizes from the tensors and the metadata, or the heads from the caller; running statistics and all."""
    model = tiny(**options)
    state = model.state_dict()
    same(quiet(lifeops.load_official, {"model": state}), model)
    if options.get("stride_kv", 2) == 2:  # which nothing tells here
        plain = {f"module.{name}": t for name, t in state.items() if not name.endswith("num_batches_tracked")}
        same(quiet(lifeops.load_official, plain, num_heads=2), model)
        with pytest.raises(ValueError, match=r"cannot tell the heads of a model of width 12; pass num_heads=…"):
            lifeops.load_official(plain)
    with pytest.raises(ValueError, match="num_heads must be the model's own, 2 by the checkpoint's metadata, got 4"):
        lifeops.load_official(state, num_heads=4)
    loaded = lifeops.load_official(state, num_classes=3, img_size=64)
    assert (loaded.head.out_features, loaded.img_size) == (3, (64, 64))


def test_official_strides():
    """An embedding's stride is that of its metadata or, of the authors' kernels, known: nothing is guessed."""
    model = tiny(patch_size=(5, 3), patch_stride=(3, 1))
    same(quiet(lifeops.load_official, model.state_dict()), model)
    with pytest.raises(ValueError, match=r"cannot tell the stride of stage0.patch_embed: .* 7 x 7 and 3 x 3, it is known, got \(5, 5\)"):
        lifeops.load_official(dict(model.state_dict()), num_heads=2)
    with pytest.raises(RuntimeError, match=r"OverlapPatchEmbed stage0.patch_embed: .* saved with stride=3, this module has stride=4"):
        tiny().load_state_dict(model.state_dict())


@pytest.mark.parametrize(("variant", "heads"), [("13", 1), ("w24", 3)])
def test_official_files_of_published_sizes(variant, heads):
    """A bare state dict, as the authors': heads by the width, and said."""
    model = cvt(variant, depths=(1, 1, 1)).eval()
    with pytest.warns(UserWarning, match=f"does not tell, so assumed num_heads={heads}; pass num_heads=… to say otherwise"):
        loaded = lifeops.load_official(dict(model.state_dict()))
    assert [s.blocks[0].attn.num_heads for s in loaded.stages] == [s.blocks[0].attn.num_heads for s in model.stages]
    assert loaded.img_size == model.img_size
    same(loaded, model, 64)


def test_norms_are_counted():
    """Batch norms that are not called count as those that are."""
    from lifeops.cost.model_cost import _evaluated

    model = tiny().requires_grad_(False)
    x = torch.randn(2, 3, 45, 30)
    fused, plain = _evaluated(model, x), _evaluated(layer_by_layer(model), x)
    assert fused == plain


def test_flops_command(capsys):
    pytest.importorskip("rich")
    assert cli.main(["flops", "cvt_13"]) == 0
    out = capsys.readouterr().out
    assert "│ cvt" in out
    assert all(number in out for number in ("19.997", "4.5661", "20 / 4.5", "arXiv 2103.15808"))


def test_rollout_is_refused():
    with pytest.raises(ValueError, match=r"rollout: stage0.blocks.0.attn is ConvProjectionAttention, whose keys and values are conv.* own"):
        lifeops.rollout(tiny(), torch.randn(1, 3, 32, 32))
