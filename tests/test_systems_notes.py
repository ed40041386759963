"""docs/systems_notes.md: its sketch is what plain PyTorch computes, and the model that it describes converts and is rolled out."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lifeops
from conftest import declare_torchvision_ops
from lifeops.models.deit import Attention
from test_localvit import _close, _randomised

PAGE = Path(__file__).parents[1] / "docs" / "systems_notes.md"


@pytest.fixture(scope="module")
def sketch():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names["local_to_global"]


def plainly(x, attention, grid, side, strides):
    """On maps, window by window."""
    maps, total = x.mT.unflatten(2, grid), 0
    for r in strides:
        coarse = F.avg_pool2d(maps, r)
        y = torch.empty_like(coarse)
        for top in range(0, coarse.shape[2], side):
            for left in range(0, coarse.shape[3], side):
                window = coarse[:, :, top : top + side, left : left + side]
                y[:, :, top : top + side, left : left + side] = attention(window.flatten(2).mT).mT.unflatten(2, (side, side))
        total = total + F.interpolate(y, scale_factor=r, mode="nearest")
    return total.flatten(2).mT


def test_lg_sketch(sketch):
    torch.manual_seed(0)
    attention = _randomised(Attention(12, 3).double())
    x = torch.randn(2, 8 * 16, 12, dtype=torch.float64)
    with torch.no_grad():
        _close(sketch(x, attention, (8, 16), 2), plainly(x, attention, (8, 16), 2, (1, 2, 4)), 1e-12)


def test_lg_sketch_sees_further_on_coarser_paths(sketch):
    """A token of the first window: with one path it depends on its window alone, with all on every patch in reach of the coarsest."""
    torch.manual_seed(0)
    attention, x = _randomised(Attention(12, 3).double()), torch.randn(1, 64, 12, dtype=torch.float64, requires_grad=True)

    def reach(strides):
        y = sketch(x, attention, (8, 8), 2, strides)
        (grad,) = torch.autograd.grad(y[0, 0].sum(), x)
        return int((grad.abs().sum(2) > 0).sum())

    assert [reach(strides) for strides in ((1,), (1, 2), (1, 2, 4))] == [4, 16, 64]


def _scaling_vit():
    declare_torchvision_ops()
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    torch.manual_seed(0)
    sizes = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return vit(**sizes, class_token=False, global_pool="map").eval()


@pytest.mark.parametrize("system", ["life", "localvit", "dw_shortcut"])
def test_scaling_vit(system):
    """No prefix tokens, attention pooling: every patch is convolved and reaches the logits."""
    model = _scaling_vit()
    plain, images = {n: p.shape for n, p in model.attn_pool.named_parameters()}, torch.randn(2, 3, 32, 48)
    lifeops.convert(model, system)
    assert {n: p.shape for n, p in model.attn_pool.named_parameters()} == plain
    modules = [m for m in model.modules() if hasattr(m, "fused_layers") and hasattr(m, "num_prefix_tokens")]
    assert modules
    assert {m.num_prefix_tokens for m in modules} == {0}
    tokens = []
    model.patch_embed.register_forward_hook(lambda m, args, y: (y.retain_grad(), tokens.append(y))[0])
    logits = model(images)
    logits.square().sum().backward()
    assert logits.shape == (2, 5)
    assert tokens[0].grad.abs().sum(2).min() > 0
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_scaling_vit_roll_out():
    model, images = lifeops.convert(_scaling_vit(), "life"), torch.randn(2, 3, 32, 48)
    found = lifeops.rollout(model, images, "pool")
    assert found.maps.shape == (2, 1, 4, 6)
    torch.testing.assert_close(found.maps.sum((1, 2, 3)), torch.ones(2))
    assert found.prefix.abs().max() < 1e-6
