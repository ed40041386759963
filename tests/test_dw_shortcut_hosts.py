"""The DW shortcut's models: the authors' numbers and sizes, their checkpoints."""

import copy
import sys
import types

import pytest
import torch

import lifeops
from conftest import declare_torchvision_ops
from lifeops.models import dw_shortcut
from lifeops.models.swin import SwinTransformer
from lifeops.models.vit_cait import CaiT, ViT
from lifeops.nn.eager_dw_shortcut import EagerDWShortcut
from test_life import golden
from test_localvit import BACKENDS, _close, _randomised, _state

timm = None


@pytest.fixture(autouse=True, scope="module")
def _timm():
    global timm
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")


def _load(d):
    return lifeops.load_official({"model": _state(d, "param.")}, num_heads=2)


# ------------------------------------------------------------------------------------------------ the authors' models


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("host", ["vit", "cait"])
def test_golden(host, backend):
    """The authors' logits to 1e-10, with and without gradients, folded too; strict load of their keys."""
    d = golden(f"dwshortcut_{host}_c16_d2")
    model = _load(d)
    assert type(model) is {"vit": ViT, "cait": CaiT}[host]
    assert model.state_dict().keys() == _state(d, "param.").keys()
    with lifeops.use_backend(backend):
        _close(model(d["x"]), d["y"])
        with torch.no_grad():
            _close(model(d["x"]), d["y"])
            _close(lifeops.fuse_(model)(d["x"]), d["y"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_training_step(backend):
    """Logits, all gradients and the running statistics after the step, to 1e-10."""
    d = golden("dwshortcut_vit_c16_d2_train")
    model, x = _load(d).train(), d["x"].requires_grad_()
    with lifeops.use_backend(backend):
        y = model(x)
        y.backward(d["g"])
    _close(y, d["y"])
    _close(x.grad, d["grad_x"])
    for name, parameter in model.named_parameters():
        _close(parameter.grad, d[f"grad.{name}"])
    for name, value in model.state_dict().items():
        _close(value, d[f"after.{name}"])


SIZES = {
    "vit_tiny": (5_519_434, 5_547_082), "vit_small": (21_655_690, 21_710_986), "cait_xxs12": (6_413_642, 6_441_290),
    "cait_xxs24": (11_750_090, 11_805_386), "swin_tiny": (27_527_044, 27_580_036),
}  # fmt: skip
VARIANTS = [
    ({"every": 2}, 5_533_258), ({"every": 3}, 5_528_650), ({"every": 4}, 5_526_346), ({"kernel_sizes": (3, 5)}, 5_611_594),
    ({"kernel_sizes": (3, 5, 7)}, 5_731_402), ({"every": 4, "kernel_sizes": (3, 5)}, 5_519_434 + 3 * (12 + 28) * 192),
]  # fmt: skip


def _parameters(*args, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in dw_shortcut(*args, num_classes=10, **options).parameters())


def test_parameters():
    for variant, (without, with_shortcuts) in SIZES.items():
        assert (_parameters(variant, every=None), _parameters(variant)) == (without, with_shortcuts), variant
    for options, expected in VARIANTS:
        assert _parameters("vit_tiny", **options) == expected, options


@pytest.mark.parametrize(("variant", "macs"), [("vit_tiny", 1.2576), ("cait_xxs12", 1.2951), ("swin_tiny", 4.5027)])
def test_macs(variant, macs):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        dw_shortcut(variant, num_classes=10).eval()(torch.randn(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e9, 4) == macs


def test_layer_scale_starts_smaller_in_deeper_layers():
    layers = CaiT(32, 8, embed_dim=8, depth=25, cls_depth=1, num_heads=2).patch_transformer.layers
    assert [layers[i][0].scale.unique().item() for i in (0, 17, 18, 23, 24)] == pytest.approx([0.1, 0.1, 1e-5, 1e-5, 1e-6])


def test_variants_of_the_hosts():
    """One shortcut around two blocks with two kernels, by hand from the same parts."""
    torch.manual_seed(0)
    model = _randomised(ViT((16, 24), (8, 4), embed_dim=8, depth=4, num_heads=2, every=2, kernel_sizes=(3, 5)).double()).eval()
    seen = []
    model.transformer.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    model(torch.randn(2, 3, 16, 24, dtype=torch.float64))
    expected, t = seen[0], model.transformer
    for i in range(2):
        start = expected
        for attn, ff in t.layers[2 * i : 2 * i + 2]:
            expected = expected + attn(expected)
            expected = expected + ff(expected)
        eager = EagerDWShortcut(8, (3, 5)).double().eval()
        eager.convs, eager.batchnorms = t.convs[2 * i : 2 * i + 2], t.batchnorms[2 * i : 2 * i + 2]
        expected = eager(start, expected, (2, 6))
    _close(seen[1], expected)


SWIN = {"img_size": 32, "patch_size": 2, "num_classes": 5, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3), "window_size": 8}


def _swin(**options):
    torch.manual_seed(0)
    return _randomised(SwinTransformer(**{**SWIN, **options}).double())


class EagerBlock(torch.nn.Module):
    """timm's block with the authors' shortcut, on maps (B, H, W, C)."""

    def __init__(self, block, conv, norm):
        super().__init__()
        self.block, self.shortcut = block, EagerDWShortcut(conv.in_channels, num_prefix_tokens=0)
        self.shortcut.convs[0], self.shortcut.batchnorms[0] = conv, norm

    def forward(self, x):
        return self.shortcut(x.flatten(1, 2), self.block(x).flatten(1, 2), x.shape[1:3]).view(x.shape)


def _eager_swin(model):
    """timm's Swin with the weights of ``model`` and the authors' shortcuts around its blocks; timm merges patches first."""
    state, theirs = {}, timm.models.SwinTransformer(**SWIN, drop_path_rate=0.0).double()
    for name, value in model.state_dict().items():
        if "relative_position_index" in name or "attn_mask" in name or ".convs." in name or ".batchnorms." in name:
            continue
        if ".downsample." in name:
            stage, rest = name.split(".", 2)[1:]
            name = f"layers.{int(stage) + 1}.{rest}"
        state[name.replace("head.", "head.fc.")] = value
    theirs.load_state_dict(state, strict=True)
    for stage, ours in zip(theirs.layers, model.layers, strict=True):
        parts = zip(stage.blocks, ours.convs, ours.batchnorms, strict=True)
        stage.blocks = torch.nn.Sequential(*(EagerBlock(*copy.deepcopy(part)) for part in parts))
    return theirs


@pytest.mark.parametrize("training", [True, False])
def test_swin_is_timms_with_the_authors_shortcuts(training):
    """Shifted windows in the first stage, a single window in the second: logits, gradients, running statistics."""
    model = _swin().train(training)
    theirs = _eager_swin(model).train(training)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    y, expected = model(x), theirs(x)
    _close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, stage in zip(model.layers, theirs.layers, strict=True):
        for conv, norm, block in zip(ours.convs, ours.batchnorms, stage.blocks, strict=True):
            _close(conv.weight.grad, block.shortcut.convs[0].weight.grad, 1e-9)
            _close(norm.weight.grad, block.shortcut.batchnorms[0].weight.grad, 1e-9)
            _close(norm.running_var, block.shortcut.batchnorms[0].running_var)
    _close(model.patch_embed.proj.weight.grad, theirs.patch_embed.proj.weight.grad, 1e-9)


def test_swin_checkpointing_keeps_the_shortcut():
    plain = _swin().train()
    checkpointed = _swin(grad_checkpointing=True).train()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for model in (plain, checkpointed):
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        _close(a.grad, b.grad, 1e-9)
    for a, b in zip(plain.state_dict().values(), checkpointed.state_dict().values(), strict=True):
        _close(a, b)


# ------------------------------------------------------------------------------------------------ their checkpoints


MODELS = {
    "vit": lambda: dw_shortcut("vit_tiny", depth=2, img_size=32, num_classes=5),
    "one_head": lambda: ViT(32, 8, num_classes=5, embed_dim=64, depth=1, num_heads=1),
    "k5": lambda: ViT(32, 8, num_classes=5, embed_dim=64, depth=1, num_heads=1, kernel_sizes=5),
    "cait": lambda: dw_shortcut("cait_xxs12", depth=2, cls_depth=3, img_size=32, num_classes=5),
    "swin": lambda: SwinTransformer(56, num_classes=5, depths=(2, 2), num_heads=(3, 6)),
    "swin_late": lambda: SwinTransformer(
        32, 2, num_classes=5, embed_dim=12, depths=(1, 2), num_heads=(2, 3), window_size=4, qkv_bias=False
    ),
    "swin_one_window": lambda: SwinTransformer(32, 2, num_classes=5, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=16),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_tells_its_model(name):
    torch.manual_seed(0)
    model = _randomised(MODELS[name]()).eval()
    twin = lifeops.load_official(model.state_dict())
    img_size = {"swin": 56}.get(name, 32)
    x = torch.randn(2, 3, img_size, img_size)
    assert torch.equal(twin(x), model(x))


def test_a_checkpoint_with_its_training_settings(tmp_path, monkeypatch):
    """The authors' script saves a yacs CfgNode beside the model; nothing of it is run or needed."""

    class CfgNode(dict):  # as yacs': a dict with attributes
        def __init__(self, *args):
            super().__init__(*args)
            self.__dict__["frozen"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    model = MODELS["vit"]()
    with monkeypatch.context() as patch:
        for name in ("yacs", "yacs.config"):
            patch.setitem(sys.modules, name, types.SimpleNamespace(CfgNode=CfgNode))
        settings = CfgNode({"MODEL": CfgNode({"TYPE": "vit", "DEPTHS": [2, 2]})})
        torch.save({"model": model.state_dict(), "epoch": 3, "config": settings}, tmp_path / "checkpoint.pth")
    twin = lifeops.load_official(tmp_path / "checkpoint.pth")
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True))


def test_checkpoint_errors():
    state = dict(MODELS["vit"]().state_dict())
    with pytest.raises(ValueError, match=r"DW shortcut ViT checkpoint has no 'pos_embedding'"):
        lifeops.load_official({k: v for k, v in state.items() if k != "pos_embedding"})
    with pytest.raises(ValueError, match=r"DW shortcut ViT models are square, got pos_embedding for 3"):
        lifeops.load_official({**state, "pos_embedding": state["pos_embedding"][:, :4]})
    with pytest.raises(ValueError, match=r"cannot tell the heads of a model of width 192; pass num_heads"):
        lifeops.load_official(state, num_heads=7)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        lifeops.load_official({**state, "transformer.convs.2.bias": torch.zeros(192)})
    swin = SwinTransformer(32, 4, num_classes=5, embed_dim=12, depths=(1,), num_heads=(2,), window_size=4).state_dict()
    with pytest.raises(ValueError, match="cannot tell the image size of a DW shortcut Swin model from one block per stage; pass img_size"):
        lifeops.load_official(swin)


def test_host_errors():
    with pytest.raises(ValueError, match="variant must be one of 'vit_tiny', 'vit_small'"):
        dw_shortcut("vit_base")
    with pytest.raises(ValueError, match="every must be a positive int that divides the 12 blocks, got 5"):
        dw_shortcut(every=5)
    with pytest.raises(ValueError, match="ViT: embed_dim must be a multiple of num_heads 3 without head_dim, got 16"):
        ViT(embed_dim=16)
    with pytest.raises(ValueError, match=r"CaiT: img_size must be a multiple of patch_size \(16, 16\), got \(30, 30\)"):
        CaiT(30)
    with pytest.raises(ValueError, match=r"ViT: x must be images \(B, 3, 32, 32\), got \(1, 3, 16, 16\)"):
        ViT(32, depth=1)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"SwinTransformer: every stage's grid must be a multiple of its window 7, got \(8, 8\)"):
        SwinTransformer(32, depths=(1,), num_heads=(3,))
    with pytest.raises(ValueError, match=r"grid of a stage before the last must be even, got \(7, 7\)"):
        SwinTransformer(28, depths=(1, 1), num_heads=(3, 3))
    with pytest.raises(ValueError, match="depths and num_heads must have one number per stage"):
        SwinTransformer(depths=(1,))
    with pytest.raises(ValueError, match="the width 96 of stage 0 must be a multiple of its 5 heads"):
        SwinTransformer(num_heads=(5, 6, 12, 24))
