"""Small hosts of timm and transformers, and what a refusal must leave alone."""

import copy

import pytest
import torch

from conftest import declare_torchvision_ops

declare_torchvision_ops()
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
vit = timm.models.vision_transformer

SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}  # a 4 x 6 grid
BEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
HF = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
SYSTEMS = ("life", "localvit", "dw_shortcut")


def small_vit(**options):
    return lambda: timm.models.VisionTransformer(**{**SMALL, **options})


def named(name, **options):
    return lambda: timm.create_model(name, **{"img_size": 64, "depth": 2, "num_classes": 3, **options})


def staged(name, **options):
    return lambda: timm.create_model(name, num_classes=3, **options)


def hf(name, model=None, **options):
    return lambda: getattr(transformers, model or f"{name}Model")(getattr(transformers, f"{name}Config")(**{**HF, **options}))


def made(build, seed=0):
    """Every table and scale that starts as a constant gets a value that shows."""
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("relative", "rel_pos", "gamma_", "position_embeddings")):
                p.normal_(std=0.02 if "position_emb" in name else 0.5)
    return model


def images_of(model, batch=2):
    sizes = [getattr(m, "img_size", None) or getattr(getattr(m, "config", None), "image_size", None) for m in model.modules()]
    size = next((s for s in sizes if s is not None), 64)
    return torch.randn(batch, 3, *((size, size) if isinstance(size, int) else size))


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def unchanged(model, call, message):
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    hooks, keys = hooks_of(model), dict(vars(model))
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert (hooks_of(model), [m.training for m in model.modules()], vars(model).keys()) == (hooks, modes, keys.keys())
    assert not any("forward" in vars(m) for m in model.modules())
    return torch.equal(random, torch.get_rng_state())
