"""MViT: checkpoints in every layout, and roll-out."""

import re

import pytest
import torch

import lifeops
from lifeops.errors import CheckpointError
from lifeops.models import MViT, mvitv2
from test_checkpoints import quiet
from test_mvit import TINY, _randomised, _timm

# ------------------------------------------------------------------------------------------------ checkpoints


def _official(model, frames=False):
    """The state dict under the authors' names; with ``frames`` as SlowFast has it."""
    places = [f"stages.{s}.blocks.{i}." for s, stage in enumerate(model.stages) for i in range(len(stage.blocks))]
    state = {}
    for name, t in model.state_dict().items():
        place = next((p for p in places if name.startswith(p)), None)
        if place is not None:
            name = f"blocks.{places.index(place)}.{name.removeprefix(place)}"
        name = re.sub("shortcut_proj_(attn|mlp)", "proj", name).replace("head.fc", "head.projection")
        state[name] = t[:, :, None] if frames and t.ndim == 4 else t
    return {"model_state": state, "epoch": 3}


MODELS = {
    "attention": {}, "MLP": {"expand_attn": False}, "class token": {"class_token": True}, "no positions": {"rel_pos": False},
    "no bias": {"qkv_bias": False, "mlp_ratio": 2.0, "num_heads": 2}, "rectangle": {"img_size": (32, 48)},
}  # fmt: skip


@pytest.mark.parametrize("layout", ["timm", "official", "slowfast"])
@pytest.mark.parametrize("name", MODELS)
def test_load_official(name, layout):
    torch.manual_seed(0)
    model = _randomised(MViT(**{**TINY, **MODELS[name]})).eval()
    state = dict(model.state_dict()) if layout == "timm" else _official(model, layout == "slowfast")
    with pytest.warns(UserWarning, match=r"assumed stride_kv=\(4, 4\)"):
        loaded = lifeops.load_official(state)
    size = (32, 48) if name == "rectangle" else (32, 32)
    x = torch.randn(2, 3, *size)
    assert torch.equal(loaded(x), model(x))
    if MODELS[name].get("rel_pos", True):
        assert loaded.img_size == size


def test_load_official_reads_what_our_state_dicts_tell():
    model = _randomised(MViT(**TINY, stride_kv=2, residual_pooling=False, class_token=True, residual_prefix=False)).eval()
    loaded, x = quiet(lifeops.load_official, model.state_dict()), torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


def test_load_official_at_another_size():
    model = _randomised(MViT(**TINY)).eval()
    loaded = quiet(lifeops.load_official, model.state_dict(), img_size=(48, 64), num_classes=5)
    x = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(loaded(x), model(x))
    assert loaded.img_size == (48, 64)
    with pytest.warns(UserWarning, match="a new head for 3 classes"):
        assert lifeops.load_official(model.state_dict(), num_classes=3)(x).shape == (2, 3)


def test_load_official_of_a_published_size_assumes_nothing():
    with torch.device("meta"):
        state = dict(mvitv2("tiny", img_size=32).state_dict())
    state = {name: torch.zeros(t.shape) for name, t in state.items()}
    assert quiet(lifeops.load_official, state).img_size == (32, 32)


def test_load_official_refuses():
    state = _official(MViT(**TINY))["model_state"]
    for change, message in (
        (lambda s: s.update(pos_embed=torch.zeros(1, 64, 8)), "'pos_embed'; models with absolute positions are not known"),
        (lambda s: [s.pop(k) for k in list(s) if re.match(r"blocks\.\d+\.proj", k)], "no block has"),
        (lambda s: s.pop("blocks.0.attn.qkv.weight"), "has no 'stages.0.blocks.0.attn.qkv.weight'"),
        (lambda s: s.update({"blocks.0.attn.rel_pos_t": torch.zeros(3, 8)}), "rel_pos_t"),
    ):
        broken = dict(state)
        change(broken)
        with pytest.raises(CheckpointError, match=message):
            lifeops.load_official(broken)


# ------------------------------------------------------------------------------------------------ roll-out


@pytest.mark.parametrize("class_token", [False, True])
def test_rollout_is_that_of_timms_model(class_token):
    mvitv2_ = _timm()
    sizes = {"depths": (1, 2, 1), "embed_dim": (24, 48, 96), "num_heads": (1, 2, 4), "stride_q": ((1, 1), (2, 2), (2, 2))}
    cfg = mvitv2_.MultiScaleVitCfg(**sizes, use_cls_token=class_token)
    reference = _randomised(mvitv2_.MultiScaleVit(cfg, (64, 64), num_classes=3)).double().eval()
    model = MViT(64, num_classes=3, embed_dim=24, depths=(1, 2, 1), class_token=class_token).double().eval()
    model.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for targets in (None, "mean", "soft", (2, 1)):
        ours, theirs = lifeops.rollout(model, images, targets), lifeops.rollout(reference, images, targets)
        torch.testing.assert_close(ours.maps, theirs.maps)
        assert ours.labels == theirs.labels


@pytest.mark.parametrize("options", [{"residual_prefix": False, "class_token": True}, {"rel_pos_resize": "middle"}, {"rel_pos": False}])
def test_rollout_of_other_sizes(options):
    """Verified against the pass: tables are read as the module reads them, q is added where it adds it."""
    model = _randomised(MViT(**TINY, **options)).double().eval()
    for size in ((28, 44), (48, 32)):
        found = lifeops.rollout(model, torch.randn(2, 3, *size, dtype=torch.float64))
        assert found.maps.shape == (2, 1, size[0] // 4, size[1] // 4)
        torch.testing.assert_close(found.maps.sum((2, 3)) + found.prefix, torch.ones(2, 1, dtype=torch.float64))
