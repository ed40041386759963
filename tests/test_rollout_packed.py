"""lifeops.rollout of packed, padded images of several grids: against the matrices of the padded pass, and against each image alone."""

import naive_rollout as naive
import pytest
import torch
from hosts import hf, hooks_of, made, named, timm, transformers, vit

import lifeops

GRIDS, LENGTH, PATCH = ((3, 4), (2, 7), (4, 4), (1, 5)), 16, 16
NARROW = {"embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 5}
SIGLIP = {"num_patches": 16, "patch_size": PATCH, "hidden_size": 48, "num_attention_heads": 3}


def _cfg(**options):
    options = {"class_token": True, "patch_size": PATCH, "embed_dim": 48, "depth": 2, "num_heads": 3, **options}
    return lambda: timm.models.NaFlexVit(timm.models.naflexvit.NaFlexVitCfg(**options))


def _parallel():
    model = _cfg()()
    model.blocks = torch.nn.Sequential(*(vit.ParallelThingsBlock(48, 3) for _ in range(2)))
    return model


def _classifier():
    config = transformers.Siglip2Config(vision_config={**SIGLIP, "num_hidden_layers": 2, "intermediate_size": 48}, num_labels=5)
    return transformers.Siglip2ForImageClassification(config)


MODELS = {  # a model, and its tokens before the patches
    "siglip2": (hf("Siglip2Vision", **SIGLIP), 0), "siglip2 eager": (hf("Siglip2Vision", attn_implementation="eager", **SIGLIP), 0),
    "siglip2 classifier": (_classifier, 0),
    "naflex": (named("naflexvit_base_patch16_gap", **NARROW), 4), "naflex map": (named("naflexvit_base_patch16_map", **NARROW), 1),
    "naflex siglip": (named("naflexvit_base_patch16_siglip", **NARROW), 0), "keys only": (_cfg(use_key_only_attn_mask=True), 1),
    "axial": (_cfg(rope_type="axial"), 1), "mixed": (_cfg(rope_type="mixed", reg_tokens=2), 3),
    "factorized": (_cfg(pos_embed="factorized"), 1), "side by side": (lambda: _parallel(), 1),
}  # fmt: skip
MEAN = ("siglip2 classifier", "naflex")  # what the output reads without a class token
POOL = ("siglip2", "siglip2 eager", "naflex siglip", "naflex map")
OPTIONS = [{}, {"head_fusion": "max", "residual": 0.3}, {"discard_ratio": 0.6, "prefix": "normalize", "start_layer": 1}]


def _packed(name, patches, grids=GRIDS):
    """What the model takes, of patches (B, N, 3 p p)."""
    at = torch.arange(patches.shape[1])
    valid = torch.stack([at < h * w for h, w in grids])
    if "siglip2" in name:
        return {"pixel_values": patches, "pixel_attention_mask": valid.long(), "spatial_shapes": torch.tensor(grids)}
    coord = torch.stack([torch.stack((at // w, at % w), -1) * (at < h * w)[:, None] for h, w in grids])
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def _case(name):
    build, prefix = MODELS[name]
    model = made(build)
    patches = torch.randn(len(GRIDS), LENGTH, 3 * PATCH * PATCH)
    return model, patches, prefix


def _matrices(model, images):
    """(B, h, N, N) of every layer."""
    with torch.no_grad(), naive.Attentions() as record:
        model(images) if "patches" in images else model(**images)
    return record.seen


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_product_of_the_models_own_matrices(name):
    model, patches, prefix = _case(name)
    images, hooks = _packed(name, patches), hooks_of(model)
    seen = _matrices(model, images)
    if name == "side by side":
        seen = [torch.cat(pair, 1) for pair in zip(seen[::2], seen[1::2], strict=True)]
    assert len(seen) == 2
    for targets in (None, "mean", (0, 3)):
        found = lifeops.rollout(model, images, targets)
        assert found.weights.shape == (4, 1, prefix + LENGTH)
        assert found.prefix.shape == (4, 1)
        for image, (H, W) in enumerate(GRIDS):
            n = prefix + H * W
            expected = naive.product([naive.layer(a[image : image + 1, :, :n, :n]) for a in seen])
            assert found.maps[image].shape == (1, H, W)
            assert found.weights[image, :, n:].abs().max() == 0 if n < prefix + LENGTH else True
            assert naive.off(found.maps[image].flatten(1), (found.weights[image, :, :n] @ expected[0])[:, prefix:]) <= 1e-5
            assert abs(found.maps[image].sum() + found.prefix[image, 0] - 1) <= 1e-5
    quick = lifeops.rollout(model, images, (0, 3), verify=False)
    assert all(torch.equal(a, b) for a, b in zip(found.maps, quick.maps, strict=True))
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_an_image_is_what_it_is_alone(name, options):
    """Whatever lies in its padding, and whatever stands beside it."""
    model, patches, _ = _case(name)
    together = lifeops.rollout(model, _packed(name, patches), **options)
    for image, (H, W) in enumerate(GRIDS):
        alone = lifeops.rollout(model, _packed(name, patches[image : image + 1, : H * W], GRIDS[image : image + 1]), **options)
        assert naive.off(together.maps[image], alone.maps[0]) <= 1e-5
        assert (together.prefix[image] - alone.prefix[0]).abs().max() <= 1e-6
    default = "mean of the patch tokens" if name in MEAN else "attention pooling" if name in POOL else "cls token"
    assert together.labels == alone.labels == (default,)


def test_packed_patches_are_those_of_the_image():
    model, _, _ = _case("naflex map")
    pixels = torch.randn(2, 3, 3 * PATCH, 4 * PATCH)
    patches = pixels.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    padded = torch.nn.functional.pad(patches, (0, 0, 0, 4), value=7.0)
    found = lifeops.rollout(model, _packed("naflex map", padded, GRIDS[:1] * 2), "pool")
    expected = lifeops.rollout(model, pixels, "pool").maps
    assert naive.off(torch.stack(found.maps), expected) <= 1e-5


def test_targets():
    model, patches, prefix = _case("naflex map")
    images, N = _packed("naflex map", patches), prefix + LENGTH
    scores = torch.randn(4, LENGTH, 3).index_fill(2, torch.tensor([1]), -9.0)
    scores[1, 14:] = torch.tensor([0.0, 9.0, 0.0])  # padding: class 1 is predicted there alone
    found = lifeops.rollout(model, images, "hard", token_logits=scores)
    assert found.labels == ("class 0", "class 2")
    assert [m.shape for m in found.maps] == [(2, H, W) for H, W in GRIDS]
    chosen = (scores[1, :14].argmax(-1) == 2).float()
    torch.testing.assert_close(found.weights[1, 1, prefix : prefix + 14], chosen / chosen.sum())
    soft = lifeops.rollout(model, images, "soft", classes=[2], token_logits=scores)
    assert (soft.weights.sum(-1) - 1).abs().max() <= 1e-6
    given = torch.rand(1, N) * (torch.arange(N) < prefix + 5)
    by_weight = lifeops.rollout(model, images, given)
    torch.testing.assert_close(by_weight.weights, (given / given.sum()).expand(4, 1, N))
    for targets, message in (
        (prefix + 5, f"token {prefix + 5} lies on padding"),
        (torch.ones(1, N), "target 0 lies on padding"),
        ((0, 5), "must lie on the 3 x 4 grid"),
    ):
        with pytest.raises(ValueError, match=message):
            lifeops.rollout(model, images, targets)


def _changed(name, **given):
    model, patches, _ = _case(name)
    images = _packed(name, patches)
    return model, {key: value for key, value in {**images, **given}.items() if value is not None}


VALID = _packed("naflex", torch.zeros(4, LENGTH, 1))["patch_valid"]
COORD = _packed("naflex", torch.zeros(4, LENGTH, 1))["patch_coord"]
REFUSED = {
    "no mask": ("siglip2 classifier", {"pixel_attention_mask": None}, "attends to the padding of image 0: no mask"),
    "other mask": ("siglip2", {"pixel_attention_mask": VALID.flip(1).long()}, "pixel_attention_mask of image 0 must be true of its first"),
    "large grids": ("siglip2", {"spatial_shapes": torch.tensor([(3, 4), (2, 7), (4, 5), (1, 5)])}, r"at most 16 patches, got \(4, 5\)"),
    "float grids": ("siglip2", {"spatial_shapes": torch.ones(4, 2)}, r"spatial_shapes must be ints of shape \(B, 2\) = \(4, 2\)"),
    "pixels": ("siglip2", {"pixel_values": torch.zeros(4, LENGTH)}, r"pixel_values must be packed patches \(B, N, …\)"),
    "columns first": ("naflex", {"patch_coord": COORD.flip(2)}, "patch_coord of image 0 must go row by row"),
    "holes": ("naflex", {"patch_valid": VALID & (torch.arange(LENGTH) != 2)}, "patch_valid of image 0 must be true of its first"),
    "no coordinates": ("naflex", {"patch_coord": None}, r"patch_coord must have shape \(B, N, 2\)"),
    "no validity": ("naflex", {"patch_valid": None}, r"patch_valid must have shape \(B, N\)|the last patch_coord"),
    "own mask": ("naflex", {"attn_mask": torch.zeros(4, 1, 4 + LENGTH, 4 + LENGTH)}, r"blocks\.0\.attn attends to the padding of image 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_told_or_not_hidden_is_refused(name):
    host, given, message = REFUSED[name]
    model, images = _changed(host, **given)
    with pytest.raises(ValueError, match=f"rollout: .*({message})"):
        lifeops.rollout(model, images)


def test_a_layer_before_the_embedding():
    model, patches, _ = _case("keys only")
    model.embeds.register_forward_pre_hook(lambda module, args: model.blocks[0](torch.zeros(4, 17, 48)) and None)
    with pytest.raises(ValueError, match=r"^rollout: blocks\.0\.attn runs before Linear, the patch embedding, has run"):
        lifeops.rollout(model, _packed("keys only", patches))


def test_half_precision():
    for name in ("siglip2", "axial"):
        model, patches, _ = _case(name)
        full = lifeops.rollout(model, _packed(name, patches), "mean")
        half = lifeops.rollout(model.bfloat16(), _packed(name, patches.bfloat16()), "mean")
        for a, b in zip(half.maps, full.maps, strict=True):
            assert naive.off(a, b) <= 0.05
