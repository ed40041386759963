"""No silent wrong answer about a host: roll-out is right on that very model, or says what it found.

Small models of timm and transformers, no weights. What computes is compared with the model's own attention elsewhere (test_rollout_hosts).
"""

import pytest
import torch
from hosts import SMALL, hf, hooks_of, images_of, made, named, small_vit, staged, timm, transformers, unchanged, vit
from torch import nn

import lifeops
from lifeops.models.deit import VisionTransformer

ROLLOUT_REFUSES = {
    "layers it cannot read": (named("convit_tiny", depth=3, local_up_to_layer=1), r"blocks\.0\.attn attends or mixes tokens in a way"),
    "layers behind": (lambda: _Behind(), r"last\.self_attn attends in a way that is not known: .*, behind blocks\.1\.attn"),
    "several embeddings": (staged("crossvit_tiny_240"), r"CrossVit has 2 patch embeddings"),
    "pooled on the way": (staged("pit_ti_224", img_size=64), r"blocks\.1\.attn has 50 tokens and .*blocks\.0\.attn 17: tokens are"),
    "hiera": (staged("hiera_tiny_224", img_size=64), r"gives \(2, 256, 96\), whose 256 tokens are no grid"),
    "dropped": (lambda: _Dropped(**SMALL), r"the layers have 13: of 24 patches some are dropped \(turn patch dropout off\)"),
    "side by side": (lambda: _SideBySide(**SMALL), r"blocks\.1\.attn does not read what blocks\.0\.attn gave: they stand side by side"),
    "flat": (lambda: _Flat(**SMALL), r"^rollout: _FlatEmbed, the patch embedding, must give tokens or maps, got \(2, 576\)$"),
    "shuffled": (lambda: _Shuffled(), r"does not read the 16 patches as tokens 1 to 16 in their order: .* shuffled"),
    "masked": (hf("ViTMAE", mask_ratio=0.75), r"^rollout: ViTMAEEmbeddings gives 4 of 16 patches, .* model\.config\.mask_ratio = 0"),
    "decoder": (
        hf("ViTMAE", "ViTMAEForPreTraining", mask_ratio=0.0, decoder_hidden_size=24, decoder_num_attention_heads=3,
            decoder_num_hidden_layers=1, decoder_intermediate_size=24),
        r"decoder moves tokens before decoder\.decoder_layers\.0\.attention: gather",
    ),
    "behind the patches": (hf("Yolos", image_size=(32, 32), num_detection_tokens=9), r"tokens 1 to 16 are the patches, and 9 come behind"),
    "no grid": (lambda: transformers.HieraModel(_hiera()), r"HieraPatchEmbeddings, the model's patch embedding, gives .* no grid"),
}  # fmt: skip


def _hiera():
    return transformers.HieraConfig(image_size=(64, 64), embed_dim=24, num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1))


class _Shuffled(timm.models.VisionTransformer):
    """Patches in another order before the blocks."""

    def __init__(self):
        super().__init__(**{**SMALL, "img_size": 32})
        self.norm_pre = torch.nn.Identity()
        self.norm_pre.register_forward_hook(lambda m, args, x: torch.cat((x[:, :1], x[:, 1:].flip(1)), 1))


class _Dropped(timm.models.VisionTransformer):
    """Half of the patches."""

    def _pos_embed(self, x):
        return super()._pos_embed(x)[:, :13]


class _SideBySide(timm.models.VisionTransformer):
    def forward(self, x):
        x = self._pos_embed(self.patch_embed(x))
        return (self.blocks[0](x) + self.blocks[1](x)).mean(1)


class _FlatEmbed(timm.layers.PatchEmbed):
    def forward(self, x):
        return super().forward(x).flatten(1)


class _Flat(timm.models.VisionTransformer):
    """An embedding without tokens."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.patch_embed.__class__ = _FlatEmbed

    def _pos_embed(self, x):
        return super()._pos_embed(x.unflatten(1, (24, 24)))


class _Behind(timm.models.VisionTransformer):
    """A layer more, of a kind that is not known."""

    def __init__(self):
        super().__init__(**SMALL)
        self.last = nn.TransformerEncoderLayer(24, 3, 24, batch_first=True)

    def forward_features(self, x, **options):
        return self.last(super().forward_features(x, **options))


@pytest.mark.parametrize("name", ROLLOUT_REFUSES)
def test_rollout_refuses(name):
    build, message = ROLLOUT_REFUSES[name]
    model = made(build)
    images = images_of(model)
    unchanged(model, lambda m: lifeops.rollout(m, images), message)


def test_classes_without_a_norm_in_front_of_them():
    model = made(small_vit())
    model.norm, model.forward_head = None, lambda x: model.head(x[:, 0])
    model.forward_features = lambda x, attn_mask=None: model.blocks(model._pos_embed(model.patch_embed(x)))
    with pytest.raises(ValueError, match=r"VisionTransformer has no final norm whose tokens could be classified"):
        lifeops.rollout(model, images_of(model), "soft")


@torch.no_grad()
def test_tensors_without_a_storage():
    """Sparse ones beside the tokens are no tokens."""
    model, x = made(small_vit()), torch.randn(2, 3, 32, 48)
    expected, own = lifeops.rollout(model, x).maps, model.patch_embed.forward
    table = torch.eye(24).to_sparse()

    def forward(x):
        tokens = own(x)
        return tokens + 0 * torch.sparse.mm(2 * table, tokens[0])

    model.patch_embed.forward = forward
    torch.testing.assert_close(lifeops.rollout(model, x).maps, expected)


def test_a_wrong_prefix_is_named():
    model = made(hf("Yolos", image_size=(32, 32), num_detection_tokens=9))
    with pytest.raises(ValueError, match=r"does not read the 16 patches as tokens 10 to 25 in their order: tokens 1 to 16 are the patches"):
        lifeops.rollout(model, images_of(model), num_prefix_tokens=10)


class _Odd(nn.Module):
    """timm's attention by its parts, with one thing done otherwise."""

    def __init__(self, dim, num_heads, num_prefix_tokens=1, how=""):
        super().__init__()
        self.num_heads, self.how, self.scale = num_heads, how, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scale * (1.1 if self.how == "scale" else 1) * q @ k.transpose(-2, -1)
        if self.how == "causal":
            scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -1e9)
        if self.how == "bias":
            scores = scores + torch.linspace(0, 0.1, x.shape[1])
        if self.how == "heads":
            scores = scores.roll(1, 1)
        attention = scores.softmax(-1)
        if self.how == "talking":
            attention = attention.mean(1, keepdim=True)
        y = (attention @ v).transpose(1, 2).flatten(2)
        if self.how == "local":
            y = y + v.transpose(1, 2).flatten(2)
        return self.proj(y)


def _odd(how):
    torch.manual_seed(0)
    model = VisionTransformer((16, 24), 4, embed_dim=24, depth=2, num_heads=3, num_classes=2, attn=lambda *sizes: _Odd(*sizes, how=how))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["", "scale", "causal", "bias", "heads", "talking", "local"])
def test_a_layers_real_output_tells(how, dtype):
    model, x = _odd(how).to(dtype), torch.randn(3, 3, 16, 24, dtype=dtype)
    subtle = dtype == torch.bfloat16 and how in ("scale", "bias")  # below its rounding
    if not how:
        assert lifeops.rollout(model, x).maps.isfinite().all()
    elif not subtle:
        with pytest.raises(ValueError, match=r"blocks\.0\.attn is _Odd, which does not compute softmax\(scale q kᵀ\) v of its own"):
            lifeops.rollout(model, x)
        assert lifeops.rollout(model, x, verify=False).maps.isfinite().all()


@pytest.mark.parametrize("change", ["twice", "shared", "flipped", "overwritten"])
def test_the_chain_of_layers(change):
    model, x = _odd(""), torch.randn(2, 3, 16, 24)
    block = model.blocks[1]
    own = block.forward
    if change == "shared":  # held twice, as ALBERT does: a chain
        model.blocks.append(block)
        assert lifeops.rollout(model, x).maps.isfinite().all()
        return
    run, message = {
        "twice": (lambda x, *grid: own(own(x, *grid), *grid), r"blocks\.1\.attn ran 2 times in one forward pass"),
        "flipped": (lambda x, *grid: own(x.flip(1), *grid), r"moves tokens before blocks\.1\.attn: flip"),
        "overwritten": (lambda x, *grid: _overwriting(block, x), r"the input of blocks\.1\.attn was overwritten"),
    }[change]
    block.forward = run
    with pytest.raises(ValueError, match=message):
        lifeops.rollout(model, x)


def _overwriting(block, x):
    tokens = block.norm1(x)
    y = block.attn(tokens)
    tokens.zero_()
    return x + y


ROLLOUT_RUNS = {
    "registers": small_vit(reg_tokens=2), "post norm": small_vit(block_fn=vit.ResPostBlock),
    "pooling head": small_vit(class_token=False, global_pool="map"),
    "aimv2": named("aimv2_large_patch14_224", img_size=56, embed_dim=48, num_heads=3), "hybrid": named("vit_tiny_r_s16_p8_224"),
    "msn": hf("ViTMSN"), "dpt": hf("DPT", is_hybrid=False), "ijepa": hf("IJepa"),
    "beit": hf("Beit", use_absolute_position_embeddings=True), "eager": hf("ViT", attn_implementation="eager"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROLLOUT_RUNS)
def test_rollout_still_runs(name):
    model = made(ROLLOUT_RUNS[name])
    x, hooks = images_of(model), hooks_of(model)
    with torch.no_grad():
        before = model(x)
    found, plain = lifeops.rollout(model, x), lifeops.rollout(model, x, verify=False)
    assert torch.equal(found.maps, plain.maps)
    assert (found.maps.sum((2, 3)) + found.prefix - 1).abs().max() <= 1e-6
    assert hooks_of(model) == hooks
    assert torch.equal(before, found.output) if isinstance(before, torch.Tensor) else True


def test_dropout_in_training_is_no_disagreement():
    model = small_vit(attn_drop_rate=0.3, pos_drop_rate=0.2)().train()
    x = images_of(model)
    torch.manual_seed(1)
    found = lifeops.rollout(model, x)
    torch.manual_seed(1)
    assert torch.equal(found.maps, lifeops.rollout(model, x, verify=False).maps)  # the check draws nothing


def test_autocast():
    model = made(small_vit(init_values=1e-5))
    with torch.autocast("cpu", torch.bfloat16):
        assert lifeops.rollout(model, images_of(model)).maps.isfinite().all()


@pytest.mark.parametrize("size", [(76, 100), (64, 64)])
def test_what_falls_on_the_padding_of_windows_is_told(size):
    swin = staged("swin_tiny_patch4_window7_224", img_size=size, window_size=4, depths=(2, 2), embed_dim=24, num_heads=(2, 4))
    model = made(swin)
    found = lifeops.rollout(model, images_of(model))
    assert (found.maps.sum((2, 3)) + found.prefix - 1).abs().max() <= 1e-6
    assert (found.prefix > 0.05).all() if size == (76, 100) else (found.prefix.abs() < 1e-6).all()
    block = model.layers[0].blocks[0]
    own = block._attn
    block._attn = lambda x: own(x.roll(1, 1)).roll(-1, 1)  # other windows than its sizes tell
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0 does not attend inside windows of \(4, 4\) shifted by \(0, 0\)"):
        lifeops.rollout(model, images_of(model))
