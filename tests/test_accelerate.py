"""accelerate: the modules of timm and transformers around a depth-wise convolution compute on token_dwconv what they computed before."""

import copy
import pickle

import pytest
import torch
from hosts import timm, transformers
from torch import nn
from torch.nn.utils import parametrize

import lifeops
from lifeops.hosts.token_convs import ENTRIES
from lifeops.integrations.token_convs import FORMS, TokenConv
from lifeops.nn.plain import reasons

models = timm.models
GRID, C = (4, 6), 12
N = GRID[0] * GRID[1]


def _tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _maps():
    return (_tokens(2, *GRID, C).permute(0, 3, 1, 2),)


def _heads(prefix=1):
    return (*_tokens(2, prefix + N, 2, 4, 3).permute(2, 0, 3, 1, 4), GRID)


def _pvt_hf(linear=False):
    config = transformers.PvtV2Config(linear_attention=linear)
    return transformers.models.pvt_v2.modeling_pvt_v2.PvtV2ConvFeedForwardNetwork(config, C, 16)


def _segformer():
    return transformers.models.segformer.modeling_segformer.SegformerMixMLP(transformers.SegformerConfig(), C, 16)


def _at(path, layer):
    """``layer`` where a model has it."""
    for name in reversed(path.split(".")):
        layer = nn.Sequential(layer) if name.isdigit() else nn.ModuleDict({name: layer})
    return layer


def _focal():
    return models.focalnet.FocalModulation(C, focal_window=5, focal_level=1).focal_layers[0]


CASES = {  # name: kind, where the module is, the module, its arguments, its convolution
    "twins": ("twins_peg", "pos_block.0", lambda: models.twins.PosConv(C, C), (_tokens(2, N, C), GRID), "proj.0"),
    "coat cpe": ("coat_cpe", "cpe1", lambda: models.coat.ConvPosEnc(C), (_tokens(2, 1 + N, C), GRID), "proj"),
    "coat crpe": ("coat_crpe", "crpe1", lambda: models.coat.ConvRelPosEnc(3, 4, {3: 1, 5: 2, 7: 1}), _heads(), "conv_list.1"),
    "pvt": ("pvt_v2_ffn", "mlp", lambda: models.pvt_v2.MlpWithDepthwiseConv(C, 16), (_tokens(2, N, C), GRID), "dwconv"),
    "pvt li": ("pvt_v2_ffn", "mlp", lambda: models.pvt_v2.MlpWithDepthwiseConv(C, 16, extra_relu=True), (_tokens(2, N, C), GRID), "dwconv"),
    "pvt relu": (
        "pvt_v2_ffn", "mlp", lambda: models.pvt_v2.MlpWithDepthwiseConv(C, 16, act_layer=nn.ReLU), (_tokens(2, N, C), GRID), "dwconv",
    ),
    "pvt hf": ("pvt_v2_ffn_hf", "mlp", _pvt_hf, (_tokens(2, N, C), *GRID), "dwconv.dwconv"),
    "pvt hf li": ("pvt_v2_ffn_hf", "mlp", lambda: _pvt_hf(True), (_tokens(2, N, C), *GRID), "dwconv.dwconv"),
    "segformer": ("segformer_ffn", "mlp", _segformer, (_tokens(2, N, C), *GRID), "dwconv.dwconv"),
    "xcit": ("xcit_lpi", "local_mp", lambda: models.xcit.LPI(C), (_tokens(2, N, C), *GRID), "conv2"),
    "davit": ("davit_cpe", "cpe1", lambda: models.davit.ConvPosEnc(C), _maps(), "proj"),
    "davit gelu": ("davit_cpe", "cpe1", lambda: models.davit.ConvPosEnc(C, act=True), _maps(), "proj"),
    "edgenext": ("edgenext_block", "blocks.0", lambda: models.edgenext.ConvBlock(C, kernel_size=5, ls_init_value=0.5), _maps(), "conv_dw"),
    "edgenext bare": ("edgenext_block", "blocks.0", lambda: models.edgenext.ConvBlock(C, ls_init_value=0), _maps(), "conv_dw"),
    "focalnet": ("focalnet_level", "modulation.focal_layers.0", _focal, _maps(), "0"),
    "tiny vit": ("tiny_vit_conv", "local_conv", lambda: models.tiny_vit.ConvNorm(C, C, 3, 1, 1, groups=C), _maps(), "conv"),
}  # fmt: skip


def _made(name, training=False):
    """The module, in a model, in float64, with values that show, and a copy of it that stays as it is."""
    kind, path, build, args, _ = CASES[name]
    torch.manual_seed(0)
    module = build().double().train(training)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
                m.weight.normal_()
                m.bias.normal_()
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    model = _at(path, module).train(training)
    return model, module, copy.deepcopy(module), kind, args


def _run(module, args, grad=True):
    """Output, and gradients of the tensors given and of all parameters."""
    if not grad:
        with torch.no_grad():
            return [module(*args)]
    args = [a.detach().clone(memory_format=torch.preserve_format).requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    y = module(*args)
    inputs = [a for a in args if isinstance(a, torch.Tensor)] + [*module.parameters()]
    return [y, *torch.autograd.grad(y, inputs, torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))]


def _same(ours, theirs, args, grad=True, tolerance=1e-9):
    for got, wanted in zip(_run(ours, args, grad), _run(theirs, args, grad), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * max(1.0, wanted.abs().max().item()))


def test_every_kind_and_every_form_has_a_case():
    assert {kind for kind, *_ in CASES.values()} == {*ENTRIES}
    assert {entry.form for entry in ENTRIES.values()} == {*FORMS}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_same_numbers_gradients_and_statistics(name, training, grad):
    model, module, twin, kind, args = _made(name, training)
    assert lifeops.accelerate(model, kinds=kind) is model
    assert isinstance(module, TokenConv)
    assert reasons(module) == []
    _same(module, twin, args, grad)
    for got, wanted in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, wanted)
    if isinstance(args[0], torch.Tensor):
        _same(module, twin, (args[0][:1], *(a[:1] if isinstance(a, torch.Tensor) else a for a in args[1:])), grad)  # one image


@pytest.mark.parametrize("name", CASES)
def test_runs_the_op_where_it_says_so(name):
    model, module, _, kind, args = _made(name)
    lifeops.accelerate(model, kinds=kind)
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(*args)
    ran = {event.key for event in profile.key_averages()}
    assert any("token_dwconv" in key for key in ran)
    assert "aten::conv2d" not in ran


@pytest.mark.parametrize("name", CASES)
def test_same_parameters_keys_and_way_back(name):
    model, module, twin, kind, args = _made(name)
    before = {key: id(value) for key, value in model.named_parameters()}
    state, keys = copy.deepcopy(model.state_dict()), [*vars(module)]
    lifeops.accelerate(model, kinds=kind)
    assert {key: id(value) for key, value in model.named_parameters()} == before
    model.load_state_dict(state)
    module(*args)
    copied = copy.deepcopy(model)
    lifeops.revert(model)
    assert type(module) is type(twin)
    assert [*vars(module)] == keys
    model.load_state_dict(copied.state_dict())
    assert isinstance(next(m for m in copied.modules() if hasattr(m, "fused_layers")), TokenConv)
    _same(lifeops.revert(copied).get_submodule(CASES[name][1]), twin, args)
    with pytest.raises(ValueError, match="nor accelerated"):
        lifeops.revert(model)


@pytest.mark.parametrize("name", CASES)
def test_pickles(name):
    model, module, twin, kind, args = _made(name)
    lifeops.accelerate(model, kinds=kind)
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is type(module)
    _same(again, twin, args)


class _Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


class _LoRA(nn.Module):
    """A layer with an adapter beside it, as peft exchanges it."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return self.base_layer(x) + 0.5 * x.mean() * self.base_layer(x)


def _hook(module, path):
    module.get_submodule(path).register_forward_hook(lambda m, args, y: 3 * y)


def _adapt(module, path):
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, _LoRA(module.get_submodule(path)))


def _parametrise(module, path):
    parametrize.register_parametrization(module.get_submodule(path), "weight", _Twice())


@pytest.mark.parametrize("touch", [_hook, _adapt, _parametrise])
@pytest.mark.parametrize("name", [name for name in CASES if name != "coat crpe"])
def test_a_touched_layer_is_called(name, touch):
    model, module, twin, kind, args = _made(name)
    lifeops.accelerate(model, kinds=kind)
    module(*args)
    for m in (module, twin):
        touch(m, CASES[name][4])
    _same(module, twin, args)
    assert not lifeops.explain(model)[0].fused


def test_touched_before_and_released_later():
    model, module, twin, _, args = _made("twins")
    handle = module.proj[0].register_forward_hook(lambda m, args, y: 3 * y)
    twin.proj[0].register_forward_hook(lambda m, args, y: 3 * y)
    lifeops.accelerate(model)
    assert not lifeops.explain(model)[0].fused
    _same(module, twin, args)
    handle.remove()
    assert lifeops.explain(model)[0].fused


def _left(name, change, message, **options):
    model, module, twin, kind, _ = _made(name)
    change(module)
    with pytest.raises(ValueError, match="accelerate: .*" + message):
        lifeops.accelerate(model, kinds=kind, **options)
    assert type(module) is type(twin)
    assert not [key for key in vars(module) if "lifeops" in key]


VARIANTS = {
    "stride": {"stride": 2, "padding": 1}, "padding is \\(2, 2\\)": {"dilation": 2, "padding": 2},
    "padding_mode": {"padding": 1, "padding_mode": "reflect"},
    "groups": {"padding": 1, "groups": 3}, "padding is": {"padding": 0},
}  # fmt: skip


@pytest.mark.parametrize("what", VARIANTS)
def test_another_convolution_is_left(what):
    options = {"groups": C, **VARIANTS[what]}
    _left("coat cpe", lambda m: setattr(m, "proj", nn.Conv2d(C, C, 3, **options).double()), f"proj: {what}")


def test_a_layer_that_is_missing_is_named():
    for name, sequence, path in (("twins", "proj", "0"), ("segformer", "dwconv", "dwconv"), ("coat crpe", "conv_list", "1")):
        _left(name, lambda m, at=(sequence, path): delattr(m.get_submodule(at[0]), at[1]), rf"{sequence}\.{path}: it is missing")


def test_another_computation_is_left():
    class PosConv(models.twins.PosConv):
        def forward(self, x, size):
            return 2 * super().forward(x, size)

    model, module, *_ = _made("twins")
    module.__class__ = PosConv
    with pytest.raises(ValueError, match="its output differs by"):
        lifeops.accelerate(model)
    assert type(module) is PosConv
    lifeops.accelerate(model, verify=False)
    assert isinstance(module, TokenConv)
    _left("segformer", lambda m: vars(m).__setitem__("forward", m.forward), "its forward was replaced")


def test_a_module_that_raises_is_left():
    class PosConv(models.twins.PosConv):
        def forward(self, x):
            return x

    model, module, *_ = _made("twins")
    module.__class__ = PosConv
    with pytest.raises(ValueError, match="it raised TypeError"):
        lifeops.accelerate(model)


def test_maps_in_another_layout_run_the_original():
    for name in ("davit", "edgenext", "focalnet", "tiny vit"):
        model, module, twin, kind, (x,) = _made(name)
        lifeops.accelerate(model, kinds=kind)
        with torch.no_grad(), torch.profiler.profile() as profile:
            module(x.contiguous())
        assert not any("token_dwconv" in event.key for event in profile.key_averages())
        _same(module, twin, (x.contiguous(),))


@pytest.mark.parametrize("name", CASES)
def test_autocast(name):
    model, module, twin, kind, args = _made(name)
    lifeops.accelerate(model, kinds=kind)
    args = tuple(a.float() if isinstance(a, torch.Tensor) else a for a in args)
    with torch.autocast("cpu", torch.bfloat16):
        _same(module.float(), twin.float(), args, False, 4e-2)
        _same(module, twin, args, True, 0.15)


@pytest.mark.parametrize("name", ["twins", "coat crpe", "pvt li", "xcit", "davit", "edgenext"])
def test_compiles_whole(name):
    model, module, twin, kind, args = _made(name)
    lifeops.accelerate(model, kinds=kind)
    torch._dynamo.reset()
    _same(torch.compile(module, fullgraph=True, backend="aot_eager"), twin, args)


def test_functorch_takes_the_original():
    model, module, twin, _, (x, *grid) = _made("xcit")
    lifeops.accelerate(model)
    got, wanted = (torch.func.grad(lambda t, m=m: m(t, *grid).square().sum())(x) for m in (module, twin))
    torch.testing.assert_close(got, wanted)


WHOLE = {
    "twins": lambda: timm.create_model("twins_pcpvt_small", img_size=64, depths=(1, 1, 1, 1)),
    "coat": lambda: timm.create_model("coat_lite_tiny", img_size=64, serial_depths=(1, 1, 1, 1)),
    "pvt": lambda: timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)),
    "xcit": lambda: timm.create_model("xcit_nano_12_p16_224", img_size=64, depth=2),
    "segformer": lambda: transformers.SegformerForImageClassification(transformers.SegformerConfig(depths=[1, 1, 1, 1])),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name):
    torch.manual_seed(0)
    model, images = WHOLE[name]().eval(), torch.randn(2, 3, 64, 64)
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()

    def run():
        with torch.no_grad():
            y = model(images)
        return y if isinstance(y, torch.Tensor) else y.logits

    before = run()
    lifeops.accelerate(model.train(), kinds={"pvt": "pvt_v2_ffn", "segformer": "segformer_ffn"}.get(name))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert "Accelerated" in repr(model)
    model.eval()
    found = lifeops.explain(model)
    assert found
    assert all(path.fused for path in found)
    torch.testing.assert_close(run(), before, rtol=0, atol=1e-5 * before.abs().max().item())
    assert lifeops.accelerate(model) is model  # again: nothing more to do
    lifeops.revert(model)
    assert torch.equal(run(), before)
    assert not any(isinstance(m, TokenConv) for m in model.modules())


def test_small_kernels_and_strides_are_left_and_said():
    model = timm.create_model("edgenext_xx_small", depths=(1, 2, 1, 1))
    lifeops.accelerate(model)
    said = {path.path: path for path in lifeops.explain(model)}
    assert said["stages.1.blocks.0"].fused
    assert "below kernel size 5" in said["stages.0.blocks.0"].reasons[0]
    lifeops.accelerate(model, kinds=["edgenext_block"])
    assert all(path.fused for path in lifeops.explain(model))
    with pytest.raises(ValueError, match="stride 2"):
        lifeops.accelerate(timm.create_model("pit_ti_224"))


def test_bad_arguments():
    model = timm.create_model("twins_pcpvt_small", img_size=64, depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="is not among the kinds asked for"):
        lifeops.accelerate(model, kinds="coat_cpe")
    with pytest.raises(ValueError, match=r"accelerate: .*kinds.*'twins_peg'"):
        lifeops.accelerate(model, kinds="peg")
    with pytest.raises(ValueError, match=r"holds no depth-wise convolution .*Found: none\. Looked for: twins_peg \(PosConv\), "):
        lifeops.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="accelerate: model"):
        lifeops.accelerate("model")
    with pytest.raises(TypeError, match="accelerate: kinds"):
        lifeops.accelerate(model, kinds=3)


def test_without_numbers_nothing_is_tried():
    with torch.device("meta"):
        model = nn.ModuleDict({"pos": models.twins.PosConv(C, C)})
    assert lifeops.explain(lifeops.accelerate(model))[0].fused
