"""Programs that are written down of models, in one form each here; tests/test_capture.py has options, sizes and modes."""

import io
import tempfile
from pathlib import Path

import torch
from tool_cells import tool
from tool_systems import SYSTEMS, build

SCRIPTED = "cannot be compiled by torch.jit.script; use torch.jit.trace(model.eval(), x), torch.export.export(model, (x,))"


def _float32(system):
    model, _, x = build(system, torch.float32)
    return model, x


def _as(model, program, x, backward=False):
    y = program(x)
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
    if backward:
        y.sum().backward()


@tool("captured programs", "`torch.compile(fullgraph=True)`, a training step", "output, gradients")
def compiled(system):
    torch._dynamo.reset()
    model, twin, x = build(system)
    found = []
    for m in (torch.compile(model, fullgraph=True, backend="aot_eager"), twin):
        inputs = x.clone().requires_grad_()
        y = m(inputs)
        (g,) = torch.autograd.grad(y.square().sum(), inputs)
        found.append((y, g))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@tool("captured programs", "`torch.export.export`", "output; torch's operators alone, gradients flow")
def exported(system):
    model, x = _float32(system)
    program = torch.export.export(model, (x,))
    assert not any("lifeops" in str(node.target) for node in program.graph.nodes)
    _as(model, program.module(), x, backward=True)


@tool("captured programs", "`torch.jit.trace`, saved and loaded", "output, gradients flow; lifeops is imported where it is loaded")
def traced(system):
    model, x = _float32(system)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    _as(model, torch.jit.load(file), x, backward=True)


@tool("captured programs", "`torch.jit.script`", "", refused=dict.fromkeys(SYSTEMS, SCRIPTED))
def scripted(system):
    torch.jit.script(build(system)[0])


def _exported_to_onnx(system, run):
    model, x = _float32(system)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (x,), path, verbose=False)
        torch.testing.assert_close(torch.from_numpy(run(path, x.numpy())), model(x), rtol=1e-5, atol=1e-5)


@tool("captured programs", "`torch.onnx.export`, onnxruntime", "output to 1e-5", ["onnxscript", "onnxruntime"])
def onnxruntime(system):
    def run(path, x):
        import onnx
        import onnxruntime

        assert {node.domain for node in onnx.load(path).graph.node} == {""}
        session = onnxruntime.InferenceSession(path)
        return session.run(None, {session.get_inputs()[0].name: x})[0]

    _exported_to_onnx(system, run)


@tool("captured programs", "`torch.onnx.export`, OpenVINO", "output to 1e-5, `INFERENCE_PRECISION_HINT` f32", ["onnxscript", "openvino"])
def openvino(system):
    def run(path, x):
        import openvino

        return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]

    _exported_to_onnx(system, run)


@tool("captured programs", "a forward pass and a training step on `device=\"meta\"`", "shapes")
def meta(system):
    model, x = _float32(system)
    y = model.to("meta").train()(x.to("meta"))
    y.sum().backward()
    assert (y.device.type, y.shape[0]) == ("meta", len(x))
