"""A fused module whose layers were exchanged, wrapped, hooked or parametrised computes what its layers compute, or says that it cannot."""

import copy

import pytest
import seams
import torch
from seams import GRID, SYSTEMS, C, P
from torch import nn
from torch.nn.utils import parametrizations, prune

import lifeops
from conftest import declare_torchvision_ops
from lifeops.nn import DWShortcut, LifeAttention, LocalAttention, LocalityFeedForward
from lifeops.nn.plain import is_fused, reasons

CONVS = {  # system: the K x K convolution in it
    "LifeAttention": "qkv.scale2.depthwise", "LifeAttention, heads across scales": "qkv.scale3.depthwise", "LocalAttention": "local",
    "LocalityFeedForward": "conv.3", "DWShortcut": "convs.0", "DWShortcut, two kernels": "convs.1",
}  # fmt: skip
PRODUCTS = {
    "LifeAttention": ("qkv.scale1", "qkv.scale2.pointwise", "proj"), "LocalAttention": ("qkv", "proj"),
    "LocalityFeedForward": ("conv.0", "conv.7", "conv.6.fc.0", "conv.6.fc.2"), "LocalityFeedForward, hs+eca": ("conv.6.conv",),
}  # fmt: skip
PARAMETRISED = [(name, path) for name, path in CONVS.items()] + [(name, path) for name, paths in PRODUCTS.items() for path in paths]


def _same(module, oracle, x, tolerance=1e-9):
    """Output and gradients of the module and of its layers."""
    twin = copy.deepcopy(module)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = seams.call(module, ours), oracle(twin, theirs)
    torch.testing.assert_close(y, z, rtol=0, atol=tolerance)
    got, wanted = seams.gradients(module, y, ours), seams.gradients(twin, z, theirs)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-7, atol=1e-7, msg=lambda text: f"gradient of {name or 'x'}: {text}")  # noqa: B023
    return y


def _put(module, path, layer):
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SYSTEMS)
def test_plain_layers_are_fused(name, training):
    module, oracle, _ = seams.build(name)
    # torch's hardsigmoid multiplies by a float32 1/6
    _same(module.train(training), oracle, seams.tokens(), 1e-7)
    assert reasons(module) == []
    assert is_fused(module)
    assert all(path.fused for path in lifeops.explain(module))


OPTIONS = {
    "dilation 2": {"padding": 2, "dilation": 2}, "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular"}, "replicate": {"padding": 1, "padding_mode": "replicate"},
    "K 1": {"padding": 0, "kernel_size": 1}, "K 5": {"padding": 2, "kernel_size": 5}, "same": {"padding": "same"},
    "rectangular": {"padding": (0, 1), "kernel_size": (1, 3)}, "dense": {"padding": 1, "groups": 1}, "grouped": {"padding": 1, "groups": 3},
}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CONVS)
def test_other_convolutions(name, options, bias):
    module, oracle, _ = seams.build(name)
    old = module.get_submodule(CONVS[name])
    kind = {"kernel_size": 3, "groups": old.groups, "bias": bias, **OPTIONS[options]}
    _put(module, CONVS[name], nn.Conv2d(old.in_channels, old.out_channels, **kind).double())
    _same(module, oracle, seams.tokens(), 1e-7)


@pytest.mark.parametrize("name", CONVS)
def test_a_layer_changed_in_place(name):
    """`for m in model.modules(): m.padding_mode = "circular"`, as people make images tile."""
    module, oracle, _ = seams.build(name)
    module.eval()
    x, conv = seams.tokens(), module.get_submodule(CONVS[name])
    before = seams.call(module, x)
    conv.padding_mode = "circular"
    after = _same(module, oracle, x, 1e-7)
    assert (before - after).abs().max() > 1e-5
    conv.padding_mode = "zeros"
    assert torch.equal(seams.call(module, x), before)


@pytest.mark.parametrize("name", CONVS)
def test_strides_are_refused(name):
    module, _, _ = seams.build(name)
    module.get_submodule(CONVS[name]).stride = (2, 2)
    pattern = r"(depthwise|local|conv|convs) makes \(3, \d+, 2, 3\) of .* use stride 1 and .*stride is \(2, 2\)"
    with pytest.raises(ValueError, match=pattern):
        seams.call(module, seams.tokens())


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Identity(), nn.Hardswish()])
@pytest.mark.parametrize("path", ["conv.2", "conv.5", "conv.6.fc.1", "conv.6.fc.3"])
def test_other_activations(path, act):
    module, oracle, _ = seams.build("LocalityFeedForward")
    _put(module, path, act)
    _same(module, oracle, seams.tokens(), 1e-7)


def _frozen(c):
    from timm.layers import FrozenBatchNormAct2d

    return FrozenBatchNormAct2d(c)


class _Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


NORMS = {
    "group": lambda c: nn.GroupNorm(3, c), "instance": nn.InstanceNorm2d, "affine instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "no affine": lambda c: nn.BatchNorm2d(c, affine=False), "untracked": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "sync": nn.SyncBatchNorm, "subclass": _Doubled, "frozen": _frozen, "identity": lambda c: nn.Identity(),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", [(4, 5), (6, 1), (1, 6), (1, 1)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("name", "path"), [("LocalityFeedForward", f"conv.{i}") for i in (1, 4, 8)] + [("DWShortcut", "batchnorms.0")])
def test_other_norms(name, path, norm, grid, batch):
    if norm == "frozen":
        declare_torchvision_ops()
        pytest.importorskip("timm")
    module, oracle, _ = seams.build(name)
    _put(module, path, NORMS[norm](module.get_submodule(path).num_features).double())
    if norm == "sync" or (batch == 1 and grid == (1, 1)):
        module.eval()  # sync's training refuses CPU tensors, the others' a single value
    x = seams.tokens(grid, batch=batch)
    ours, theirs, twin = x.clone().requires_grad_(), x.clone().requires_grad_(), copy.deepcopy(module)
    if grid == (1, 1) and ("instance" in norm or (batch == 1 and norm == "untracked")):
        with pytest.raises(ValueError, match=r"[Ee]xpected more than 1"):
            seams.call(module, ours, grid)
        return
    z = oracle(twin, theirs, grid)
    y = seams.call(module, ours, grid)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-7)
    got, wanted = seams.gradients(module, y, ours), seams.gradients(twin, z, theirs)
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ hooks


def _layers(module):
    """The layers that a fused path would read without calling them."""
    qkv = [f"qkv.{path}" for path, _ in module.qkv.fused_layers()] if isinstance(module, LifeAttention) else []
    return [path for path, _ in module.fused_layers()] + qkv


HOOKED = [(name, path) for name in SYSTEMS for path in _layers(SYSTEMS[name][0]())]


@pytest.mark.parametrize(("name", "path"), HOOKED)
def test_hooks_on_inner_layers(name, path):
    """Forward hooks that replace the output, forward pre-hooks, backward hooks: they run once a call, and what they return is used."""
    module, _, _ = seams.build(name)
    module.eval()
    x = seams.tokens()
    plain = seams.call(module, x)
    layer, ran = module.get_submodule(path), []

    def doubled(m, args, out):
        ran.append("forward")
        return tuple(2 * t for t in out) if isinstance(out, tuple) else 2 * out

    handle = layer.register_forward_hook(doubled)
    changed = seams.call(module, x)
    assert ran == ["forward"]
    assert (changed - plain).abs().max() > 1e-6
    handle.remove()
    torch.testing.assert_close(seams.call(module, x), plain, rtol=0, atol=1e-12)
    handles = [
        layer.register_forward_pre_hook(lambda m, args: ran.append("before")),
        layer.register_full_backward_hook(lambda m, gi, go: ran.append("backward")),
        layer.register_full_backward_pre_hook(lambda m, go: ran.append("before backward")),
    ]
    y = seams.call(module, x.clone().requires_grad_())
    y.sum().backward()
    torch.testing.assert_close(y, plain, rtol=0, atol=1e-7)
    assert ran == ["forward", "before", "before backward", "backward"]
    for handle in handles:
        handle.remove()
    assert reasons(module) == []
    assert is_fused(module)


@pytest.mark.parametrize("name", SYSTEMS)
def test_hooks_for_all_modules(name):
    module, _, _ = seams.build(name)
    module.eval()
    x, seen = seams.tokens(), []
    plain = seams.call(module, x)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        y = seams.call(module, x)
    finally:
        handle.remove()
    torch.testing.assert_close(y, plain, rtol=0, atol=1e-7)
    assert {id(module.get_submodule(path)) for path in _layers(module)} <= {id(m) for m in seen}


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_instances_own_forward(name):
    """accelerate's hooks and hand-made patches put a function in place of a layer's forward."""
    module, _, _ = seams.build(name)
    module.eval()
    x = seams.tokens()
    for path in _layers(module):
        layer, plain = module.get_submodule(path), seams.call(module, x)
        forward, called = layer.forward, []
        layer.forward = lambda *args: called.append(1) or forward(*args)  # noqa: B023
        torch.testing.assert_close(seams.call(module, x), plain, rtol=0, atol=1e-7)
        assert called == [1], path
        del layer.forward


# ------------------------------------------------------------------------------------------------ parametrised weights


def _weight_norm(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


METHODS = {
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5), "weight_norm, hook": _weight_norm,
    "weight_norm": parametrizations.weight_norm, "spectral_norm, hook": nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "path"), PARAMETRISED)
def test_parametrised_weights(name, path, method):
    """Over three optimiser steps as the layers one by one, and after load_state_dict into a fresh module."""
    (module, oracle, _), (twin, _, _), x = seams.build(name), seams.build(name), seams.tokens()
    for m in (module, twin):
        torch.manual_seed(3)
        METHODS[method](m.get_submodule(path))
    steps = [(m, torch.optim.SGD(m.parameters(), 0.05)) for m in (module, twin)]
    for _ in range(3):
        for (m, optimiser), run in zip(steps, (seams.call, oracle), strict=True):
            optimiser.zero_grad()
            run(m, x).square().mean().backward()
            optimiser.step()
    for (key, ours), theirs in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda text: f"{key}: {text}")  # noqa: B023
    fresh, _, _ = seams.build(name, seed=7)
    METHODS[method](fresh.get_submodule(path))
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(seams.call(fresh.eval(), x), oracle(twin.eval(), x), rtol=0, atol=1e-6)


class _Scaled(torch.Tensor):
    """A weight that every operator sees three times as large."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(a.as_subclass(torch.Tensor) * 3 if isinstance(a, cls) else a for a in args), **(kwargs or {}))


@pytest.mark.parametrize(("name", "path"), PARAMETRISED)
def test_weights_that_are_tensor_subclasses(name, path):
    module, oracle, _ = seams.build(name)
    layer, x = module.eval().get_submodule(path), seams.tokens()
    weight = layer.weight.detach()
    layer._parameters["weight"] = weight.as_subclass(_Scaled)
    assert any("weight is a _Scaled" in why for path in lifeops.explain(module) for why in path.reasons) or path in ("qkv", "proj")
    with torch.no_grad():
        y, z = seams.call(module, x), oracle(module, x)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ odd sizes, explain, copies


def _by_affine(conv, maps):
    """Layers in evaluation mode, batch norms as the multiply-add that they are: torch's CPU gradient of them is wrong for some layouts."""
    for layer in conv:
        if isinstance(layer, nn.BatchNorm2d):
            scale = layer.weight / (layer.running_var + layer.eps).sqrt()
            maps = maps * scale[:, None, None] + (layer.bias - layer.running_mean * scale)[:, None, None]
        else:
            maps = layer(maps)
    return maps


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("P", [0, 1])
@pytest.mark.parametrize("options", [{"wo_dp_conv": True}, {"dp_first": True}, {}, {"hooked": True}])
def test_gradients_that_come_from_maps(options, P, B):
    """torch's CPU batch norm reads some gradients in the wrong order; no layout of the loss reaches it like that."""
    for grid in ((3, 4), (12, 1), (1, 12)):
        torch.manual_seed(0)
        hooked = options == {"hooked": True}
        module = LocalityFeedForward(8, 2.0, "relu6", num_prefix_tokens=P, **({} if hooked else options)).double().eval()
        if hooked:
            module.conv[-1].register_forward_hook(lambda *a: None)
        x = torch.randn(B, P + 12, 8, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(B, 8, *grid, dtype=torch.float64)

        def maps(t):
            return t[:, P:].transpose(1, 2).reshape(B, 8, *grid)  # noqa: B023

        z = maps(x) + _by_affine(module.conv, maps(x))
        expected = torch.autograd.grad((z * weight).sum(), (x, *module.parameters()))
        ours = torch.autograd.grad((maps(module(x, grid)) * weight).sum(), (x, *module.parameters()))
        torch.testing.assert_close(ours[0][:, P:], expected[0][:, P:], rtol=0, atol=1e-9)
        for a, b in zip(ours[1:], expected[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_one_hidden_channel():
    """A depth-wise convolution of one channel has groups == 1 and is no product."""
    module = LocalityFeedForward(1, 1.0, "relu6", num_prefix_tokens=0).double().eval()
    x = torch.randn(2, 12, 1, dtype=torch.float64)
    maps = x.transpose(1, 2).reshape(2, 1, 3, 4)
    expected = (maps + module.conv(maps)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(x, (3, 4)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", [
    lambda: LocalityFeedForward(C, 2.0, "hs+se", num_prefix_tokens=P), lambda: LocalityFeedForward(C, 2.0, "hs+eca", num_prefix_tokens=P),
    lambda: LocalityFeedForward(C, 2.0, "hs+ecah", num_prefix_tokens=P, dp_first=True), lambda: DWShortcut(C, 3, P),
    lambda: LifeAttention(C, 3, P), lambda: LocalAttention(C, 3, num_prefix_tokens=P),
])  # fmt: skip
@pytest.mark.parametrize("hooked", [True, False])
def test_no_patches(build, hooked):
    """A grid without patches: prefix tokens come through, gradients are zeros."""
    for p in (P, 0):
        module = build().eval()
        for m in module.modules():
            if hasattr(m, "num_prefix_tokens") and not isinstance(m, LifeAttention):
                m.num_prefix_tokens = p
        if hooked:
            for m in module.modules():
                if isinstance(m, nn.Conv2d):
                    m.register_forward_hook(lambda *a: None)
        x = torch.randn(2, p, C, requires_grad=True)
        y = seams.call(module, x, (0, 3))
        assert y.shape == x.shape
        y.sum().backward()
        assert all(q.grad is None or q.grad.isfinite().all() for q in module.parameters())


def test_explain_says_why():
    module = nn.Sequential(LifeAttention(C, 3, P), LocalityFeedForward(C, num_prefix_tokens=P))
    module[0].proj.register_forward_hook(lambda *a: None)
    module[0].qkv.scale3.depthwise.padding_mode = "reflect"
    module[1].conv[2] = nn.GELU()
    text = str(lifeops.explain(module))
    for expected in (
        "0 (LifeAttention): calls its layers\n  proj: it has forward hooks", "1.conv.6 (SELayer): fused",
        "scale3.depthwise: padding_mode is 'reflect', the kernel", "conv.2: it is a GELU, the kernel computes a Hardswish",
    ):  # fmt: skip
        assert expected in text
    with pytest.raises(ValueError, match="Linear has no module of lifeops"):
        lifeops.explain(nn.Linear(2, 2))


@pytest.mark.parametrize("name", SYSTEMS)
def test_copies_look_at_their_own_layers(name):
    """deepcopy, pickle and DataParallel's replicas do not share what was found out about the original."""
    module, _, _ = seams.build(name)
    module.eval()
    x = seams.tokens()
    plain = seams.call(module, x)  # found to be fused
    twin = copy.deepcopy(module)
    path = _layers(twin)[-1]
    twin.get_submodule(path).register_forward_hook(lambda m, a, out: out * 2)
    assert (seams.call(twin, x) - plain).abs().max() > 1e-6
    assert torch.equal(seams.call(module, x), plain)
    replica = module._replicate_for_data_parallel()
    assert is_fused(replica) == is_fused(module)


@pytest.mark.parametrize("name", SYSTEMS)
def test_compiled_without_a_graph_break(name):
    """Plain and with an exchanged layer; a compiled program follows an exchange that comes later."""
    torch._dynamo.reset()
    module, _, _ = seams.build(name, torch.float32)
    module.eval()
    x = seams.tokens(dtype=torch.float32)
    compiled = torch.compile(seams.call, fullgraph=True, backend="aot_eager")
    for change in (lambda: None, lambda: module.get_submodule(CONVS.get(name, "conv.3")).__setattr__("padding_mode", "circular")):
        change()
        torch.testing.assert_close(compiled(module, x, GRID), seams.call(module, x), rtol=0, atol=1e-5)
