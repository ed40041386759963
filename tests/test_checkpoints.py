"""State dicts in checkpoints: under any key and prefix, with metadata that tells what tensors cannot; nothing assumed in silence."""

import warnings

import pytest
import torch
from torch import nn

import lifeops
from lifeops.integrations.official import lifeops_deit
from lifeops.models import localvit
from lifeops.models.deit import VisionTransformer
from lifeops.nn import LifeAttention, LifeQKV

SIZES = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 12, "depth": 2, "num_heads": 3}


def life(aux_key="scale1", **changes):
    """A LIFE DeiT whose scales differ, so that a wrong aux_key or number of heads shows."""
    torch.manual_seed(0)

    def attention(dim, num_heads, num_prefix_tokens):
        return LifeAttention(dim, num_heads, num_prefix_tokens, aux_key=aux_key)

    model = VisionTransformer(attn=attention, **{**SIZES, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def same(loaded, model, size=32):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def quiet(load, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(*args, **options)


# ------------------------------------------------------------------------------------------------ keys and prefixes


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.module.", "a.b.c."])
@pytest.mark.parametrize("path", [(), ("model",), ("state_dict",), ("state", "net"), ("whatever",), ("teacher",)], ids=".".join)
def test_any_key_and_prefix(path, prefix, tmp_path):
    model = life()
    content = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    if prefix != "_orig_mod.":  # what is beside the model is passed over
        content["criterion.weight"] = torch.ones(3)
    for name in reversed(path):
        content = {name: content, "epoch": 1}
    torch.save(content, tmp_path / "checkpoint.pth")
    for checkpoint in (content, tmp_path / "checkpoint.pth"):
        same(quiet(lifeops.load_official, checkpoint, num_heads=3, aux_key="scale1"), model)


def test_wrappers_inside_and_metadata_behind_them(tmp_path):
    """Compiled or checkpointed blocks, DistributedDataParallel, averages: metadata goes with the names."""
    model = life("multiscale")
    wrapped = nn.Module()
    wrapped.module = life("multiscale")
    wrapped.module.blocks[0] = torch.compile(wrapped.module.blocks[0])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for content in (wrapped.state_dict(), torch.compile(model).state_dict(), averaged.state_dict(), {"model": model.state_dict()}):
        torch.save(content, tmp_path / "checkpoint.pth")
        same(quiet(lifeops.load_official, tmp_path / "checkpoint.pth"), model)


def test_several_models():
    models = {name: life() for name in ("model", "model_ema")}
    with torch.no_grad():
        models["model_ema"].head.bias += 1
    content = {name: model.state_dict() for name, model in models.items()}
    with pytest.warns(UserWarning, match="load_official: took the weights under 'model'; for others pass key='model_ema'"):
        same(lifeops.load_official(dict(reversed(content.items()))), models["model"])
    for key, model in models.items():
        same(quiet(lifeops.load_official, content, key=key), model)
    with pytest.raises(ValueError, match="load_official: key must be one of 'model', 'model_ema', got 'ema'"):
        lifeops.load_official(content, key="ema")
    flat = {f"{prefix}.{name}": t for prefix, state in content.items() for name, t in state.items()}
    for key, model in models.items():
        same(quiet(lifeops.load_official, {"state_dict": flat}, key=f"state_dict.{key}", num_heads=3, aux_key="scale1"), model)
    with pytest.warns(UserWarning, match="took the weights under 'student'; for others pass key='teacher'"):
        lifeops.load_official({"teacher": content["model"], "student": content["model"]})


@pytest.mark.parametrize("kind", ["torch", "renamed", "plain"])
def test_safetensors(kind, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / {"renamed": "checkpoint.pth"}.get(kind, "checkpoint.safetensors")
    (torch.save if kind == "torch" else save_file)(dict(life().state_dict()), path)
    same(quiet(lifeops.load_official, path, num_heads=3, aux_key="scale1"), life())


# ------------------------------------------------------------------------------------------------ what tensors cannot tell


@pytest.mark.parametrize("aux_key", ["scale1", "multiscale"])
@pytest.mark.parametrize("load", [lifeops.load_official, lifeops_deit])
def test_metadata_tells(load, aux_key, tmp_path):
    model = life(aux_key, num_heads=6)
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint.pth")
    same(quiet(load, tmp_path / "checkpoint.pth"), model)
    same(quiet(load, tmp_path / "checkpoint.pth", num_heads=6, aux_key=aux_key), model)
    with pytest.raises(ValueError, match=r"num_heads must be the model's own, 6 by the checkpoint's metadata, got 3"):
        load(tmp_path / "checkpoint.pth", num_heads=3)
    other = {"scale1": "multiscale", "multiscale": "scale1"}[aux_key]
    with pytest.raises(ValueError, match=f"aux_key must be the model's own, '{aux_key}' by .* metadata, got '{other}'"):
        load(tmp_path / "checkpoint.pth", aux_key=other)


def test_load_state_dict_refuses_another_model():
    """The same keys and shapes, other outputs."""
    qkv = LifeQKV(12, 3, aux_key="scale1")
    assert qkv.state_dict()._metadata[""] == {"version": 1, "num_heads": 3, "aux_key": "scale1"}
    LifeQKV(12, 3, aux_key="scale1").load_state_dict(qkv.state_dict())
    LifeQKV(12, 6).load_state_dict(dict(qkv.state_dict()))  # without metadata: who says nothing is taken
    with pytest.raises(RuntimeError, match=r"LifeQKV: the state dict was saved with aux_key='scale1', this module has .*'multiscale'"):
        LifeQKV(12, 3).load_state_dict(qkv.state_dict())
    with pytest.raises(RuntimeError, match=r"LifeQKV blocks\.0\.attn\.qkv: .* num_heads=3, this module has num_heads=6"):
        life(num_heads=6).load_state_dict(life().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"Attention blocks\.1\.attn: .* num_heads=3, this module has num_heads=4"):
        VisionTransformer(**{**SIZES, "num_heads": 4}).load_state_dict(VisionTransformer(**SIZES).state_dict())


PUBLISHED = {
    "life_192": (lambda: life(embed_dim=192, depth=1), {"num_heads": 3, "aux_key": "scale1"}),
    "life_384": (lambda: life(embed_dim=384, depth=1, num_heads=6), {"num_heads": 6, "aux_key": "scale1"}),
    "localvit_192": (lambda: localvit(depth=1, img_size=32), {"num_heads": 4}),
    "localvit_384": (lambda: localvit("small_mlp4_act3_r384", depth=1, img_size=32), {"num_heads": 8}),
    "localvit_relu6": (lambda: localvit("tiny_mlp6_act1", depth=1, img_size=32), {"num_heads": 4, "act": "relu6"}),
    "vit": (lambda: lifeops.models.dw_shortcut("vit_tiny", depth=1, img_size=32), {"num_heads": 3}),
    "vit_small": (lambda: lifeops.models.dw_shortcut("vit_small", depth=1, img_size=32), {"num_heads": 6}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_known_and_said(name):
    build, assumed = PUBLISHED[name]
    model = build().eval()
    state = dict(model.state_dict())
    values = ", ".join(f"{k}={v!r}" for k, v in assumed.items())
    arguments = ", ".join(f"{k}=…" for k in assumed)
    with pytest.warns(UserWarning, match=f"the checkpoint does not tell, so assumed {values}; pass {arguments} to say otherwise"):
        same(lifeops.load_official(state), model)
    same(quiet(lifeops.load_official, state, **assumed), model)


def test_unpublished_sizes_must_be_told():
    vit = lifeops.models.vit_cait.ViT(32, 8, num_classes=5, embed_dim=64, depth=1, num_heads=2)
    local = localvit(embed_dim=24, num_heads=3, depth=1, img_size=32, reduction=4)
    for model in (life(), vit, local):
        state = dict(model.state_dict())
        with pytest.raises(ValueError, match=r"load_official: cannot tell the heads of a model of width .*; pass num_heads"):
            lifeops.load_official(state)
        same(quiet(lifeops.load_official, model.state_dict()), model.eval())
    with pytest.raises(ValueError, match="load_official: the checkpoint does not tell LIFE's aux_key; pass aux_key="):
        lifeops.load_official(dict(life().state_dict()), num_heads=3)
    with pytest.raises(ValueError, match="does not tell LIFE's aux_key"):  # nobody published 192 channels in 6 heads
        lifeops.load_official(dict(life(embed_dim=192, depth=1).state_dict()), num_heads=6)
    with pytest.warns(UserWarning, match="lifeops_deit: the checkpoint does not tell, so assumed aux_key='multiscale'"):
        same(lifeops_deit(dict(life("multiscale").state_dict()), num_heads=3), life("multiscale"))


def test_a_plain_model_of_this_library():
    model = VisionTransformer(32, 8, num_classes=5, embed_dim=24, depth=2, num_heads=2, qkv_bias=False, num_reg_tokens=2).eval()
    same(quiet(lifeops_deit, model.state_dict()), model)
    oblong = VisionTransformer((16, 40), 8, num_classes=5, embed_dim=24, depth=1, num_heads=2, class_token=False).eval()
    twin = quiet(lifeops_deit, oblong.state_dict(), img_size=(16, 40))
    assert twin.patch_embed.grid_size == (2, 5)
    assert torch.equal(twin.pos_embed, oblong.pos_embed)


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 5}, "cannot tell the heads of a model of width 12; pass num_heads=…, which divides it, got 5"),
        ({"aux_key": "scale2"}, "aux_key must be 'multiscale' or 'scale1', got 'scale2'"),
        ({"num_classes": -1}, "num_classes must not be negative, got -1"),
        ({"img_size": (32, 0)}, "img_size must be a positive int"),
        ({"img_size": 30}, "img_size must be a multiple of patch_size"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=rf"load_official: .*{message}|load_official: {message}"):
        lifeops.load_official(dict(life().state_dict()), **{"num_heads": 3, "aux_key": "scale1", **options})
    with pytest.raises(TypeError, match=r"load_official: img_size must be an int or \(height, width\), got 3\.5"):
        lifeops.load_official({}, img_size=3.5)


def test_weights_that_are_no_floats():
    state = {name: t.int() for name, t in life().state_dict().items()}
    with pytest.raises(ValueError, match=r"^load_official: .* must be floating point, got torch\.int32$"):
        lifeops.load_official(state, num_heads=3, aux_key="scale1")


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "head.weight", "blocks.0.mlp.fc1.weight"])
@pytest.mark.parametrize("shape", [(5,), (), (0, 3, 2), (2, 0, 1, 1), (1, 2, 3, 4, 5)], ids=str)
def test_tensors_of_other_shapes(name, shape):
    state = {**life().state_dict(), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match="load_official: "):
        lifeops.load_official(state, num_heads=3, aux_key="scale1")
