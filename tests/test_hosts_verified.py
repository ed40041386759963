"""No silent wrong answer about a host: roll-out, convert and structured_ are right on that very model, or say what they found.

Small models of timm and transformers, no weights. What computes is compared with the model's own attention elsewhere
(test_rollout_hosts, test_convert, test_init_layouts); here is what must be refused, what must not, and that refusals change nothing.
"""

import copy
import re

import pytest
import torch
from torch import nn

import lifeops
from conftest import declare_torchvision_ops
from lifeops.init import structured_
from lifeops.models.deit import VisionTransformer

declare_torchvision_ops()
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
vit = timm.models.vision_transformer

SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}  # a 4 x 6 grid
HF = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
SYSTEMS = ("life", "localvit", "dw_shortcut")


def _vit(**options):
    return lambda: timm.models.VisionTransformer(**{**SMALL, **options})


def _named(name, **options):
    return lambda: timm.create_model(name, **{"img_size": 64, "depth": 2, "num_classes": 3, **options})


def _staged(name, **options):
    return lambda: timm.create_model(name, num_classes=3, **options)


def _hf(name, model=None, **options):
    return lambda: getattr(transformers, model or f"{name}Model")(getattr(transformers, f"{name}Config")(**{**HF, **options}))


def _made(build, seed=0):
    """Every table and scale that starts as a constant gets a value that shows."""
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("relative", "rel_pos", "gamma_", "position_embeddings")):
                p.normal_(std=0.02 if "position_emb" in name else 0.5)
    return model


def _images(model, batch=2):
    sizes = [getattr(m, "img_size", None) or getattr(getattr(m, "config", None), "image_size", None) for m in model.modules()]
    size = next((s for s in sizes if s is not None), 64)
    return torch.randn(batch, 3, *((size, size) if isinstance(size, int) else size))


def _hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _unchanged(model, call, message):
    before, hooks, modes, keys = copy.deepcopy(model.state_dict()), _hooks(model), [m.training for m in model.modules()], dict(vars(model))
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert (_hooks(model), [m.training for m in model.modules()], vars(model).keys()) == (hooks, modes, keys.keys())
    assert not any("forward" in vars(m) for m in model.modules())
    return torch.equal(random, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ roll-out

ROLLOUT_REFUSES = {
    "layers it cannot read": (_named("convit_tiny", depth=3, local_up_to_layer=1), r"blocks\.0\.attn attends or mixes tokens in a way"),
    "layers behind": (lambda: _Behind(), r"last\.self_attn attends in a way that is not known: .*, behind blocks\.1\.attn"),
    "parallel": (_vit(block_fn=vit.ParallelThingsBlock), r"attns\.1\.attn does not read what blocks\.0\.attns\.0\.attn gave"),
    "several embeddings": (_staged("crossvit_tiny_240"), r"CrossVit has 2 patch embeddings"),
    "NCHW": (_staged("pit_ti_224", img_size=64), r"a 7 x 7 grid are 49 tokens, the layers have 50: .* tokens 1 to 49 are the 49 patches"),
    "hiera": (_staged("hiera_tiny_224", img_size=64), r"gives \(2, 256, 96\), whose 256 tokens are no grid"),
    "maps": (_named("samvit_base_patch16", embed_dim=48, num_heads=3, use_rel_pos=False), r"blocks\.0\.attn is given \(2, 14, 14, 48\)"),
    "shuffled": (_hf("ViTMAE", mask_ratio=0.0), r"does not read the 16 patches as tokens 1 to 16 in their order: .* shuffled"),
    "dropped": (_hf("ViTMAE", mask_ratio=0.75), r"the layers have 5: of 16 patches some are dropped"),
    "decoder": (
        _hf("ViTMAE", "ViTMAEForPreTraining", mask_ratio=0.0, decoder_hidden_size=24, decoder_num_attention_heads=3,
            decoder_num_hidden_layers=1, decoder_intermediate_size=24),
        r"shuffled",
    ),
    "behind the patches": (_hf("Yolos", image_size=(32, 32), num_detection_tokens=9), r"tokens 1 to 16 are the patches, and 9 come behind"),
    "no patch size": (lambda: transformers.HieraModel(_hiera()), r"HieraPatchEmbeddings, the patch embedding, does not say its patch_size"),
}  # fmt: skip


def _hiera():
    return transformers.HieraConfig(image_size=(64, 64), embed_dim=24, num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1))


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
    model = _made(build)
    images = _images(model)
    _unchanged(model, lambda m: lifeops.rollout(m, images), message)


def test_a_wrong_prefix_is_named():
    model = _made(_hf("Yolos", image_size=(32, 32), num_detection_tokens=9))
    with pytest.raises(ValueError, match=r"does not read the 16 patches as tokens 10 to 25 in their order: tokens 1 to 16 are the patches"):
        lifeops.rollout(model, _images(model), num_prefix_tokens=10)


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
    "registers": _vit(reg_tokens=2), "post norm": _vit(block_fn=vit.ResPostBlock),
    "pooling head": _vit(class_token=False, global_pool="map"),
    "aimv2": _named("aimv2_large_patch14_224", img_size=56, embed_dim=48, num_heads=3), "hybrid": _named("vit_tiny_r_s16_p8_224"),
    "msn": _hf("ViTMSN"), "dpt": _hf("DPT", is_hybrid=False), "ijepa": _hf("IJepa"),
    "beit": _hf("Beit", use_absolute_position_embeddings=True), "eager": _hf("ViT", attn_implementation="eager"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROLLOUT_RUNS)
def test_rollout_still_runs(name):
    model = _made(ROLLOUT_RUNS[name])
    x, hooks = _images(model), _hooks(model)
    with torch.no_grad():
        before = model(x)
    found, plain = lifeops.rollout(model, x), lifeops.rollout(model, x, verify=False)
    assert torch.equal(found.maps, plain.maps)
    assert (found.maps.sum((2, 3)) + found.prefix - 1).abs().max() <= 1e-6
    assert _hooks(model) == hooks
    assert torch.equal(before, found.output) if isinstance(before, torch.Tensor) else True


def test_dropout_in_training_is_no_disagreement():
    model = _vit(attn_drop_rate=0.3, pos_drop_rate=0.2)().train()
    x = _images(model)
    torch.manual_seed(1)
    found = lifeops.rollout(model, x)
    torch.manual_seed(1)
    assert torch.equal(found.maps, lifeops.rollout(model, x, verify=False).maps)  # the check draws nothing


def test_autocast():
    model = _made(_vit(init_values=1e-5))
    with torch.autocast("cpu", torch.bfloat16):
        assert lifeops.rollout(model, _images(model)).maps.isfinite().all()


@pytest.mark.parametrize("size", [(76, 100), (64, 64)])
def test_what_falls_on_the_padding_of_windows_is_told(size):
    swin = _staged("swin_tiny_patch4_window7_224", img_size=size, window_size=4, depths=(2, 2), embed_dim=24, num_heads=(2, 4))
    model = _made(swin)
    found = lifeops.rollout(model, _images(model))
    assert (found.maps.sum((2, 3)) + found.prefix - 1).abs().max() <= 1e-6
    assert (found.prefix > 0.05).all() if size == (76, 100) else (found.prefix.abs() < 1e-6).all()
    block = model.layers[0].blocks[0]
    own = block._attn
    block._attn = lambda x: own(x.roll(1, 1)).roll(-1, 1)  # other windows than its sizes tell
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0 does not attend inside windows of \(4, 4\) shifted by \(0, 0\)"):
        lifeops.rollout(model, _images(model))


# ------------------------------------------------------------------------------------------------ convert

BEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
CONVERT_REFUSES = {
    "rope": (_named("eva02_tiny_patch14_224", img_size=56), {"life": "blocks.0 hands its attention rope"}),
    "rope and scale": (_named("vit_small_patch16_dinov3"), {"life": "hands its attention rope", "localvit": "EvaBlock with gamma_1"}),
    "mixed rope": (_named("vit_small_patch16_rope_mixed_224"), {"life": "hands its attention rope", "localvit": "with gamma_1"}),
    "perception": (_named("vit_pe_core_tiny_patch16_384"), {"life": "hands its attention rope"}),
    "beit": (lambda: timm.models.Beit(**BEIT, init_values=0.1), {"life": "shared_rel_pos_bias", "localvit": "Block with gamma_1"}),
    "beit table": (lambda: timm.models.Beit(**BEIT, use_rel_pos_bias=True), {"life": "has relative_position_bias_table"}),
    "relative": (_named("vit_relpos_small_patch16_224"), {"life": "has rel_pos"}),
    "shared relative": (_named("vit_srelpos_small_patch16_224"), {"life": "hands its attention shared_rel_pos"}),
    "post norm": (_vit(block_fn=vit.ResPostBlock), {"localvit": "ResPostBlock, whose attention branch is not"}),
    "relative post norm": (
        _named("vit_relpos_base_patch16_rpn_224", embed_dim=48, num_heads=3), {"life": "rel_pos", "localvit": "branch is not"},
    ),
    "differential": (_vit(embed_dim=48, attn_layer="diff"), {"life": "has lambda_q1, lambda_k1, lambda_q2, lambda_k2"}),
    "cait": (_named("cait_xxs24_224"), {"life": "has proj_l, proj_w", "localvit": "LayerScaleBlock with gamma_1"}),
    "late cls": (
        _named("convit_tiny", depth=3, local_up_to_layer=1),
        {"life": "GPSA without qkv", "localvit": "in blocks.0 tokens 0 to 15", "dw_shortcut": "in blocks.0 tokens 0 to 15"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", CONVERT_REFUSES)
def test_convert_refuses_or_runs(name, system):
    build, messages = CONVERT_REFUSES[name]
    model = _made(build)
    if system in messages:
        _unchanged(model, lambda m: lifeops.convert(m, system), re.escape(messages[system]))
    else:
        x = _images(model)
        with torch.no_grad():
            before = model(x)
            assert lifeops.convert(model, system)(x).shape == before.shape
            assert torch.equal(lifeops.revert(model)(x), before)


@pytest.mark.parametrize("rel_pos", [False, True])
def test_blocks_that_take_maps(rel_pos):
    build = _named("samvit_base_patch16", embed_dim=48, num_heads=3, use_rel_pos=rel_pos)
    for system in ("life", "localvit"):
        message = "rel_pos_h" if rel_pos and system == "life" else "blocks.0 is given maps"
        _unchanged(build(), lambda m, s=system: lifeops.convert(m, s, num_prefix_tokens=0), message)
    assert lifeops.convert(build(), "dw_shortcut", num_prefix_tokens=0)(torch.randn(1, 3, 64, 64)).shape == (1, 3)


class _Masked(nn.Module):
    """An attention with the right parts and a mask of its own."""

    def __init__(self, attn):
        super().__init__()
        self.num_heads, self.qkv, self.proj, self.attn_drop, self.proj_drop = 3, attn.qkv, attn.proj, attn.attn_drop, attn.proj_drop

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_convert_compares_numbers():
    model = _vit()()
    model.blocks[1].attn = _Masked(model.blocks[1].attn)
    _unchanged(model, lifeops.convert, r"blocks\.1\.attn is _Masked, which does not compute softmax\(scale q kᵀ\) v")
    assert lifeops.convert(model, probe=False).blocks[1].attn.num_prefix_tokens == 1
    wrong = _vit(reg_tokens=2)()
    _unchanged(wrong, lambda m: lifeops.convert(m, num_prefix_tokens=1), r"tokens 3 to 26 are the 24 patches \(give num_prefix_tokens=…\)")


class _Embed(nn.Module):
    """Tells its grid, or that it has none, and nothing else."""

    def __init__(self, proj, grid_size):
        super().__init__()
        self.proj, self.grid_size = proj, grid_size

    def forward(self, x):
        return self.proj(x).permute(0, 2, 3, 1)


@pytest.mark.parametrize("grid_size", [None, (4, 6)])
@pytest.mark.parametrize("system", SYSTEMS)
def test_embeddings_that_tell_no_image_size(system, grid_size):
    model = _vit(dynamic_img_size=True)()
    model.patch_embed = _Embed(model.patch_embed.proj, grid_size)
    if grid_size is None:
        model.pos_embed, model.patch_embed.grid_size = None, None
    assert lifeops.convert(model, system)(torch.randn(1, 3, 32, 48)).shape == (1, 5)


def test_a_probe_leaves_no_trace():
    """Hooks do not run, buffers and random numbers stay; models without numbers are not tried."""
    model, ran = _vit(drop_path_rate=0.2, proj_drop_rate=0.1)().train(), []
    for m in (model, model.patch_embed, *model.blocks, *(block.attn for block in model.blocks), model.norm):
        m.register_forward_hook(lambda *a: ran.append(a))
    twin = copy.deepcopy(model)
    for system in SYSTEMS:
        torch.manual_seed(3)
        lifeops.convert(model, system)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        lifeops.convert(twin, system, probe=False)
        assert torch.equal(after, torch.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
        lifeops.revert(model), lifeops.revert(twin)
    assert not ran
    with torch.device("meta"):
        assert lifeops.convert(_vit()()).blocks[0].attn.qkv.scale1.weight.is_meta


# ------------------------------------------------------------------------------------------------ structured_

WIDE = {"embed_dim": 96, "num_heads": 12}
VITDET = {"pretrain_image_size": 32}
STRUCTURED_REFUSES = {
    "windows": ("impulse", _hf("VitDet", **VITDET, window_size=2, window_block_indices=[0]), r"inside 4 groups of 4 tokens"),
    "detection tokens": ("impulse", _hf("Yolos", image_size=(32, 32), num_detection_tokens=20), r"last 16 rows .* must belong to"),
    "few detection tokens": ("impulse", _hf("Yolos", image_size=(32, 32), num_detection_tokens=3), r"must belong to the patches"),
    "dropped": ("impulse", _hf("ViTMAE"), r"attends inside 5 tokens"),
    "differential": ("impulse", _vit(**WIDE, attn_layer="diff"), r"is DiffAttention, which does not compute"),
    "shared bias": ("mimetic", lambda: timm.models.Beit(**BEIT, use_shared_rel_pos_bias=True), r"has a relative position bias \("),
    "bias in a child": ("mimetic", _hf("Beit", use_relative_position_bias=True), r"relative_position_bias_table"),
    "relative": ("mimetic", _named("vit_relpos_small_patch16_224"), r"has rel_pos"),
    "sam": ("mimetic", _named("samvit_base_patch16", embed_dim=48, num_heads=3), r"has rel_pos_h, rel_pos_w"),
    "channels": ("mimetic", _staged("xcit_nano_12_p16_224", img_size=64), r"is XCA, which does not compute"),
    "factorised": ("mimetic", _staged("coat_lite_tiny", img_size=64), r"is FactorAttnConvRelPosEnc, which does not compute"),
    "cosine": ("mimetic", _staged("swinv2_cr_tiny_ns_224", img_size=64, window_size=2, depths=(1, 1, 1, 1)), r"does not compute"),
    "gated layers": ("mimetic", _named("convit_tiny", depth=3, local_up_to_layer=1), r"blocks\.0\.attn attends .*would be left"),
    "swin": ("mimetic", lambda: transformers.SwinModel(_swin()), r"relative_position_bias_table"),
}  # fmt: skip


def _swin():
    return transformers.SwinConfig(image_size=32, embed_dim=24, num_heads=(2, 4), depths=(1, 1), window_size=4, patch_size=4)


@pytest.mark.parametrize("name", STRUCTURED_REFUSES)
def test_structured_refuses(name):
    method, build, message = STRUCTURED_REFUSES[name]
    assert _unchanged(_made(build), lambda m: structured_(m, method, generator=torch.Generator().manual_seed(0)), message)


def test_a_report_that_is_not_the_models_is_put_back():
    """Post-norm blocks read the embedding as it is, not layer-normed."""
    model = _made(_vit(block_fn=vit.ResPostBlock))
    _unchanged(model, lambda m: structured_(m, generator=torch.Generator().manual_seed(0)), r"off by 0\.\d+ from the report; nothing was")
    assert model.pos_embed.requires_grad
    assert structured_(model, "mimetic").heads[0].mass is None
    assert structured_(_made(_vit(block_fn=vit.ResPostBlock)), verify=False).heads[0].mass > 0.4


STRUCTURED_RUNS = {
    "ViT": _hf("ViT"), "DINOv2": _hf("Dinov2"), "registers": _hf("Dinov2WithRegisters"), "CLIP": _hf("CLIPVision"),
    "SigLIP": _hf("SiglipVision"),
    "global ViTDet": _hf("VitDet", **VITDET), "MSN": _hf("ViTMSN"), "timm": _vit(**WIDE, reg_tokens=3),
    "BEiT": lambda: timm.models.Beit(**{**BEIT, **WIDE}, use_abs_pos_emb=True),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURED_RUNS)
def test_reports_are_the_models(name):
    """The mass of layer 0 against the attention that the model computes on blank patches without biases."""
    model = _made(STRUCTURED_RUNS[name])
    head = {n: p.clone() for n, p in model.named_parameters() if n.startswith("head.")}
    report = structured_(model, generator=torch.Generator().manual_seed(0))
    assert report.num_layers == 2  # SigLIP's pooling head is none
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in head.items())
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.zero_()
    attention = _first_attention(model, report.heads[0].path)
    patches = attention[:, -24:, -24:] if name == "timm" else attention[:, -16:, -16:]
    grid = (4, 6) if name == "timm" else (4, 4)
    mass = [lifeops.init.report.measure(patches[h.head], grid, h.offset)[0] for h in report.layer(0)]
    assert sum(mass) / len(mass) == pytest.approx(sum(h.mass for h in report.layer(0)) / len(mass), abs=0.05)


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
@pytest.mark.parametrize("system", SYSTEMS)
def test_converted_models_are_initialised(system, size):
    torch.manual_seed(0)
    model = lifeops.convert(_vit(**WIDE, img_size=size)(), system)
    plain = _vit(**WIDE, img_size=size)()
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
        model(_images(model, 1) * 0)
        hook.remove()
        x = seen[0].flatten(1, 2) if seen[0].dim() == 4 else seen[0]
        inner = getattr(layer, "attention", layer)
        if hasattr(layer, "qkv"):
            q, k, _ = layer.qkv(x).chunk(3, -1)
        elif hasattr(layer, "q_proj"):
            q, k = layer.q_proj(x), layer.k_proj(x)
        else:
            q, k = inner.query(x), inner.key(x)
        q, k = (t[0].unflatten(1, (12, -1)).transpose(0, 1) for t in (q, k))
        return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
