"""Tools that count multiply-accumulates: what each says is the layers' own number and what it counts beside it."""

import contextlib
import io
import warnings
from collections import Counter

import torch
from tool_cells import tool
from tool_systems import Host, build, fused
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lifeops
from lifeops import model_cost
from lifeops.nn import LifeAttention, LocalAttention

NORMS = nn.LayerNorm, nn.BatchNorm2d
CONVS = nn.Conv1d, nn.Conv2d


def _add(found, layer, x, y):
    if isinstance(layer, (nn.Linear, *CONVS)):
        found["layers"] += y.numel() * (layer.weight.numel() // len(layer.weight))
        found["biases"] += y.numel() * (layer.bias is not None)
    found["norms"] += x.numel() * (type(layer) in NORMS)
    found["fvcore"] += x.numel() * (5 * isinstance(layer, nn.LayerNorm) + 2 * isinstance(layer, nn.BatchNorm2d))
    found["beside"] += 3 * (x.numel() + y.numel())  # more than any tool counts for a norm, an activation or a pool
    once = sum(p.numel() for p in layer.parameters())
    found["torchinfo"] += once * (len(y) if not isinstance(layer, CONVS) else y.numel() // y.shape[1])


def _counted(model, twin, x):
    """From the shapes that the twin's layers see: MACs of the "layers", of "attention" and, of those, of "timms" attention, elements of
    "biases" and "norms".
    """
    found, handles = Counter(), []
    for layer in twin.modules():
        if not list(layer.children()):
            handles.append(layer.register_forward_hook(lambda m, args, y: _add(found, m, args[0], y)))
    with torch.no_grad():
        twin(x)
    for handle in handles:
        handle.remove()
    B, N, C = (len(x), x.shape[1] if isinstance(model, Host) else 22, 12)
    own = sum(isinstance(m, (LifeAttention, LocalAttention)) for m in model.modules())
    timms = sum(type(m).__name__ == "Attention" for m in model.modules())
    found["attention"], found["timms"] = 2 * B * N * N * C * (own + timms), 2 * B * N * N * C * timms
    found["sums"] = 2 * B * N * C * sum(isinstance(m, LifeAttention) for m in model.modules())
    return found


def _ours(system):
    model, twin, x = build(system, torch.float32)
    return model, twin, x, _counted(model, twin, x)


def _left_as_it_was(model, system, x):
    """The counter has taken its hooks away: the model is fused again."""
    found = build(system, torch.float32)[0]
    assert fused(model) == fused(found)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), found(x))


@tool("counting", "`lifeops.model_cost.count_macs`, `lifeops flops`", "products of the layers and of attention, from their shapes")
def count_macs(system):
    model, _, x, found = _ours(system)
    assert model_cost.count_macs(lambda: model(x)) == found["layers"] + found["attention"]


@tool("counting", "`torch.utils.flop_counter`", "the same; without `flop_formulas()` torch leaves out its own attention on the CPU")
def flop_counter(system):
    model, _, x, found = _ours(system)
    for mapping, left_out in ((model_cost.flop_formulas(), 0), (None, found["timms"])):
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
            model(x)
        assert counter.get_total_flops() == 2 * (found["layers"] + found["attention"] - left_out)


@tool("counting", "`fvcore`", "the same with `fvcore_handles()`, and 5 per element of a layer norm, 2 of a batch norm", ["fvcore"])
def fvcore(system):
    from fvcore.nn import FlopCountAnalysis

    model, _, x, found = _ours(system)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model, x).set_op_handle(**lifeops.fvcore_handles())
        total = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
    assert total == found["layers"] + found["attention"] + found["fvcore"]


@tool("counting", "`thop`", "products of the layers, 4 per element of a norm; no attention", ["thop"])
def thop(system):
    from thop import profile

    model, twin, x, found = _ours(system)
    for m in (model, twin):
        assert profile(m, (x,), verbose=False)[0] == found["layers"] + 4 * found["norms"]
    _left_as_it_was(model, system, x)


@tool("counting", "`torchinfo`", "a dense layer once an image, whatever the tokens (torchinfo's way), as for plain layers", ["torchinfo"])
def torchinfo(system):
    from torchinfo import summary

    model, twin, x, found = _ours(system)
    ours, theirs = (summary(m, input_data=x, verbose=0) for m in (model, twin))
    assert (ours.total_mult_adds, ours.total_params) == (theirs.total_mult_adds, theirs.total_params)
    assert ours.total_mult_adds == found["torchinfo"]
    assert ours.total_params == sum(p.numel() for p in model.parameters())
    _left_as_it_was(model, system, x)


def _ptflops(model, x, backend):
    from ptflops import get_model_complexity_info

    with contextlib.redirect_stdout(io.StringIO()):
        options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
        return get_model_complexity_info(model, tuple(x.shape[1:]), input_constructor=lambda _: {"x": x}, **options)[0]


@tool("counting", "`ptflops`, aten", "products, 1 per element they are added to; not torch's own attention on the CPU", ["ptflops"])
def ptflops_aten(system):
    model, _, x, found = _ours(system)
    expected = found["layers"] + found["attention"] - found["timms"] + found["biases"] + found["sums"]
    assert _ptflops(model, x, "aten") == expected
    with torch.no_grad():
        assert _ptflops(model, x, "aten") == expected


PTFLOPS = "as for plain layers: products of the layers, not attention's, biases, norms, activations; timm's own attention by a formula"


@tool("counting", "`ptflops`, pytorch", PTFLOPS + " that leaves its projections out (backend='aten' counts them)", ["ptflops"])
def ptflops_pytorch(system):
    model, twin, x, found = _ours(system)
    n = _ptflops(model, x, "pytorch")
    assert n == _ptflops(twin, x, "pytorch")
    timms = sum(type(m).__name__ == "Attention" for m in model.modules())
    dropped = timms * x.shape[0] * 22 * 4 * 12 * 12
    products = found["layers"] - dropped + found["timms"]
    assert products <= n <= products + found["beside"]
    _left_as_it_was(model, system, x)
