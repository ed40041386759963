"""lifeops.rollout in the windows of transformers' Swin and of SAM: against dense matrices of the windows the model is seen to use."""

import naive_rollout as naive
import pytest
import torch
import torch.nn.functional as F
from host_attention import CHAINS
from hosts import hooks_of, made, timm, transformers

import lifeops

WINDOW = 4
SIZES = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 3], "window_size": WINDOW, "patch_size": 4, "hidden_size": 48}


def _model(version, size):
    config = getattr(transformers, f"{version}Config")(image_size=size, **SIZES)
    model = made(lambda: getattr(transformers, f"{version}Model")(config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "logit_scale" in name:
                p.add_(torch.randn_like(p))
    return model


def _dense(attention, grid, shift):
    """(B, N, N): padded to whole windows, then shifted, by the numbers of the tokens; padding has none."""
    (H, W), attention = grid, attention.mean(1)
    numbers = F.pad(torch.arange(H * W).view(1, 1, H, W).float(), (0, -W % WINDOW, 0, -H % WINDOW), value=-1).roll((-shift, -shift), (2, 3))
    numbers = F.unfold(numbers, WINDOW, stride=WINDOW)[0].T.long()
    attention = attention.unflatten(0, (-1, len(numbers)))
    dense = torch.zeros(len(attention), H * W, H * W)
    for window, tokens in enumerate(numbers):
        real = tokens >= 0
        own = attention[:, window][:, real][:, :, real]
        dense[:, tokens[real][:, None], tokens[real]] = own
    return (dense + torch.eye(H * W)) / 2


def _merging(grid):
    """(coarse, fine): a merged token's parts alike."""
    (H, W), columns = grid, -(-grid[1] // 2)
    at = torch.arange(H * W)
    matrix = torch.zeros(-(-H // 2) * columns, H * W)
    matrix[at // W // 2 * columns + at % W // 2, at] = 1
    return matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize("size", [(64, 64), (44, 76)], ids=str)  # 16 x 16, and 11 x 19 which is padded
@pytest.mark.parametrize("version", ["Swin", "Swinv2"])
def test_windows_of_transformers(version, size):
    model, images = _model(version, size), torch.randn(2, 3, *size)
    hooks, fine = hooks_of(model), (size[0] // 4, size[1] // 4)
    coarse = tuple(-(-n // 2) for n in fine)
    attentions = [a.flatten(0, 1) if a.dim() == 5 else a for a in _seen(model, images)]
    assert len(attentions) == 4
    grids, shifts = (fine, fine, coarse, coarse), (0, 2, 0, 2)
    layers = [_dense(*given) for given in zip(attentions, grids, shifts, strict=True)]
    expected = naive.product([*layers[:2], _merging(fine).expand(2, -1, -1), *layers[2:]])
    found = lifeops.rollout(model, images)
    assert hooks_of(model) == hooks
    assert found.maps.shape == (2, 1, *fine)
    assert naive.off(found.maps.flatten(2), found.weights @ expected) <= 1e-5
    assert (found.maps.sum((2, 3)) + found.prefix - 1).abs().max() <= 1e-6
    assert (found.prefix > 0.01).all() == (size == (44, 76))
    one = lifeops.rollout(model, images, (1, 2), verify=False)
    assert naive.off(one.maps.flatten(2), one.weights @ expected) <= 1e-5


def _seen(model, images):
    with torch.no_grad(), naive.Attentions() as record:
        model(images)
    return record.seen


@pytest.mark.parametrize("version", ["Swin", "Swinv2"])
def test_other_windows_are_refused(version):
    model = _model(version, (64, 64))
    block = model.encoder.layers[0].blocks[1]
    attention = getattr(block.attention, "self", block.attention)
    attention.register_forward_pre_hook(lambda module, args: (args[0].flip(1), *args[1:]))
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.1 does not attend inside windows of \(4, 4\) shifted by \(2, 2\)"):
        lifeops.rollout(model, torch.randn(2, 3, 64, 64))


def _sam(**options):
    sizes = {"img_size": (48, 80), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 3, "neck_chans": 16}
    return timm.models.VisionTransformerSAM(**sizes, window_size=WINDOW, global_attn_indexes=(1,), **options)


def _sam_hf():
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_dim": 48, "image_size": 48, "patch_size": 8}
    config = transformers.SamVisionConfig(window_size=WINDOW, global_attn_indexes=[1], output_channels=8, **sizes)
    return transformers.SamVisionModel(config)


SAMS = {
    "relative": (lambda: _sam(use_rel_pos=True), (6, 10)), "rotary": (lambda: _sam(use_rope=True), (6, 10)), "hf": (_sam_hf, (6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMS)
def test_windows_and_the_whole_grid_in_turn(name):
    build, grid = SAMS[name]
    model, images = made(build), torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    N, layers = grid[0] * grid[1], []
    for attention in _seen(model, images):
        attention = attention.unflatten(0, (-1, 3)) if attention.dim() == 3 else attention
        layers.append(naive.layer(attention) if attention.shape[-1] == N else _dense(attention, grid, 0))
    assert len(layers) == 3
    expected = naive.product(layers)
    for targets in ("mean", (5, 1)):
        found = lifeops.rollout(model, images, targets)
        assert naive.off(found.maps.flatten(2), found.weights @ expected) <= 1e-5
        assert (found.maps.sum((2, 3)) + found.prefix - 1).abs().max() <= 1e-6
        assert (found.prefix > 0.01).all()  # 6 rows in windows of 4 are padded


def _padded(library, name, **options):
    """A 14 x 12 grid, which windows of 5 do not divide, then 7 x 6."""
    sizes = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 3), "window_size": 5, "patch_size": 4, **options}
    if library is timm:
        return lambda: getattr(timm.models, name)(img_size=(56, 48), num_classes=3, **sizes)
    return lambda: getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(image_size=48, **sizes))


PADDED = {
    "timm": _padded(timm, "SwinTransformer"), "timm 2": _padded(timm, "SwinTransformerV2"),
    "timm, one window": _padded(timm, "SwinTransformer", window_size=10, always_partition=True),
    **{name: _padded(transformers, name) for name in ("Swin", "Swinv2", "DonutSwin", "MaskFormerSwin")},
}  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_what_falls_on_the_padding_of_windows_is_told(name):
    model, images = made(PADDED[name]), torch.randn(2, 3, 56, 48)
    expected = CHAINS["swin"](model, images, 168)
    for targets in (None, (5, 3)):
        found = lifeops.rollout(model, images, targets)
        maps = found.weights.double() @ expected
        assert naive.off(found.maps.flatten(2), maps) <= 1e-5
        assert (found.prefix - (1 - maps.sum(-1))).abs().max() <= 1e-5
        assert (found.prefix > 0.01).all()
        whole = lifeops.rollout(model, images, targets, prefix="normalize")
        assert (whole.maps.sum((2, 3)) - 1).abs().max() <= 1e-5
        assert torch.equal(whole.prefix, found.prefix)
