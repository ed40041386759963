"""load_official at another image size and number of classes than the checkpoint's, and without what can be computed again."""

import pytest
import torch

import lifeops
from conftest import declare_torchvision_ops
from lifeops.integrations.official_fit import resample_positions, resample_table
from lifeops.models import dw_shortcut, localvit
from lifeops.models.swin import SwinTransformer
from lifeops.models.vit_cait import CaiT, ViT
from test_checkpoints import life, quiet, same
from test_localvit import _randomised

COMPUTED = "attn_mask", "relative_position_index", "num_batches_tracked"
SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 24, "depth": 1}
SWIN = {"num_classes": 5, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3)}


@pytest.fixture(scope="module")
def layers():
    declare_torchvision_ops()
    return pytest.importorskip("timm.layers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("new", [(7, 7), (3, 3), (2, 5), (8, 2), (4, 4)], ids=str)
def test_positions_as_timm_resamples_them(new, prefix, dtype, layers):
    t = torch.randn(1, prefix + 16, 12).to(dtype)
    expected = layers.resample_abs_pos_embed(t, list(new), num_prefix_tokens=prefix)
    found = resample_positions(t, (4, 4), new)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[:, :prefix], t[:, :prefix])


@pytest.mark.parametrize("window", [3, 8, 12])
def test_tables_as_timm_resamples_them(window, layers):
    t, rows = torch.randn(13 * 13, 3), (2 * window - 1) ** 2
    expected = layers.pos_embed_rel.resize_rel_pos_bias_table_simple(t, (window, window), (rows, 3))
    torch.testing.assert_close(resample_table(t, rows), expected)


def _vit(**changes):
    return ViT(**{**SMALL, "num_heads": 2, **changes}).eval()


def _localvit(**changes):
    return localvit(**{**SMALL, "num_heads": 3, "reduction": 4, **changes})


HOSTS = {
    "life": life,
    "localvit": _localvit,
    "vit": _vit,
    "cait": lambda **changes: CaiT(**{**SMALL, **changes}),
}


@pytest.mark.parametrize("img_size", [48, (16, 64), (24, 40), 32], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_another_image_size(host, img_size, layers):
    """Exactly the model of that size with timm's position embedding and all other tensors the same."""
    model = HOSTS[host]().eval()
    pair = (img_size, img_size) if isinstance(img_size, int) else img_size
    twin = HOSTS[host](img_size=img_size).eval()
    state = dict(model.state_dict())
    (name,) = (n for n in state if n in ("pos_embed", "pos_embedding"))
    grid = [n // 8 for n in pair]
    state[name] = layers.resample_abs_pos_embed(state[name], grid, num_prefix_tokens=state[name].shape[1] - 16)
    twin.load_state_dict(state)
    with pytest.warns(UserWarning, match="read pos.* as that of 4 x 4 patches and resampled it to 2 x 8") if grid == [2, 8] else _silent():
        loaded = lifeops.load_official(model.state_dict(), img_size=img_size)
    x = torch.randn(2, 3, *pair)
    torch.testing.assert_close(loaded(x), twin(x))


def _silent():
    import contextlib

    return contextlib.nullcontext()


def test_a_grid_that_is_no_square():
    model = life(img_size=(16, 40))
    state = model.state_dict()
    with pytest.raises(ValueError, match="LIFE DeiT models are square, got pos_embed for 10; pass img_size"):
        lifeops.load_official(state)
    twin = quiet(lifeops.load_official, state, img_size=(16, 40))
    x = torch.randn(1, 3, 16, 40)
    assert torch.equal(twin(x), model(x))
    with pytest.raises(ValueError, match="models are square, got pos_embed for 10"):
        lifeops.load_official(state, img_size=(24, 40))


@pytest.mark.parametrize("classes", [3, 5, 7])
@pytest.mark.parametrize("host", [*HOSTS, "distilled", "swin"])
def test_another_number_of_classes(host, classes):
    build = {"distilled": lambda: life(dist_token=True), "swin": lambda: SwinTransformer(32, 2, window_size=4, **SWIN)}.get(host)
    model = (build or HOSTS[host])().eval()
    heads = ("head.", "head_dist.", "mlp_head.1.")
    if classes == 5:
        return same(quiet(lifeops.load_official, model.state_dict(), num_classes=5), model)
    with pytest.warns(UserWarning, match=rf"a new head for {classes} classes, untrained: truncated normal weights \(std 0.02\), zero bias"):
        loaded = lifeops.load_official(model.state_dict(), num_classes=classes)
    assert loaded(torch.randn(2, 3, 32, 32)).shape == (2, classes)
    old = model.state_dict()
    for name, value in loaded.state_dict().items():
        if not name.startswith(heads):
            assert torch.equal(value, old[name]), name
        elif name.endswith("bias"):
            assert not value.any()
        else:
            assert 0.005 < value.std() < 0.04


def test_without_a_head():
    model = life()
    features = quiet(lifeops.load_official, model.state_dict(), num_classes=0)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.head(features(x)), model(x))
    headless = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    with pytest.raises(ValueError, match=r"has no 'head\.weight'"):
        lifeops.load_official(headless, num_heads=3, aux_key="scale1")
    with pytest.warns(UserWarning, match="a new head for 4 classes"):
        assert lifeops.load_official(headless, num_heads=3, aux_key="scale1", num_classes=4).head.out_features == 4
    with pytest.raises(ValueError, match="num_classes of a DW shortcut ViT model must be at least 1, got 0"):
        lifeops.load_official(_vit().state_dict(), num_classes=0)


# ------------------------------------------------------------------------------------------------ buffers, Swin


def _stripped(model):
    return {name: t for name, t in model.state_dict().items() if name.rpartition(".")[2] not in COMPUTED}


@pytest.mark.parametrize("host", ["localvit", "vit", "cait"])
def test_buffers_that_can_be_computed_may_be_missing(host):
    model = _randomised(HOSTS[host]()).eval()
    same(quiet(lifeops.load_official, _stripped(model), num_heads={"localvit": 3, "vit": 2}.get(host)), model)


SWINS = {
    "masks": {"img_size": 32, "patch_size": 2, "window_size": 4, **SWIN},
    "late": {"img_size": 32, "patch_size": 2, "window_size": 4, **SWIN, "depths": (1, 2)},
    "one_window": {"img_size": 32, "patch_size": 2, "window_size": 16, **SWIN},
    "last_one_window": {"img_size": 32, "patch_size": 4, "window_size": 4, **SWIN},
}


@pytest.mark.parametrize("name", SWINS)
def test_swin_without_its_buffers(name):
    model = _randomised(SwinTransformer(**SWINS[name])).eval()
    same(quiet(lifeops.load_official, model.state_dict()), model)
    same(quiet(lifeops.load_official, _stripped(model), img_size=32), model)
    without_masks = {k: t for k, t in model.state_dict().items() if not k.endswith("attn_mask")}
    for state in (_stripped(model), without_masks):
        if name == "one_window":  # the second stage's smaller window tells its grid
            same(quiet(lifeops.load_official, state), model)
        else:
            with pytest.raises(ValueError, match="cannot tell the image size of a DW shortcut Swin model from tensors without attn_mask"):
                lifeops.load_official(state)


def test_swin_of_one_block_per_stage():
    model = _randomised(SwinTransformer(32, 4, num_classes=5, embed_dim=12, depths=(1,), num_heads=(2,), window_size=4)).eval()
    same(quiet(lifeops.load_official, model.state_dict(), img_size=32), model)


@pytest.mark.parametrize(("img_size", "window"), [(32, 4), (64, 4), (16, 4), (48, 4), (56, 7), (40, 5), ((32, 64), 4)], ids=str)
def test_swin_at_another_image_size(img_size, window, layers):
    """The window stays where it fits and grows in proportion where it does not; the tables follow it."""
    model = _randomised(SwinTransformer(**SWINS["masks"])).eval()
    twin = SwinTransformer(**{**SWINS["masks"], "img_size": img_size, "window_size": window}).eval()
    own, state = twin.state_dict(), dict(model.state_dict())
    for name, t in own.items():
        if name.endswith("relative_position_bias_table"):
            side = (int(t.shape[0] ** 0.5) + 1) // 2
            state[name] = layers.pos_embed_rel.resize_rel_pos_bias_table_simple(state[name], (side, side), tuple(t.shape))
        elif name.rpartition(".")[2] in COMPUTED[:2]:
            state[name] = t
    twin.load_state_dict({name: state[name] for name in own})
    with pytest.warns(UserWarning, match=f"windows of {window} instead of 4 patches") if window != 4 else _silent():
        loaded = lifeops.load_official(model.state_dict(), img_size=img_size)
    assert loaded.layers[0].blocks[0].size == window
    x = torch.randn(1, 3, *((img_size, img_size) if isinstance(img_size, int) else img_size))
    torch.testing.assert_close(loaded(x), twin(x))


def test_swin_window_that_does_not_fit():
    state = SwinTransformer(**SWINS["masks"]).state_dict()
    with pytest.raises(ValueError, match="the window 4 does not divide grids of 18 x 18 patches; pass window_size"):
        lifeops.load_official(state, img_size=36)
    loaded = quiet(lifeops.load_official, state, img_size=(24, 48), window_size=3)
    assert loaded.layers[0].blocks[0].size == 3
    assert loaded(torch.randn(1, 3, 24, 48)).shape == (1, 5)


def test_published_swin_at_384():
    with torch.device("meta"):
        state = dw_shortcut("swin_tiny", num_classes=10).state_dict()
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in state.items()}
    with pytest.warns(UserWarning, match="windows of 12 instead of 7"):
        assert lifeops.load_official(state, img_size=384).layers[3].blocks[1].size == 12
