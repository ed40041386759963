"""Models that shuffle, leave out or hide patches before their blocks: converted ones see all on their grid, or say why not."""

import copy
import pickle

import pytest
import torch
from hosts import HF, SYSTEMS, hf, hooks_of, made, named, small_vit, transformers

import lifeops

DECODER = {"decoder_hidden_size": 24, "decoder_num_attention_heads": 3, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 24}
GRID, NOISES = (4, 6), (None, torch.arange(24.0).expand(2, -1), -torch.arange(24.0).expand(2, -1))


def mae(ratio=0.0, **options):
    return hf("ViTMAE", **{"mask_ratio": ratio, **DECODER, **options})


def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def shown(model):
    """New branches with weights that show."""
    for name, p in model.named_parameters():
        if any(part in name for part in ("shortcut", "mlp.conv", "qkv")):
            p.data.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    return model


def tokens_in_order(original, x):
    """(B, 1 + H*W, C): patches, their positions, the class token; by the formula."""
    part = original.embeddings
    patches = part.patch_embeddings.projection(x).flatten(2).transpose(1, 2)
    positions = part.interpolate_pos_encoding(patches, *x.shape[2:])
    cls_token = (part.cls_token + positions[:, :1]).expand(len(x), -1, -1)
    return torch.cat((cls_token, patches + positions[:, 1:]), 1)


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_shuffled_patches_are_put_in_order(system):
    original, x = made(mae()), images()
    model = shown(lifeops.convert(copy.deepcopy(original), system))
    tokens = tokens_in_order(original, x)
    with lifeops.use_grid(model, GRID):
        for layer in model.layers:
            tokens = layer(tokens)
    expected = model.layernorm(tokens)
    for noise in NOISES:
        found = model(x, noise=noise, interpolate_pos_encoding=True)
        assert torch.equal(found.last_hidden_state, expected)
        assert torch.equal(found.ids_restore, torch.arange(24).expand(2, -1))
        assert not found.mask.any()
    options = {"pixel_values": x, "interpolate_pos_encoding": True}
    assert torch.equal(lifeops.rollout(model, options).maps, lifeops.rollout(model, options).maps)
    plain = original(x, interpolate_pos_encoding=True).last_hidden_state
    assert not torch.allclose(plain[:, :1], expected[:, :1], atol=1e-3)  # the blocks do something else now


@pytest.mark.parametrize("every", [1, 2])
@torch.no_grad()
def test_pretraining_model_starts_as_the_original(every):
    original = made(hf("ViTMAE", "ViTMAEForPreTraining", mask_ratio=0.0, **DECODER))
    x, noise = torch.randn(2, 3, 32, 32), torch.randn(2, 16)
    expected = original(x, noise=torch.arange(16.0).expand(2, -1))
    model = lifeops.convert(original, "dw_shortcut", start="identity", every=every)
    torch.testing.assert_close(model(x, noise=noise).logits, expected.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 4), (0.05, 15)])
def test_masked_patches_are_refused_at_each_pass(system, ratio, kept):
    model = made(mae(ratio))
    x, hooks = torch.randn(2, 3, 32, 32), hooks_of(model)
    with torch.no_grad():
        before = model(x, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    lifeops.convert(model, system)
    assert model.config.mask_ratio == ratio  # tried with all patches
    message = rf"^convert: ViTMAEEmbeddings gives {kept} of 16 patches, .*: set model\.config\.mask_ratio = 0 \(it is {ratio}\)$"
    with pytest.raises(ValueError, match=message):
        model(x)
    assert f"shuffles them and leaves out {ratio} of them (config.mask_ratio); lifeops needs all" in str(lifeops.describe(model))
    model.config.mask_ratio = 0.0
    assert torch.equal(model(x).last_hidden_state, model(x).last_hidden_state)
    model.config.mask_ratio = ratio
    lifeops.revert(model)
    with torch.no_grad():
        assert torch.equal(model(x, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state, before)
    assert hooks_of(model) == hooks


def test_copies_and_compiled_models_put_them_in_order_too():
    model, x = lifeops.convert(made(mae()), "life"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x).last_hidden_state
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.compile(model, backend="aot_eager", fullgraph=True)):
            torch.testing.assert_close(twin(x).last_hidden_state, expected, rtol=1e-5, atol=1e-6)
        model.config.mask_ratio = 0.5
        with pytest.raises(ValueError, match=r"^convert: ViTMAEEmbeddings gives 8 of 16 patches"):
            torch.compile(model, backend="eager")(x)


def test_gradients_reach_each_patch_once():
    model, x = lifeops.convert(made(mae()), "life"), torch.randn(1, 3, 32, 32, requires_grad=True)
    found = [torch.autograd.grad(model(x).last_hidden_state.square().sum(), x)[0] for _ in range(2)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ patch dropout

DROPS = {
    "vit": small_vit(patch_drop_rate=0.25), "ordered": small_vit(patch_drop_rate=0.25),
    "eva": named("eva02_tiny_patch14_224", img_size=56, embed_dim=48, num_heads=3, patch_drop_rate=0.25),
    "naflex": named("naflexvit_base_patch16_gap", embed_dim=48, num_heads=3, patch_drop_rate=0.25),
}  # fmt: skip


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", DROPS)
def test_patch_dropout_is_refused_while_it_drops(name, system):
    model = made(DROPS[name])
    if name == "ordered":
        model.patch_drop.ordered = True
    size = (32, 48) if name in ("vit", "ordered") else (64, 64) if name != "eva" else (56, 56)
    x, kind = torch.randn(2, 3, *size), type(model.patch_drop).__name__
    lifeops.convert(model, system)
    assert f"patch_drop ({kind}) leaves out 0.25 of them in training; lifeops needs all" in str(lifeops.describe(model))
    with torch.no_grad():
        expected = model(x)
    with pytest.raises(ValueError, match=rf"^convert: {kind} leaves out patches in training \(prob=0\.25\).*model\.patch_drop\.prob = 0$"):
        model.train()(x)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected)  # nothing is left of the pass that failed
    model.patch_drop.prob = 0.0
    model.train()(x).sum().backward()


# ------------------------------------------------------------------------------------------------ mask tokens

HIDES = {  # mask tokens take the place of patches, which stay where they are
    "Dinov2": {}, "Dinov2WithRegisters": {}, "Beit": {"use_mask_token": True}, "ViTMSN": {},
    "IJepa": {}, "DINOv3ViT": {}, "DeiT": {}, "ViT": {},
}  # fmt: skip


@pytest.mark.parametrize("name", HIDES)
@torch.no_grad()
def test_mask_tokens_keep_their_grid(name):
    """A model that starts as the original gives what that does for hidden patches: the tokens are as many, in the same order."""
    original = made(hf(name, **HIDES[name]))
    part = original.embeddings
    if getattr(part, "mask_token", None) is None and name in ("ViT", "DeiT", "ViTMSN", "IJepa"):
        original.embeddings = part = type(part)(original.config, use_mask_token=True)
    part.mask_token.normal_()
    x, hidden = torch.randn(2, 3, 32, 32), torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    model = lifeops.convert(copy.deepcopy(original), "dw_shortcut", start="identity")
    expected, whole = original(x, bool_masked_pos=hidden).last_hidden_state, original(x).last_hidden_state
    torch.testing.assert_close(model(x, bool_masked_pos=hidden).last_hidden_state, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, whole, atol=1e-3)


@torch.no_grad()
def test_hidden_padding_keeps_its_grid():
    """Images of several sizes in one batch: their padding is patches of the grid, which nothing attends to."""
    original = made(lambda: transformers.Idefics3VisionTransformer(transformers.Idefics3VisionConfig(**HF)))
    x, shown = torch.randn(2, 3, 32, 32), torch.ones(2, 4, 4, dtype=torch.bool)
    shown[1, :, 3] = shown[1, 3] = False
    model = lifeops.convert(copy.deepcopy(original), "dw_shortcut", start="identity")
    expected = original(x, patch_attention_mask=shown).last_hidden_state
    torch.testing.assert_close(model(x, patch_attention_mask=shown).last_hidden_state, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(original(x).last_hidden_state, expected, atol=1e-3)
