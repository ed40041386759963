"""convert on models that have the right parts and do something else with them: it says what is in the way, and changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from hosts import BEIT, SMALL, SYSTEMS, hf, made, small_vit, timm, transformers, unchanged, vit
from torch import nn

import lifeops
from test_dw_shortcut_stages import _host as staged

Attention, ViT, ViTLayer = timm.layers.Attention, timm.models.VisionTransformer, transformers.models.vit.modeling_vit.ViTLayer


class _Block(vit.Block):
    """timm's block, whose forward is written out so that parts of it can be done otherwise."""

    def attended(self, x):
        return self.attn(self.norm1(x))

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.attended(x)
        return x + self.mlp(self.norm2(x))


class _Cut(_Block):
    def attended(self, x):
        return F.pad(super().attended(x[:, :-1]), (0, 0, 0, 1))


class _Twice(_Block):
    def attended(self, x):
        return super().attended(x) + super().attended(x)


class _Masking(_Block):
    def attended(self, x):
        return self.attn(self.norm1(x), attn_mask=torch.ones(x.shape[1], x.shape[1]))


class _Naming(_Block):
    def attended(self, x):
        return self.attn(self.norm1(x), temperature=2)


class _PostNorm(_Block):
    def attended(self, x):
        return self.norm1(self.attn(x))


class _Warm(Attention):
    def forward(self, x, attn_mask=None, is_causal=False, temperature=1):
        return super().forward(x)


class _Wide(Attention):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options, attn_head_dim=16)


class _Gated(Attention):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options, gated=True)


class _WideAndGated(Attention):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options, gated=True, attn_head_dim=16)


class _CutAndGated(_Gated):
    def forward(self, x, attn_mask=None, is_causal=False):
        return F.pad(super().forward(x[:, :-1]), (0, 0, 0, 1))


class _GoesByTheClass(_Gated):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x) + (0.3 if type(self.qkv) is nn.Linear else 0)


class _OddNorm(Attention):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.q_norm = nn.LayerNorm(5)


class _Unreadable(nn.Linear):
    def forward(self, x):
        raise RuntimeError("packed weights")


class _Half(nn.Linear):
    def forward(self, x):
        return super().forward(x)[..., : self.out_features // 2]


class _ByWeight(Attention):
    """Does not call its layer."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Wrapped(nn.Module):
    """A layer inside another, as adapters put it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def _projecting(kind, attn=_ByWeight):
    """The joint projection of one block is of another class."""

    def build():
        model = small_vit(attn_layer=attn)()
        if issubclass(kind, nn.Linear):
            model.blocks[1].attn.qkv.__class__ = kind
        else:
            model.blocks[1].attn.qkv = kind(model.blocks[1].attn.qkv)
        return model

    return build


def _beit():
    model = timm.models.Beit(**BEIT)
    model.blocks[1].attn.gate = nn.Linear(24, 24)
    del model.blocks[1].attn.qkv_bias_separate
    return model


def _swin():
    model = timm.models.SwinTransformer(img_size=64, window_size=2, embed_dim=24, depths=(1, 1), num_heads=(2, 2))
    model.layers[1].blocks[0].window_size = 0
    return model


LIFE = {  # the block, or the model, and what is said of it
    "tokens left out": (small_vit(block_fn=_Cut), r"blocks\.0\.attn is handed \(1, 24, 24\), looked for its block's tokens \(1, 25, 24\)"),
    "called twice": (small_vit(block_fn=_Twice), r"the block of blocks\.0\.attn calls its attention 2 times, looked for once"),
    "told more": (
        small_vit(block_fn=_Naming, attn_layer=_Warm), r"blocks\.0\.attn is handed temperature, which LIFE's attention does not take"
    ),
    "wide heads": (small_vit(attn_layer=_Wide), r"blocks\.0\.attn must map 48 channels to 48, .* got qkv 24 to 144, proj 48 to 24"),
    "wide heads, gated": (small_vit(attn_layer=_WideAndGated), r"blocks\.0\.attn\.qkv must give .* got 24 channels to 144, heads: 3"),
    "tokens left out, gated": (
        small_vit(attn_layer=_CutAndGated), r"blocks\.0\.attn\.qkv is handed \(1, 24, 24\), looked for its block's tokens \(1, 25, 24\) or"
    ),
    "by the class": (
        small_vit(attn_layer=_GoesByTheClass), r"blocks\.0 gives something else with another layer in the place of blocks\.0\.attn\.qkv"
    ),
    "norm": (small_vit(attn_layer=_OddNorm), r"blocks\.0\.attn\.q_norm is over 5 channels, looked for 8 or 24"),
    "unreadable": (_projecting(_Unreadable), r"blocks\.1\.attn cannot be read as q, k and v: packed weights"),
    "half": (_projecting(_Half), r"blocks\.1\.attn makes q, k and v \[\(1, 25, 12\), .*\], looked for three of \(1, 25, 24\)"),
    "wrapped": (_projecting(_Wrapped, Attention), r"blocks\.1\.attn\.qkv cannot be read: it is a test_convert_refuses\._Wrapped, the"),
    "biases": (_beit, r"blocks\.1\.attn is Attention, which reads the weight of qkv beside biases of its own"),
    "windows in some stages": (_swin, r"SwinTransformer has stages of blocks, and in some of them attention outside of windows"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIFE)
def test_attention_that_life_cannot_stand_for(name):
    build, message = LIFE[name]
    unchanged(made(build), lifeops.convert, "^convert: " + message)


class _TwoFeedForwards(ViTLayer):
    def forward(self, x, *args, **kwargs):
        x = x + self.attention(self.layernorm_before(x))[0]
        y = self.layernorm_after(x)
        return x + self.mlp(y) + self.mlp(y)


_TwoFeedForwards.__name__ = "ViTLayer"  # by which the order of its parts is known


def _layers(kind):
    def build():
        model = hf("ViT")()
        for layer in model.layers:
            layer.__class__ = kind
        return model

    return build


LOCALVIT = {
    "masked": (small_vit(block_fn=_Masking), r"blocks\.0 tells its attention \['attn_mask'\], LocalViTBlock would tell it \['nothing'\]"),
    "post norm": (small_vit(block_fn=_PostNorm), r"blocks\.0 is _PostNorm, whose attention branch is not x \+ ls1\(attn\(norm1\(x\)\)\)"),
    "two feed-forwards": (_layers(_TwoFeedForwards), r"layers\.0 is ViTLayer, which calls its MLP 2 times, looked for tokens of one MLP"),
}


@pytest.mark.parametrize("name", LOCALVIT)
def test_blocks_that_are_not_localvits(name):
    build, message = LOCALVIT[name]
    unchanged(made(build), lambda m: lifeops.convert(m, "localvit"), "^convert: " + message)


# ------------------------------------------------------------------------------------------------ shortcuts


class _Named(ViTLayer):
    def forward(self, x, *args, **kwargs):
        return {"hidden_states": super().forward(x, *args, **kwargs)}


class _Counting(ViTLayer):
    def forward(self, x, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x, *args, **kwargs) * self.calls


class _FirstBlock(ViT):
    def forward(self, x):
        return self.norm(self.blocks[0](self._pos_embed(self.patch_embed(x))))


def _pit(**methods):
    """PiT whose second stage, or whose forward, is another."""
    model = staged("pit")
    owner = model if "model" in methods else model.transformers[1]
    (forward,) = methods.values()
    owner.__class__ = type("Odd", (type(owner),), {"forward": forward, "original": type(owner).forward})
    return model


def _turned(stage, given):
    x, cls = stage.original(given)
    return x.flip(2), cls


def _first_stage(model, x):
    x = model.patch_embed(x) + model.pos_embed
    return model.transformers[0]((x, model.cls_token.expand(len(x), -1, -1)))[0]


class _Flip(nn.Module):
    def forward(self, x):
        return x.flip(1)


def _tnt():
    model = staged("tnt")
    model.norm2_proj = nn.Sequential(model.norm2_proj, _Flip())
    return model


SHORTCUTS = {  # the model, every, and what is said
    "names": (_layers(_Named), 1, r"layers\.0 is _Named, which gives dict, looked for tokens"),
    "another answer each time": (_layers(_Counting), 1, r"layers\.0 is _Counting, which a shortcut cannot be put around"),
    "half a group": (lambda: _FirstBlock(**SMALL), 2, r"blocks\.1 is told something else in a group than alone"),
    "half the stages": (lambda: _pit(model=_first_stage), 1, r"the shortcut of transformers\.1\.blocks\.0 did not run on one image"),
    "turned maps": (lambda: _pit(stage=_turned), 1, r"the tokens of transformers\.1 do not lie on a 5 x 3 grid behind 1 prefix tokens"),
    "another order": (_tnt, 1, r"blocks\.0 is given 25 tokens, of which none begin the patches, looked for 1 prefix tokens and a 4 x 6"),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_blocks_without_room_for_a_shortcut(name):
    build, every, message = SHORTCUTS[name]
    unchanged(build().eval(), lambda m: lifeops.convert(m, "dw_shortcut", every=every), "^convert: " + message)


# ------------------------------------------------------------------------------------------------ whole models


class _WithoutBlocks(ViT):
    def forward(self, x):
        return self._pos_embed(self.patch_embed(x))


class _WithoutEmbedding(ViT):
    def forward(self, x):
        return self.blocks(x.new_zeros(len(x), 25, 24))


class _EmbeddingTwice(ViT):
    def forward(self, x):
        return super().forward(x + self.patch_embed(x).mean())


class _Elsewhere(ViT):
    def _pos_embed(self, x):
        return super()._pos_embed(torch.zeros_like(x))


class _OutOfSight(ViT):
    def _pos_embed(self, x):
        return super()._pos_embed(torch.from_numpy(x.detach().numpy().copy()))


class _Decomposed(ViT):
    def _pos_embed(self, x):
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        return super()._pos_embed(u * s[:, None] @ v)


class _Broken(ViT):
    def forward(self, x):
        raise RuntimeError("broken")


class _Ours(ViT):
    def forward(self, x):
        raise ValueError("lifeops: the grid is odd")


def _masking():
    """A masked autoencoder that masks whatever its configuration says."""
    model = hf("ViTMAE")()

    def random_masking(self, *args, **kwargs):
        tokens, *rest = type(self).__mro__[1].random_masking(self, *args, **kwargs)
        return tokens[:, :4], *rest

    model.embeddings.__class__ = type("Masking", (type(model.embeddings),), {"random_masking": random_masking})
    return model


class _Unfolded(nn.Module):
    img_size, grid_size, patch_size = (32, 48), (4, 6), (8, 8)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24, 192))

    def forward(self, x):
        return F.unfold(x, 8, stride=8).mT @ self.weight.T


def _unfolding():
    model = small_vit()()
    model.patch_embed = _Unfolded()
    return model


UNTRIED = r"cannot be tried on one image: .*RuntimeError: broken"
MODELS = {
    "blocks": (lambda: _WithoutBlocks(**SMALL), r"_WithoutBlocks ran without its blocks \(probe=False\)$"),
    "embedding": (lambda: _WithoutEmbedding(**SMALL), r"_WithoutEmbedding ran without its patch_embed \(probe=False\)$"),
    "embedding twice": (lambda: _EmbeddingTwice(**SMALL), r"PatchEmbed, the patch embedding, ran twice in one forward pass"),
    "other tokens": (lambda: _Elsewhere(**SMALL), r"blocks\.0 does not read .*: none of the 24 patches can be followed there"),
    "out of sight": (lambda: _OutOfSight(**SMALL), r"the patches' way from the embedding to blocks\.0 cannot be followed$"),
    "not for NaN": (lambda: _Decomposed(**SMALL), r"the patches' way .* cannot be followed \(lost at aten::_?linalg_svd\)$"),
    "raises": (lambda: _Broken(**SMALL), f"_Broken {UNTRIED}"),
    "raises in our words": (lambda: _Ours(**SMALL), "the grid is odd$"),
    "an embedding without layers": (_unfolding, r".*\(ValueError: _Unfolded, the patch embedding, has neither a Conv2d nor in_chans\)"),
    "masks": (_masking, r"Masking gives 4 of 16 patches, the others are masked; all are needed"),
}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", MODELS)
def test_models_that_do_something_else(name, system):
    build, message = MODELS[name]
    unchanged(build().eval(), lambda m: lifeops.convert(m, system), "^convert: " + message)


@pytest.mark.parametrize("system", ["life", "localvit"])
def test_stages_that_do_not_run(system):
    class Swin(timm.models.SwinTransformer):
        def forward(self, x):
            return self.patch_embed(x)

    model = Swin(img_size=64, window_size=2, embed_dim=24, depths=(1, 1), num_heads=(2, 2))
    unchanged(model, lambda m: lifeops.convert(m, system), r"^convert: Swin ran without its blocks \(probe=False\)$")


@pytest.mark.parametrize("system", ["life", "localvit"])
def test_maps_where_tokens_are_expected(system):
    class Maps(ViT):
        def forward(self, x):
            return self.blocks(self.patch_embed(x).unflatten(1, (4, 6)))

    model = Maps(**SMALL, class_token=False, global_pool="avg")
    message = r"^convert: blocks\.0 is given maps \(1, 4, 6, 24\), looked for tokens \(B, P \+ H\*W, C\)"
    unchanged(model, lambda m: lifeops.convert(m, system), message)


@pytest.mark.parametrize("part", ["note", "head", "blocks.0.mlp"])
def test_models_of_several_precisions(part):
    """Tried where they run as they are; where autocast may be there for them they are not."""
    model = small_vit(block_fn=_Cut)()
    model.note = nn.Linear(1, 1)
    model.get_submodule(part).double()
    if part == "note":  # which does not take part
        unchanged(model, lifeops.convert, r"^convert: blocks\.0\.attn is handed")
    else:
        assert isinstance(lifeops.convert(model).blocks[1].attn, lifeops.nn.LifeAttention)
