"""Quantised linear layers: the model computes what its quantised layers compute when they are called one by one."""

import torch
from tool_cells import tool
from tool_systems import SYSTEMS, build, same
from torch import nn

ONE_STEP = "output, but for activations that the last bit puts on the other side of an int8 step"


def _linear(m):
    return [name for name, layer in m.named_modules() if isinstance(layer, nn.Linear)]


def _quantised(system, config, filter_fn=None, dtype=torch.float32):
    """Model and twin quantised, input, and the output of before."""
    from torchao.quantization import quantize_

    model, twin, x = build(system, dtype)
    with torch.no_grad():
        before = model(x)
    for m in (model, twin):
        quantize_(m, config(), **({} if filter_fn is None else {"filter_fn": filter_fn}))
    return model, twin, x, before


def _close(model, twin, x, before, tolerance, error):
    """As the twin; within the ``error`` of quantisation, relative to the largest logit, of the model before, and not the same."""
    y, _ = same(model, twin, x, tolerance, backward=False)
    off = ((y - before).abs().max() / before.abs().max()).item()
    assert 0 < off < error, off


def _torchao(title, holds, config, error, tolerance=1e-5, **options):
    @tool("torchao", title, holds, ["torchao"])
    def check(system):
        _close(*_quantised(system, config, **options), tolerance, error)

    return check


def _int8_weights():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int8_dynamic():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _intx():
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))


_torchao("`Int8WeightOnlyConfig`", "output", _int8_weights, 0.05)
_torchao("`Int8DynamicActivationInt8WeightConfig`", ONE_STEP, _int8_dynamic, 0.15, 5e-3)
def _float8():
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


_torchao("`IntxWeightOnlyConfig(torch.int4)`", "output", _intx, 0.8)
_torchao("`Float8WeightOnlyConfig`", "output", _float8, 0.3)


@tool("torchao", "`QATConfig(step=\"prepare\")`, int4 weights", "output, gradients", ["torchao"])
def training(system):
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    def config():
        return QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, granularity=PerAxis(0)), step="prepare")

    model, twin, x, before = _quantised(system, config)
    assert all("Fake" in type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear))
    y, _ = same(model.train(), twin.train(), x, 1e-4)
    assert (y - before).abs().max() > 1e-4


@tool("torchao", "`filter_fn`: one layer inside a fused module", "output; the other layers keep their weights", ["torchao"])
def filtered(system):
    ends = tuple(n for n in SYSTEMS[system].products if n not in ("conv.0", "conv.7") and "pointwise" not in n) or ("head",)
    chosen = ends[-1]
    model, twin, x, before = _quantised(system, _int8_weights, lambda layer, path: path.endswith(chosen) and isinstance(layer, nn.Linear))
    changed = [name for name in _linear(model) if type(model.get_submodule(name).weight) is not nn.Parameter]
    assert changed
    assert all(name.endswith(chosen) for name in changed)
    _close(model, twin, x, before, 1e-5, 0.05)


@tool("torchao", "quantised state dict into a fresh model, `assign=True`", "output of the saved model", ["torchao"])
def reloaded(system):
    model, _, x, _ = _quantised(system, _int8_weights)
    fresh, _, _ = build(system, torch.float32, seed=5)
    fresh.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), model(x), rtol=1e-6, atol=1e-6)


@tool("torch.ao", "`torch.ao.quantization.quantize_dynamic`", ONE_STEP)
def quantize_dynamic(system):
    model, twin, x = build(system, torch.float32)
    with torch.no_grad():
        before = model(x)
    model, twin = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}) for m in (model, twin))
    assert _linear(model) == []
    _close(model, twin, x, before, 5e-3, 0.15)
