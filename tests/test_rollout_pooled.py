"""lifeops.rollout of MViTv2: against the matrices it is seen to use, spread over the tokens that its pooling windows read."""

import naive_rollout as naive
import pytest
import torch
from host_attention import window_means
from hosts import hooks_of, made, timm

import lifeops

MVIT = timm.models.mvitv2
SIZES = {"depths": (1, 2, 1), "embed_dim": (24, 48, 96), "num_heads": (1, 2, 4), "stride_q": ((1, 1), (2, 2), (2, 2))}
MODELS = {  # the configuration, the image, of which the first grid is a quarter
    "mean": ({}, (64, 64)),
    "cls": ({"use_cls_token": True}, (64, 64)),
    "rectangle": ({"use_cls_token": True}, (48, 64)),
    "odd grids": ({"rel_pos_type": ""}, (44, 60)),
    "keys at full size": ({"stride_kv_adaptive": (1, 1)}, (48, 64)),
    "max": ({"mode": "max", "use_cls_token": True}, (64, 64)),
    "mean pooling": ({"mode": "avg", "residual_pooling": False}, (64, 64)),
    "wider at the end of stages": ({"expand_attn": False}, (64, 64)),
    "strides of two numbers": ({"stride_q": ((1, 1), (2, 1), (1, 2)), "rel_pos_type": ""}, (48, 64)),
}


def _model(name):
    options, size = MODELS[name]
    cfg = MVIT.MultiScaleVitCfg(**{**SIZES, **options})
    return made(lambda: MVIT.MultiScaleVit(cfg, img_size=(64, 64), num_classes=3)), cfg, torch.randn(2, 3, *size)


class _Seen(naive.Attentions):
    def note(self, attention, dtype):
        self.seen.append(attention.detach().to(dtype))


def _layers(model, cfg, images, head_fusion="mean", residual=0.5, discard_ratio=0.0):
    """(B, tokens behind, tokens before) of every block, by the configuration's kernels and strides."""
    with torch.no_grad(), _Seen() as record:
        model(images)
    fuse = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}[head_fusion]
    seen, grid, layers = iter(record.seen), tuple(-(-n // 4) for n in images.shape[2:]), []
    for depth, stride_q, stride_kv in zip(cfg.depths, cfg.stride_q, cfg.stride_kv, strict=True):
        for stride in (stride_q, *[(1, 1)] * (depth - 1)):
            fused, prefix = fuse(next(seen)), int(cfg.use_cls_token)
            for row in fused.flatten(0, 1):
                row[row < row.sort().values[int(discard_ratio * len(row))]] = 0
            keys, _ = window_means(grid, cfg.kernel_qkv, stride_kv, prefix)
            skip, coarse = window_means(grid, [s + 1 if s > 1 else 1 for s in stride], stride, prefix)
            assert fused.shape[1:] == (len(skip), len(keys))
            mixed = (1 - residual) * fused @ keys.to(fused.dtype) + residual * skip.to(fused.dtype)
            layers.append(mixed / mixed.sum(-1, keepdim=True))
            grid = coarse
    assert next(seen, None) is None
    return layers, grid


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_models_own_matrices_spread_over_its_windows(name):
    model, cfg, images = _model(name)
    hooks, prefix = hooks_of(model), int(cfg.use_cls_token)
    layers, grid = _layers(model, cfg, images)
    expected, fine = naive.product(layers), (images.shape[2] // 4, images.shape[3] // 4)
    for targets in (None, "mean", (1, grid[1] - 1)):
        found = lifeops.rollout(model, images, targets)
        assert found.maps.shape == (2, 1, *fine)
        assert found.weights.shape[-1] == prefix + grid[0] * grid[1]
        assert naive.off(found.maps.flatten(2), (found.weights @ expected)[..., prefix:]) <= 1e-5
        assert (found.maps.sum((2, 3)) + found.prefix - 1).abs().max() <= 1e-5
    assert lifeops.rollout(model, images).labels == ("cls token" if prefix else "mean of the patch tokens",)
    assert torch.equal(found.maps, lifeops.rollout(model, images, targets, verify=False).maps)
    later = lifeops.rollout(model, images, "mean", start_layer=2)
    assert naive.off(later.maps.flatten(2), (later.weights @ naive.product(layers[2:]))[..., prefix:]) <= 1e-5
    assert hooks_of(model) == hooks


@pytest.mark.parametrize(("fusion", "residual", "discard"), [("max", 0.3, 0.0), ("min", 0.5, 0.0), ("mean", 0.2, 0.6), ("max", 0.0, 0.4)])
def test_options(fusion, residual, discard, monkeypatch):
    model, cfg, images = _model("rectangle")
    model, images = model.double(), images.double()
    monkeypatch.setattr("lifeops.ops.rollout_step._BLOCK", 7 * 2 * 13)  # several blocks of rows
    options = {"head_fusion": fusion, "residual": residual, "discard_ratio": discard}
    layers, _ = _layers(model, cfg, images, **options)
    found = lifeops.rollout(model, images, "mean", **options)
    assert naive.off(found.maps.flatten(2), (found.weights @ naive.product(layers))[..., 1:]) <= 1e-9


def test_classes_of_the_last_grid():
    model, _, images = _model("mean")
    found = lifeops.rollout(model, images, "soft", classes=[0, 2])
    assert found.maps.shape == (2, 2, 16, 16)
    assert (found.maps.sum((2, 3)) - 1).abs().max() <= 1e-5


def _negated(attn):
    own, scale = attn.forward, attn.scale

    def forward(x, feat_size):
        attn.scale = -scale
        out = own(x, feat_size)
        attn.scale = scale
        return out

    attn.forward = forward


def _with_residual(attn):
    own, attn.residual_pooling = attn.forward, False

    def forward(x, feat_size):
        attn.residual_pooling = True
        out = own(x, feat_size)
        attn.residual_pooling = False
        return out

    attn.forward = forward


CHANGES = {
    "scale": (_negated, r"blocks\.0\.attn is MultiScaleAttention, which does not compute softmax"),
    "residual": (_with_residual, "does not compute softmax"),
    "windows": (lambda a: setattr(a, "pool_v", torch.nn.MaxPool2d(5, 4, 2)), r"pools its keys by Window\(kernel=\(3, 3\).* its values by"),
    "ceil mode": (lambda a: setattr(a, "pool_k", torch.nn.MaxPool2d(3, 4, 1, ceil_mode=True)), "without dilation and ceil_mode"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_pools_otherwise_is_refused(name):
    change, message = CHANGES[name]
    model, _, images = _model("mean")
    change(model.stages[0].blocks[0].attn)
    with pytest.raises(ValueError, match=message):
        lifeops.rollout(model, images)


def test_a_skip_connection_of_another_grid_is_refused():
    model, _, images = _model("mean")
    model.stages[1].blocks[0].shortcut_pool_attn = torch.nn.MaxPool2d(3, 4, 1)
    message = r"^rollout: stages\.1\.blocks\.0\.attn makes \(\d+, \d+\) queries of a \(\d+, \d+\) grid, beside a skip connection of \("
    with pytest.raises(ValueError, match=message):
        lifeops.rollout(model, images)


def test_half_precision():
    model, _, images = _model("rectangle")
    full = lifeops.rollout(model, images, "mean").maps
    assert naive.off(lifeops.rollout(model.bfloat16(), images.bfloat16(), "mean").maps, full) <= 0.05
