"""Programs written down of our models: torch.compile, torch.export, torch.jit, ONNX and OpenVINO, AOTInductor, meta tensors, torch.func."""

import copy
import io
import subprocess
import sys

import pytest
import seams
import torch
from torch import nn
from torch.export import Dim, export

import lifeops
from conftest import declare_torchvision_ops
from lifeops import ChannelAct, registry, torchlib

declare_torchvision_ops()
timm = pytest.importorskip("timm")
SYSTEMS = ("life", "localvit", "dw_shortcut")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
OPTIONS = {
    "life": {"qkv_norm": True, "aux_key": "scale1"}, "localvit": {"act": "hs+ecah"}, "dw_shortcut": {"kernel_sizes": (3, 5), "every": 2},
}  # fmt: skip
SMALL = {"img_size": 32, "depth": 2, "num_classes": 5}


def _perturbed(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value) if "var" in key else 0.1 * torch.randn_like(value))
    return model.eval()


def _vit(system, dynamic=False, other=False, **options):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**SIZES, dynamic_img_size=dynamic, reg_tokens=other, **options)
    return _perturbed(lifeops.convert(model, system, **(OPTIONS[system] if other else {})))


MODELS = {f"{system}{', options' * other}": (lambda s=system, o=other: _vit(s, other=o)) for system in SYSTEMS for other in (False, True)}
MODELS |= {
    "lifeops localvit": lambda: _perturbed(lifeops.models.localvit("tiny_mlp4_act3_r192", embed_dim=48, patch_size=8, **SMALL)),
    "lifeops vit": lambda: _perturbed(lifeops.models.dw_shortcut("vit_tiny", patch_size=8, **SMALL)),
    "lifeops cait": lambda: _perturbed(lifeops.models.dw_shortcut("cait_xxs12", patch_size=8, **SMALL)),
    "fused dw_shortcut": lambda: lifeops.fuse_(_vit("dw_shortcut", other=True)), "fused localvit": lambda: lifeops.fuse_(_vit("localvit")),
}  # fmt: skip


def _images(*size, batch=2, seed=0):
    return torch.randn(batch, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(seed))


def _close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ torch.compile


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", MODELS)
def test_compile(name, mode):
    model, x = MODELS[name](), _images()
    with mode():
        _close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("name", ["life, options", "localvit, options", "dw_shortcut, options"])
def test_compile_training(name):
    model = MODELS[name]().train()
    twin, x = copy.deepcopy(model), _images()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=lambda text: f"{key}: {text}")  # noqa: B023
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_compile_dynamic(system):
    model = _vit(system, dynamic=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size, batch in (((32, 48), 2), ((48, 32), 3), ((64, 16), 2)):
            x = _images(*size, batch=batch)
            _close(compiled(x), model(x))


def _token_calls(device="cpu"):
    draw, place = torch.Generator().manual_seed(0), {"grid": (4, 5), "num_prefix_tokens": 2}
    shapes = (2, 22, 12), (12, 1, 3, 3), (12,), (22, 22), (2, 22), *[(2, 3, 22, 4)] * 3
    x, w, b, mask, there, q, k, v = (torch.randn(shape, generator=draw).to(device) for shape in shapes)
    there = there > -1
    conv = lifeops.token_dwconv
    return {
        "plain": lambda: conv(x, w, b, **place), "drop": lambda: conv(x, w, b, prefix="drop", **place),
        "zero, residual": lambda: conv(x, w, prefix="zero", residual=x, **place),
        "prologue": lambda: conv(x, w, b, prologue=ChannelAct(b, b, "hardswish"), **place),
        "gelu first": lambda: conv(x, w, b, prologue=ChannelAct(b, b, "gelu_first"), residual=x, **place),
        "epilogue": lambda: conv(x, w, b, epilogue=ChannelAct(b, None, "relu6"), **place),
        "sums": lambda: tuple(conv(x, w, b, epilogue=ChannelAct(act="gelu"), pool=True, stats=True, **place)),
        "attention": lambda: lifeops.local_attention(q, k, v, **place), "local": lambda: lifeops.local_attention(q, k, v, w, b, **place),
        "mask": lambda: lifeops.local_attention(q, k, v, w, attn_mask=mask, **place),
        "bool mask": lambda: lifeops.local_attention(q, k, v, attn_mask=mask > -2, key_mask=there, **place),
        "key mask": lambda: lifeops.local_attention(q, k, v, w, b, attn_mask=mask, key_mask=there, **place),
    }  # fmt: skip


class _Call(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call, self.scale = call, nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = self.call()
        return tuple(t * self.scale for t in y) if isinstance(y, tuple) else y * self.scale


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", _token_calls())
def test_ops(name, mode):
    """Every option compiled, exported and traced."""
    call = _token_calls()[name]
    with mode():
        _close(torch.compile(call, fullgraph=True, backend="aot_eager")(), call())
    x = torch.ones(1)
    if mode is torch.enable_grad:
        _close(export(_Call(call), (x,)).module()(x), _Call(call)(x))
        _close(torch.jit.trace(_Call(call), x)(x), _Call(call)(x))


def test_compiled_code_follows_use_backend():
    x, w = torch.randn(2, 22, 12), torch.randn(12, 1, 3, 3)
    compiled = torch.compile(lambda: lifeops.token_dwconv(x, w, grid=(4, 5), num_prefix_tokens=2), fullgraph=True, backend="eager")
    for backend in (None, "reference", None):
        with lifeops.use_backend(backend):
            compiled()
        assert torchlib.last_backend["token_dwconv"] == (backend or ("reference" if registry.unavailable("cpu") else "cpu"))


# ------------------------------------------------------------------------------------------------ torch.export


def _operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_export(name, strict):
    """A program of torch's own operators, which runs with gradients on."""
    model, x = MODELS[name](), _images()
    program = export(model, (x,), strict=strict)
    assert not any("lifeops" in operator for operator in _operators(program))
    y = program.module()(x)
    _close(y, model(x))
    y.sum().backward()


@pytest.mark.parametrize("system", SYSTEMS)
def test_export_of_a_block(system):
    """On its own it takes the grid that is bound around the export, or else the only one that there has been."""
    model, x = _vit(system), torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(1))
    block = model.blocks[0]
    with torch.no_grad():
        with lifeops.use_grid(model, (2, 8)):
            wide, expected_wide = export(block, (x,), strict=False).module(), block(x)
        other = copy.deepcopy(model)
        other(_images())
        square = export(other.blocks[0], (x,), strict=False).module()
        with lifeops.use_grid(model, (4, 4)):
            expected = block(x)
    _close(wide(x), expected_wide)
    _close(square(x), expected)
    assert (expected - expected_wide).abs().max() > 1e-3


@pytest.mark.parametrize("system", SYSTEMS)
def test_export_of_blocks_on_maps(system):
    """They tell their grid, to a compiler too."""
    sam = timm.models.VisionTransformerSAM(**{**SIZES, "img_size": (32, 48)}, use_rel_pos=True, window_size=0, neck_chans=16)
    model, x = _perturbed(lifeops.convert(sam.eval(), system)), _images(32, 48)
    _close(export(model, (x,), strict=False).module()(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_export_training(name):
    """Exported in train mode it trains: the same gradients and running statistics."""
    if name.startswith("fused"):
        return  # for inference
    model, x = MODELS[name]().train(), _images(batch=4)
    program = export(copy.deepcopy(model), (x,)).module()
    for m in (program, model):
        m(x).square().sum().backward()
    got = dict(program.named_parameters())
    for key, p in model.named_parameters():
        torch.testing.assert_close(got[key].grad, p.grad, rtol=1e-3, atol=1e-4, msg=lambda text: f"{key}: {text}")  # noqa: B023
    buffers = dict(program.named_buffers())
    for key, b in model.named_buffers():
        torch.testing.assert_close(buffers[key].to(b.dtype), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_export_dynamic(system):
    model = _vit(system, dynamic=True)
    program = export(model, (_images(48, 64),), dynamic_shapes={"x": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}}).module()
    for size, batch in (((32, 48), 3), ((64, 24), 2), ((80, 40), 1)):
        _close(program(_images(*size, batch=batch)), model(_images(*size, batch=batch)))
    batched = export(_vit(system), (_images(),), dynamic_shapes={"x": {0: Dim("batch")}}).module()
    _close(batched(_images(batch=5)), _vit(system)(_images(batch=5)))


def test_a_backend_that_was_asked_for_stays_in_the_program():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(12, 12, 3, padding=1, groups=12)

        def forward(self, x):
            return lifeops.token_dwconv(x, self.conv.weight, self.conv.bias, grid=(4, 5), num_prefix_tokens=2, backend="reference")

    model, x = Model(), torch.randn(2, 22, 12)
    program = export(model, (x,))
    assert "lifeops.token_dwconv.default" in _operators(program)
    program.module()(x).square().sum().backward()
    got = dict(program.module().named_parameters())["conv.weight"]
    program.module()(x).square().sum().backward()
    assert got.shape == model.conv.weight.shape


# ------------------------------------------------------------------------------------------------ torch.jit


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", MODELS)
def test_trace(name):
    """As everyone writes it, gradients on; saved, loaded, another batch, gradients."""
    model, x = MODELS[name](), _images()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    y = loaded(x)
    _close(y, model(x))
    y.square().sum().backward()
    model(x).square().sum().backward()
    got = dict(loaded.named_parameters())
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[key].grad, p.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        _close(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build", [*MODELS.values(), *(build for build, _ in seams.SYSTEMS.values())])
def test_script_is_refused(build):
    with pytest.raises(RuntimeError, match=r"lifeops: \w+ cannot be compiled by torch.jit.script; use torch.jit.trace\(model.eval"):
        torch.jit.script(build())


# ------------------------------------------------------------------------------------------------ ONNX, OpenVINO, AOTInductor


def _onnx(model, x, folder, **options):
    pytest.importorskip("onnxscript")
    path = str(folder / "model.onnx")
    torch.onnx.export(model, (x,), path, verbose=False, **options)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_onnx(name, tmp_path):
    """Without a flag of ours: standard operators, onnxruntime's and OpenVINO's outputs ours to 1e-5."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, x = MODELS[name](), _images()
    path = _onnx(model, x, tmp_path)
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}
    session = onnxruntime.InferenceSession(path)
    _close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), model(x))
    _close(_openvino(path)(x), model(x))


def _openvino(path):
    """In float32: on processors with bfloat16 products its default is those."""
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("system", SYSTEMS)
def test_onnx_of_any_batch_and_image_size(system, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    for positions, example in (("learn", 2), ("none", 1)):  # one image as an example does not fix the batch
        model = _vit(system, dynamic=True, pos_embed=positions)
        sizes = {"x": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
        path = _onnx(model, _images(48, 64, batch=example), tmp_path, dynamic_shapes=sizes)
        session, other = onnxruntime.InferenceSession(path), _openvino(path)
        for size, batch in (((32, 48), 3), ((64, 24), 2)):
            x = _images(*size, batch=batch)
            _close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), model(x))
            # OpenVINO resizes timm's positions otherwise: the plain model is 6e-5 off, too
            _close(other(x), model(x), 1e-5 if positions == "none" else 1e-2)


AOT = """
import sys, torch, torch._inductor.codecache
assert "lifeops" not in sys.modules
run = torch._inductor.aoti_load_package(sys.argv[1])
x, y = torch.load(sys.argv[2])
assert (run(x) - y).abs().max() < 1e-5, (run(x) - y).abs().max()
"""


@pytest.mark.parametrize("system", SYSTEMS)
def test_aot_inductor_in_a_fresh_process(system, tmp_path):
    """The package needs torch and nothing of ours."""
    model, x = _vit(system), _images()
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(export(model, (x,)), package_path=str(tmp_path / "model.pt2"))
        torch.save((x, model(x)), tmp_path / "data.pt")
    subprocess.run([sys.executable, "-c", AOT, package, str(tmp_path / "data.pt")], check=True, timeout=600)


# ------------------------------------------------------------------------------------------------ meta, torch.func


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*MODELS, *seams.SYSTEMS])
def test_meta(name, training):
    """Shapes without memory, in evaluation and through a training step."""
    if name in MODELS:
        if name.startswith("fused"):
            return
        model = MODELS[name]().to("meta").train(training)
        y, shape = model(_images().to("meta")), (2, 5)
    else:
        model = seams.SYSTEMS[name][0]().to("meta").train(training)
        x = seams.tokens(dtype=torch.float32).to("meta")
        y, shape = seams.call(model, x), x.shape
    assert (y.device.type, tuple(y.shape)) == ("meta", tuple(shape))
    y.sum().backward()
    assert all(p.grad is None or (p.grad.shape == p.shape and p.grad.is_meta) for p in model.parameters())


@pytest.mark.parametrize("name", _token_calls())
def test_meta_ops(name):
    got, expected = _token_calls("meta")[name](), _token_calls()[name]()
    for a, b in zip(got if isinstance(got, tuple) else (got,), expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)


@pytest.mark.parametrize("name", seams.SYSTEMS)
def test_func(name):
    """grad, grad of grad and per-sample gradients as the layers one by one have them."""
    module, oracle, _ = seams.build(name)
    module.eval()
    x, parameters = seams.tokens(), {k: p.detach() for k, p in module.named_parameters()}

    def loss(p, t):
        return torch.func.functional_call(module, p, (t, t.tanh(), seams.GRID) if "DW" in name else (t, seams.GRID)).square().mean()

    def by_layer(p, t):
        with torch.nn.utils.stateless._reparametrize_module(module, p):
            return oracle(module, t).square().mean()

    for ours, theirs in zip(torch.func.grad(loss)(parameters, x).items(), torch.func.grad(by_layer)(parameters, x).items(), strict=True):
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-6)
    if "LocalityFeedForward" not in name or "relu6" in name:  # torch has no second derivative of h-swish
        twice = (torch.func.grad(lambda t: torch.func.grad(f, argnums=1)(parameters, t).square().sum())(x) for f in (loss, by_layer))  # noqa: B023
        torch.testing.assert_close(*twice, rtol=1e-6, atol=1e-6)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    for i in range(len(x)):
        one = torch.func.grad(by_layer)(parameters, x[i : i + 1])
        for key, value in one.items():
            torch.testing.assert_close(each[key][i], value, rtol=1e-6, atol=1e-6)


def _by_backward(loss, inputs):
    loss.backward()
    return [t.grad for t in inputs]


def _by_inputs(loss, inputs):
    loss.backward(inputs=inputs)
    return [t.grad for t in inputs]


def _by_grad(loss, inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True)


@pytest.mark.parametrize("way", [_by_backward, _by_inputs, _by_grad])
@pytest.mark.parametrize("plus", [0, 1])
@pytest.mark.parametrize("name", seams.SYSTEMS)
def test_second_derivatives_raise_or_are_right(name, plus, way):
    """A gradient penalty through an op that is differentiable once: never without its second-order term, with respect to whatever."""
    module, oracle, _ = seams.build(name)
    module.train(name.startswith("DW"))
    wanted = ["x", *(key for key, _ in module.named_parameters())]
    for chosen in [["x"], *([key] for key in wanted if "weight" in key), wanted]:
        found = []
        for run in (seams.call, oracle):
            module.zero_grad()
            x = seams.tokens().requires_grad_()
            y = run(module, x)
            (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            leaves = {"x": x, **dict(module.named_parameters())}
            try:
                found.append(way(plus * y.sum() + g.square().sum(), [leaves[key] for key in chosen]))
            except RuntimeError as error:
                assert run is seams.call, chosen
                assert "differentiable once, a second derivative was asked for" in str(error), chosen  # noqa: PT017
                break
        else:
            for key, ours, theirs in zip(chosen, *found, strict=True):
                assert (ours is None) == (theirs is None), key
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda text: f"{key}: {text}")  # noqa: B023
