"""FLOPs of every operator and of whole models against those that torch counts for the same maths in its own operators.

torch counts dW of a depth-wise convolution C times too high (as if it had no groups); ``lifeops.model_cost.flop_formulas`` puts
2 K² B H W C in its place, which is what ours are held to.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import lifeops
from conftest import declare_torchvision_ops
from lifeops import model_cost, registry, testing
from lifeops.model_cost import count_flops
from lifeops.models.deit import Attention, VisionTransformer
from lifeops.nn import LocalityFeedForward
from lifeops.nn.eager_dw_shortcut import EagerDWShortcut
from lifeops.nn.eager_life import EagerLifeAttention
from lifeops.nn.eager_localvit import EagerLocalityFeedForward
from lifeops.nn.localvit import LocalViTBlock
from lifeops.nn.shortcut_blocks import ShortcutBlocks

SAMPLES = [pytest.param(op, s, id=f"{name}-{s.name}") for name, op in registry.ops.items() for s in op.samples()]
SIZES = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
B, N, C, HIDDEN, PATCHES = 2, 25, 48, 192, 24


def _shapes(args):
    return [a.shape if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("op", registry.ops.values(), ids=lambda op: op.name)
def test_every_operator_has_a_formula(op):
    formula = flop_registry[getattr(torch.ops.lifeops, op.name)]
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in testing.make(op, op.samples()[0], torch.float32)]
    assert formula(*args, out_val=op.fake(*args)) == op.flops(*_shapes(args))


@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_an_operator_counts_what_its_reference_does(op, sample):
    """The reference is plain PyTorch; convolutions and products count, elementwise operators and sums are 0 in both."""
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in testing.make(op, sample, torch.float32)]
    with torch.no_grad():
        expected = count_flops(lambda: op.reference(*args))
    assert op.flops(*_shapes(args)) == expected
    if op.name.startswith(("channel_", "norm_", "token_pool")) or op.name.endswith("_bwd_db"):
        assert expected == 0
    elif not op.is_empty(*args):
        assert expected > 0


def test_torch_counts_a_depthwise_weight_gradient_c_times():
    x, w = torch.randn(2, 8, 4, 5, requires_grad=True), torch.randn(8, 1, 3, 3, requires_grad=True)
    product = 2 * 9 * 2 * 20 * 8

    def step():
        F.conv2d(x, w, padding=1, groups=8).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == (1 + 1 + 8) * product
    assert count_flops(step) == 3 * product


@pytest.mark.parametrize(("transposed", "groups"), [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_a_convolutions_backward_is_twice_its_forward(transposed, groups):
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(2, 4, 7, 9, requires_grad=True)
    assert count_flops(lambda: conv(x).sum().backward()) == 3 * count_flops(lambda: conv(x))


# ------------------------------------------------------------------------------------------------ whole models


def _timm(system):
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    return lifeops.convert(timm.create_model("vit_tiny_patch16_224", **SIZES), system)


def _eager(system):
    """The same model from the transcriptions of the authors' execution."""
    if system == "life":
        return VisionTransformer(attn=lambda dim, heads, prefix: EagerLifeAttention(dim, heads, prefix), **SIZES)
    if system == "localvit":

        def block(dim, heads, prefix, drop_path):
            return LocalViTBlock(nn.LayerNorm(dim), Attention(dim, heads), EagerLocalityFeedForward(dim, 4.0, dim, prefix), drop_path)

        return VisionTransformer(block=block, **SIZES)
    model = VisionTransformer(**SIZES)
    model.blocks = nn.ModuleList(ShortcutBlocks([b], EagerDWShortcut(C, 3, 1)) for b in model.blocks)
    return model


# What backward does on top of the plain operators' products, per block: attention's scores again (as torch's fused kernels do), the
# gate's two products twice again (B x hidden numbers), the sums over the shortcut's window that stand for its shift, of one image.
AGAIN = {"life": 2 * B * N * N * C, "localvit": 2 * 2 * B * 2 * HIDDEN * (HIDDEN // C), "dw_shortcut": 2 * 9 * PATCHES * C}


@pytest.mark.parametrize("system", AGAIN)
def test_a_converted_model_counts_what_plain_operators_do(system):
    x, models = torch.randn(B, 3, 32, 48), (_timm(system), _eager(system))
    assert model_cost.count_params(models[0]) == model_cost.count_params(models[1])
    for model in models:
        model.eval()
    with torch.no_grad():
        ours, plain = (count_flops(lambda m=m: m(x)) for m in models)
    assert ours == plain
    assert 2 * model_cost.count_macs(lambda: models[0](x)) == plain
    ours, plain = (count_flops(lambda m=m: m.train()(x).sum().backward()) for m in models)
    assert ours == plain + SIZES["depth"] * AGAIN[system]


@pytest.mark.parametrize("act", ["relu6", "hs"])
def test_the_fused_feed_forward_counts_what_its_layers_do(act):
    module, x = LocalityFeedForward(8, 4.0, act), torch.randn(2, 21, 8, requires_grad=True)
    paths = (lambda: module(x, (4, 5))), (lambda: module._composed(x, (4, 5)))
    fused, plain = (count_flops(lambda p=p: p().sum().backward()) for p in paths)
    assert fused == plain == 3 * 2 * 2 * 20 * (8 * 32 + 9 * 32 + 32 * 8)
