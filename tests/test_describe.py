"""What is known of a host: where its patches, prefix tokens and blocks are, in timm, transformers and lifeops."""

import pytest
import torch
from hosts import BEIT, hf, named, small_vit, staged, timm, vit
from torch import nn

import lifeops

PRE = {"norm1": "norm1", "attn": "attn", "norm2": "norm2", "mlp": "mlp"}
BERT = {"norm1": "layernorm_before", "attn": "attention", "norm2": "layernorm_after", "mlp": "mlp"}
CLIP = {"norm1": "layer_norm1", "attn": "self_attn", "norm2": "layer_norm2", "mlp": "mlp"}
DINO = {"attn": "attention", "ls1": "layer_scale1", "drop_path1": "drop_path", "ls2": "layer_scale2"}
HOSTS = {
    "vit": (small_vit(reg_tokens=4), "timm", "patch_embed", 5, True, "pre", {**PRE, "ls1": "ls1"}),
    "no cls": (small_vit(class_token=False, global_pool="avg"), "timm", "patch_embed", 0, False, "pre", PRE),
    "beit": (lambda: timm.models.Beit(**BEIT, init_values=0.1), "timm", "patch_embed", 1, True, "pre", {**PRE, "ls1": "gamma_1"}),
    "post norm": (small_vit(block_fn=vit.ResPostBlock), "timm", "patch_embed", 1, True, "post", PRE),
    "parallel": (small_vit(block_fn=vit.ParallelThingsBlock), "timm", "patch_embed", 1, True, "parallel", {"attn": "attns", "mlp": "ffns"}),
    "cait": (named("cait_xxs24_224"), "timm", "patch_embed", 0, False, "pre", {**PRE, "ls1": "gamma_1", "ls2": "gamma_2"}),
    "xcit": (staged("xcit_nano_12_p8_224"), "timm", "patch_embed", 0, False, "pre", {**PRE, "ls1": "gamma1"}),
    "pit": (staged("pit_ti_distilled_224"), "timm", "patch_embed", 2, True, "pre", PRE),
    "naflex": (named("naflexvit_base_patch16_gap", embed_dim=48, num_heads=3), "timm", "embeds.proj", 4, False, "pre", PRE),
    "lifeops": (lambda: lifeops.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3),
                "lifeops", "patch_embed", 1, True, "pre", PRE),
    "ViT": (hf("ViT"), "transformers", "embeddings.patch_embeddings", 1, True, "pre", BERT),
    "DeiT": (hf("DeiT"), "transformers", "embeddings.patch_embeddings", 2, True, "pre", BERT),
    "DINOv2": (hf("Dinov2WithRegisters"), "transformers", "embeddings.patch_embeddings", 5, True, "pre", DINO),
    "DINOv3": (hf("DINOv3ViT", num_register_tokens=4), "transformers", "embeddings.patch_embeddings", 5, True, "pre", DINO),
    "CLIP": (hf("CLIPVision"), "transformers", "embeddings.patch_embedding", 1, True, "pre", CLIP),
    "SigLIP": (hf("SiglipVision"), "transformers", "embeddings.patch_embedding", 0, False, "pre", CLIP),
    "AIMv2": (hf("Aimv2Vision"), "transformers", "embeddings.patch_embed", 0, False, "pre", {"norm1": "rms_norm1", "mlp": "ffn"}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTS)
def test_hosts(name):
    build, library, embed, prefix, has_cls, order, parts = HOSTS[name]
    model = build()
    host = lifeops.describe(model).host
    assert (host.library, host.embed_path, host.prefix, host.has_cls, host.suffix) == (library, embed, prefix, has_cls, 0)
    assert host.embed is model.get_submodule(embed)
    assert host.path == ""
    for block in host.blocks:
        assert block.module is host.trunk.get_submodule(block.path)
        assert block.order == order
        assert {part: getattr(block, part) for part in parts} == parts
    assert type(host.blocks[0].module).__name__ in str(lifeops.describe(model))


def test_tokens_that_blocks_see():
    """The prefix is that of the tokens that reach the first block."""
    for name in ("vit", "no cls", "beit", "cait", "ViT", "DeiT", "DINOv2", "CLIP", "SigLIP", "AIMv2"):
        model, seen = HOSTS[name][0]().eval(), []
        host = lifeops.describe(model).host
        size = getattr(host.embed, "img_size", None) or getattr(getattr(model, "config", None), "image_size", 224)
        host.embed.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.numel() // out.shape[0]))
        host.blocks[0].module.register_forward_pre_hook(
            lambda m, args, kwargs, seen=seen: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1:]), with_kwargs=True
        )
        images = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))
        with torch.no_grad():
            model(images)
        embedded, (tokens, width) = seen[0] if isinstance(seen[0], int) else seen[0].numel(), seen[1]
        assert tokens - host.prefix == embedded // width, name


def test_tokens_that_join_late():
    eomt = hf("Eomt", "EomtForUniversalSegmentation", num_queries=3, num_blocks=1, num_upscale_blocks=1, mlp_ratio=1)()
    for model, late, late_cls in ((HOSTS["cait"][0](), 1, True), (eomt, 3, False), (small_vit()(), 0, False)):
        found = lifeops.describe(model)
        assert (found.host.late, found.host.late_cls) == (late, late_cls)
        assert (f"{late} join in front" in str(found)) == bool(late)


def test_inside_another_model():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = small_vit()(), nn.Linear(24, 2)

    model = Wrapped()
    found = lifeops.describe(model)
    assert found.host.path == "backbone"
    assert found.host.trunk is model.backbone
    assert "at backbone" in str(found)


def test_stages():
    host = lifeops.describe(staged("swin_tiny_patch4_window7_224")()).host
    assert host.staged
    assert host.blocks_path == tuple(f"layers.{i}.blocks" for i in range(4))
    assert [block.order for block in host.blocks] == ["pre"] * 12
    assert host.prefix == 0


PRINTED = {
    "vit": """VisionTransformer of timm
  patches: patch_embed (PatchEmbed)
  tokens before the patches: 5 (class token first)
  2 blocks: blocks
    2 x Block, norms before the branches; attention Attention (norm1=norm1, attn=attn, ls1=ls1, drop_path1=drop_path1, norm2=norm2, """
    "mlp=mlp, ls2=ls2)",
    "parallel": """VisionTransformer of timm
  patches: patch_embed (PatchEmbed)
  tokens before the patches: 1 (class token first)
  2 blocks: blocks
    2 x ParallelThingsBlock, branches side by side; attention ModuleList (attn=attns, mlp=ffns)""",
    "cait": """Cait of timm
  patches: patch_embed (PatchEmbed)
  tokens before the patches: 0; 1 join in front of all behind the first blocks (class token)
  2 blocks: blocks
    2 x LayerScaleBlock, norms before the branches; attention TalkingHeadAttn (norm1=norm1, attn=attn, ls1=gamma_1, """
    "drop_path1=drop_path, norm2=norm2, mlp=mlp, ls2=gamma_2)",
    "pvt": """PyramidVisionTransformerV2 of timm
  patches: patch_embed (OverlapPatchEmbed)
  tokens before the patches: 0
  grid: told in the call, or seen in maps
  8 blocks in 4 stages: stages.0.blocks, stages.1.blocks, stages.2.blocks, stages.3.blocks
    8 x Block, norms before the branches; attention Attention (norm1=norm1, attn=attn, drop_path1=drop_path1, norm2=norm2, mlp=mlp)""",
}


@pytest.mark.parametrize("name", PRINTED)
def test_what_is_printed(name):
    build = staged("pvt_v2_b0") if name == "pvt" else HOSTS[name][0]
    assert str(lifeops.describe(build())) == PRINTED[name]


def test_what_blocks_take_is_printed_where_it_is_not_tokens():
    printed = str(lifeops.describe(named("tnt_s_patch16_224", embed_dim=96, inner_dim=24, num_heads_outer=4)()))
    assert "\n  grid: the same for every image\n" in printed
    assert printed.count("; takes pixels inside the patches and tokens (B, P + H*W, C), both given back") == 1


def test_converted():
    model = lifeops.convert(small_vit()(), "life")
    assert lifeops.describe(model).system == "life"
    assert "converted to life" in str(lifeops.describe(model))
    assert lifeops.describe(lifeops.revert(model)).system is None


def test_unknown_models():
    with pytest.raises(ValueError, match=r"describe: Sequential is not a known ViT \(it holds .*\); looked for a timm model"):
        lifeops.describe(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"CrossVit has 2 patch embeddings"):
        lifeops.describe(staged("crossvit_tiny_240")())
    with pytest.raises(TypeError, match=r"describe: model must be a torch\.nn\.Module"):
        lifeops.describe("vit")
