"""NaFlexViT on images: each system on its blocks, images of several sizes, and packed patches, which lie on no one grid."""

import copy

import host_oracles
import pytest
import torch
from host_configs import HostConfig
from hosts import SYSTEMS, timm

import lifeops

naflex = timm.models.naflexvit
VARIANTS = {
    "linear": {"class_token": True, "reg_tokens": 2},
    "convolution": {"embed_proj_type": "conv", "pos_embed": "factorized", "init_values": 0.5},
    "padded": {"dynamic_img_pad": True, "class_token": True},
    "rope": {"rope_type": "axial", "block_fn": "eva", "reg_tokens": 1, "init_values": 0.5},
    "mixed rope": {"rope_type": "mixed", "block_fn": "eva", "class_token": True},
    "norms of q and k": {"qk_norm": True},
}
PREFIX = {"linear": 3, "padded": 1, "rope": 1, "mixed rope": 1}


def _model(name):
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "global_pool": "avg"}
    cfg = naflex.NaFlexVitCfg(**{**options, "pos_embed_grid_size": (4, 4), **VARIANTS[name]})
    return naflex.NaFlexVit(cfg, num_classes=3).eval()


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", VARIANTS)
def test_blocks(name, system):
    size = (30, 47) if name == "padded" else (32, 48)
    host = HostConfig("timm", "NaFlex", name, None, size, size, (8, 8), PREFIX.get(name, 0), "plain")
    model, x = _model(name), torch.randn(2, 3, *size)
    original, before = copy.deepcopy(model), model(x)
    lifeops.convert(model, system)
    reverted = copy.deepcopy(model)
    assert host_oracles.check_converted(system, original, model, x, host) < host_oracles.TOLERANCE
    assert torch.equal(lifeops.revert(reverted)(x), before)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("method", ["forward", "forward_features"])
def test_two_sizes_with_checkpoints(system, method):
    """4 x 6 and 6 x 4 patches in one backward, their blocks run again; methods that the model has beside ``forward`` bind the grid too."""
    model = lifeops.convert(_model("rope"), system).double()
    images = [torch.randn(2, 3, *size, dtype=torch.float64) for size in ((32, 48), (48, 32))]
    run, parameters = getattr(model, method), list(model.blocks.parameters())
    expected = [torch.autograd.grad(run(x).square().sum(), parameters, allow_unused=True) for x in images]
    model.set_grad_checkpointing()
    got = torch.autograd.grad(sum(run(x).square().sum() for x in images), parameters, allow_unused=True)
    for a, b, c in zip(*expected, got, strict=True):
        torch.testing.assert_close(c, a + b)


@pytest.mark.parametrize("system", SYSTEMS)
def test_packed_patches_are_refused(system):
    model = lifeops.convert(_model("linear"), system)
    places = torch.tensor([[[y, x] for y in range(2) for x in range(3)]])
    packed = {"patches": torch.zeros(1, 6, 192), "patch_coord": places, "patch_valid": torch.ones(1, 6, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"NaFlexEmbeds, the model's patch embedding, is given packed patches \(1, 6, 192\)"):
        model(packed)
    assert model(torch.randn(1, 3, 24, 16)).shape == (1, 3)  # nothing is left of it
    assert lifeops.revert(model)(packed).shape == (1, 3)
