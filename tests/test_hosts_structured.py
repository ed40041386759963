"""No silent wrong answer about a host: structured_ reports the model's own attention, or says what is in the way.

Small models of timm and transformers, no weights. What computes is compared with the model's own attention elsewhere (test_init_layouts).
"""

import contextlib
import copy

import pytest
import torch
from hosts import BEIT, SMALL, SYSTEMS, hf, images_of, made, named, small_vit, staged, timm, transformers, unchanged, vit
from torch.utils.flop_counter import FlopCounterMode

import lifeops
from lifeops.hosts import images, positions
from lifeops.init import structured_

WIDE = {"embed_dim": 96, "num_heads": 12}
VITDET = {"pretrain_image_size": 32}
STRUCTURED_REFUSES = {
    "windows": ("impulse", hf("VitDet", **VITDET, window_size=2, window_block_indices=[0]), r"attends in 4 groups of 4 tokens, looked"),
    "detection tokens": ("impulse", hf("Yolos", image_size=(32, 32), num_detection_tokens=20), r"has 20 tokens behind .* must belong to"),
    "few detection tokens": ("impulse", hf("Yolos", image_size=(32, 32), num_detection_tokens=3), r"has 3 tokens behind"),
    "dropped": ("impulse", hf("ViTMAE"), r"attends over 5 tokens, looked for"),
    "differential": ("impulse", small_vit(**WIDE, attn_layer="diff"), r"\(DiffAttention\) has sub_norm, lambda_q1, "),
    "shared bias": ("mimetic", lambda: timm.models.Beit(**BEIT, use_shared_rel_pos_bias=True), r"has a relative position bias \("),
    "bias in a child": ("mimetic", hf("Beit", use_relative_position_bias=True), r"relative_position_bias_table"),
    "relative": ("mimetic", named("vit_relpos_small_patch16_224"), r"has rel_pos"),
    "sam": ("mimetic", named("samvit_base_patch16", embed_dim=48, num_heads=3), r"has rel_pos_h, rel_pos_w"),
    "cross covariance": ("impulse", staged("xcit_nano_12_p16_224", img_size=64), r"\(XCA\) has temperature"),
    "channels": ("impulse", staged("davit_tiny", depths=(1, 1, 1, 1), embed_dims=(24, 48, 96, 192)), r"is ChannelAttention, which"),
    "factorised": ("mimetic", staged("coat_lite_tiny", img_size=64), r"\(FactorAttnConvRelPosEnc\) has crpe"),
    "cosine": ("mimetic", staged("swinv2_cr_tiny_ns_224", img_size=64, window_size=2, depths=(1, 1, 1, 1)), r"logit_scale"),
    "gated layers": ("mimetic", named("convit_tiny", depth=3, local_up_to_layer=1), r"blocks\.0\.attn attends .*would be left"),
    "swin": ("mimetic", lambda: transformers.SwinModel(_swin()), r"has relative_position_bias,"),
    "a block that does not run": ("impulse", lambda: _FirstBlock(**SMALL), r"blocks\.1\.attn did not run in _FirstBlock on an image"),
    "wide heads": ("impulse", lambda: small_vit(attn_layer=_Wide)(), r"the heads' total width must not exceed the 24 channels, got 48"),
    "no tokens": ("impulse", lambda: _FirstBlock(**SMALL, block_fn=_Listing, attn_layer=_Listed), r"is given \(\), looked for tokens"),
    "unreadable": ("mimetic", lambda: _unreadable(), r"blocks\.1\.attn cannot be read as plain attention: packed weights"),
    "not finite": ("impulse", lambda: _not_finite(), r"^structured_: position_embedding must be finite"),
    "class token behind": ("impulse", lambda: _Last(**SMALL), r"tokens 0 to 23 of blocks\.0\.attn; they belong to tokens 1 to 24 "),
}  # fmt: skip


class _FirstBlock(timm.models.VisionTransformer):
    def forward(self, x):
        return self.blocks[0](self._pos_embed(self.patch_embed(x)))


class _Wide(timm.layers.Attention):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options, attn_head_dim=16)


class _Listed(timm.layers.Attention):
    def forward(self, tokens, **options):
        return super().forward(tokens[0])


class _Listing(vit.Block):
    def forward(self, x, **options):
        return x + self.attn([self.norm1(x)])


class _ByWeight(timm.layers.Attention):
    """Does not call its layer."""

    def forward(self, x, **options):
        q, k, v = (x @ self.qkv.weight.T + self.qkv.bias).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Packed(torch.nn.Linear):
    def forward(self, x):
        raise RuntimeError("packed weights")


def _unreadable():
    model = small_vit(attn_layer=_ByWeight)()
    model.blocks[1].attn.qkv.__class__ = _Packed
    return model


def _not_finite():
    model = timm.models.VisionTransformer(**SMALL)
    torch.nn.init.constant_(model.pos_embed[:, 3:4], torch.inf)
    return model


class _Last(timm.models.VisionTransformer):
    """The class token behind the patches, and its row of the position embedding with it."""

    def _pos_embed(self, x):
        return torch.cat((x, self.cls_token.expand(len(x), -1, -1)), 1) + self.pos_embed


def _swin():
    return transformers.SwinConfig(image_size=32, embed_dim=24, num_heads=(2, 4), depths=(1, 1), window_size=4, patch_size=4)


@pytest.mark.parametrize("name", STRUCTURED_REFUSES)
def test_structured_refuses(name):
    method, build, message = STRUCTURED_REFUSES[name]
    assert unchanged(made(build), lambda m: structured_(m, method, generator=torch.Generator().manual_seed(0)), message)


def test_a_scale_that_overflows():
    with pytest.raises(ValueError, match=r"^structured_: position_embedding must be finite"):
        structured_(made(small_vit()), position_scale=1e39)


def test_nothing_is_tried_under_a_mode_that_looks_on():
    """Written is what is written without it."""
    models = [made(small_vit()) for _ in range(2)]
    for model, mode in zip(models, (contextlib.nullcontext(), FlopCounterMode(display=False)), strict=True):
        with mode:
            structured_(model, generator=torch.Generator().manual_seed(0))
    assert torch.ops.aten.convolution not in mode.get_flop_counts()["Global"]  # no pass of the model
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


def test_a_table_of_another_grid():
    model = timm.models.VisionTransformerSAM(**SMALL, use_rel_pos=False, window_size=0, neck_chans=16)
    with pytest.raises(ValueError, match=r"the position embedding \(1, 4, 6, 24\) must be of the grid 6 x 4"):
        structured_(model, grid=(6, 4))


def test_prefix_and_grid_are_the_hosts():
    """timm's CaiT counts the class token of the result, transformers' models say their grid in the configuration alone."""
    cait, siglip = timm.create_model("cait_xxs24_224", img_size=32, depth=1), hf("SiglipVision", image_size=64)()
    assert positions.prefix_of(cait, positions.host_or_none("", cait)) == 0
    assert positions.grid_of(siglip, positions.host_or_none("", siglip)) == (8, 8)


def test_images_and_embeddings_of_any_model():
    """What a model says of its images, in the order in which it is tried; timm's hybrids have more convolutions than one."""
    assert images.image_sizes(hf("Dinov2", image_size=(16, 64))()) == [(16, 64)]
    assert images.image_sizes(named("vit_tiny_patch16_224", embed_dim=24, num_heads=3)()) == [(64, 64), (224, 224)]
    assert images.image_sizes(staged("mobilevit_xxs")()) == [(256, 256)]
    assert images.image_sizes(torch.nn.Linear(2, 2)) == []
    for build, path in ((staged("mobilevit_xxs"), "stem.conv"), (hf("ViT"), "embeddings.patch_embeddings"), (small_vit(), "patch_embed")):
        model = build()
        assert images.embedding_of(model, None) is model.get_submodule(path)


def test_a_report_that_is_not_the_models_is_put_back():
    """Post-norm blocks read the embedding as it is, not layer-normed."""
    model = made(small_vit(block_fn=vit.ResPostBlock))
    unchanged(model, lambda m: structured_(m, generator=torch.Generator().manual_seed(0)), r"off by 0\.\d+ from the report; nothing was")
    assert model.pos_embed.requires_grad
    assert structured_(model, "mimetic").heads[0].mass is None
    assert structured_(made(small_vit(block_fn=vit.ResPostBlock)), verify=False).heads[0].mass > 0.4


class _Torch(torch.nn.Module):
    """torch's attention in the place of timm's."""

    first = True  # the batch

    def __init__(self, dim, num_heads, **options):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(dim, num_heads, batch_first=self.first)

    def forward(self, x, **options):
        x = x if self.first else x.transpose(0, 1)
        y = self.attention(x, x, x, need_weights=False)[0]
        return y if self.first else y.transpose(0, 1)


class _TokensFirst(_Torch):
    first = False


STRUCTURED_RUNS = {
    "ViT": hf("ViT"), "DINOv2": hf("Dinov2"), "registers": hf("Dinov2WithRegisters"), "CLIP": hf("CLIPVision"),
    "SigLIP": hf("SiglipVision"), "BLIP": hf("BlipVision"), "AIMv2": hf("Aimv2Vision"),
    "DINOv2, its table of 4x4 resized": hf("Dinov2", image_size=(16, 64)),
    "registers, its table of 4x4 resized": hf("Dinov2WithRegisters", image_size=(16, 64)),
    "global ViTDet": hf("VitDet", **VITDET), "MSN": hf("ViTMSN"), "timm": small_vit(**WIDE, reg_tokens=3),
    "BEiT": lambda: timm.models.Beit(**{**BEIT, **WIDE}, use_abs_pos_emb=True),
    "torch": small_vit(**WIDE, attn_layer=_Torch), "torch, tokens first": small_vit(**WIDE, attn_layer=_TokensFirst),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURED_RUNS)
def test_reports_are_the_models(name):
    """The mass of layer 0 against the attention that the model computes on blank patches without biases."""
    model = made(STRUCTURED_RUNS[name])
    head = {n: p.clone() for n, p in model.named_parameters() if n.startswith("head.")}
    report = structured_(model, generator=torch.Generator().manual_seed(0))
    assert report.num_layers == 2  # SigLIP's pooling head is none
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in head.items())
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.zero_()
    attention = _first_attention(model, report.heads[0].path)
    grid = (4, 6) if name in ("timm", "torch", "torch, tokens first") else (2, 8) if "resized" in name else (4, 4)
    patches = attention[:, -grid[0] * grid[1] :, -grid[0] * grid[1] :]
    mass = [lifeops.init.report.measure(patches[h.head], grid, h.offset)[0] for h in report.layer(0)]
    assert sum(mass) / len(mass) == pytest.approx(sum(h.mass for h in report.layer(0)) / len(mass), abs=0.05)


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
@pytest.mark.parametrize("system", SYSTEMS)
def test_converted_models_are_initialised(system, size):
    torch.manual_seed(0)
    model = lifeops.convert(small_vit(**WIDE, img_size=size)(), system)
    plain = small_vit(**WIDE, img_size=size)()
    plain.load_state_dict(lifeops.revert(copy.deepcopy(model)).state_dict())
    report = structured_(model, generator=torch.Generator().manual_seed(0))
    assert report.num_layers == 2
    assert all(h.mass > 0.3 for h in report.heads)
    if system != "life":
        expected = structured_(plain, generator=torch.Generator().manual_seed(0))
        assert [h.mass for h in report.heads] == [h.mass for h in expected.heads]


def _first_attention(model, path):
    """(h, N, N) of the layer at ``path``, from its q and k."""
    seen, layer = [], model.get_submodule(path)
    hook = layer.register_forward_pre_hook(lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
    with torch.no_grad():
        model(images_of(model, 1) * 0)
        hook.remove()
        x = seen[0].flatten(1, 2) if seen[0].dim() == 4 else seen[0]
        inner = getattr(layer, "attention", layer)
        if isinstance(layer, torch.nn.MultiheadAttention):
            x = seen[0] if layer.batch_first else seen[0].transpose(0, 1)
            q, k, _ = (x @ layer.in_proj_weight.T).chunk(3, -1)
        elif hasattr(layer, "qkv"):
            q, k, _ = layer.qkv(x).chunk(3, -1)
        elif hasattr(layer, "q_proj"):
            q, k = layer.q_proj(x), layer.k_proj(x)
        else:
            q, k = inner.query(x), inner.key(x)
        q, k = (t[0].unflatten(1, (12, -1)).transpose(0, 1) for t in (q, k))
        return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
