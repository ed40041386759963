"""Hooks, Grad-CAM and captum on a layer that a fused kernel stands for; the attributions are those of the twin."""

import torch
from tool_cells import tool
from tool_systems import SYSTEMS, build, fused

TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}


def _layers(system):
    model, twin, x = build(system)
    inner = SYSTEMS[system].inner
    return (model, model.get_submodule(inner)), (twin, twin.get_submodule(inner)), x


def _grad_cam(model, layer, x):
    """Selvaraju et al. 2017 as people write it: a forward hook that keeps the map and a hook on its gradient."""
    kept = {}

    def keep(module, args, output):
        kept["map"] = output
        output.register_hook(lambda gradient: kept.update(gradient=gradient))

    handle = layer.register_forward_hook(keep)
    model(x)[:, 1].sum().backward()
    handle.remove()
    return (kept["gradient"].mean((2, 3), keepdim=True) * kept["map"]).sum(1).relu()


@tool("hooks", "Grad-CAM by hooks", "heat map")
def grad_cam(system):
    (model, layer), (twin, like), x = _layers(system)
    paths = fused(model)
    ours, theirs = _grad_cam(model, layer, x), _grad_cam(twin, like, x)
    assert ours.abs().max() > 0
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert fused(model) == paths


@tool("hooks", "forward hook that changes the output, pre-hook that changes the input", "output")
def changing_hooks(system):
    (model, layer), (twin, like), x = _layers(system)
    with torch.no_grad():
        before = model(x)
        for m in (layer, like):
            m.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
            m.register_forward_hook(lambda m, args, out: out.roll(1, -1))
        torch.testing.assert_close(model(x), twin(x), **TOLERANCE)
        assert (model(x) - before).abs().max() > 1e-5


@tool("hooks", "full backward hook that changes the gradient", "gradient of the input")
def backward_hooks(system):
    (model, layer), (twin, like), x = _layers(system)
    gradients = []
    for m, part in ((model, layer), (twin, like), (build(system)[0], None)):
        if part is not None:
            part.register_full_backward_hook(lambda m, given, out: (given[0] * 3,))
        inputs = x.clone().requires_grad_()
        m(inputs).square().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(gradients[0], gradients[1], **TOLERANCE)
    assert (gradients[0] - gradients[2]).abs().max() > 1e-6


def _captum(name, holds="attributions", make=None, refused=None, **options):
    @tool("captum", f"`{name}`", holds, ["captum"], refused=refused)
    def check(system):
        import captum.attr

        ours, theirs, x = _layers(system)
        paths, found = fused(ours[0]), []
        for model, layer in (ours, theirs):
            method = make(model, layer) if make else getattr(captum.attr, name)(model, layer)
            found.append(method.attribute(x, **options))
        assert fused(ours[0]) == paths
        ours, theirs = (t[0] if isinstance(t, tuple) else t for t in found)
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, **TOLERANCE)

    return check


def _of_model(name):
    def make(model, layer):
        import captum.attr

        return getattr(captum.attr, name)(model)

    return make


_captum("LayerActivation")
_captum("LayerGradCam", target=1)
_captum("LayerGradientXActivation", target=1)
_captum("LayerIntegratedGradients", target=1, n_steps=4)
_captum("LayerConductance", target=1, n_steps=4)
_captum("LayerDeepLift", target=1)
_captum("DeepLift", make=_of_model("DeepLift"), target=1)
_captum("GuidedBackprop", make=_of_model("GuidedBackprop"), target=1)
_captum("IntegratedGradients", make=_of_model("IntegratedGradients"), target=1, n_steps=4)
_captum("Saliency", make=_of_model("Saliency"), target=1)
NO_RULE = dict.fromkeys(SYSTEMS, "has no rule defined")
_captum("LayerLRP", "captum has rules for few layers, not for norms: take another method", refused=NO_RULE, target=1)
