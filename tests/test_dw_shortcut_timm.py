"""timm's ViT, CaiT and Swin, and our own host, converted to the DW shortcut and back."""

import copy

import pytest
import torch

import lifeops
from conftest import declare_torchvision_ops
from lifeops.models.vit_cait import ViT
from lifeops.nn.eager_dw_shortcut import EagerDWShortcut
from lifeops.nn.shortcut_blocks import ShortcutBlocks
from test_localvit import _close, _randomised

timm = None


@pytest.fixture(autouse=True, scope="module")
def _timm():
    global timm
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")


SWIN = {"img_size": (32, 64), "patch_size": 2, "num_classes": 5, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3), "window_size": 8}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
HOSTS = {
    "cls": lambda: timm.models.VisionTransformer(**SMALL),
    "distilled": lambda: timm.models.deit.VisionTransformerDistilled(**SMALL),
    "registers": lambda: timm.models.VisionTransformer(**SMALL, reg_tokens=4),
    "no_prefix": lambda: timm.models.VisionTransformer(**SMALL, class_token=False, global_pool="avg"),
    "rectangle": lambda: timm.models.VisionTransformer(**{**SMALL, "img_size": (32, 48)}),
    "cait": lambda: timm.models.Cait(**SMALL, init_values=0.5),
    "swin": lambda: timm.models.SwinTransformer(**SWIN, drop_path_rate=0.0),
}


def _host(name):
    torch.manual_seed(0)
    return HOSTS[name]().double().eval()


def _groups(model):
    return [m for m in model.modules() if isinstance(m, ShortcutBlocks)]


def _by_hand(group, x, grid):
    """The blocks one after another and the authors' shortcut around them."""
    y, maps = x, x.dim() == 4
    for block in group.blocks:
        y = block(y)
    shortcut, grid = group.shortcut, x.shape[1:3] if maps else grid
    eager = EagerDWShortcut(shortcut.dim, tuple(c.kernel_size[0] for c in shortcut.convs), shortcut.num_prefix_tokens).double()
    eager.load_state_dict(shortcut.state_dict())
    tokens = (t.flatten(1, 2) if maps else t for t in (x, y))
    return eager.eval()(*tokens, grid).view(x.shape)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", HOSTS)
def test_convert_and_revert(name, every):
    """Every group computes its blocks and the authors' shortcut on the right rows and grid; everything goes back."""
    model = _host(name)
    x = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
    before, keys, blocks = model(x), list(model.state_dict()), [m for m in model.modules() if hasattr(m, "mlp")]
    assert lifeops.convert(model, "dw_shortcut", every=every, kernel_sizes=(3, 5)) is model
    _randomised(model)
    groups = _groups(model)
    assert len(groups) == 4 // every
    assert [b for g in groups for b in g.blocks] == blocks[:4]  # CaiT's class blocks come after
    expected_prefix = {"cait": 0, "swin": 0}.get(name, getattr(model, "num_prefix_tokens", 0))
    assert {g.shortcut.num_prefix_tokens for g in groups} == {expected_prefix}
    seen = []
    for group in groups:
        hook = lambda module, args, output: seen.append((module, args[0], module.shortcut.grid_holder.grid, output))  # noqa: E731
        group.register_forward_hook(hook)
    model(x).sum().backward()
    for group, start, grid, output in seen:
        _close(output, _by_hand(group, start, grid))
    assert len(seen) == len(groups)
    assert all(p.grad is not None for g in groups for p in g.shortcut.parameters())
    with torch.no_grad():
        _close(lifeops.fuse_(copy.deepcopy(model))(x), model(x))
    lifeops.revert(model)
    assert list(model.state_dict()) == keys
    assert not _groups(model)
    assert not model.patch_embed._forward_hooks
    assert model(x).shape == before.shape


def test_our_own_host():
    """A list of blocks that are given the grid."""
    torch.manual_seed(0)
    model = lifeops.models.VisionTransformer((32, 48), 8, num_classes=5, embed_dim=24, depth=4, num_heads=3, dist_token=True).eval()
    x = torch.randn(2, 3, 32, 48)
    before = model(x)
    lifeops.convert(model, "dw_shortcut", every=2)
    assert [g.shortcut.num_prefix_tokens for g in _groups(model)] == [2, 2]
    assert not torch.equal(model(x), before)
    assert torch.equal(lifeops.revert(model)(x), before)


def test_revert_restores_the_outputs():
    for name in ("registers", "cait", "swin"):
        model = _host(name)
        x = torch.randn(1, 3, *model.patch_embed.img_size, dtype=torch.float64)
        before = model(x)
        assert not torch.equal(lifeops.convert(model, "dw_shortcut")(x), before)
        assert torch.equal(lifeops.revert(model)(x), before)


@pytest.mark.parametrize("name", ["cls", "cait", "swin"])
def test_checkpointing_in_timm(name):
    """timm's activation checkpointing keeps the shortcuts: same gradients, and one step's statistics."""
    model = lifeops.convert(_host(name), "dw_shortcut", every=2).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing(True)
    x = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
    for m in (model, twin):
        m(x).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        _close(a.grad, b.grad, 1e-9)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        _close(a, b)
    assert all(norm.num_batches_tracked == 1 for g in _groups(twin) for norm in g.shortcut.batchnorms)


def test_the_grid_follows_the_image():
    model = lifeops.convert(timm.models.VisionTransformer(**SMALL, dynamic_img_size=True), "dw_shortcut")
    twin = copy.deepcopy(model)
    shortcut, seen = _groups(model)[3].shortcut, []
    shortcut.register_forward_hook(lambda module, args, output: seen.append(module.grid_holder.grid))
    for size, grid in (((32, 48), (4, 6)), ((48, 32), (6, 4))):
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)
        assert seen.pop() == grid
        assert shortcut.grid_holder.grid is None  # nothing is left of it
    assert _groups(twin)[0].shortcut.grid_holder is _groups(twin)[3].shortcut.grid_holder
    assert _groups(twin)[0].shortcut.grid_holder is not _groups(model)[0].shortcut.grid_holder
    swin = lifeops.convert(_host("swin"), "dw_shortcut")
    swin.set_input_size((64, 64))
    assert swin(torch.randn(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 5)


def test_bfloat16_models():
    """Where the authors' model fails at its second block."""
    model = lifeops.convert(HOSTS["registers"]().bfloat16(), "dw_shortcut").train()
    y = model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16


def test_what_cannot_be_converted_is_named():
    with pytest.raises(ValueError, match="every must be a positive int that divides the 4 blocks, got 3"):
        lifeops.convert(_host("cls"), "dw_shortcut", every=3)
    with pytest.raises(TypeError, match="unknown options kernel; known: every, kernel_sizes, num_prefix_tokens"):
        lifeops.convert(_host("cls"), "dw_shortcut", kernel=3)
    with pytest.raises(ValueError, match="ViT has DW shortcuts of its own"):
        lifeops.convert(ViT(32, 8, depth=1), "dw_shortcut")
    with pytest.raises(ValueError, match="Linear is not a known ViT"):
        lifeops.convert(torch.nn.Linear(2, 2), "dw_shortcut")
    model = _host("cls")
    for block in model.blocks:
        block.norm1 = block.norm2 = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"^convert: cannot tell the width of Block, which has no norm with a shape or with weights$"):
        lifeops.convert(model, "dw_shortcut")
