"""LIFE in Swin V2 and in T2T-ViT: the authors' numbers, timm's model converted, sizes, checkpoints, bad input."""


import copy
from pathlib import Path

import pytest
import system_checks
import torch

import lifeops
from conftest import declare_torchvision_ops
from lifeops import cli
from lifeops.models import life_swinv2, life_t2t
from lifeops.models.named import system_in
from lifeops.models.swin_v2 import SwinV2Block, relative_coordinates
from lifeops.nn import LifeQKV
from lifeops.nn.eager_life import EagerLifeQKV
from test_checkpoints import quiet
from test_localvit import _close, _randomised, _state, golden_with_act

SWIN = {"img_size": 32, "patch_size": 2, "num_classes": 5, "embed_dim": 12, "depths": (2, 2), "num_heads": (3, 6), "window_size": 8}


def _block(name):
    """A golden file and its block, with its weights."""
    d = golden_with_act(name)
    sizes = 12, tuple(d["grid"].tolist()), int(d["heads"]), int(d["window"]), int(d["shift"])
    block = SwinV2Block(*sizes, float(d["mlp_ratio"]), True, 0.0, True).double().train(bool(d["training"]))
    block.load_state_dict(_state(d, "param."))
    assert torch.equal(block.attn.relative_coords_table, d["relative_coords_table"])
    return d, block


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", ["life_swinv2_block_s0", "life_swinv2_block_s2"])
def test_golden(name, backend):
    """Outputs and gradients of the authors' blocks to 1e-10; the biases that have no use have no gradient."""
    d, block = _block(name)
    x = d["x"].clone().requires_grad_()
    with lifeops.use_backend(backend):
        y = block(x)
        y.backward(d["g"])
        with torch.no_grad():
            _close(block(x), d["y"])
    _close(y, d["y"])
    _close(x.grad, d["grad_x"])
    parameters = dict(block.named_parameters())
    assert parameters.keys() == _state(d, "grad.").keys()
    for key, expected in _state(d, "grad.").items():
        _close(torch.zeros_like(expected) if parameters[key].grad is None else parameters[key].grad, expected)
    assert {key for key, p in parameters.items() if p.grad is None} == {"attn.q_bias", "attn.v_bias"}


def swin(**options):
    """Blocks that start as the identity would show nothing."""
    torch.manual_seed(0)
    return _randomised(life_swinv2("tiny", **{**SWIN, **options})).eval()


def test_convert_of_timms_model_is_the_authors():
    """LIFE in the place of every window's qkv: with the same weights the same logits; reverted, the model is what it was."""
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    model = timm.models.SwinTransformerV2(**SWIN).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    converted, ours = lifeops.convert(model, "life"), swin().double()
    state = {}
    for name, t in ours.state_dict().items():
        if name.startswith("layers.0.downsample."):
            name = name.replace("layers.0.", "layers.1.")
        if not name.endswith("attn_mask"):
            state[name.replace("head.", "head.fc.")] = torch.zeros_like(t) if name.endswith(("q_bias", "v_bias")) else t
    converted.load_state_dict(state)
    _close(converted(x), ours(x))
    assert system_in(converted) == system_in(ours) == "life"
    reverted = lifeops.revert(converted)
    assert not any(isinstance(m, LifeQKV) for m in reverted.modules())
    assert reverted(x).shape == before.shape


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_plain_is_timms(qkv_bias):
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    sizes = {**SWIN, "qkv_bias": qkv_bias}
    theirs, ours = timm.models.SwinTransformerV2(**sizes).double().eval(), swin(life=False, qkv_bias=qkv_bias).double()
    own = {name.replace("layers.0.downsample.", "layers.1.downsample."): t for name, t in ours.state_dict().items()}
    theirs.load_state_dict({name.replace("head.", "head.fc."): t for name, t in own.items() if not name.endswith("attn_mask")})
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    _close(ours(x), theirs(x))


def t2t(**options):
    torch.manual_seed(0)
    sizes = {"img_size": (64, 96), "embed_dim": 24, "depth": 2, "num_heads": 3, "token_dim": 8, "token_drop": 0.0, "num_classes": 5}
    return _randomised(life_t2t("7", **{**sizes, **options})).eval()


MODELS = {"swinv2": (swin, (32, 32)), "rectangle": (lambda: swin(img_size=(32, 64)), (32, 64)), "t2t": (t2t, (64, 96))}


def test_t2t_attends_with_life():
    """Every block's attention is LIFE's on the joined tokens' grid; 256 channels are shared by three scales."""
    model = t2t().double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    t = torch.cat((model.cls_token.expand(2, -1, -1), model.tokens_to_token(x)), 1) + model.pos_embed
    for block in model.blocks:
        q, k, v = (p.unflatten(2, (3, 8)).transpose(1, 2) for p in block.attn.qkv(block.norm1(t), (4, 6)))
        t = t + block.attn.proj(((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
        t = t + block.mlp(block.norm2(t))
    _close(model(x), model.head(model.norm(t)[:, 0]))
    assert [layer.out_features for layer in (life_t2t("7", depth=1).blocks[0].attn.qkv.scale1,)] == [3 * 86]


@pytest.mark.parametrize("name", MODELS)
def test_training_step(name):
    """Every parameter that is trained gets a gradient; a copy, a round trip and features are the same model."""
    build, size = MODELS[name]
    model, x = build().train(), torch.randn(2, 3, *size)
    model(x).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    y, twin = model.eval()(x), build()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)


@pytest.mark.parametrize("name", ["swinv2", "t2t"])
def test_compiled_and_exported(name):
    build, size = MODELS[name]
    x = torch.randn(2, 3, *size)
    system_checks.compiled(build(), x)
    model = build().requires_grad_(False)  # torch.jit.trace checks what it traced without gradients
    system_checks.exported(model, x)
    system_checks.traced(model, x)


@pytest.mark.parametrize("name", ["swinv2", "t2t"])
def test_gradients_of_each_image(name):
    build, size = MODELS[name]
    model = build().double().requires_grad_()  # biases without use, and tables: gradients of zero
    system_checks.gradients_of_each_image(model, torch.randn(2, 3, *size, dtype=torch.float64), 1e-8, unused=True)


def test_low_precision_and_autocast():
    model, x = swin(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x)
    for y in (copy.deepcopy(model).bfloat16()(x.bfloat16()), cast):
        assert (y.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_starts_as_the_authors():
    """Blocks as the identity; stochastic depth rises to the last."""
    model = life_swinv2("tiny", **SWIN, drop_path_rate=0.3)
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert not any(p.any() for block in blocks for norm in (block.norm1, block.norm2) for p in norm.parameters())
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert relative_coordinates(1).tolist() == [[[[0.0, 0.0]]]]  # a window of one token has no offset to scale by
    headless = life_swinv2("tiny", **{**SWIN, "num_classes": 0})
    assert headless(torch.randn(1, 3, 32, 32)).shape == (1, 24)


def test_eager_baseline_is_the_authors(monkeypatch):
    """What the speed is measured against."""
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
    from bench.host_systems import as_authors

    for name in ("life_swinv2_block_s0", "life_swinv2_block_s2"):
        d, block = _block(name)
        eager = as_authors(torch.nn.ModuleList([block]))[0]
        assert type(eager.attn.qkv) is EagerLifeQKV
        _close(eager(d["x"]), d["y"])


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "mlp_ratio": 2}, {"window_size": 4, "depths": (1, 2)}], ids=str)
def test_official(options):
    """All sizes from the tensors; without masks the caller tells image and window."""
    model, x = swin(**options), torch.randn(2, 3, 32, 32)
    state = {f"module.{name}": t for name, t in model.state_dict().items()}
    assert torch.equal(quiet(lifeops.load_official, {"model": state})(x), model(x))
    bare = {name: t for name, t in state.items() if not name.endswith("attn_mask")}
    window = options.get("window_size", 8)
    assert torch.equal(quiet(lifeops.load_official, bare, img_size=32, window_size=window)(x), model(x))
    with pytest.raises(ValueError, match="cannot tell img_size and window_size of a LIFE Swin V2 model from tensors without attn_mask"):
        lifeops.load_official(bare)


def test_official_at_another_size():
    """The bias is a function of the offset: nothing is resampled, the window grows in proportion where it has to."""
    model = swin()
    with pytest.warns(UserWarning, match="a new head for 3 classes"):
        loaded = lifeops.load_official(model.state_dict(), img_size=64, num_classes=3)
    assert (loaded.img_size, loaded.layers[0].blocks[1].size, loaded.head.out_features) == ((64, 64), 8, 3)
    twin = swin(img_size=64, window_size=16)
    own = twin.state_dict()
    twin.load_state_dict({name: own[name] if name.endswith("attn_mask") else t for name, t in model.state_dict().items()})
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(lifeops.load_official(model.state_dict(), img_size=64, window_size=16)(x), twin(x))


def test_errors():
    for options, message in (
        ({"num_heads": (3, 5)}, r"the width 24 of stage 1 must be a multiple of num_heads\[1\], got 5"),
        ({"window_size": 6}, "every stage's grid must be a multiple of its window 6"),
        ({"img_size": 30, "window_size": 15}, r"the grid of a stage before the last must be even, got \(15, 15\)"),
        ({"depths": (1,)}, r"num_heads must be one int for each of the 1 stages, got \(3, 6\)"),
    ):
        with pytest.raises(ValueError, match=f"life_swinv2: SwinTransformerV2: .*{message}"):
            swin(**options)
    with pytest.raises(ValueError, match="life_swinv2: variant must be 'tiny' or 'small', got 'base'"):
        life_swinv2("base")
    with pytest.raises(ValueError, match="life_t2t: variant must be '7' or '12', got '14'"):
        life_t2t("14")
    with pytest.raises(ValueError, match=r"rollout: layers.0.blocks.0 is SwinV2Block, whose windows are not known there"):
        lifeops.rollout(swin(), torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"rollout: tokens_to_token.attention1 is TokenPerformer, which lets every token draw on all"):
        lifeops.rollout(t2t(), torch.randn(1, 3, 64, 96))


def test_flops_command(capsys):
    pytest.importorskip("rich")
    assert cli.main(["flops", "swinv2_tiny", "--num-classes", "100"]) == 0
    out = capsys.readouterr().out
    assert all(number in out for number in ("27.655", "27.810", "6.0025", "27.88 / 6.01"))
