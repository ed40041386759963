"""timm models through lifeops.convert and back, and the authors' checkpoints through lifeops.load_official."""

import copy
import io
import pickle

import pytest
import torch

import lifeops
from conftest import declare_torchvision_ops
from lifeops.models.deit import VisionTransformer
from lifeops.nn import LifeAttention
from test_life import golden

timm = None


@pytest.fixture(autouse=True, scope="module")
def _timm():
    global timm
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
MODELS = {
    "cls": {},
    "registers": {"reg_tokens": 4},
    "no_prefix": {"class_token": False, "global_pool": "avg"},
    "dynamic": {"dynamic_img_size": True},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
    "rectangle": {"img_size": (32, 48)},
    "straddle": {"num_heads": 4},
    "init_values": {"init_values": 0.1},
}


def _model(name, distilled=False):
    torch.manual_seed(0)
    cls = timm.models.deit.VisionTransformerDistilled if distilled else timm.models.VisionTransformer
    return cls(**{**SMALL, **MODELS[name]}).eval()


def _image(model, B=2):
    return torch.randn(B, 3, *model.patch_embed.img_size)


@pytest.mark.parametrize("name", MODELS)
def test_convert_and_revert(name):
    model = _model(name)
    x = _image(model)
    before, keys = model(x), list(model.state_dict())
    assert lifeops.convert(model, "life") is model
    assert all(isinstance(b.attn, LifeAttention) for b in model.blocks)
    assert model.blocks[0].attn.num_prefix_tokens == model.num_prefix_tokens
    y = model(x)
    assert y.shape == before.shape
    assert not torch.equal(y, before)
    y.sum().backward()
    assert all(p.grad is not None for b in model.blocks for p in b.attn.parameters())
    lifeops.revert(model)
    assert list(model.state_dict()) == keys
    assert not model.patch_embed._forward_hooks
    assert torch.equal(model(x), before)


def test_distilled():
    model = lifeops.convert(_model("cls", distilled=True))
    assert model.blocks[0].attn.num_prefix_tokens == 2
    assert model(_image(model)).shape == (2, 5)


def test_the_grid_follows_the_image():
    model = lifeops.convert(_model("dynamic"))
    attn, seen = model.blocks[0].attn, []
    attn.register_forward_hook(lambda module, args, output: seen.append(module.grid_holder.grid))
    for size, grid in (((32, 48), (4, 6)), ((48, 32), (6, 4)), ((32, 32), (4, 4))):
        y = model(torch.randn(1, 3, *size))
        assert seen.pop() == grid
        assert attn.grid_holder.grid is None  # nothing is left of it
        assert y.shape == (1, 5)


def test_converted_equals_our_own_host():
    """The same weights in timm's model and in lifeops.models give the same logits."""
    model = lifeops.convert(_model("cls"))
    ours = VisionTransformer(attn=LifeAttention, **SMALL).eval()
    ours.load_state_dict(model.state_dict())
    x = _image(model)
    torch.testing.assert_close(ours(x), model(x), rtol=0, atol=1e-5)


def test_parameters_and_macs_are_the_published_ones():
    """DeiT-T-LIFE with 100 classes: 5,617,444 parameters and 1.2689 GMAC."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = lifeops.convert(timm.create_model("deit_tiny_patch16_224", num_classes=100)).eval()
    assert sum(p.numel() for p in model.parameters()) == 5_617_444
    # torch counts the CPU's fused attention as nothing; its math path as what it is
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e9, 4) == 1.2689


def test_copies_and_pickles_are_independent():
    model = lifeops.convert(_model("dynamic"))
    twin = copy.deepcopy(model)
    assert twin.blocks[0].attn.grid_holder is twin.blocks[1].attn.grid_holder
    assert twin.blocks[0].attn.grid_holder is not model.blocks[0].attn.grid_holder
    x = torch.randn(1, 3, 32, 48)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    lifeops.revert(twin)
    assert torch.equal(model(x), expected)


def _same(model):
    return model


@pytest.mark.parametrize("copied", [_same, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), torch.nn.Sequential])
@pytest.mark.parametrize("system", ["life", "localvit", "dw_shortcut"])
def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(system, copied):
    """Whatever ``strict`` is, before anything is loaded; its own, and parts of it, are not."""
    model = lifeops.convert(_model("cls"), system)
    plain, (other, *_) = _model("cls").state_dict(), [s for s in ("life", "localvit", "dw_shortcut") if s != system]
    converted = lifeops.convert(_model("cls"), other).state_dict()
    loading = copied(model)
    before, prefix = {name: t.clone() for name, t in loading.state_dict().items()}, "0." if copied is torch.nn.Sequential else ""
    refused = (plain, f"was not converted, this one is, to '{system}': load it, then"), (converted, f"converted to '{other}'")
    for strict in (True, False):
        for state, said in refused:
            with pytest.raises(ValueError, match=f"^convert: the checkpoint is of a model (that )?{said}") as error:
                loading.load_state_dict({prefix + name: t + 1 for name, t in state.items()}, strict=strict)
            assert isinstance(error.value, RuntimeError)
            assert "\n" not in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in loading.state_dict().items())
    assert not loading.load_state_dict(before).missing_keys
    assert not loading.load_state_dict({f"{prefix}head.bias": torch.zeros(5)}, strict=False).unexpected_keys
    if copied is not torch.nn.Sequential:
        lifeops.revert(loading).load_state_dict(plain)
        assert not loading._load_state_dict_pre_hooks


def test_training_mode_dropout_and_freezing_are_kept():
    model = timm.models.VisionTransformer(**SMALL, attn_drop_rate=0.1, proj_drop_rate=0.2).train().double()
    lifeops.convert(model)
    attn = model.blocks[1].attn
    assert (attn.attn_drop.p, attn.proj_drop.p, attn.training, attn.proj.weight.dtype) == (0.1, 0.2, True, torch.float64)


def test_what_cannot_be_converted_is_named():
    with pytest.raises(ValueError, match="system must be one of 'life', 'localvit', 'dw_shortcut', got 'conv'"):
        lifeops.convert(_model("cls"), "conv")
    with pytest.raises(ValueError, match=r"Linear is not a known ViT \(it holds no modules\); looked for a timm model with one"):
        lifeops.convert(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"converted to 'life' before; call lifeops\.revert"):
        lifeops.convert(lifeops.convert(_model("cls")))
    with pytest.raises(ValueError, match="was not converted"):
        lifeops.revert(_model("cls"))
    with pytest.raises(TypeError, match="unknown options kernel; known: qkv_norm"):
        lifeops.convert(_model("cls"), "life", kernel=3)
    for system in ("life", "localvit"):
        with pytest.raises(ValueError, match=rf"convert: '{system}' cannot start as the identity: L.*; 'dw_shortcut' can"):
            lifeops.convert(_model("cls"), system, start="identity")
    with pytest.raises(ValueError, match="convert: start must be None or 'identity', got 'zero'"):
        lifeops.convert(_model("cls"), "dw_shortcut", start="zero")


def test_compiled_converted_model():
    torch._dynamo.reset()
    model = lifeops.convert(_model("dynamic"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((32, 32), (32, 48)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), model(x))


def _checkpoint(dist=False):
    d = golden("life_deit_c24_d2")
    state = {k.removeprefix("param."): v for k, v in d.items() if k.startswith("param.")}
    if dist:
        state["dist_token"] = torch.zeros_like(state["cls_token"])
        state["pos_embed"] = torch.cat((state["pos_embed"][:, :1], state["pos_embed"]), 1)
        state["head_dist.weight"], state["head_dist.bias"] = state["head.weight"], state["head.bias"]
    return state, d


@pytest.mark.parametrize("form", ["dict", "outer", "file", "safetensors"])
def test_official_life_checkpoint(form, tmp_path):
    """The authors' logits to 1e-10 in float64, from every form a checkpoint comes in."""
    state, d = _checkpoint()
    checkpoint = {"dict": state, "outer": {"model": state, "epoch": torch.tensor(3)}}.get(form)
    if form == "file":
        checkpoint = tmp_path / "checkpoint.pth"
        torch.save({"model": state}, checkpoint)
    if form == "safetensors":
        from safetensors.torch import save_file

        checkpoint = tmp_path / "checkpoint.safetensors"
        save_file(state, checkpoint)
    model = lifeops.load_official(checkpoint, num_heads=3, aux_key="scale1")
    assert model.blocks[0].attn.qkv.aux_key == "scale1"
    assert not model.training
    torch.testing.assert_close(model(d["x"]), d["y"], rtol=0, atol=1e-10)


def test_official_distilled_checkpoint():
    model = lifeops.load_official(_checkpoint(dist=True)[0], num_heads=3, aux_key="scale1")
    assert model.num_prefix_tokens == 2
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 7)


def test_official_errors():
    state, _ = _checkpoint()
    with pytest.raises(ValueError, match="no known checkpoint; looked for LIFE DeiT"):
        lifeops.load_official({"fc.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="cannot tell the heads of a model of width 24; pass num_heads"):
        lifeops.load_official(state)
    with pytest.raises(ValueError, match=r"does not tell LIFE's aux_key; pass aux_key='scale1' .* or 'multiscale'"):
        lifeops.load_official(state, num_heads=3)
    told = {"num_heads": 3, "aux_key": "scale1"}
    for kind in (ValueError, RuntimeError):  # as other bad input, and as load_state_dict
        with pytest.raises(kind, match=r"load_official: .*Unexpected key"):
            lifeops.load_official({**state, "extra": torch.zeros(1)}, **told)
    with pytest.raises(ValueError, match=r"has no 'head\.weight'"):
        lifeops.load_official({k: v for k, v in state.items() if k != "head.weight"}, **told)
    with pytest.raises(ValueError, match="models are square, got pos_embed for 15; pass img_size"):
        lifeops.load_official({**state, "pos_embed": torch.zeros(1, 16, 24)}, **told)
    with pytest.raises(TypeError, match="must be a path or a dict, got int"):
        lifeops.load_official(3)
