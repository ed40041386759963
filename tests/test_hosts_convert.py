"""No silent wrong answer about a host: convert tries each block, or says what is in the way.

Small models of timm and transformers, no weights. What computes is compared with the model's own attention elsewhere
(test_convert, test_localvit).
"""

import copy
import pickle
import re

import pytest
import torch
from hosts import BEIT, SYSTEMS, hf, images_of, made, named, small_vit, staged, timm, transformers, unchanged, vit
from torch import nn

import lifeops


def _gated():
    model = named("eva02_tiny_patch14_224", img_size=56)()
    model.blocks[1].attn.gate = nn.Linear(192, 192)
    return model


CONVERT_REFUSES = {
    "differential": (small_vit(embed_dim=48, attn_layer="diff"), {}),
    "cait": (named("cait_xxs24_224"), {}),
    "gate": (_gated, {}),
    "fused branches": (
        small_vit(block_fn=vit.ParallelScalingBlock),
        {"localvit": "whose attention and MLP share a projection (in_proj)"},
    ),
    "windows in stages": (
        staged("swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=24, depths=(1, 1), num_heads=(2, 2)), {},
    ),
    "late cls": (
        named("convit_tiny", depth=3, local_up_to_layer=1),
        {"life": "GPSA without q, k and v", "localvit": "in blocks.0 tokens 0 to 15", "dw_shortcut": "in blocks.0 tokens 0 to 15"},
    ),
    "tokens behind": (
        hf("Yolos", num_detection_tokens=5, image_size=(32, 48)),
        dict.fromkeys(SYSTEMS, "puts 5 tokens behind its patches (detection_tokens)"),
    ),
    "frames": (hf("VideoMAE"), dict.fromkeys(SYSTEMS, "the patch embedding of VideoMAEModel, reads patches of several frames (Conv3d)")),
    "packed": (hf("Siglip2Vision"), dict.fromkeys(SYSTEMS, "of Siglip2VisionModel, reads patches that were cut before (Linear)")),
}  # fmt: skip


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", CONVERT_REFUSES)
def test_convert_refuses_or_runs(name, system):
    build, messages = CONVERT_REFUSES[name]
    model = made(build)
    if system in messages:
        unchanged(model, lambda m: lifeops.convert(m, system), re.escape(messages[system]))
    else:
        x = images_of(model)
        with torch.no_grad():
            before = model(x)
            assert lifeops.convert(model, system)(x).shape == before.shape
            assert torch.equal(lifeops.revert(model)(x), before)


@pytest.mark.parametrize("system", ["life", "localvit"])
def test_stages_without_windows(system):
    lists = "transformers.0.blocks, transformers.1.blocks, transformers.2.blocks"
    message = f"blocks in 3 stages ({lists}), each on a grid of its own; '{system}' needs"
    unchanged(staged("pit_ti_224", img_size=64)(), lambda m: lifeops.convert(m, system), re.escape(message))


@pytest.mark.parametrize("rel_pos", [False, True])
def test_blocks_that_take_maps(rel_pos):
    build = named("samvit_base_patch16", embed_dim=48, num_heads=3, use_rel_pos=rel_pos)
    for system in SYSTEMS:
        assert lifeops.convert(build(), system)(torch.randn(1, 3, 64, 64)).shape == (1, 3)


class _Masked(nn.Module):
    """An attention with the right parts and a mask of its own."""

    def __init__(self, attn):
        super().__init__()
        self.num_heads, self.qkv, self.proj, self.attn_drop, self.proj_drop = 3, attn.qkv, attn.proj, attn.attn_drop, attn.proj_drop

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_convert_compares_numbers():
    model = small_vit()()
    model.blocks[1].attn = _Masked(model.blocks[1].attn)
    unchanged(model, lifeops.convert, r"blocks\.1\.attn is _Masked, which does not compute softmax\(scale q kᵀ\) v")
    assert lifeops.convert(model, probe=False).blocks[1].attn.num_prefix_tokens == 1
    wrong = small_vit(reg_tokens=2)()
    unchanged(wrong, lambda m: lifeops.convert(m, num_prefix_tokens=1), r"tokens 3 to 26 are the 24 patches \(give num_prefix_tokens=…\)")


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
    model = small_vit(dynamic_img_size=True)()
    model.patch_embed = _Embed(model.patch_embed.proj, grid_size)
    if grid_size is None:
        model.pos_embed, model.patch_embed.grid_size = None, None
    assert lifeops.convert(model, system)(torch.randn(1, 3, 32, 48)).shape == (1, 5)


def test_a_probe_leaves_no_trace():
    """Hooks do not run, buffers and random numbers stay; models without numbers are not tried."""
    model, ran = small_vit(drop_path_rate=0.2, proj_drop_rate=0.1)().train(), []
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
        assert lifeops.convert(small_vit()()).blocks[0].attn.qkv.scale1.weight.is_meta


def test_a_stand_in_that_does_not_attend():
    """timm's names around a dense layer: there is no attention that LIFE's could differ from."""

    class StandIn(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.proj = 3, nn.Linear(24, 72), nn.Linear(24, 24)
            self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

        def forward(self, x, attn_mask=None, is_causal=False):
            return self.proj(x)

    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    for block in model.blocks:
        block.attn = StandIn()
    assert lifeops.convert(model, "life")(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("window", [2, 3])
def test_three_layers_in_windows(window):
    """transformers' Swin: attention is called as before, copies look at the windows of their own block, gradients reach all weights."""
    sizes = {"embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "image_size": 32, "patch_size": 4, "drop_path_rate": 0.0}
    model = made(lambda: transformers.SwinModel(transformers.SwinConfig(window_size=window, **sizes)))
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        before = model(x).last_hidden_state
        expected = lifeops.convert(model, "life")(x).last_hidden_state
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        block = twin.encoder.layers[1].blocks[1]
        assert block.attention.block[0] is block
        assert block.attention.window == (window, window)
        with torch.no_grad():
            assert torch.equal(twin(x).last_hidden_state, expected)
    model.train()(x).last_hidden_state.sum().backward()
    attention = model.encoder.layers[0].blocks[1].attention
    assert all(p.grad is not None for p in attention.parameters())
    q, k, v = attention.qkv_heads(torch.randn(4, window * window, 24))
    assert q.shape == k.shape == v.shape == (4, 3, window * window, 8)
    with torch.no_grad():
        assert torch.equal(lifeops.revert(model).eval()(x).last_hidden_state, before)


HOST_BLOCKS = lambda: timm.models.Beit(**BEIT, init_values=0.1), small_vit(block_fn=vit.ParallelThingsBlock), hf("ViT")


@pytest.mark.parametrize("build", HOST_BLOCKS)
def test_conv_names_the_feed_forward_of_any_block(build):
    """As in LocalViT's own block, whatever the host calls its MLP; the block is what it was beside."""
    old = made(build)
    host = lifeops.describe(old).host
    model = lifeops.convert(copy.deepcopy(old), "localvit")
    path, mlp = host.blocks[1].path, host.blocks[1].mlp
    block, was = model.get_submodule(path), host.blocks[1].module
    for b in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        part = getattr(b, mlp)
        assert b.conv is (part[0] if isinstance(part, nn.ModuleList) else part)
        assert isinstance(b, type(was))
        assert type(b).__name__ == type(was).__name__
        assert b.state_dict().keys() == block.state_dict().keys()
        assert not any(name.split(".")[0] == "conv" for name, _ in [*b.named_modules(remove_duplicate=False), *b.named_parameters()])
        assert [name for name, _ in b.named_children()] == [name for name, _ in was.named_children()]
    tokens = torch.randn(2, host.prefix + host.grid[0] * host.grid[1], 96 if host.library == "transformers" else 24)
    with pytest.raises(ValueError, match=r"the grid is unknown: .*with lifeops\.use_grid\(model, \(H, W\)\)"):
        block(tokens)
    twin = pickle.loads(pickle.dumps(block))
    with lifeops.use_grid(model, host.grid), lifeops.use_grid(twin, host.grid), torch.no_grad():
        assert torch.equal(twin(tokens), block(tokens))


def test_conv_is_of_localvit_alone():
    model = lifeops.convert(hf("ViT")(), "life")
    assert not hasattr(lifeops.describe(model).host.blocks[0].module, "conv")


def _two(kind):
    models = [timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=2) for _ in range(2)]
    return torch.nn.ModuleDict({"student": models[0], "teacher": models[1] if kind == "two" else models[0]})


@pytest.mark.parametrize("system", SYSTEMS)
def test_several_models_in_one(system):
    pair = _two("two")
    before = {name: id(m) for name, m in pair.named_modules()}
    names = r"student \(VisionTransformer\), teacher \(VisionTransformer\)"
    with pytest.raises(ValueError, match=f"^convert: ModuleDict holds 2 ViTs, {names}"):
        lifeops.convert(pair, system)
    assert before == {name: id(m) for name, m in pair.named_modules()}
    with pytest.raises(ValueError, match=r"^describe: ModuleDict holds 2 ViTs"):
        lifeops.describe(pair)
    shared = lifeops.convert(_two("one"), system)  # the same model by two names
    assert shared["student"] is shared["teacher"]
    lifeops.convert(pair["student"], system)
    lifeops.convert(pair["teacher"], system)


@pytest.mark.parametrize("how", ["torch.compile", "compile"])
def test_compiled_models_are_refused(how):
    model = _two("one")["student"]
    compiled = torch.compile(model, backend="eager") if how == "torch.compile" else model
    if how == "compile":
        model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"^convert: .* is compiled; convert the model as it was before"):
        lifeops.convert(compiled, "life")
