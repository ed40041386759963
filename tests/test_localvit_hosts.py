"""LocalViT in PVT, TNT, T2T-ViT and Swin: the authors' numbers, both paths, sizes, checkpoints, bad input."""


import contextlib
import copy
import math
import re
import sys
from pathlib import Path

import pytest
import system_checks
import torch
import torch.nn.functional as F

import lifeops
from conftest import declare_torchvision_ops
from lifeops import cli
from lifeops.models import localvit
from lifeops.models.blocks import TokenAttention, pre_norm_block
from lifeops.models.deit import DropPath
from lifeops.models.localvit import _feed_forwards, plain
from lifeops.models.pvt import SpatialReductionAttention
from lifeops.models.swin import SwinBlock
from lifeops.models.t2t import TokenPerformer
from lifeops.models.tnt import TNTBlock
from lifeops.nn import LocalityFeedForward
from test_checkpoints import quiet
from test_localvit import _close, _randomised, _state, golden_with_act


def _pvt(d, conv):
    P = int(d["prefix"])
    attn = SpatialReductionAttention(8, int(d["heads"]), int(d["sr"]), P)
    return pre_norm_block(8, attn, float(d["mlp_ratio"]), float(d["ln_eps"]), DropPath(0.0), conv, P)


def _tnt(d, conv):
    return TNTBlock(12, 4, 4, int(d["heads"]), int(d["in_heads"]), float(d["mlp_ratio"]), conv=conv)


def _t2t(d, conv):
    attn = TokenAttention(12, int(d["heads"]), "param.attn.qkv.bias" in d)
    return pre_norm_block(12, attn, float(d["mlp_ratio"]), 1e-5, DropPath(0.0), conv, int(d["prefix"]))


def _swin(d, conv):
    grid = tuple(d["grid"].tolist())
    block = SwinBlock(8, grid, int(d["heads"]), int(d["window"]), int(d["shift"]), 4.0, True, 0.0, conv(8, float(d["mlp_ratio"]), 0))
    return _OnGrid(block)


class _OnGrid(torch.nn.Module):
    """Swin's block, which knows its grid, called as the others are."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, grid):
        return self.block(x)


BLOCKS = {
    "localvit_pvt_block_sr2_nocls_eval": _pvt, "localvit_pvt_block_sr2_nocls_train": _pvt, "localvit_pvt_block_sr1_cls_eval": _pvt,
    "localvit_tnt_block_eval": _tnt, "localvit_t2t_block_eval": _t2t,
    "localvit_t2t_performer_eval": lambda d, conv: TokenPerformer(12, 8, True, 0.1),
    "localvit_swin_block_s0_eval": _swin, "localvit_swin_block_s2_eval": _swin, "localvit_swin_block_s2_train": _swin,
}  # fmt: skip


def _block(name):
    """A golden file and its block, with its weights."""
    d = golden_with_act(name)
    module = BLOCKS[name](d, _feed_forwards(d["act"], int(d["reduction"]) if "reduction" in d else 1)).double().train(bool(d["training"]))
    getattr(module, "block", module).load_state_dict(_state(d, "param."))
    return d, module


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", BLOCKS)
def test_golden(name, backend):
    """Outputs, gradients and running statistics of the authors' blocks to 1e-10."""
    d, module = _block(name)
    inputs, outputs = (("pixel", "patch"), ("y_pixel", "y_patch")) if "pixel" in d else (("x",), ("y",))
    given = [d[key].clone().requires_grad_() for key in inputs]
    with lifeops.use_backend(backend):
        found = module(*given, tuple(d["grid"].tolist()))
        found = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(found, [d[key.replace("y", "g", 1)] for key in outputs])
    for y, key in zip(found, outputs, strict=True):
        _close(y, d[key])
    for x, key in zip(given, inputs, strict=True):
        _close(x.grad, d[f"grad_{key}"])
    parameters = dict(getattr(module, "block", module).named_parameters())
    for key, expected in _state(d, "grad.").items():
        _close(torch.zeros_like(expected) if parameters[key].grad is None else parameters[key].grad, expected)
    assert parameters.keys() - _state(d, "grad.").keys() <= {"w"}
    for key, value in _state(d, "after.").items():
        _close(getattr(module, "block", module).state_dict()[key], value)


EAGER = [name for name in BLOCKS if name.endswith("eval")]


@pytest.mark.parametrize("name", EAGER)
def test_eager_baseline_is_the_authors(name, bench):
    """What the speed is measured against."""
    d, module = _block(name)
    eager = bench.as_authors(torch.nn.ModuleList([module]))[0]
    assert any(type(m).__module__.startswith("lifeops.nn.eager") for m in eager.modules())
    given = [d[key] for key in (("pixel", "patch") if "pixel" in d else ("x",))]
    found = eager(*given, tuple(d["grid"].tolist()))
    for y, key in zip(found if isinstance(found, tuple) else (found,), ("y_pixel", "y_patch") if "pixel" in d else ("y",), strict=True):
        _close(y, d[key])


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("rich")
    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    from bench import host_systems

    yield host_systems
    sys.path.remove(root)


# ------------------------------------------------------------------------------------------------ whole models


SMALL = {  # grids that are no square
    "pvt_tiny": {
        "img_size": (32, 48), "patch_size": 2, "embed_dims": (12, 24), "depths": (1, 2), "num_heads": (1, 2), "mlp_ratios": (4.5, 2),
        "sr_ratios": (4, 1),
    },
    "tnt_t": {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "in_dim": 6, "depth": 2, "num_heads": 4, "in_num_heads": 2},
    "t2t_7": {"img_size": (64, 96), "embed_dim": 24, "depth": 2, "num_heads": 4, "token_dim": 8, "token_drop": 0.0},
    "swin_tiny": {"img_size": (32, 64), "patch_size": 2, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3), "window_size": 4},
}  # fmt: skip


def tiny(variant, **options):
    torch.manual_seed(0)
    return _randomised(localvit(variant, **{**SMALL[variant], "num_classes": 5, **options})).eval()


def images(variant, batch=2, **options):
    size = {**SMALL[variant], **options}["img_size"]
    return torch.randn(batch, 3, *((size, size) if isinstance(size, int) else size))


@pytest.mark.parametrize("variant", SMALL)
def test_both_paths(variant):
    """Every feed-forward runs fused; layer by layer, and folded, the model is the same."""
    model, x = tiny(variant).double(), images(variant).double()
    assert all(state.fused for state in lifeops.explain(model))
    slow = copy.deepcopy(model)
    for m in slow.modules():
        if isinstance(m, LocalityFeedForward):
            m.conv[0].register_forward_hook(lambda *_: None)
    y = model(x)
    _close(y, slow(x))
    _close(lifeops.fuse_(model)(x), y)


@pytest.mark.parametrize("variant", SMALL)
def test_training_step(variant):
    """Every parameter that is trained gets a gradient, but for what the class token does not see; a copy, a round trip and features are
    the same model.
    """
    model, x = tiny(variant, drop_path_rate=0.2).train(), images(variant, 3)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2 * i / (len(rates) - 1) for i in range(len(rates))])
    for m in model.modules():
        if isinstance(m, DropPath):
            m.drop_prob = 0.0
    model(x).square().sum().backward()
    silent = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    last = {"pvt_tiny": "block2.1.conv.", "tnt_t": "blocks.1.conv.", "t2t_7": "blocks.1.conv."}  # the feed-forwards of the last patches
    assert all(name.startswith(last.get(variant, "none of it")) for name in silent)
    y = model.eval()(x)
    twin = tiny(variant)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    headless = tiny(variant, num_classes=0)
    headless.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("head.")})
    _close(model.head(headless(x)), y, 1e-6)


@pytest.mark.parametrize("variant", SMALL)
def test_compiled(variant):
    system_checks.compiled(tiny(variant).train(), images(variant))


@pytest.mark.parametrize("variant", SMALL)
def test_exported(variant):
    model, x = tiny(variant).requires_grad_(False), images(variant)  # torch.jit.trace checks what it traced without gradients
    system_checks.exported(model, x)
    system_checks.traced(model, x)


@pytest.mark.parametrize("variant", SMALL)
def test_gradients_of_each_image(variant):
    system_checks.gradients_of_each_image(tiny(variant).double().requires_grad_(), images(variant).double(), 1e-8, unused=True)


@pytest.mark.parametrize("variant", SMALL)
def test_hooked_layers_are_called(variant):
    """A hook on any dense layer of an attention sees it: the same numbers."""
    model, x, seen = tiny(variant).double(), images(variant).double(), []
    y = model(x)
    for name, m in model.named_modules():
        if "attn" in name and name.endswith(".proj"):
            m.register_forward_hook(lambda *_: seen.append(1))
    _close(model(x), y)
    assert len(seen) == sum("attn" in name and name.endswith(".proj") for name, _ in model.named_modules()) > 1


@pytest.mark.parametrize("variant", SMALL)
def test_low_precision_and_autocast(variant):
    model, x = tiny(variant), images(variant)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x)
    for y in (copy.deepcopy(model).bfloat16()(x.bfloat16()), cast):
        assert (y.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_performer_in_low_precision():
    """Its exponentials are taken in float32: those of half-precision numbers overflow where the quotient is an ordinary number."""
    torch.manual_seed(0)
    module, x = TokenPerformer(12, 8, False, 0.0), 8 * torch.randn(2, 24, 12)
    module.kqv.weight.data *= 3
    expected = copy.deepcopy(module).double()(x.double(), (4, 6))
    for dtype, limit in ((torch.float16, 0.03), (torch.bfloat16, 0.2)):
        y = copy.deepcopy(module).to(dtype)(x.to(dtype), (4, 6))
        assert y.dtype == dtype
        assert (y.double() - expected).abs().max() < limit * expected.abs().max()


def test_pvt_is_transformers():
    """The plain host, whose patch embeddings and reductions have another epsilon than its blocks."""
    declare_torchvision_ops()
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [1, 2], "num_attention_heads": [1, 2], "mlp_ratios": [3, 2], "hidden_sizes": [12, 24], "strides": [4, 2]}
    config = transformers.PvtConfig(
        image_size=32, num_encoder_blocks=2, sequence_reduction_ratios=[4, 1], patch_sizes=[4, 2], num_labels=5, **sizes
    )
    theirs = transformers.PvtForImageClassification(config).double().eval()
    model = plain("pvt_tiny", **{**SMALL["pvt_tiny"], "img_size": 32, "patch_size": 4, "mlp_ratios": (3, 2)}, num_classes=5).double().eval()
    state = dict(model.state_dict())
    for name in [name for name in state if ".attn.kv." in name]:
        state[name.replace(".kv.", ".k.")], state[name.replace(".kv.", ".v.")] = state.pop(name).chunk(2)
    renamed = {_in_transformers(name): t for name, t in state.items()}
    assert not theirs.load_state_dict(renamed, strict=False).unexpected_keys
    for name, m in theirs.named_modules():
        if name.endswith(("patch_embeddings.0.layer_norm", "patch_embeddings.1.layer_norm", "self.layer_norm")):
            m.eps = 1e-5
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    _close(model(x), theirs(x).logits)


def _in_transformers(name):
    for pattern, replacement in (
        (r"^patch_embed(\d)\.proj", lambda m: f"pvt.encoder.patch_embeddings.{int(m[1]) - 1}.projection"),
        (r"^patch_embed(\d)\.norm", lambda m: f"pvt.encoder.patch_embeddings.{int(m[1]) - 1}.layer_norm"),
        (r"^pos_embed(\d)", lambda m: f"pvt.encoder.patch_embeddings.{int(m[1]) - 1}.position_embeddings"),
        (r"^cls_token", "pvt.encoder.patch_embeddings.1.cls_token"), (r"^norm\.", "pvt.encoder.layer_norm."),
        (r"^block(\d)\.(\d)\.", lambda m: f"pvt.encoder.block.{int(m[1]) - 1}.{m[2]}."), (r"\.norm(\d)\.", r".layer_norm_\1."),
        (r"\.attn\.q\.", ".attention.self.query."), (r"\.attn\.k\.", ".attention.self.key."), (r"\.attn\.v\.", ".attention.self.value."),
        (r"\.attn\.sr\.", ".attention.self.sequence_reduction."), (r"\.attn\.norm\.", ".attention.self.layer_norm."),
        (r"\.attn\.proj\.", ".attention.output.dense."), (r"\.mlp\.fc(\d)\.", r".mlp.dense\1."), (r"^head\.", "classifier."),
    ):  # fmt: skip
        name = re.sub(pattern, replacement, name)
    return name


def test_tnt_is_timms():
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 24, "depth": 2, "num_classes": 5, "patch_size": 8, "qkv_bias": False, "img_size": 32}
    names = {"num_heads_outer": 4, "num_heads_inner": 2, "inner_dim": 6}
    theirs = timm.models.tnt.TNT(**sizes, **names, legacy=True).double().eval()
    model = plain("tnt_t", **{**SMALL["tnt_t"], "img_size": 32}, num_classes=5).double().eval()
    theirs.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    _close(model(x), theirs(x))


def test_tokens_are_joined_as_unfolded():
    """T2T's three steps, written out with the layers of a plain model on a grid that is no square."""
    model = plain("t2t_7", **SMALL["t2t_7"], num_classes=5).double().eval()
    join, x = model.tokens_to_token, images("t2t_7").double()
    t = F.unfold(x, 7, padding=2, stride=4).mT
    for layer, grid in ((join.attention1, (16, 24)), (join.attention2, (8, 12))):
        k, q, v = layer.kqv(layer.norm1(t)).chunk(3, -1)
        kernel = (q @ layer.w.mT - q.square().sum(-1, True) / 2).exp() @ (k @ layer.w.mT - k.square().sum(-1, True) / 2).exp().mT / 4
        t = v + layer.proj(kernel @ v / (kernel.sum(-1, True) + 1e-8))
        t = t + layer.mlp(layer.norm2(t))
        t = F.unfold(t.mT.unflatten(2, grid), 3, padding=1, stride=2).mT
    tokens = join.project(t)
    _close(join(x), tokens)
    position = [[(math.cos if c % 2 else math.sin)(n / 10000 ** (c // 2 * 2 / 24)) for c in range(24)] for n in range(25)]
    torch.testing.assert_close(model.pos_embed[0].float(), torch.tensor(position))
    t = torch.cat((model.cls_token.expand(2, -1, -1), tokens), 1) + model.pos_embed
    for block in model.blocks:
        t = block(t, (4, 6))
    _close(model(x), model.head(model.norm(t)[:, 0]))


# ------------------------------------------------------------------------------------------------ checkpoints


SQUARE = {"pvt_tiny": 32, "tnt_t": 32, "t2t_7": 64, "swin_tiny": 32}
OPTIONS = [{}, {"act": "hs+eca", "qkv_bias": True}, {"reduction": 3, "qkv_bias": False}, {"act": "relu6"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("variant", SMALL)
def test_official(variant, options):
    """All sizes from the tensors and the metadata, at any depth in the file; the activation where nothing tells it."""
    model = tiny(variant, img_size=SQUARE[variant], **options)
    x = images(variant, img_size=SQUARE[variant])
    assert torch.equal(quiet(lifeops.load_official, {"model": model.state_dict()})(x), model(x))
    if "act" not in options and variant == "swin_tiny":  # where tensors alone tell everything
        bare = {f"module.{name}": t for name, t in model.state_dict().items() if not name.endswith(("attn_mask", "num_batches_tracked"))}
        loaded = quiet(lifeops.load_official, bare, img_size=SQUARE[variant])
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("variant", SMALL)
def test_another_image_size_and_number_of_classes(variant):
    """Position embeddings are resampled as timm does it, everything else is the same."""
    declare_torchvision_ops()
    layers = pytest.importorskip("timm.layers")
    size, model = SMALL[variant]["img_size"], tiny(variant, img_size=SQUARE[variant])
    twin, state = tiny(variant), dict(model.state_dict())
    for name, grid in getattr(twin, "position_grids", dict)().items():
        count = twin.state_dict()[name].shape[1] - grid[0] * grid[1]
        state[name] = layers.resample_abs_pos_embed(state[name], list(grid), num_prefix_tokens=count)
    kept = twin.state_dict()
    twin.load_state_dict({name: kept[name] if name.endswith("attn_mask") else t for name, t in state.items()})
    loaded = lifeops.load_official(model.state_dict(), img_size=size)
    x = images(variant)
    torch.testing.assert_close(loaded(x), twin(x))
    with pytest.warns(UserWarning, match="a new head for 3 classes"):
        assert lifeops.load_official(model.state_dict(), num_classes=3).head.out_features == 3


@pytest.mark.parametrize(
    ("variant", "options", "said"),
    [
        ("pvt_tiny", {"depths": (1, 1, 1, 1), "img_size": 64}, "assumed num_heads=1;"),
        ("tnt_t", {"depth": 1, "img_size": 64}, "assumed num_heads=3;|took 3 heads for the pixels"),
        ("t2t_7", {"depth": 1, "img_size": 64}, "assumed num_heads=4;"),
        ("swin_tiny", {"depths": (2, 1, 1, 1)}, None),
    ],
)
def test_official_files_of_published_sizes(variant, options, said):
    """Without metadata, as the authors': heads by the width, and said."""
    model = localvit(variant, **options).eval()
    with pytest.warns(UserWarning, match=said) if said else contextlib.nullcontext() as caught:
        loaded = lifeops.load_official({"model": dict(model.state_dict())})
    assert caught is None or len(caught) == len(said.split("|"))
    x = images("swin_tiny", img_size=options.get("img_size", 224))
    assert torch.equal(loaded(x), model(x))


def test_checkpoint_errors():
    state = dict(tiny("tnt_t", img_size=32).state_dict())
    with pytest.raises(ValueError, match=r"cannot tell the heads of pixels of 6 channels: metadata has none"):
        lifeops.load_official(state, num_heads=4)
    with pytest.raises(ValueError, match=r"the LocalViT TNT checkpoint has no 'blocks.0.conv.conv.0.weight'"):
        lifeops.load_official(plain("tnt_t", **SMALL["tnt_t"]).state_dict())
    with pytest.raises(ValueError, match=r"cannot tell the heads of a model of width 12; pass num_heads=…"):
        lifeops.load_official(dict(tiny("pvt_tiny", img_size=32).state_dict()))
    state = dict(tiny("t2t_7").state_dict())
    with pytest.raises(ValueError, match="LocalViT T2T models are square, got pos_embed for 24"):
        lifeops.load_official(state, num_heads=4)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("pvt_tiny", {"img_size": 30}, r"PyramidVisionTransformer: img_size must be a multiple of patch_size \(2, 2\), got \(15, 15\)"),
        ("pvt_tiny", {"depths": (1,)}, r"depths must be one int for each of the 2 stages, got \(1,\)"),
        ("pvt_tiny", {"num_heads": (1, 5)}, "dim must be a multiple of num_heads, got dim = 24, num_heads = 5"),
        ("tnt_t", {"patch_size": 6, "img_size": 36}, "TNT: patch_size must be a multiple of 4, got 6"),
        ("tnt_t", {"in_num_heads": 4}, "dim must be a multiple of num_heads, got dim = 6, num_heads = 4"),
        ("t2t_7", {"num_heads": 5}, "dim must be a multiple of num_heads, got dim = 24, num_heads = 5"),
        ("t2t_7", {"img_size": 2}, r"T2T: the kernel \(7, 7\) must fit the grid \(2, 2\)"),
        ("swin_tiny", {"window_size": 5}, "every stage's grid must be a multiple of its window 5"),
        ("swin_tiny", {"act": "gelu"}, "act must be one of"),
    ],
)
def test_errors(variant, options, message):
    with pytest.raises(ValueError, match=f"localvit: .*{message}"):
        tiny(variant, **options)


@pytest.mark.parametrize("variant", SMALL)
def test_wrong_images(variant):
    with pytest.raises(ValueError, match=r"x must be images \(B, 3, \d+, \d+\), got \(1, 3, 8, 8\)"):
        tiny(variant)(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("pvt_tiny", "block1.0.attn is SpatialReductionAttention, whose keys and values lie on a coarser grid"),
        ("tnt_t", "blocks.0.attn_in is SplitAttention, one of the two in a block of TNT"),
        ("t2t_7", "tokens_to_token.attention1 is TokenPerformer, which lets every token draw on all before the blocks do"),
        ("swin_tiny", "layers.0.blocks.0 is SwinBlock, whose windows are not known there"),
    ],
)
def test_rollout_is_refused(variant, message):
    with pytest.raises(ValueError, match=f"rollout: {message}"):
        lifeops.rollout(tiny(variant), images(variant))


def test_flops_command(capsys):
    pytest.importorskip("rich")
    assert cli.main(["flops", "localvit_tnt_t"]) == 0
    out = capsys.readouterr().out
    assert all(number in out for number in ("6.261", "1.4165", "1.4361", "6.070", "arXiv 2104.05707"))
    with pytest.raises(SystemExit):
        cli.main(["flops", "localvit_t2t_7", "--patch-size", "8"])
    assert "named: localvit_t2t_7 does not take all of num_classes, patch_size" in capsys.readouterr().err
