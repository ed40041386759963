"""fvcore_handles: multiply-accumulates from torch.jit graphs, with and without fvcore."""

import pytest
import torch
import torch.nn.functional as F

import lifeops
from conftest import declare_torchvision_ops
from lifeops import model_cost, registry, testing, torchlib
from lifeops.models import named

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
SIZES = {"img_size": (32, 48), "patch_size": 8, "num_classes": 5, "depth": 2}


def _macs(function, *tensors):
    """By operator, of every node in the trace of a function of tensors that there is a handle for."""
    handles, found = lifeops.fvcore_handles(), {}
    with torch.no_grad():
        graph = torch.jit.trace(function, tensors, check_trace=False).graph
    for node in graph.nodes():
        if node.kind() in handles:
            assert node.kind() not in found
            found[node.kind()] = handles[node.kind()](list(node.inputs()), list(node.outputs()))
    return found


@pytest.mark.parametrize("op", registry.ops.values(), ids=lambda op: op.name)
def test_every_operator_in_a_trace(op):
    sample = next((s for s in op.samples() if s.name in ("plain", "cls")), op.samples()[0])
    args = testing.make(op, sample, torch.float32)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]

    def call(*given):
        given = iter(given)
        out = torchlib.overload(op)(*(next(given) if isinstance(a, torch.Tensor) else a for a in args))
        return testing.tensors(out)

    expected = op.flops(*(a.shape if isinstance(a, torch.Tensor) else a for a in args))
    assert expected % 2 == 0
    assert _macs(call, *tensors) == {f"lifeops::{op.name}": expected // 2}


def test_torchs_attention():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    assert _macs(F.scaled_dot_product_attention, q, k, v) == {"aten::scaled_dot_product_attention": 2 * 3 * 5 * 7 * (8 + 4)}


def test_a_graph_without_shapes_is_an_error():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 1, 3, 3))

        def forward(self, x):
            return lifeops.token_dwconv(x, self.weight, grid=(2, 3))

    with torch.no_grad():
        graph = torch.jit.trace(Module(), torch.randn(1, 6, 4)).graph
    node = next(n for n in graph.nodes() if n.kind() == "lifeops::token_dwconv")
    with pytest.raises(ValueError, match="argument 1 of lifeops::token_dwconv must have a shape or be a constant in the graph"):
        lifeops.fvcore_handles()[node.kind()](list(node.inputs()), list(node.outputs()))


@pytest.mark.parametrize("system", ["life", "localvit", "dw_shortcut"])
def test_a_converted_timm_model_can_be_traced(system):
    """Its grid comes from the image's size, which torch.jit.trace gives as tensors."""
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
    model = lifeops.convert(timm.create_model("vit_tiny_patch16_224", **sizes), system).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), model(x))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert any(kind.startswith("lifeops::") for kind in kinds) == (system != "localvit")  # its layers are called where a program is traced
    assert "prim::PythonOp" not in kinds


@pytest.mark.parametrize("system", ["plain", "life", "localvit", "dw_shortcut"])
def test_fvcore_counts_the_macs_of_a_model(system):
    fvcore = pytest.importorskip("fvcore.nn")
    model, x = named("deit_tiny", system, **SIZES).eval(), torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        analysis = fvcore.FlopCountAnalysis(model, x).set_op_handle(**lifeops.fvcore_handles())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        found = analysis.by_operator()
    products = sum(n for name, n in found.items() if name not in ("layer_norm", "batch_norm"))
    assert products == model_cost.count_macs(lambda: model(x))
    assert not [name for name in analysis.unsupported_ops() if name.startswith(("lifeops", "prim::PythonOp"))]
