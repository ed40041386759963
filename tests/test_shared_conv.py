"""Bootstrapping ViTs: the authors' numbers, a dense convolution, shared weights, other heads, both losses, bad input."""

import copy
import runpy
from pathlib import Path

import pytest
import system_checks
import torch
import torch.nn.functional as F
from torch import nn

import lifeops
from conftest import declare_torchvision_ops
from lifeops.cost.model_cost import count_macs
from lifeops.losses import FeatureHint, logit_distillation
from lifeops.models import VisionTransformer
from lifeops.models.deit import Attention
from lifeops.nn import SharedConvAttention
from lifeops.nn.eager_shared_conv import EagerSharedConv
from test_edgevit import layer_by_layer
from test_localvit import _close, _randomised, _state, golden_with_act

GRID = (4, 6)
GOLDEN = ["bootstrap_sharedconv_h6", "bootstrap_sharedconv_h9"]


class AuthorsAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.linear_qkv, self.linear_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)


def build(name):
    d = golden_with_act(name)
    module = SharedConvAttention(AuthorsAttention(d["x"].shape[1], int(d["heads"]))).double()
    module.load_state_dict(_state(d, "param."))
    return {**d, **{key: d[key].flatten(2).transpose(1, 2).contiguous() for key in ("x", "y", "g", "grad_x")}}, module


def agrees(d, module, call):
    x = d["x"].clone().requires_grad_()
    system_checks.agrees(d, module, x, call(x, tuple(d["grid"].tolist())))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, backend, fused):
    d, module = build(name)
    module = module if fused else layer_by_layer(module)
    with lifeops.use_backend(backend):
        agrees(d, module, module)


@pytest.mark.parametrize("name", GOLDEN)
def test_eager_baseline_is_the_authors(name):
    d, module = build(name)
    agrees(d, module, EagerSharedConv(module))


# ------------------------------------------------------------------------------------------------ the module


def attention(dim=18, heads=9, bias=True):
    torch.manual_seed(0)
    return _randomised(Attention(dim, heads, bias).double())


def dense(attn, offsets, x, grid):
    """As a convolution of all channels, tap by tap."""
    d, reach = attn.proj.in_features // attn.num_heads, max(max(map(abs, offset)) for offset in offsets)
    weight = torch.zeros(attn.proj.out_features, attn.qkv.in_features, 2 * reach + 1, 2 * reach + 1, dtype=x.dtype)
    values = attn.qkv.weight[2 * attn.proj.in_features :]
    for h, (dy, dx) in enumerate(offsets):
        weight[:, :, reach + dy, reach + dx] += attn.proj.weight[:, h * d : (h + 1) * d] @ values[h * d : (h + 1) * d]
    maps = F.conv2d(x.mT.unflatten(2, grid), weight, attn.proj.bias, padding=reach)
    return maps.flatten(2).mT


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("P", [0, 2])
@pytest.mark.parametrize("heads", [1, 5, 6, 7, 8, 9, 17])
def test_dense_convolution(heads, P, bias):
    """Of the authors' numbers of heads; prefix tokens look at themselves, whichever way the layers run."""
    attn = attention(2 * heads, heads, bias)
    module = SharedConvAttention(attn, P)
    x = torch.randn(2, P + 24, 2 * heads, dtype=torch.float64)
    y = module(x, GRID)
    assert lifeops.explain(module)[0].fused
    _close(y[:, P:], dense(attn, module.offsets, x[:, P:], GRID), 1e-11)
    own = F.linear(F.linear(x[:, :P], attn.qkv.weight[4 * heads :]), attn.proj.weight, attn.proj.bias)
    _close(y[:, :P], own, 1e-11)
    _close(layer_by_layer(module)(x, GRID), y, 1e-11)


def test_offsets():
    """The authors' six heads look at the upper two rows; two, which they have none for, where they are told."""
    assert SharedConvAttention(attention(18, 6)).offsets == ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 0), (0, 1))
    attn, offsets = attention(8, 2), ((0, 2), (-1, 0))
    x = torch.randn(2, 24, 8, dtype=torch.float64)
    _close(SharedConvAttention(attn, offsets=offsets)(x, GRID), dense(attn, offsets, x, GRID), 1e-12)
    assert SharedConvAttention(attention(12, 3), offsets=lifeops.init.head_offsets(3)).offsets == ((0, 0), (-1, 0), (0, 1))


def test_weights_are_shared():
    """What one of the two trains, the other has; a state dict has every tensor, and the shifts are none of it."""
    vit = VisionTransformer(16, 4, embed_dim=18, num_heads=9, depth=1)
    module = SharedConvAttention(vit.blocks[0].attn)
    both = nn.ModuleList([vit, module])
    assert len(list(both.parameters())) == len(list(vit.parameters()))
    assert [*module.state_dict()] == ["mhsa.qkv.weight", "mhsa.qkv.bias", "mhsa.proj.weight", "mhsa.proj.bias"]
    module(torch.randn(2, 24, 18), GRID).square().sum().backward()
    q, k, v = vit.blocks[0].attn.qkv.weight.grad.chunk(3)
    assert not q.any()
    assert not k.any()
    assert v.abs().min() > 0
    assert vit.blocks[0].attn.qkv.bias.grad is None
    twin = copy.deepcopy(both)
    assert twin[1].mhsa is twin[0].blocks[0].attn


def test_without_memory():
    """Built on the meta device, given memory and a state dict."""
    module, x = SharedConvAttention(attention().float()), torch.randn(2, 24, 18)
    with torch.device("meta"):
        bare = SharedConvAttention(Attention(18, 9))
    assert bare.taps.is_meta
    bare.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(bare(x, GRID), module(x, GRID))


def test_what_was_done_to_a_layer_counts():
    module = SharedConvAttention(attention())
    x = torch.randn(2, 24, 18, dtype=torch.float64)
    before = module(x, GRID)
    module.mhsa.qkv.register_forward_hook(lambda layer, args, y: 2 * y)
    assert "mhsa.qkv: it has forward hooks" in str(lifeops.explain(module))
    bias = module.mhsa.proj.bias
    _close(module(x, GRID) - bias, 2 * (before - bias), 1e-12)


def test_timms_attention():
    declare_torchvision_ops()
    block = pytest.importorskip("timm.models.vision_transformer").Attention(18, 9, qkv_bias=True).double()
    module, x = SharedConvAttention(block), torch.randn(2, 24, 18, dtype=torch.float64)
    _close(module(x, GRID), dense(block, module.offsets, x, GRID), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    system_checks.low_precision(SharedConvAttention(attention(bias=False), 2), torch.randn(2, 26, 18, dtype=torch.float64), GRID, dtype)


def test_autocast_compile_export_and_transforms():
    module, x = SharedConvAttention(attention(bias=False).float(), 1, grid=GRID), torch.randn(2, 25, 18)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.1)
    system_checks.compiled(module, x)
    system_checks.exported(module, x)
    system_checks.traced(module, x)
    system_checks.gradients_of_each_image(module, torch.randn(3, 25, 18), 1e-4)


def test_cost():
    """Two products and the shifts, not a product for each of nine taps."""
    module = SharedConvAttention(attention().float())
    assert count_macs(lambda: module(torch.randn(2, 24, 18), GRID)) == 2 * 24 * (2 * 18 * 18 + 9 * 18)
    alone = SharedConvAttention(attention(18, 1).float())
    assert count_macs(lambda: alone(torch.randn(2, 24, 18), GRID)) == 2 * 24 * 2 * 18 * 18


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SharedConvAttention(attention(18, 3)),
            "offsets must be given where ceil(sqrt(num_heads)) is even: the kernel of 3 heads, 2 x 2",
        ),
        (
            lambda: SharedConvAttention(attention(20, 10)),
            "SharedConvAttention: offsets must be given where ceil(sqrt(num_heads)) is even: the",
        ),
        (
            lambda: SharedConvAttention(attention(18, 2), offsets=((0, 1),)),
            "offsets must be (dy, dx) for each of the 2 heads, got ((0, 1),)",
        ),
        (
            lambda: SharedConvAttention(attention(18, 1), offsets=((0, 1.0),)),
            "offsets must be (dy, dx) for each of the 1 heads, got ((0, 1.0),)",
        ),
        (
            lambda: SharedConvAttention(nn.Linear(3, 3)),
            "mhsa must have layers qkv and proj (or linear_qkv and linear_out) and num_heads, got",
        ),
        (lambda: SharedConvAttention(odd_one()), "mhsa must project to q, k and v of 9 heads, as wide together as proj reads, 9, got 54"),
        (lambda: SharedConvAttention(attention())(torch.ones(1, 24, 18).double()), "SharedConvAttention: the grid is unknown"),
        (
            lambda: SharedConvAttention(attention())(torch.ones(1, 25, 18).double(), GRID),
            "x.shape[1] must be P + H*W = 0 + 4*6 = 24, got 25",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert message in str(error.value)


def odd_one():
    attn = attention()
    attn.proj = nn.Linear(9, 18)
    return attn


# ------------------------------------------------------------------------------------------------ joint training


def test_logit_distillation():
    a, b = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = logit_distillation(a, b)
    p, q = (b / 4).softmax(1), (a / 4).softmax(1)
    _close(loss, 16 * (p * (p.log() - q.log())).sum(1).mean(), 1e-12)
    loss.backward()
    assert b.grad is None
    assert a.grad.abs().max() > 0
    assert logit_distillation(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"logit_distillation: student and teacher must be logits \(B, classes\), got \(5, 7\) and \(5, 6\)"
    ):
        logit_distillation(a, b[:, :6])


def test_feature_hint():
    torch.manual_seed(0)
    hint = _randomised(FeatureHint(6, 2).double())
    vit, cnn = (torch.randn(3, n, 6, dtype=torch.float64, requires_grad=True) for n in (26, 24))
    loss = hint(vit, cnn)
    _close(loss, (hint.norm_s(vit[:, 2:]) - hint.norm_t(cnn)).square().mean(), 1e-13)
    loss.backward()
    assert cnn.grad is None
    assert not vit.grad[:, :2].any()
    hint(vit.detach(), cnn, "vit").backward()
    assert cnn.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"FeatureHint: cnn must have as many tokens as vit has patches, 24, got 6 \(batches 3, 3\)"):
        hint(vit, cnn[:, :6])
    few = FeatureHint(6, 2, resample=True).double()
    _close(few(vit, cnn[:, :6]), few(torch.cat((vit[:, :2], vit[:, 2:].unflatten(1, (6, 4)).mean(2)), 1), cnn[:, :6]), 1e-13)
    with pytest.raises(ValueError, match="cnn must have as many or a divisor of them tokens as vit has patches, 24, got 7"):
        few(vit, cnn[:, :7])
    assert repr(few).startswith("FeatureHint(\n  dim=6, num_prefix_tokens=2, resample=True")


def test_example(monkeypatch, capsys):
    """Both models learn, and the ViT alone is what it is without the agent."""
    for name in ("sklearn", "rich"):
        pytest.importorskip(name)
    example = Path(__file__).parents[1] / "examples" / "bootstrap_digits.py"
    monkeypatch.setattr("sys.argv", [str(example), "--sizes", "30", "--seeds", "2", "--steps", "4"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(example), run_name="__main__")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("labelled images", "ViT alone", "ViT with its agent", "agent", "30"))
