"""The systems that tools are tried on, each beside a twin that is built of plain layers, with the same names and weights.

A twin holds the very layers of the fused module, or copies, and calls every one of them (the functions of ``seams``): what a tool does
to it is what the tool does to any model of torch's own layers.
"""

import copy
from types import SimpleNamespace

import seams
import torch
from seams import GRID, C, P
from torch import nn

import lifeops
from conftest import declare_torchvision_ops
from lifeops.nn import DWShortcut, LifeAttention, LocalAttention, LocalityFeedForward

declare_torchvision_ops()  # before any tool imports transformers or timm
CLASSES = 5
SIZES = {"img_size": (32, 40), "patch_size": 8, "embed_dim": C, "depth": 2, "num_heads": 3, "reg_tokens": 1}
SIZES |= {"num_classes": CLASSES, "global_pool": "avg"}  # of the cls token alone the last block's patches would not be seen


# ------------------------------------------------------------------------------------------------ twins


class _Twin(nn.Module):
    """The layers of a fused module under the same names."""

    def __init__(self, module):
        super().__init__()
        self._modules.update(module._modules)
        self.training, self.num_heads = module.training, getattr(module, "num_heads", None)
        self.needs_grid = False


class _Life(_Twin):
    def forward(self, x, grid=None, **timms):
        return seams.life(self, x)


class _Local(_Twin):
    def forward(self, x, grid=None):
        return seams.local_attention(self, x)


class _Locality(_Twin):
    def forward(self, x, grid=None):
        wrapped = getattr(self.conv, "modules_to_save", None)  # peft's wrapper cannot be gone through
        return seams.locality_ffn(self if wrapped is None else SimpleNamespace(conv=wrapped["default"]), x)


class _Shortcut(_Twin):
    def forward(self, x, y, grid=None):
        return seams.shortcut(self, x, y=y)


TWINS = {LifeAttention: _Life, LocalAttention: _Local, LocalityFeedForward: _Locality, DWShortcut: _Shortcut}


def twin_of(model):
    """A copy of ``model`` with twins for its fused modules."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) in TWINS:
                parent._modules[name] = TWINS[type(child)](child)
    return model


# ------------------------------------------------------------------------------------------------ systems


class Host(nn.Module):
    """A fused module between a layer norm and a classifier: tokens (B, N, C) to logits."""

    def __init__(self, block):
        super().__init__()
        self.first, self.block, self.head = nn.LayerNorm(C), block, nn.Linear(C, CLASSES)
        self.two = isinstance(block, DWShortcut)

    def forward(self, x):
        x = self.first(x)
        return self.head((self.block(x, x.tanh(), GRID) if self.two else self.block(x, GRID)).mean(1))


def timm_model():
    import timm

    return timm.models.VisionTransformer(**SIZES)


def _timm(system):
    return lifeops.convert(timm_model(), system)


ATTENTION = ("attn.qkv", "attn.proj")
MLP = ("mlp.fc1", "mlp.fc2")


class System(SimpleNamespace):
    """``depthwise``, ``products``: ends of the paths of its K x K convolutions and of its products, dense layers and 1x1 convolutions
    that a fused kernel stands for. ``inner``: the module whose output a heat map is made from, and that is fused.
    """


def _system(build, depthwise, products, inner, beside=()):
    return System(build=build, depthwise=depthwise, products=products, inner=inner, beside=beside)


LIFE = ("scale1", "scale2.pointwise", "scale3.pointwise", "proj")
SYSTEMS = {
    "LIFE": _system(
        lambda: Host(LifeAttention(C, 3, P)), ("scale2.depthwise", "scale3.depthwise"), LIFE, "block.qkv.scale3.depthwise"
    ),
    "LocalViT": _system(
        lambda: Host(LocalityFeedForward(C, 2.0, "hs+se", num_prefix_tokens=P)), ("conv.3",),
        ("conv.0", "conv.7", "fc.0", "fc.2"), "block.conv.3",
    ),
    "LocalViT, ECA": _system(
        lambda: Host(LocalityFeedForward(C, 2.0, "hs+eca", num_prefix_tokens=P)), ("conv.3",),
        ("conv.0", "conv.7"), "block.conv.3", ("conv.6.conv",),
    ),
    "DW shortcut": _system(lambda: Host(DWShortcut(C, (3, 5), P)), ("convs.0", "convs.1"), (), "block.convs.0"),
    "LocalAttention": _system(lambda: Host(LocalAttention(C, 3, num_prefix_tokens=P)), ("local",), ("qkv", "proj"), "block.local"),
    "timm, life": _system(
        lambda: _timm("life"), ("scale2.depthwise", "scale3.depthwise"), (*LIFE[:3], "attn.proj"), "blocks.0.attn.qkv.scale3.depthwise", MLP
    ),
    "timm, localvit": _system(
        lambda: _timm("localvit"), ("conv.3",), ("conv.0", "conv.7", "fc.0", "fc.2"), "blocks.0.conv.conv.3", ATTENTION
    ),
    "timm, dw_shortcut": _system(lambda: _timm("dw_shortcut"), ("convs.0",), (), "blocks.0.shortcut.convs.0", (*ATTENTION, *MLP)),
}  # fmt: skip


def build(name, dtype=torch.float64, seed=0):
    """(model, its twin, x), with random biases, norms and running statistics; in evaluation mode."""
    torch.manual_seed(seed)
    model = SYSTEMS[name].build().to(dtype).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            if value.dim() < 2:
                value.copy_(torch.rand_like(value) + 0.5 if "var" in key else 0.3 * torch.randn_like(value) + ("weight" in key))
            elif not value.any() or value.std() < 0.1:  # initialisations near zero would hide what a layer does
                value.copy_(0.3 * torch.randn_like(value))
    shape = (2, P + GRID[0] * GRID[1], C) if isinstance(model, Host) else (2, 3, *SIZES["img_size"])
    return model, twin_of(model), torch.randn(shape, dtype=dtype)


# ------------------------------------------------------------------------------------------------ comparing


def fused(model) -> list[str]:
    """Paths of lifeops' modules in ``model`` that run fused."""
    return [path.path for path in lifeops.explain(model) if path.fused]


def gradients(model, y, x):
    """By name of the parameter, x's under ""; of a loss that weights every logit on its own."""
    model.zero_grad()
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found if x.grad is None else {"": x.grad, **found}


def same(model, twin, x, tolerance=1e-7, backward=True, seed=None):
    """Output, and gradients of both, equal; ``seed`` for dropout. Returns the model's output and its gradients."""
    results = []
    for m in (model, twin):
        if seed is not None:
            torch.manual_seed(seed)
        inputs = x.clone().requires_grad_(backward)
        y = m(inputs)
        results.append((y.detach(), gradients(m, y, inputs) if backward else {}))
    (ours, got), (theirs, wanted) = results
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert got.keys() == wanted.keys()
    for name, g in wanted.items():
        torch.testing.assert_close(got[name], g, rtol=10 * tolerance, atol=10 * tolerance, msg=lambda text: f"{name or 'x'}: {text}")  # noqa: B023
    return ours, got
