"""lifeops.rollout on timm and transformers models: against their own unfused attention, converted, windowed, and refusals."""

import pytest
import torch

import lifeops
from conftest import declare_torchvision_ops
from lifeops.attention_maps.protocol import Options
from lifeops.attention_maps.windows import MergeLayer, WindowLayer

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
PLAIN = Options("mean", 0.5, 0.0, None)


@pytest.fixture(scope="module")
def timm():
    declare_torchvision_ops()
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def transformers():
    declare_torchvision_ops()
    return pytest.importorskip("transformers")


def _product(attentions):
    """(B, N, N) from every layer's (B, h, N, N), the plain way."""
    eye, product = torch.eye(attentions[0].shape[-1]), torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        product = (attention.mean(1) + eye) / 2 @ product
    return product


def _timm_attention(model, x):
    """The attention matrices that an unfused forward pass hands to its dropout."""
    seen = []
    hooks = [block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(args[0])) for block in model.blocks]
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        model(x)
    for hook, block in zip(hooks, model.blocks, strict=True):
        hook.remove()
        block.attn.fused_attn = True
    return seen


MODELS = {
    "vit": {},
    "qk_norm": {"qk_norm": True},
    "registers": {"reg_tokens": 4},
    "no_prefix": {"class_token": False, "global_pool": "avg"},
    "dynamic": {"dynamic_img_size": True},
    "rectangle": {"img_size": (32, 48), "fc_norm": True},
    "distilled": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_timm_equals_its_unfused_attention(timm, name):
    torch.manual_seed(0)
    cls = timm.models.deit.VisionTransformerDistilled if name == "distilled" else timm.models.VisionTransformer
    model = cls(**{**SMALL, **MODELS[name]}).eval()
    H, W = (64, 40) if name == "dynamic" else model.patch_embed.img_size
    x = torch.randn(2, 3, H, W)
    assert all(block.attn.fused_attn for block in model.blocks)
    found = lifeops.rollout(model, x)
    assert all(block.attn.fused_attn for block in model.blocks)
    assert found.labels == ("mean of the patch tokens" if name == "no_prefix" else "cls token",)
    expected = (found.weights @ _product(_timm_attention(model, x)))[..., model.num_prefix_tokens :]
    assert found.maps.shape == (2, 1, H // 8, W // 8)
    assert (found.maps.flatten(2) - expected).abs().max() <= 1e-6
    assert lifeops.rollout(model, x, "soft", classes=[0, 4]).maps.shape == (2, 2, H // 8, W // 8)


@pytest.mark.parametrize("system", ["life", "localvit"])
def test_converted_timm(timm, system):
    torch.manual_seed(0)
    model, x = timm.models.VisionTransformer(**SMALL, reg_tokens=2), torch.randn(2, 3, 32, 32)
    options = {} if system == "life" else {"reduction": 4}
    lifeops.convert(model, system, **options).eval()
    seen = []
    hooks = [block.attn.register_forward_pre_hook(lambda attn, args: seen.append((attn, args[0]))) for block in model.blocks]
    with torch.no_grad():
        model(x)
        attentions = []
        for attn, tokens in seen:
            if system == "life":
                q, k, _ = attn.qkv_heads(tokens, (4, 4))
            else:
                q, k = attn.qkv(tokens).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)[:2]
            attentions.append((q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1))
    for hook in hooks:
        hook.remove()
    found = lifeops.rollout(model.train(), x)
    assert model.training
    model.eval()
    found = lifeops.rollout(model, x)
    assert (found.maps.flatten(2) - _product(attentions)[:, :1, 3:]).abs().max() <= 1e-6


def _hf(transformers, name, **options):
    config, model = {
        "vit": ("ViTConfig", "ViTForImageClassification"),
        "deit": ("DeiTConfig", "DeiTForImageClassificationWithTeacher"),
        "dinov2": ("Dinov2Config", "Dinov2Model"),
        "registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification"),
    }[name]
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes, num_labels=4, **options)).eval()


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "registers"])
def test_transformers_equal_their_eager_attention(transformers, name):
    x, P = torch.randn(2, 3, 32, 32), {"deit": 2, "registers": 5}.get(name, 1)
    eager, model = _hf(transformers, name, attn_implementation="eager"), _hf(transformers, name, attn_implementation="sdpa")
    with torch.no_grad():
        attentions = eager(x, output_attentions=True).attentions
    for images in (x, {"pixel_values": x}):
        found = lifeops.rollout(model, images)
        assert (found.maps.flatten(2) - _product(attentions)[:, :1, P:]).abs().max() <= 1e-6
    if name in ("vit", "deit"):
        assert set(lifeops.rollout(model, x, "hard").labels) <= {f"class {c}" for c in range(4)}
    else:
        with pytest.raises(ValueError, match="give token_logits"):
            lifeops.rollout(model, x, "hard")


def test_windows_are_put_back_where_they_were():
    """A shifted, padded window layer is the matrix whose rows, found token by token, hold the window's attention."""
    B, R, (H, W), (h, w), shift = 2, 3, (5, 7), (3, 4), (1, 2)
    layer = WindowLayer("layer", (H, W), ((h, w), shift))
    windows = 2 * 2
    layer.attention = torch.rand(B * windows, 2, h * w, h * w).softmax(-1)
    place = {}  # token of the grid -> (window, place in it)
    for row in range(H):
        for column in range(W):
            y, x = (row - shift[0]) % H, (column - shift[1]) % W
            place[row * W + column] = (y // h * 2 + x // w, y % h * w + x % w)
    matrix = torch.zeros(B, H * W, H * W)
    for i, (window, at) in place.items():
        for j, (other, to) in place.items():
            if window == other:
                matrix[:, i, j] = layer.attention.unflatten(0, (B, windows))[:, window].mean(1)[:, at, to]
    r = torch.rand(B, R, H * W)
    torch.testing.assert_close(layer.back(r, PLAIN), r @ (matrix + torch.eye(H * W)) / 2)


def test_merged_patches_share_alike():
    r = torch.rand(1, 2, 2 * 3)
    fine = MergeLayer("merge", (4, 5)).back(r, PLAIN).unflatten(2, (4, 5))
    torch.testing.assert_close(fine[..., :2, :2], r[..., :1, None].expand(1, 2, 2, 2) / 4)
    torch.testing.assert_close(fine[..., 2:, 4], r[..., 5:].expand(1, 2, 2) / 2)  # the odd column has two parts
    torch.testing.assert_close(fine.sum((2, 3)), r.sum(2))


@pytest.mark.parametrize("version", [1, 2])
def test_swin(timm, version):
    torch.manual_seed(0)
    cls = timm.models.SwinTransformer if version == 1 else timm.models.SwinTransformerV2
    model = cls(img_size=32, patch_size=2, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 2), num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    block = model.layers[0].blocks[0]
    block.attn.fused_attn = version == 1  # off by default in timm
    before, hooks = model(x), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    found = lifeops.rollout(model, x)
    assert block.attn.fused_attn is (version == 1)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert torch.equal(model(x), before)
    assert found.maps.shape == (2, 1, 16, 16)
    assert (found.maps.sum((2, 3)) - 1).abs().max() <= 1e-6
    one = lifeops.rollout(model, x, (0, 0))  # reaches its own window and, shifted, the neighbours'
    assert (one.maps[:, 0, :2, :2].sum((1, 2)) > one.maps[:, 0, 8:10, 8:10].sum((1, 2))).all()
    assert lifeops.rollout(model, x, "soft", classes=[1]).maps.shape == (2, 1, 16, 16)
    last = lifeops.rollout(model, x, start_layer=2)  # the second stage alone, on its own grid
    assert last.maps.shape == (2, 1, 8, 8)


def test_attention_with_more_than_q_and_k_is_refused(timm):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 2}
    with pytest.raises(ValueError, match=r"blocks\.0\.attn is DiffAttention with lambda_k1, .*, which is not known"):
        lifeops.rollout(timm.models.VisionTransformer(**sizes, attn_layer="diff"), torch.randn(1, 3, 32, 32))
