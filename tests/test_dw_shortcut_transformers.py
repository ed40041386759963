"""DW shortcuts around one or several layers of transformers' models, plain and in stages: the original with the shortcut added by hooks."""

import copy
import io

import plain_systems
import pytest
import torch
from hosts import hf, hooks_of, transformers, unchanged

import lifeops
from test_localvit import _close, _randomised

PLAIN = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32, "num_hidden_layers": 4, "image_size": (32, 48)}
SWIN = {
    "image_size": (32, 64), "patch_size": 4, "embed_dim": 12, "depths": (2, 4), "num_heads": (2, 3), "window_size": 4, "mlp_ratio": 2.0,
}  # fmt: skip
PYRAMID = {
    "num_encoder_blocks": 2, "hidden_sizes": [8, 16], "depths": [2, 4], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
    "strides": [4, 2], "patch_sizes": [7, 3], "sr_ratios": [2, 1],
}  # fmt: skip


def _model(name, **options):
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))


HOSTS = {
    "ViT": hf("ViT", **PLAIN),
    "DINOv2": hf("Dinov2WithRegisters", **{**PLAIN, "layerscale_value": 0.5, "image_size": 32}),
    "DINOv3": hf("DINOv3ViT", num_register_tokens=3, **PLAIN),
    "AIMv2": hf("Aimv2Vision", **{**PLAIN, "image_size": 32}),
    "Swin": lambda: _model("Swin", **SWIN),
    "Swin V2": lambda: _model("Swinv2", **SWIN),
    "Donut": lambda: _model("DonutSwin", **SWIN),
    "PVT v2": lambda: _model("PvtV2", **PYRAMID),
    "SegFormer": lambda: _model("Segformer", **PYRAMID),
}
PREFIX = {"ViT": 1, "DINOv2": 5, "DINOv3": 4}
CHECKPOINTED = ["ViT", "DINOv3", "Swin", "Swin V2", "PVT v2", "SegFormer"]


def _rounding(name):
    """AIMv2 normalises in float32."""
    return 1e-5 if name == "AIMv2" else 1e-9


def _host(name):
    torch.manual_seed(0)
    return _randomised(HOSTS[name]().double().eval())


def _images(name):
    size = (32, 32) if name == "AIMv2" else (32, 64) if name in ("Swin", "Swin V2", "Donut") else (32, 48)
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _lists(model):
    stages = getattr(model, "stages", None) or getattr(getattr(model, "encoder", None), "layers", ())
    if stages and hasattr(stages[0], "blocks"):
        return [stage.blocks for stage in stages]
    places = (model, getattr(model, "encoder", None), getattr(model, "model", None))
    found = (getattr(p, n, None) for p in places for n in ("layer", "layers"))
    return [next(f for f in found if isinstance(f, torch.nn.ModuleList))]


def _added(name, shortcut, x, args, output):
    told = args[1:2] if len(args) > 1 and isinstance(args[1], (tuple, list, torch.Size)) else [args[1:3]]
    grid = tuple(told[0]) if name in ("Swin", "Swin V2", "Donut", "PVT v2", "SegFormer") else (4, 4 if name == "AIMv2" else 6)
    term = plain_systems.shortcut(shortcut, x, PREFIX.get(name, 0), grid)
    return (output[0] + term, *output[1:]) if isinstance(output, tuple) else output + term


def _pair(name, every):
    """A converted model, and the original with hooks that add the same shortcuts."""
    original = _host(name)
    model = lifeops.convert(copy.deepcopy(original), "dw_shortcut", every=every)
    for blocks, news in zip(_lists(original), _lists(model), strict=True):
        for i in range(every - 1, len(blocks), every):
            shortcut, given = _randomised(news[i].shortcut), []
            blocks[i - every + 1].register_forward_pre_hook(lambda m, a, given=given: given.append(a[0]))
            blocks[i].register_forward_hook(lambda m, a, y, s=shortcut, given=given: _added(name, s, given.pop(), a, y))
    assert sum(isinstance(m, lifeops.nn.DWShortcut) for m in model.modules()) == sum(map(len, _lists(original))) // every
    return model, original


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", HOSTS)
def test_outputs_gradients_and_hidden_states(name, every):
    results = []
    for m in _pair(name, every):
        x = _images(name).requires_grad_()
        y = m(x, output_hidden_states=True)
        (gradient,) = torch.autograd.grad(y.last_hidden_state.square().sum(), x)
        results.append((y.last_hidden_state, gradient, y.hidden_states))
    (y, gradient, states), (expected, expected_gradient, expected_states) = results
    _close(y, expected, _rounding(name))
    _close(gradient, expected_gradient, 10 * _rounding(name) * expected_gradient.abs().max().item())
    assert len(states) == len(expected_states)
    for a, b in zip(states, expected_states, strict=True):
        _close(a, b, _rounding(name))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", HOSTS)
def test_start_and_back(name, every):
    model, x = _host(name), _images(name)
    before, keys = model(x).last_hidden_state, list(model.state_dict())
    lifeops.convert(model, "dw_shortcut", every=every, kernel_sizes=(3, 5), start="identity")
    y = model(x).last_hidden_state
    _close(y, before, 1e-5 if name == "AIMv2" else 1e-13)
    y.square().sum().backward()
    shortcuts = [m for m in model.modules() if isinstance(m, lifeops.nn.DWShortcut)]
    assert all(conv.weight.grad.any() for m in shortcuts for conv in m.convs)
    lifeops.revert(model)
    assert torch.equal(model(x).last_hidden_state, before)
    assert list(model.state_dict()) == keys
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("name", "every", "reentrant"),
    [
        (name, every, reentrant) for name in CHECKPOINTED for every in (1, 2, 4) for reentrant in (False, True)
        if (every < 4 or name in PREFIX) and not (name == "PVT v2" and reentrant)  # whose layers nest their outputs: no gradient, as it is
    ],
)  # fmt: skip
def test_checkpointing(name, every, reentrant):
    model, _ = _pair(name, every)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train().zero_grad()
        torch.manual_seed(0)
        model(_images(name).requires_grad_()).last_hidden_state.square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        _close(gradients[1][key], value, 1e-9 * max(1, value.abs().max().item()))


@pytest.mark.parametrize("name", ["ViT", "Swin", "SegFormer"])
def test_copies(name):
    """Deep copies and files of a converted model remember their own groups."""
    model, _ = _pair(name, 2)
    x, file = _images(name), io.BytesIO()
    expected = model(x).last_hidden_state
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x).last_hidden_state, expected)
        assert _lists(other)[0][0].group.starts is _lists(other)[0][1].group.starts is not _lists(model)[0][0].group.starts


def test_a_group_is_called_as_a_whole():
    model, x = _pair("ViT", 2)[0], _images("ViT")
    layers, tokens = _lists(model)[0], torch.zeros(1, 25, 24, dtype=torch.float64)

    def broken(*args):
        raise KeyboardInterrupt

    with lifeops.use_grid(model, (4, 6)):
        with pytest.raises(ValueError, match="ViTLayer: the first block of its group has not run before it in this forward pass"):
            layers[1](tokens)
        handle = layers[1].register_forward_pre_hook(broken)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        handle.remove()
        with pytest.raises(ValueError, match="the first block of its group has not run before it in this forward pass"):
            layers[1](tokens)  # nothing is left of the pass that broke off
        expected = layers[1](layers[0](tokens))
        assert torch.equal(torch.nn.Sequential(*layers[:2])(tokens), expected)  # torch's own frames in between do not count
    with pytest.raises(ValueError, match="every must be a positive int that divides the 4 blocks, got 3"):
        lifeops.convert(_host("ViT"), "dw_shortcut", every=3)


def test_compiled():
    model, x = _pair("ViT", 2)[0], _images("ViT")
    expected = model(x).last_hidden_state
    torch._dynamo.reset()
    _close(torch.compile(model, backend="aot_eager")(x).last_hidden_state, expected, 1e-12)


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict):
    model, x = _pair("ViT", 2)[0], _images("ViT")
    program = torch.export.export(model, (x,), strict=strict).module()
    _close(program(2 * x).last_hidden_state, model(2 * x).last_hidden_state, 1e-12)


def test_layers_called_several_times():
    model = _host("ViT")
    model.layers[2] = model.layers[0]
    message = "every must be 1 for ViTModel, which calls blocks several times, got 2"
    unchanged(model, lambda m: lifeops.convert(m, "dw_shortcut", every=2), message)
