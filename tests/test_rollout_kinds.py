"""lifeops.rollout where attention is more than softmax(scale q kᵀ): against the matrices that the model is seen to use."""

import naive_rollout as naive
import pytest
import torch
from hosts import HF, SMALL, hf, hooks_of, images_of, made, named, small_vit, timm, transformers, vit

import lifeops

NARROW = {"embed_dim": 48, "num_heads": 3}
WIDE = {"img_size": (64, 96)}  # a 4 x 6 grid
EAGER = {"image_size": (32, 48), "attn_implementation": "eager"}
RELATIVE = timm.models.vision_transformer_relpos.VisionTransformerRelPos
TOWERS = {
    "clip": (hf("CLIPVision"), 1), "siglip": (hf("SiglipVision"), 0), "blip": (hf("BlipVision"), 1), "blip2": (hf("Blip2Vision"), 1),
    "aimv2": (hf("Aimv2Vision"), 0), "aimv2 native": (hf("Aimv2Vision", is_native=True), 0),
    "internvl": (hf("InternVLVision", use_qk_norm=True, image_size=(32, 32), patch_size=(8, 8)), 1),
    "janus": (hf("JanusVision"), 0),
    "clip classifier": (lambda: transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=dict(HF))), 1),
}  # fmt: skip
ROTARY = {
    "dinov3 hf": (hf("DINOv3ViT", num_register_tokens=4), 5), "dinov3": (named("vit_small_patch16_dinov3", **WIDE), 5),
    "dinov3 biases": (named("vit_small_patch16_dinov3_qkvb", **WIDE), 5),
    "eva02": (named("eva02_tiny_patch14_224", img_size=(56, 84)), 1),
    "eva02 base": (named("eva02_base_patch14_224", img_size=(56, 84), **NARROW), 1),
    "axial": (named("vit_small_patch16_rope_224", **WIDE), 1), "mixed": (named("vit_small_patch16_rope_mixed_224", **WIDE), 1),
    "pe": (named("vit_pe_core_tiny_patch16_384", **WIDE), 1),
    "pe spatial": (named("vit_pe_lang_large_patch14_448", img_size=(56, 84), **NARROW), 1),
    "half": (lambda: timm.models.eva.Eva(**SMALL, use_rot_pos_emb=True, rope_rotate_half=True), 1),
}  # fmt: skip
BIASED = {
    "beit": (named("beit_base_patch16_224", **WIDE, **NARROW), 1),
    "beit shared": (lambda: timm.models.beit.Beit(**SMALL, use_shared_rel_pos_bias=True), 1),
    "beit biases only": (lambda: timm.models.beit.Beit(**SMALL, qkv_bias=True), 1),
    "beit hf": (hf("Beit", use_relative_position_bias=True, image_size=(32, 48)), 1),
    "beit hf shared": (hf("Beit", use_shared_relative_position_bias=True, image_size=(32, 48)), 1),
    "beit hf both": (hf("Beit", use_relative_position_bias=True, use_shared_relative_position_bias=True, **EAGER), 1),
    "data2vec": (hf("Data2VecVision", use_relative_position_bias=True, image_size=(32, 48)), 1),
    "data2vec shared": (hf("Data2VecVision", use_shared_relative_position_bias=True, **EAGER), 1),
    "relative mlp": (lambda: RELATIVE(**SMALL, rel_pos_type="mlp", class_token=True), 1),
    "relative table": (lambda: RELATIVE(**SMALL, rel_pos_type="bias"), 0),
    "relative shared": (lambda: RELATIVE(**SMALL, rel_pos_type="mlp", shared_rel_pos=True), 0),
    "relative post norm": (named("vit_relpos_medium_patch16_rpn_224", **WIDE, **NARROW), 0),
    "sam": (lambda: _sam(), 0), "sam resized": (lambda: _sam(tables=5), 0), "sam hf": (lambda: _sam_hf(0), 0),
}  # fmt: skip
FLEXIBLE = {
    "naflex": (named("naflexvit_base_patch16_gap", **NARROW), 4), "naflex map": (named("naflexvit_base_patch16_siglip", **NARROW), 0),
    "naflex cls": (lambda: timm.models.NaFlexVit(timm.models.naflexvit.NaFlexVitCfg(patch_size=16, embed_dim=48, depth=2, num_heads=3,
                                                                                 class_token=True, rope_type="axial")), 1),
}  # fmt: skip
BESIDE_MLP = {"beside mlp": (small_vit(block_fn=vit.ParallelScalingBlock, qk_norm=True), 1)}
class _Gated(timm.layers.Attention):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options, gated=True)


GATED = {"gated": (small_vit(attn_layer=_Gated), 1), "gated and normed": (small_vit(attn_layer=_Gated, scale_attn_norm=True), 1)}
POOLS = {"siglip", "aimv2", "aimv2 native", "naflex map"}  # no class token, and a head that pools by attention
HOSTS = {**TOWERS, **ROTARY, **BIASED, **BESIDE_MLP, **FLEXIBLE, **GATED}


def _sam(tables=None):
    model = timm.models.VisionTransformerSAM(**SMALL, use_rel_pos=True, window_size=0, neck_chans=16)
    for block in model.blocks if tables else ():  # of another grid
        block.attn.rel_pos_h, block.attn.rel_pos_w = (torch.nn.Parameter(torch.zeros(tables, 8)) for _ in "hw")
    return model


def _sam_hf(window_size):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_dim": 48, "image_size": 64, "patch_size": 8}
    config = transformers.SamVisionConfig(window_size=window_size, global_attn_indexes=[1], output_channels=8, **sizes)
    return transformers.SamVisionModel(config)


@pytest.mark.parametrize("name", HOSTS)
def test_equals_the_product_of_the_models_own_matrices(name):
    build, prefix = HOSTS[name]
    model = made(build)
    images, hooks = images_of(model), hooks_of(model)
    expected = naive.product([naive.layer(a) for a in naive.attentions_of(model, images)])
    for targets in (None, (2, 1), "mean"):
        found = lifeops.rollout(model, images, targets)
        assert naive.off(found.maps.flatten(2), (found.weights @ expected)[..., prefix:]) <= 1e-5
        assert (found.maps.sum((2, 3)) + found.prefix - 1).abs().max() <= 1e-5
    default = "cls token" if prefix and name != "naflex" else "attention pooling" if name in POOLS else "mean of the patch tokens"
    assert lifeops.rollout(model, images).labels == (default,)
    assert torch.equal(found.maps, lifeops.rollout(model, images, "mean", verify=False).maps)
    assert hooks_of(model) == hooks


OPTIONS = [("mean", 0.5, 0.0), ("max", 0.3, 0.0), ("min", 0.5, 0.0), ("mean", 0.2, 0.6), ("max", 0.0, 0.4)]


@pytest.mark.parametrize("name", ["beit", "sam", "mixed"])
@pytest.mark.parametrize(("fusion", "residual", "discard"), OPTIONS)
def test_options_mean_the_same_with_a_bias(name, fusion, residual, discard, monkeypatch):
    monkeypatch.setattr("lifeops.ops.rollout_step._BLOCK", 2 * 3 * 25 * 7)  # seven rows at a time
    build, prefix = HOSTS[name]
    model = made(build).double()
    images = images_of(model).double()
    options = {"head_fusion": fusion, "residual": residual, "discard_ratio": discard}
    expected = naive.product([naive.layer(a, **options) for a in naive.attentions_of(model, images)])
    found = lifeops.rollout(model, images, "mean", **options)
    assert found.maps.dtype == torch.float64
    assert naive.off(found.maps.flatten(2), (found.weights @ expected)[..., prefix:]) <= 1e-9


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("fusion", "residual", "discard"), OPTIONS)
def test_attentions_side_by_side_are_one_layer(fused, fusion, residual, discard):
    model = made(small_vit(block_fn=vit.ParallelThingsBlock))
    for block in model.blocks:
        for attn in block.attns:
            attn.attn.fused_attn = fused
    images = images_of(model)
    matrices = naive.attentions_of(model, images)
    assert len(matrices) == 4
    fuse = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}[fusion]
    pairs = [(fuse(a) + fuse(b))[:, None] / 2 for a, b in zip(matrices[::2], matrices[1::2], strict=True)]
    expected = naive.product([naive.layer(pair, "mean", residual, discard) for pair in pairs])
    found = lifeops.rollout(model, images, head_fusion=fusion, residual=residual, discard_ratio=discard)
    assert naive.off(found.maps.flatten(2), expected[:, :1, 1:]) <= 1e-5
    start = lifeops.rollout(model, images, start_layer=1, head_fusion=fusion, residual=residual, discard_ratio=discard)
    assert naive.off(start.maps.flatten(2), naive.layer(pairs[1], "mean", residual, discard)[:, :1, 1:]) <= 1e-5


def test_what_is_no_longer_side_by_side_is_refused():
    model = made(small_vit(block_fn=vit.ParallelThingsBlock))
    first, second = model.blocks[0].attns
    chained = second.norm.forward
    second.norm.forward = lambda x: chained(x + first(x))
    with pytest.raises(ValueError, match=r"blocks\.0\.attns\.0\.attn ran 2 times"):
        lifeops.rollout(model, images_of(model))
    given = []
    del second.norm.forward
    first.ls.register_forward_hook(lambda module, args, output: given.append(output))
    second.norm.register_forward_pre_hook(lambda module, args: args[0] + given[-1])
    with pytest.raises(ValueError, match=r"blocks\.0\.attns\.1\.attn does not read what blocks\.0\.attns\.0\.attn read, beside which"):
        lifeops.rollout(model, images_of(model))


@pytest.mark.parametrize(
    ("name", "change"),
    [("dinov3", "rotation"), ("eva02", "rotation"), ("dinov3 hf", "rotation"), ("beit", "bias"), ("sam", "bias"), ("relative mlp", "bias")],
)
def test_another_rotation_or_bias_is_noticed(name, change):
    """The layer is made to compute something else than its parts tell."""
    model = made(HOSTS[name][0])
    images = images_of(model)
    attn = next(m for m in model.modules() if any(hasattr(m, n) for n in ("qkv", "q_proj")))
    own = attn.forward
    if change == "rotation":
        turn = lambda value: tuple(v.flip(0) for v in value) if isinstance(value, tuple) else value.flip(0)  # noqa: E731
        names = ("rope", "position_embeddings")

        def forward(x, *args, **given):
            return own(x, *args, **{k: turn(v) if k in names else v for k, v in given.items()})
    else:
        tables = [p for n, p in attn.named_parameters() if "rel" in n]

        def forward(x, *args, **given):
            before = [t.detach().clone() for t in tables]
            with torch.no_grad():
                [t.neg_() for t in tables]
                out = own(x, *args, **given)
                [t.copy_(b) for t, b in zip(tables, before, strict=True)]
            return out

    attn.forward = forward
    with pytest.raises(ValueError, match="which does not compute softmax"):
        lifeops.rollout(model, images)


def test_relative_positions_of_two_axes_need_maps():
    model = made(HOSTS["sam"][0])
    own = model.blocks[0].attn.forward
    model.blocks[0].attn.forward = lambda x: own(x.unflatten(1, (4, 6))).flatten(1, 2)
    model.blocks[0].norm1.register_forward_hook(lambda module, args, output: output.flatten(1, 2))
    model.blocks[0].ls1.register_forward_hook(lambda module, args, output: output.unflatten(1, (4, 6)))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn has relative positions of rows and columns and is given .*24, 24.*maps"):
        lifeops.rollout(model, images_of(model))


def test_half_precision_and_autocast():
    for name in ("dinov3", "beit", "relative shared"):
        model = made(HOSTS[name][0])
        images = images_of(model)
        full = lifeops.rollout(model, images, "mean").maps
        with torch.autocast("cpu", torch.bfloat16):
            cast = lifeops.rollout(model, images, "mean").maps
        half = lifeops.rollout(model.bfloat16(), images.bfloat16(), "mean").maps
        assert naive.off(cast, full) <= 0.05
        assert naive.off(half, full) <= 0.05


def test_a_mask_is_added_as_the_layer_adds_it():
    model = made(small_vit())
    images = images_of(model)
    mask = torch.rand(25, 25) < 0.7
    mask.fill_diagonal_(True)
    for given in (mask, torch.randn(2, 1, 25, 25)):
        for block in model.blocks:
            block.forward = lambda x, block=block, given=given: type(block).forward(block, x, attn_mask=given)
        expected = naive.product([naive.layer(a) for a in naive.attentions_of(model, images)])
        found = lifeops.rollout(model, images)
        assert naive.off(found.maps.flatten(2), expected[:, :1, 1:]) <= 1e-5


def _cait(fused):
    model = made(lambda: timm.models.Cait(img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5))
    for block in model.blocks_token_only:
        block.attn.fused_attn = fused
    return model


def _cait_layers(model, images, head_fusion, residual):
    """Dense matrices over the class token and the patches, from the matrices that attention dropout is given."""
    seen, layers = [], []
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for n, m in model.named_modules() if n.endswith("attn_drop")]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    fuse = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1)}[head_fusion]
    for attention in seen:
        fused, own = fuse(attention), torch.eye(25).repeat(2, 1, 1)
        if fused.shape[1] == 1:  # only the class token asks
            own[:, :1] = (1 - residual) * fused + residual * own[:, :1]
        else:
            own[:, 1:, 1:] = (1 - residual) * fused.clamp_min(0) + residual * own[:, 1:, 1:]
        layers.append(own / own.sum(-1, keepdim=True))
    return layers


@pytest.mark.parametrize(("fusion", "residual"), [("mean", 0.5), ("max", 0.2)])
def test_talking_heads_and_class_attention(fusion, residual):
    model = _cait(False)
    images = images_of(model)
    layers = _cait_layers(model, images, fusion, residual)
    assert len(layers) == 4
    for fused in (False, True):
        for block in model.blocks_token_only:
            block.attn.fused_attn = fused
        for targets in ("cls", "mean"):
            found = lifeops.rollout(model, images, targets, head_fusion=fusion, residual=residual)
            expected = found.weights @ naive.product(layers)
            assert naive.off(found.maps.flatten(2), expected[..., 1:]) <= 1e-5
            torch.testing.assert_close(found.prefix, expected[..., 0])
        last = lifeops.rollout(model, images, head_fusion=fusion, residual=residual, start_layer=2)
        assert naive.off(last.maps.flatten(2), naive.product(layers[2:])[:, :1, 1:]) <= 1e-5
    model.blocks[0].attn.proj_w.forward = lambda heads: heads.flip(-1)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn is TalkingHeadAttn, which does not compute softmax"):
        lifeops.rollout(model, images)


POOLED = {
    "siglip": hf("SiglipVision"), "aimv2": hf("Aimv2Vision", use_head=True),
    "latent": small_vit(class_token=False, global_pool="map"),
    "latent behind registers": small_vit(reg_tokens=2, class_token=False, global_pool="map", pool_include_prefix=False),
    "latent with all": small_vit(reg_tokens=2, global_pool="map", pool_include_prefix=True),
    "pe": named("vit_pe_core_tiny_patch16_384", **WIDE),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLED)
def test_pooling_heads_weigh_the_tokens(name):
    model = made(POOLED[name])
    images, hooks = images_of(model), hooks_of(model)
    with torch.no_grad(), _Queries() as record:
        model(images)
    seen = record.pooling.mean(1)
    found = lifeops.rollout(model, images, "pool")
    assert (found.labels, hooks_of(model)) == (("attention pooling",), hooks)
    prefix = found.weights.shape[-1] - seen.shape[-1]
    assert naive.off(found.weights[..., prefix:], seen[:, :1]) <= 1e-5
    assert (found.weights[..., :prefix] == 0).all()
    torch.testing.assert_close(found.maps, lifeops.rollout(model, images, found.weights).maps)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("targets", [None, "pool", "mean", (3, 5)])
def test_no_images(targets, verify):
    found = lifeops.rollout(made(POOLED["latent"]), torch.zeros(0, 3, 32, 48), targets, verify=verify)
    assert (found.maps.shape, found.weights.shape, found.prefix.shape) == ((0, 1, 4, 6), (0, 1, 24), (0, 1))


@pytest.mark.parametrize("verify", [True, False])
def test_the_default_is_what_the_output_reads(verify):
    tower = made(POOLED["siglip"])
    config = transformers.SiglipConfig(vision_config=dict(HF), num_labels=5)
    classifier = made(lambda: transformers.SiglipForImageClassification(config))  # of the mean, although its tower holds such a head
    cases = (tower, "attention pooling"), (classifier, "mean of the patch tokens"), (made(POOLED["pe"]), "cls token")
    for model, label in cases:
        images = images_of(model) if model is not classifier else torch.randn(2, 3, 32, 32)
        assert lifeops.rollout(model, images, verify=verify).labels == (label,)


class _Queries(naive.Attentions):
    """The last attention with fewer queries than keys."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "multi_head_attention_forward":
            out = func(*args, **{**(kwargs or {}), "need_weights": True, "average_attn_weights": False})
            self.note(out[1], out[1].dtype)
            return out
        return super().__torch_function__(func, types, args, kwargs)

    def note(self, attention, dtype):
        if attention.shape[-2] < attention.shape[-1]:
            self.pooling = attention.to(dtype)


class _Pooling(timm.models.VisionTransformer):
    """What its head pools is told by ``how``."""

    how = staticmethod(lambda model, x: model.attn_pool(model.blocks(x)))

    def forward(self, x):
        return self.how(self, self._pos_embed(self.patch_embed(x)))


class _Latent(timm.layers.AttentionPoolLatent):
    def forward(self, x, attn_mask=None, others=None):
        return super().forward(x, attn_mask=attn_mask)


POOL_REFUSES = {
    "before the blocks": (
        lambda m, x: (m.blocks(x), m.attn_pool(x))[1], r"^rollout: attn_pool does not pool what blocks\.1\.attn gave$"
    ),
    "in another order": (lambda m, x: m.attn_pool(m.blocks(x).flip(1)), r"the model itself moves tokens before attn_pool: flip"),
    "not at all": (lambda m, x: m.blocks(x).mean(1), r"^rollout: attn_pool, the pooling head, has not run$"),
    "some of the tokens": (lambda m, x: m.attn_pool(m.blocks(x)[:, 3:]), r"^rollout: attn_pool pools 21 tokens, looked for 24 or 24$"),
    "by name": (lambda m, x: m.attn_pool(x=m.blocks(x)), r"^rollout: attn_pool was called otherwise than with tokens \(B, N, C\)"),
    "beside others": (lambda m, x: m.attn_pool(m.blocks(x), others=x), r"^rollout: attn_pool was called with others beside tokens"),
    "maps": (lambda m, x: m.attn_pool(m.blocks(x)[:, None]), r"^rollout: attn_pool was called otherwise than with tokens \(B, N, C\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", POOL_REFUSES)
def test_what_a_pooling_head_is_called_with(name):
    how, message = POOL_REFUSES[name]
    model = made(lambda: _Pooling(**SMALL, class_token=False, global_pool="map"))
    assert lifeops.rollout(model, images_of(model), "pool").labels == ("attention pooling",)
    model.how, model.attn_pool.__class__ = how, _Latent
    with pytest.raises(ValueError, match=message):
        lifeops.rollout(model, images_of(model), "pool")


def test_a_pool_that_is_none():
    with pytest.raises(ValueError, match="VisionTransformer has 0 pooling heads for targets='pool'; looked for an attention pooling"):
        lifeops.rollout(made(small_vit()), torch.randn(1, 3, 32, 48), "pool")
    model = made(POOLED["latent"])
    model.attn_pool.scale = 2 * model.attn_pool.scale  # fused attention does not read it
    with pytest.raises(ValueError, match="attn_pool is AttentionPoolLatent, which does not pool by softmax"):
        lifeops.rollout(model, images_of(model), "pool")
    model.attn_pool.forward = lambda x: x.mean(1)
    with pytest.raises(ValueError, match="attn_pool is AttentionPoolLatent, whose proj has not run"):
        lifeops.rollout(model, images_of(model), "pool")
