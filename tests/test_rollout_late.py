"""lifeops.rollout of EoMT: queries join in front of the tokens on the way, and masks are made of what the tokens predict."""

import naive_rollout as naive
import pytest
import torch
from hosts import hf, hooks_of, made, timm

import lifeops

QUERIES, PREFIX, SIZES = 3, 8, {"num_queries": 3, "num_hidden_layers": 4, "num_blocks": 2, "num_upscale_blocks": 1, "mlp_ratio": 1}
MODELS = {name: hf(name, f"{name}ForUniversalSegmentation", **SIZES) for name in ("Eomt", "EomtDinov3")}


def _model(name="Eomt", share=0.6):
    """``share``: of the queries whose attention is masked."""
    model = made(MODELS[name])
    model.attn_mask_probs.fill_(share)
    return model, torch.randn(2, 3, 32, 32)


def _layers(model, images, head_fusion="mean", residual=0.5):
    """(B, tokens behind, tokens before) of every layer; before the queries are there they are the identity's."""
    torch.manual_seed(1)
    layers = []
    for attention in naive.attentions_of(model, images):
        layer = naive.layer(attention, head_fusion, residual)
        own = torch.eye(QUERIES + layer.shape[-1]).repeat(2, 1, 1)
        own[:, QUERIES:, QUERIES:] = layer
        layers.append(own if layer.shape[-1] == 16 + PREFIX - QUERIES else layer)
    return layers


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_product_of_the_models_own_matrices(name, share):
    model, images = _model(name, share)
    hooks, layers = hooks_of(model), _layers(model, images)
    assert [layer.shape[-1] for layer in layers] == [16 + PREFIX] * 4
    for targets, first in ((None, QUERIES), (1, 1), ("mean", None), ((2, 1), PREFIX + 9)):
        torch.manual_seed(1)
        found = lifeops.rollout(model, images, targets)
        assert first is None or (found.weights[..., first] == 1).all()
        expected = (found.weights @ naive.product(layers))[..., PREFIX:]
        assert naive.off(found.maps.flatten(2), expected) <= 1e-5
        assert (found.maps.sum((2, 3)) + found.prefix - 1).abs().max() <= 1e-5
        torch.manual_seed(1)
        late = lifeops.rollout(model, images, targets, start_layer=3)
        assert naive.off(late.maps.flatten(2), (late.weights @ layers[3])[..., PREFIX:]) <= 1e-5
    assert hooks_of(model) == hooks


def test_options():
    model, images = _model()
    layers = _layers(model, images, "max", 0.2)
    torch.manual_seed(1)
    found = lifeops.rollout(model, images, 0, head_fusion="max", residual=0.2)
    assert naive.off(found.maps.flatten(2), (found.weights @ naive.product(layers))[..., PREFIX:]) <= 1e-5


def _turned(x, args):
    return torch.cat((x[:, : PREFIX + 1], x[:, PREFIX + 2 :], x[:, PREFIX + 1 : PREFIX + 2]), 1)


def _behind(x, args):
    return torch.cat((x[:, QUERIES:], x[:, :QUERIES]), 1)


def _mixed(x, args):
    return x + 0.01 * (x @ x.mT) @ x


def _unmasked(x, args):
    return x + (args[1] < 0).float().mean((1, 3))[..., None]


CHANGES = {  # what becomes of the tokens of layer 2, where the queries join, or of layer 3
    "turned": (2, _turned, r"layers\.2\.attention does not read the 16 patches as tokens 8 to 23 in their order"),
    "behind": (2, _behind, r"does not read the 16 patches as tokens 8 to 23.*tokens 5 to 20 are the patches, and 3 come behind"),
    "mixed": (3, _mixed, r"attends or mixes tokens in a way that is not known: a product of two activations, between layers\.2"),
    "by its mask": (3, _unmasked, r"the model itself attends or mixes tokens in a way that is not known: a product of two activations"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tokens_that_are_something_else_are_refused(name):
    at, change, message = CHANGES[name]
    model, images = _model()
    model.layers[at].register_forward_pre_hook(lambda module, args: (change(args[0], args), *args[1:]))
    with pytest.raises(ValueError, match=message):
        lifeops.rollout(model, images)
    assert lifeops.rollout(model, images, verify=False).maps.shape == (2, 1, 4, 4)


def test_patches_that_a_class_token_joins_are_followed_too():
    sizes = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model, images = made(lambda: timm.models.Cait(**sizes)), torch.randn(2, 3, 32, 48)
    assert lifeops.rollout(model, images).labels == ("cls token",)
    model.blocks[1].register_forward_hook(lambda module, args, output: torch.cat((output[:, 1:], output[:, :1]), 1))
    with pytest.raises(ValueError, match=r"blocks_token_only\.0\.attn does not read the 24 patches as tokens 1 to 24 in their order"):
        lifeops.rollout(model, images)
