"""timm's hosts for docs/hosts.md."""

from host_configs import add
from hosts import timm, vit

WIDE = {"embed_dim": 96, "num_heads": 12, "depth": 2, "num_classes": 3}  # heads of 8 channels: narrower than 24 patches are many


def _vit(family, name, prefix=1, chain="plain", cls=None, size=(32, 48), **options):
    """timm's classes with options: 4 x 6 patches of 8."""
    options = {"img_size": (32, 48), "patch_size": 8, **WIDE, **options}
    cls, own = cls or timm.models.VisionTransformer, options["img_size"]
    add("timm", family, name, lambda: cls(**options), size, options["patch_size"], prefix, chain, own)


def _named(family, name, prefix=1, chain="plain", patch=16, label=None, own=None, **options):
    """timm's registered models, narrow: 4 x 6 patches."""
    size = (4 * patch, 6 * patch)
    options = {"img_size": size, **WIDE, **options}
    add("timm", family, label or name, lambda: timm.create_model(name, **options), options["img_size"], patch, prefix, chain, own)


def _staged(family, name, size=(64, 96), chain="none", prefix=0, label=None, sized=False, patch=None, grids=(), **options):
    """timm's models with widths of their own."""
    options = {"num_classes": 3, **({"img_size": size} if sized else {}), **options}
    add("timm", family, label or name, lambda: timm.create_model(name, **options), size, patch, prefix, chain, grids=grids)


def _class(family, name, size=(64, 96), prefix=0, chain="none", patch=None, **options):
    """timm's classes whose registered depths cannot be changed."""
    cls = getattr(timm.models, name.partition(",")[0], None) or timm.models.mvitv2.MultiScaleVit
    add("timm", family, name, lambda: cls(num_classes=3, **options), size, patch, prefix, chain)


# ------------------------------------------------------------------------------------------------ timm: plain ViTs

_vit("ViT", "vit")
_vit("ViT", "vit, 4 registers", 5, reg_tokens=4)
_vit("ViT", "vit, registers, no cls", 4, reg_tokens=4, class_token=False, global_pool="avg")
_vit("ViT", "vit, registers, no_embed_class", 5, reg_tokens=4, no_embed_class=True)
_vit("ViT", "vit, dynamic_img_size, other image", size=(48, 64), dynamic_img_size=True)
_vit("ViT", "vit, dynamic_img_size, 4 registers", 5, size=(40, 24), dynamic_img_size=True, reg_tokens=4)
_vit("ViT", "vit, dynamic_img_pad", size=(36, 50), dynamic_img_size=True, dynamic_img_pad=True)
_vit("ViT", "vit, square", img_size=32, size=(32, 32))
_vit("ViT", "vit, one row", img_size=(8, 96), size=(8, 96))
_vit("ViT", "vit, patches 8 x 4", img_size=(32, 24), patch_size=(8, 4), size=(32, 24))
_vit("ViT", "vit, no cls", 0, class_token=False, global_pool="avg")
_vit("ViT", "vit, cls, average pooling", global_pool="avg")
_vit("ViT", "vit, attention pooling", 0, class_token=False, global_pool="map")
_vit("ViT", "vit, no position embedding", pos_embed="none")
_vit("ViT", "vit, qk_norm", qk_norm=True)
_vit("ViT", "vit, scale norms", scale_attn_norm=True, scale_mlp_norm=True, mlp_layer=timm.layers.SwiGLU)
_vit("ViT", "vit, pre_norm", pre_norm=True)
_vit("ViT", "vit, LayerScale", init_values=0.1)
_vit("ViT", "vit, no qkv_bias", qkv_bias=False)
_vit("ViT", "vit, no proj_bias", proj_bias=False)
_vit("ViT", "vit, RMSNorm", norm_layer=timm.layers.RmsNorm)
_vit("ViT", "vit, SwiGLUPacked", mlp_layer=timm.layers.SwiGLUPacked)
_vit("ViT", "vit, drop rates", drop_path_rate=0.2, attn_drop_rate=0.1, proj_drop_rate=0.1)
_vit("ViT", "vit, patch dropout", patch_drop_rate=0.25)
_vit("ViT", "vit, depth 4", depth=4)
_vit("ViT", "vit, 8 heads of 12", num_heads=8)
_vit("ViT", "vit, 3 heads of 10", embed_dim=30, num_heads=3)
_vit("ViT", "vit, wide heads", embed_dim=96, num_heads=3)
_vit("ViT", "vit, ParallelThingsBlock", chain="parallel", block_fn=vit.ParallelThingsBlock)
_vit("ViT", "vit, ParallelScalingBlock", block_fn=vit.ParallelScalingBlock)
_vit("ViT", "vit, ResPostBlock", block_fn=vit.ResPostBlock, init_values=0.1)
_vit("ViT", "vit, DiffAttention", chain="none", attn_layer="diff")
for _name in ("test_vit", "test_vit2", "test_vit3", "test_vit4"):  # 64 channels, 2 heads
    _staged("ViT", _name, (64, 96), "plain", 1, sized=True, patch=16)
for _name, _prefix, _patch in (
    ("vit_tiny_patch16_224", 1, 16), ("vit_base_patch32_plus_256", 1, 32), ("vit_medium_patch16_gap_256", 0, 16),
    ("vit_little_patch16_reg4_gap_256", 4, 16), ("vit_mediumd_patch16_reg4_gap_256", 4, 16), ("vit_betwixt_patch16_reg4_gap_256", 4, 16),
    ("vit_wee_patch16_reg1_gap_256", 1, 16), ("vit_so150m_patch16_reg4_map_256", 4, 16), ("vit_base_patch16_xp_224", 1, 16),
    ("vit_base_patch16_224_miil", 1, 16), ("vit_base_patch16_rpn_224", 0, 16), ("vit_base_patch16_clip_224", 1, 16),
    ("vit_base_patch16_clip_quickgelu_224", 1, 16), ("vit_base_patch16_siglip_224", 0, 16), ("vit_base_patch16_siglip_gap_224", 0, 16),
    ("vit_so400m_patch14_siglip_224", 0, 14), ("vit_small_patch14_dinov2", 1, 14), ("vit_small_patch14_reg4_dinov2", 5, 14),
    ("vit_giant_patch14_dinov2", 1, 14), ("vit_intern300m_patch14_448", 1, 14), ("flexivit_small", 1, 16),
    ("deit_tiny_patch16_224", 1, 16), ("deit_tiny_distilled_patch16_224", 2, 16), ("deit3_small_patch16_224", 1, 16),
    ("aimv2_large_patch14_224", 0, 14), ("vit_xsmall_patch16_clip_224", 1, 16), ("vit_7b_patch16_dinov3", 5, 16),
):  # fmt: skip
    _named("DINOv3" if "dinov3" in _name else "ViT", _name, _prefix, patch=_patch)
_named("ViT", "vit_pwee_patch16_reg1_gap_256")
_named("ViT", "vit_dlittle_patch16_reg1_gap_256", chain="none")
_named("ViT", "vit_dwee_patch16_reg1_gap_256", chain="none")
_named("ViT", "vit_small_patch16_18x2_224", chain="parallel")
_named("ViT", "deit3_small_patch16_224", img_size=(80, 48), label="deit3, 5 x 3 patches")
_named("hybrid ViT", "vit_tiny_r_s16_p8_224", patch=32)
_named("hybrid ViT", "vit_small_r26_s32_224", patch=32)

# ------------------------------------------------------------------------------------------------ timm: positions in attention

_vit("BEiT", "beit, no bias", cls=timm.models.Beit)
_vit("BEiT", "beit, relative tables", cls=timm.models.Beit, use_rel_pos_bias=True, init_values=0.1)
_vit("BEiT", "beit, shared table", cls=timm.models.Beit, use_shared_rel_pos_bias=True, init_values=0.1)
_vit("BEiT", "beit, positions and shared table", cls=timm.models.Beit, use_shared_rel_pos_bias=True, use_abs_pos_emb=True)
_vit("BEiT", "beit, positions", cls=timm.models.Beit, use_abs_pos_emb=True, init_values=0.1)
_named("BEiT", "beit_base_patch16_224")
_named("BEiT", "beitv2_base_patch16_224")
_vit("EVA", "eva, positions", cls=timm.models.Eva)
_vit("EVA", "eva, rope", cls=timm.models.Eva, use_rot_pos_emb=True)
_vit("EVA", "eva, rope, registers", 3, cls=timm.models.Eva, use_rot_pos_emb=True, num_reg_tokens=2)
_vit("EVA", "eva, rope, dynamic", size=(48, 64), cls=timm.models.Eva, use_rot_pos_emb=True, dynamic_img_size=True, init_values=0.1)
_vit("EVA", "eva, rope, post norm", cls=timm.models.Eva, use_rot_pos_emb=True, use_post_norm=True)
_vit("EVA", "eva, rope, attention norm", cls=timm.models.Eva, use_rot_pos_emb=True, scale_attn_inner=True, scale_mlp=True)
_named("EVA", "eva_giant_patch14_224", patch=14)
_named("EVA", "eva02_tiny_patch14_224", patch=14)
_named("EVA", "eva02_base_patch16_clip_224")
_named("EVA", "vit_pe_core_tiny_patch16_384")
_named("EVA", "vit_pe_spatial_tiny_patch16_512")
_named("EVA", "vit_pe_lang_large_patch14_448", patch=14)
_named("rope ViT", "vit_medium_patch16_rope_reg1_gap_256")
_named("rope ViT", "vit_small_patch16_rope_224")
_named("rope ViT", "vit_small_patch16_rope_ape_224")
_named("rope ViT", "vit_small_patch16_rope_mixed_224")
_named("rope ViT", "vit_small_patch16_rope_mixed_ape_224")
_named("DINOv3", "vit_small_patch16_dinov3", 5)
_named("DINOv3", "vit_small_patch16_dinov3_qkvb", 5)
_named("DINOv3", "vit_small_plus_patch16_dinov3", 5)
for _name, _prefix in (
    ("vit_relpos_small_patch16_224", 0), ("vit_relpos_medium_patch16_cls_224", 1), ("vit_relpos_base_patch16_clsgap_224", 1),
    ("vit_srelpos_small_patch16_224", 0), ("vit_relpos_base_patch16_rpn_224", 0), ("vit_relpos_medium_patch16_rpn_224", 0),
):  # fmt: skip
    _named("relative ViT", _name, _prefix)
_named("SAM", "samvit_base_patch16", 0, "sam")
_named("SAM", "samvit_base_patch16", 0, "plain", label="samvit, global", global_attn_indexes=(0, 1))
_named("SAM", "samvit_base_patch16", 0, "plain", label="samvit, global, no bias", global_attn_indexes=(0, 1), use_rel_pos=False)
_named("NaFlex", "naflexvit_base_patch16_gap", 4, own=(256, 256))
_named("NaFlex", "naflexvit_base_patch16_map", 1, own=(256, 256))
_named("NaFlex", "naflexvit_base_patch16_siglip", 0, own=(256, 256))

# ------------------------------------------------------------------------------------------------ timm: other attention

_named("CaiT", "cait_xxs24_224", 0, "cait")
_named("CaiT", "cait_xxs24_224", 0, "cait", label="cait, depth 3", depth=3)
_staged("XCiT", "xcit_nano_12_p16_224", sized=True, depth=2)
_staged("XCiT", "xcit_nano_12_p8_224", (32, 48), sized=True, depth=2)
_CONVIT = {"size": (64, 64), "sized": True, "patch": 16, "prefix": 1, "chain": "plain"}
_staged("ConViT", "convit_tiny", (64, 64), sized=True, depth=3, local_up_to_layer=1)
_staged("ConViT", "convit_tiny", **_CONVIT, label="convit, no gates", depth=2, local_up_to_layer=0)
_staged("TNT", "tnt_s_patch16_224", prefix=1, patch=16, sized=True, depth=2, embed_dim=96, inner_dim=24, num_heads_outer=4)
_staged(
    "CrossViT",
    "crossvit_9_240",
    (48, 96),
    img_size=(48, 96),
    img_scale=(1.0, 2 / 3),
    patch_size=(12, 16),
    depth=((1, 1, 0),),
    embed_dim=(48, 96),
    num_heads=(4, 4),
    mlp_ratio=(3, 3, 1),
)
_staged("CoaT", "coat_tiny", sized=True, prefix=1, serial_depths=(1, 1, 1, 1), parallel_depth=1)
_staged("CoaT", "coat_lite_tiny", sized=True, prefix=1)
_class(
    "VOLO",
    "VOLO",
    img_size=(64, 96),
    layers=(1, 1, 1, 1),
    embed_dims=(48, 96, 96, 96),
    num_heads=(2, 4, 4, 4),
    downsamples=(True, False, False, False),
    outlook_attention=(True, False, False, False),
)
_staged("LeViT", "levit_128s", (64, 64), img_size=64)
_staged("LeViT", "levit_conv_128s", (64, 64), img_size=64)
_staged("MViT", "mvitv2_tiny", (64, 64), "mvit", img_size=64, patch=4)
_class(
    "MViT",
    "MultiScaleVit, cls",
    (64, 64),
    img_size=(64, 64),
    cfg=timm.models.mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), use_cls_token=True),
    prefix=1,
    chain="mvit",
    patch=4,
)
_SWIN = {"patch": 4, "sized": True, "chain": "swin", "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
_staged("Swin", "swin_tiny_patch4_window7_224", (64, 96), window_size=4, depths=(2, 2, 2, 2), **_SWIN)
_staged("Swin", "swin_tiny_patch4_window7_224", (64, 96), label="swin, padded windows", window_size=3, depths=(2, 2), **_SWIN)
_staged(
    "Swin", "swin_tiny_patch4_window7_224", (64, 96), label="swin, always_partition", window_size=5, depths=(2, 2), always_partition=True,
    strict_img_size=False, **_SWIN,
)  # fmt: skip
_staged("Swin", "swinv2_tiny_window8_256", (64, 96), window_size=4, depths=(2, 2), **_SWIN)
_staged("Swin", "swinv2_cr_tiny_ns_224", window_size=4, depths=(2, 2), sized=True, embed_dim=24, num_heads=(2, 4))
_class("NesT", "Nest", (64, 64), img_size=64, num_levels=3, embed_dims=(24, 48, 96), num_heads=(1, 2, 4), depths=(1, 1, 1))
_PIT = {"sized": True, "grids": ((7, 11), (4, 6), (2, 3))}
_staged("PiT", "pit_ti_224", prefix=1, **_PIT)
_staged("PiT", "pit_ti_distilled_224", prefix=2, **_PIT)
_staged("PVT", "pvt_v2_b0")
_staged("PVT", "pvt_v2_b2_li", depths=(1, 1, 1, 1))
_staged("Twins", "twins_pcpvt_small", depths=(1, 1, 1, 1), sized=True)
_staged("Twins", "twins_svt_small", depths=(2, 2, 2, 2), sized=True)
_staged("Visformer", "visformer_tiny", sized=True)
_staged("DaViT", "davit_tiny", depths=(1, 1, 1, 1), embed_dims=(24, 48, 96, 192))
_staged("GCViT", "gcvit_xxtiny", size=(64, 64), img_size=64)
_staged("MaxViT", "maxvit_rmlp_pico_rw_256", size=(64, 64), img_size=64)
_staged("CoAtNet", "coatnet_pico_rw_224", sized=True)
_staged("Hiera", "hiera_tiny_224", sized=True, stages=(1, 1, 2, 1))
_staged("Hiera", "sam2_hiera_tiny")
_staged("Hiera", "hieradet_small")
_staged("EdgeNeXt", "edgenext_xx_small")
_staged("EfficientFormer", "efficientformer_l1", size=(224, 224))
_staged("EfficientFormer", "efficientformerv2_s0", sized=True)
_staged("MobileViT", "mobilevit_xxs")
_staged("MobileViT", "mobilevitv2_050")
_staged("FastViT", "fastvit_t8")
_staged("MetaFormer", "caformer_s18")
_staged("MetaFormer", "poolformer_s12")
_staged("FocalNet", "focalnet_tiny_srf")
_staged("TinyViT", "tiny_vit_5m_224")
_staged("NextViT", "nextvit_small", depths=(1, 1, 5, 1))
_staged("SwiftFormer", "swiftformer_xs")
_staged("EfficientViT", "efficientvit_b0")
_staged("EfficientViT", "efficientvit_m0", sized=True)
_staged("SHViT", "shvit_s1")
_staged("RepViT", "repvit_m0_9")
_staged("MLP", "mixer_s16_224", sized=True)
_staged("MLP", "resmlp_12_224", sized=True)
_staged("MLP", "gmlp_ti16_224", sized=True)
_staged("Sequencer", "sequencer2d_s", sized=True, layers=(1, 1, 1, 1))
_staged("iFormer", "iformer_t")
_staged("LowFormer", "lowformer_b0")
_staged("ConvNeXt", "convnext_atto")
_staged("ResNet", "resnet18")
_named("DeepSeek", "deepseek_vit_412m", 0, patch=14)
_named("Qwen", "qwen3_vit_88m", 0)
