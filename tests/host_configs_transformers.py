"""transformers' hosts for docs/hosts.md."""

from host_configs import add
from hosts import transformers


def _hf(family, name, prefix=1, chain="plain", model=None, config=None, size=(32, 48), rect=True, label=None, own=None, grids=(), **more):
    """transformers' models; ``rect``: the configuration's image_size may be a pair."""
    side = size if rect else size[0]
    base = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 96, "patch_size": 8}
    options = {**base, "image_size": side, **more}
    options = {k: v for k, v in options.items() if v is not None}

    def build():
        configuration = getattr(transformers, config or f"{name}Config")(**options)
        return getattr(transformers, model or f"{name}Model")(configuration)

    patch = options.get("patch_size") if chain != "none" else None
    own = own or options.get("image_size")
    add("transformers", family, label or model or f"{name}Model", build, size, patch, prefix, chain, own, grids)


# ------------------------------------------------------------------------------------------------ transformers

_hf("ViT", "ViT")
_hf("ViT", "ViT", label="ViTModel, eager", attn_implementation="eager")
_hf("ViT", "ViT", model="ViTForImageClassification", num_labels=3)
_hf("DeiT", "DeiT", 2)
_hf("DeiT", "DeiT", 2, model="DeiTForImageClassificationWithTeacher", num_labels=3)
_hf("DINOv2", "Dinov2", image_size=32)
_hf("DINOv2", "Dinov2", model="Dinov2ForImageClassification", num_labels=3, image_size=32)
_hf("DINOv2", "Dinov2", model="Dinov2Backbone", image_size=32)
_hf("DINOv2", "Dinov2", label="Dinov2Model, SwiGLU", use_swiglu_ffn=True, image_size=32)
_hf("DINOv2", "Dinov2", label="Dinov2Model, square", size=(32, 32), rect=False)
_hf("DINOv2", "Dinov2WithRegisters", 5, image_size=32)
_hf("DINOv2", "Dinov2WithRegisters", 5, model="Dinov2WithRegistersForImageClassification", num_labels=3, image_size=32)
_hf("DINOv3", "DINOv3ViT", 5, num_register_tokens=4, layerscale_value=0.1)
_hf("DINOv3", "DINOv3ViT", 5, label="DINOv3ViTModel, gated MLP", num_register_tokens=4, use_gated_mlp=True)
_BEIT = {"size": (32, 32), "rect": False}
_hf("BEiT", "Beit", label="BeitModel, no bias", **_BEIT)
_hf("BEiT", "Beit", label="BeitModel, positions", use_absolute_position_embeddings=True, **_BEIT)
_hf("BEiT", "Beit", label="BeitModel, relative tables", use_relative_position_bias=True, **_BEIT)
_hf("BEiT", "Beit", label="BeitModel, shared table", use_shared_relative_position_bias=True, **_BEIT)
_hf("BEiT", "Beit", model="BeitForImageClassification", num_labels=3, use_relative_position_bias=True, **_BEIT)
_hf("BEiT", "Data2VecVision", use_relative_position_bias=True, intermediate_size=192, **_BEIT)
_hf("MAE", "ViTMAE", chain="none", **_BEIT)
_hf("MAE", "ViTMAE", chain="mae", label="ViTMAEModel, mask_ratio 0", mask_ratio=0.0, **_BEIT)
_DECODER = {"decoder_hidden_size": 48, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3, "decoder_intermediate_size": 48}
_hf("MAE", "ViTMAE", chain="mae", model="ViTMAEForPreTraining", mask_ratio=0.0, **_DECODER, **_BEIT)
_hf("MSN", "ViTMSN")
_hf("I-JEPA", "IJepa", 0)
_hf("YOLOS", "Yolos", chain="suffix", num_detection_tokens=5)
_NECK = {"backbone_out_indices": [0, 1], "neck_hidden_sizes": [8, 8, 8, 8], "is_hybrid": False}
_hf("DPT", "DPT", intermediate_size=192, **_NECK, **_BEIT)
_hf("ViTPose", "VitPoseBackbone", 0, model="VitPoseBackbone", label="VitPoseBackbone")
_hf("ViTDet", "VitDet", 0, pretrain_image_size=32, size=(32, 32), rect=False, num_channels=3)
_hf(
    "ViTDet",
    "VitDet",
    0,
    "none",
    label="VitDetModel, windows",
    pretrain_image_size=32,
    window_size=2,
    window_block_indices=[0],
    size=(32, 32),
    rect=False,
)
_CLIP = {"size": (32, 32), "rect": False, "projection_dim": 48}
_hf("CLIP", "CLIPVision", **_CLIP)
_hf("CLIP", "CLIPVision", label="CLIPVisionModel, eager", attn_implementation="eager", **_CLIP)
_hf("CLIP", "CLIPVision", model="CLIPVisionModelWithProjection", **_CLIP)
_hf("CLIP", "ChineseCLIPVision", **_CLIP)
_hf("CLIP", "CLIPSegVision", **_CLIP)
_hf("CLIP", "AltCLIPVision", **_CLIP)
_hf("CLIP", "MLCDVision", **_CLIP)
_hf("CLIP", "MetaClip2Vision", **_CLIP)
_hf("OWL-ViT", "OwlViTVision", **_BEIT)
_hf("OWL-ViT", "Owlv2Vision", **_BEIT)
_hf("SigLIP", "SiglipVision", 0, **_BEIT)
_hf("BLIP", "BlipVision", **_CLIP)
_hf("BLIP", "Blip2Vision", **_BEIT)
_hf("BLIP", "InstructBlipVision", **_BEIT)
_hf("BLIP", "GitVision", **_BEIT)
_hf("BLIP", "InstructBlipVideoVision", **_BEIT)
_hf("AIMv2", "Aimv2Vision", 0, **_BEIT)
_EOMT = {"num_queries": 3, "num_blocks": 1, "num_upscale_blocks": 1, "mlp_ratio": 1, **_BEIT}
_hf("EoMT", "Eomt", 5, "eomt", model="EomtForUniversalSegmentation", **_EOMT)
_hf("EoMT", "EomtDinov3", 5, "eomt", model="EomtDinov3ForUniversalSegmentation", **_EOMT)
_hf("Idefics", "Idefics3Vision", 0, model="Idefics3VisionTransformer", **_BEIT)
_hf("Idefics", "SmolVLMVision", 0, model="SmolVLMVisionTransformer", **_BEIT)
_hf("Janus", "JanusVision", 0, **_BEIT)
_hf("TIPS", "Tipsv2Vision", 2, num_register_tokens=1, **_BEIT)
_hf(
    "Depth Anything",
    "DepthAnything",
    1,
    model="DepthAnythingForDepthEstimation",
    hidden_size=None,
    num_hidden_layers=None,
    image_size=None,
    num_attention_heads=None,
    intermediate_size=None,
    patch_size=14,
    size=(56, 84),
    own=(56, 56),
    reassemble_hidden_size=96,
    neck_hidden_sizes=[8, 8],
    fusion_hidden_size=8,
    head_hidden_size=8,
    reassemble_factors=[1, 1],
    backbone_config=transformers.Dinov2Config(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=12,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2],
        reshape_hidden_states=False,
    ),
)
_hf("FLAVA", "FlavaImage", intermediate_size=192, **_BEIT)
_hf("Pixio", "Pixio", 8, **_BEIT)
_INTERN = {"size": (32, 32), "image_size": (32, 32), "patch_size": (8, 8), "layer_scale_init_value": 0.1}
_hf("InternVL", "InternVLVision", **_INTERN)
_hf("InternVL", "InternVLVision", label="InternVLVisionModel, norms of q and k", use_qk_norm=True, norm_type="rms_norm", **_INTERN)
_hf("Pixtral", "PixtralVision", 0, "none", head_dim=8, **_BEIT)
_STAGES = {"hidden_size": None, "num_hidden_layers": None, "num_attention_heads": None, "intermediate_size": None, "patch_size": None}
_PVT = {
    **_STAGES,
    "image_size": None,
    "size": (64, 96),
    "prefix": 0,
    "chain": "none",
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "num_encoder_blocks": 2,
}
_MIX = {**_PVT, "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "strides": [4, 2], "patch_sizes": [7, 3]}
_hf("SegFormer", "Segformer", sr_ratios=[4, 2], **_MIX)
_hf("SegFormer", "Segformer", label="SegformerModel, no reduction", sr_ratios=[1, 1], **_MIX)
_hf("PVT", "PvtV2", sr_ratios=[4, 2], **_MIX)
_hf(
    "PVT",
    "Pvt",
    grids=((16, 16), (8, 8)),
    sequence_reduction_ratios=[2, 1],
    **{**_MIX, "image_size": 64, "size": (64, 64), "patch_sizes": [4, 2], "num_encoder_blocks": 2, "prefix": 1},
)
_HSWIN = {
    **_STAGES,
    "prefix": 0,
    "chain": "swin",
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [1, 2],
    "window_size": 4,
    "patch_size": 4,
    "size": (64, 96),
}
_hf("Swin", "Swin", **_HSWIN)
_hf("Swin", "Swin", **{**_HSWIN, "window_size": 3}, label="SwinModel, padded windows")
_hf("Swin", "Swinv2", **_HSWIN)
_hf("Swin", "Swin", model="SwinForImageClassification", num_labels=3, **_HSWIN)
_hf("Swin", "DonutSwin", **_HSWIN)
_hf("Swin", "MaskFormerSwin", **_HSWIN)
_SIZED = {**_STAGES, "prefix": 0, "chain": "none", "size": (64, 96)}
_hf("CvT", "Cvt", **{**_SIZED, "image_size": None}, embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3])
_hf(
    "LeViT",
    "Levit",
    **{**_SIZED, "size": (64, 64), "num_attention_heads": [2, 3, 4]},
    rect=False,
    hidden_sizes=[32, 48, 64],
    depths=[1, 1, 1],
    key_dim=[8, 8, 8],
)
_hf("MobileViT", "MobileViT", **_SIZED)
_hf("MobileViT", "MobileViTV2", **_SIZED)
_hf("Hiera", "Hiera", **_SIZED, embed_dim=24, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], image_size=[64, 96])
_hf("SAM", "SamVision", 0, "sam", **_BEIT, output_channels=8, window_size=2, global_attn_indexes=[1])
_hf("SAM", "SamVision", 0, label="SamVisionModel, global", **_BEIT, output_channels=8, window_size=0, global_attn_indexes=[0, 1])
_hf("SAM", "SamHQVision", 0, "sam", **_BEIT, output_channels=8, window_size=2, global_attn_indexes=[1])
_hf("SAM", "Sam3ViT", 0, "none", **_BEIT, pretrain_image_size=32, window_size=2, global_attn_indexes=[1])
_hf("FocalNet", "FocalNet", **_SIZED, embed_dim=24, depths=[1, 1, 1, 1])
_hf("MetaFormer", "PoolFormer", **{**_SIZED, "image_size": None}, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1])
_hf("SwiftFormer", "SwiftFormer", **{**_SIZED, "size": (64, 64)}, rect=False)
_hf("ConvNeXt", "DINOv3ConvNext", **_SIZED, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1])
_hf("ConvNeXt", "ConvNextV2", **_SIZED, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1])
