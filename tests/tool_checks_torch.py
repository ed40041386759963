"""What torch itself does to models: pruning, parametrisations, other weights, dtypes, memory, initialisation."""

import copy
import io
import warnings

import torch
from seams import C, P
from tool_cells import tool
from tool_systems import SYSTEMS, Host, build, fused, same
from torch import nn
from torch.nn.utils import parametrizations, prune

TOLERANCE = {"rtol": 1e-7, "atol": 1e-7}


def _inner(model, system):
    """The depth-wise convolutions and products inside the fused modules."""
    ends = (*SYSTEMS[system].depthwise, *SYSTEMS[system].products)
    return [m for name, m in model.named_modules() if name.endswith(ends) and isinstance(m, (nn.Linear, nn.Conv2d))]


def _both(system, change, tolerance=1e-7, training=(False, True), dtype=torch.float64):
    """``change(model)`` on the model and on the twin, then as each other; and it changed something."""
    model, twin, x = build(system, dtype)
    with torch.no_grad():
        before = model(x)
    for m in (model, twin):
        torch.manual_seed(5)
        change(m)
    for mode in training:
        y, _ = same(model.train(mode), twin.train(mode), x, tolerance)
        assert mode or (y - before).abs().max() > 1e-6
    return model, twin, x


# ------------------------------------------------------------------------------------------------ pruning and parametrisations


def _on_inner(system, method):
    def change(m):
        for layer in _inner(m, system):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                method(layer)

    return change


def _removed(system, change):
    """After ``prune.remove`` the weights are plain again: fused, the same numbers."""
    model, _, x = _both(system, change)
    with torch.no_grad():
        y = model.eval()(x)
        for layer in model.modules():
            if hasattr(layer, "weight_mask"):
                prune.remove(layer, "weight")
        torch.testing.assert_close(model(x), y, **TOLERANCE)
    assert fused(model) == fused(build(system)[0])


@tool("prune", "`random_unstructured`, `ln_structured`, then `remove`", "output, gradients; fused again after `remove`")
def pruned(system):
    _removed(system, _on_inner(system, lambda layer: prune.random_unstructured(layer, "weight", 0.3)))
    _removed(system, _on_inner(system, lambda layer: prune.ln_structured(layer, "weight", 0.3, n=2, dim=0)))


@tool("prune", "`global_unstructured`, then `remove`", "output, gradients; fused again after `remove`")
def pruned_globally(system):
    def change(m):
        prune.global_unstructured([(layer, "weight") for layer in _inner(m, system)], prune.L1Unstructured, amount=0.4)

    _removed(system, change)


def _parametrised(title, method):
    @tool("parametrisations", title, "output, gradients in training and evaluation")
    def check(system):
        _both(system, _on_inner(system, method))

    return check


def _scaled(method):
    """Weight norm alone changes nothing: its length is doubled."""

    def change(layer):
        method(layer)
        with torch.no_grad():
            (layer.weight_g if hasattr(layer, "weight_g") else layer.parametrizations.weight.original0).mul_(2)

    return change


_parametrised("`nn.utils.weight_norm` (hooks)", _scaled(nn.utils.weight_norm))
_parametrised("`parametrizations.weight_norm`", _scaled(parametrizations.weight_norm))
_parametrised("`nn.utils.spectral_norm` (hooks)", nn.utils.spectral_norm)
_parametrised("`parametrizations.spectral_norm`", parametrizations.spectral_norm)
_parametrised("`parametrizations.orthogonal`", parametrizations.orthogonal)


# ------------------------------------------------------------------------------------------------ other weights


def _others(system):
    """The weights of another model of the same kind."""
    other, twin, x = build(system, seed=9)
    with torch.no_grad():
        return other.state_dict(), twin(x), x


@tool("weights", "`torch.func.functional_call`, `nn.utils.stateless`", "output and gradients with other weights, the model's own kept")
def functional_call(system):
    model, _, x = build(system)
    weights, expected, x = _others(system)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(torch.func.functional_call(model, weights, (x,)), expected, **TOLERANCE)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    leaves = {name: t.clone().requires_grad_() for name, t in weights.items() if t.is_floating_point() and "running" not in name}
    torch.func.functional_call(model, leaves | {n: t for n, t in weights.items() if n not in leaves}, (x,)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(t.grad is not None for t in leaves.values())


@tool("weights", "`load_state_dict(assign=True)` into a model on meta", "output of the saved model, fused")
def assign(system):
    weights, expected, x = _others(system)
    with torch.device("meta"):
        model = SYSTEMS[system].build().double().eval()
    model.load_state_dict(weights, assign=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **TOLERANCE)
    assert fused(model) == fused(build(system)[0])


@tool("weights", "`to_empty`, then `load_state_dict`", "output of the saved model, fused")
def to_empty(system):
    weights, expected, x = _others(system)
    with torch.device("meta"):
        model = SYSTEMS[system].build().double().eval()
    model.to_empty(device="cpu").load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **TOLERANCE)
    assert fused(model) == fused(build(system)[0])


OPTIONS = {
    "LIFE": {"num_heads": 3}, "LocalViT": {"expand_ratio": 2.0}, "LocalViT, ECA": {"expand_ratio": 2.0, "act": "hs+eca"},
    "DW shortcut": {"kernel_size": (3, 5)}, "LocalAttention": {"num_heads": 3},
}  # fmt: skip


@tool("weights", "`nn.utils.skip_init`", "output after `load_state_dict`", absent=[name for name in SYSTEMS if name not in OPTIONS])
def skip_init(system):
    weights, expected, x = _others(system)
    block = type(build(system)[0].block)
    model = Host(nn.utils.skip_init(block, dim=C, num_prefix_tokens=P, **OPTIONS[system])).double().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **TOLERANCE)


@tool("weights", "`swa_utils.AveragedModel`", "output of the average of two models")
def averaged(system):
    model, twin, x = build(system)
    weights, _, _ = _others(system)
    averages = [torch.optim.swa_utils.AveragedModel(m, use_buffers=True) for m in (model, twin)]
    for average, m in zip(averages, (model, twin), strict=True):
        average.update_parameters(m)
        m.load_state_dict(weights)
        average.update_parameters(m)
    same(*averages, x)


@tool("weights", "`torch.save` of the whole model, `copy.deepcopy`, `share_memory`", "output")
def saved_and_shared(system):
    model, twin, x = build(system)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = twin(x)
        for m in (torch.load(file, weights_only=False), copy.deepcopy(model), model.share_memory()):
            torch.testing.assert_close(m(x), expected, **TOLERANCE)
    assert all(p.is_shared() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ dtypes, layouts, initialisation


def _cast(dtype, tolerance):
    @tool("dtypes", f"`model.to(torch.{dtype})`".replace("torch.torch.", "torch."), f"output within {tolerance:g} of float64's")
    def check(system):
        model, twin, x = build(system, torch.float32)
        with torch.no_grad():
            expected = twin.double()(x.double())
            y = model.to(dtype)(x.to(dtype))
            assert y.dtype == dtype
            scale = expected.abs().max().item()
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance * scale)

    return check


_cast(torch.float64, 1e-6)
_cast(torch.float16, 2e-2)
_cast(torch.bfloat16, 1e-1)


@tool("dtypes", "`convert_conv2d_weight_memory_format`, `to(memory_format=channels_last)`", "output, gradients; fused")
def memory_format(system):
    model, twin, x = build(system)
    paths = fused(model)
    for convert in (nn.utils.convert_conv2d_weight_memory_format, lambda m, memory_format: m.to(memory_format=memory_format)):
        model = convert(model, torch.channels_last)
        same(model, twin, x)
    assert fused(model) == paths


@tool("initialisation", "`torch.nn.init` in a loop over `modules()`, `model.apply`", "output, gradients; fused")
def initialised(system):
    def weights(m):
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.xavier_normal_(m.weight)
            if m.bias is not None:
                nn.init.constant_(m.bias, 0.1)
        elif isinstance(m, (nn.LayerNorm, nn.BatchNorm2d)):
            nn.init.uniform_(m.weight, 0.5, 1.5)

    def by_loop(model):
        for m in model.modules():
            weights(m)

    for change in (by_loop, lambda model: model.apply(weights)):
        model, _, _ = _both(system, change)
        assert fused(model) == fused(build(system)[0])


@tool("fusion", "`nn.utils.fusion.fuse_conv_bn_eval`", "output; a folded convolution and `nn.Identity` in place of the norm run fused",
      absent=("LIFE", "DW shortcut", "LocalAttention", "timm, life", "timm, dw_shortcut"))  # fmt: skip
def fuse_conv_bn(system):
    model, twin, x = build(system)
    paths = fused(model)
    for m in (m for m in model.modules() if type(m).__name__ == "LocalityFeedForward"):
        for i in (0, 3, 7):
            norm = i + 1
            m.conv[i], m.conv[norm] = nn.utils.fusion.fuse_conv_bn_eval(m.conv[i], m.conv[norm]), nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), **TOLERANCE)
    assert fused(model) == paths
