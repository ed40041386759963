"""PVTv2's feed-forward and patch embedding: timm's and transformers' layers, both paths, prefix tokens, keys, bad input."""

import copy

import pytest
import system_checks
import torch
import torch.nn.functional as F
from torch import nn

import lifeops
from conftest import declare_torchvision_ops
from lifeops.cost.model_cost import count_macs, saved_bytes
from lifeops.models import VisionTransformer
from lifeops.models.deit import Attention, Block
from lifeops.nn import ConvFeedForward, OverlapPatchEmbed
from lifeops.nn.eager_conv_ffn import EagerConvFeedForward
from test_edgevit import layer_by_layer
from test_localvit import _close, _randomised

GRID, C = (4, 6), 12


def module(P=2, **options):
    torch.manual_seed(0)
    return _randomised(ConvFeedForward(C, 2.5, P, **options).double())


def plainly(m, x):
    P = m.num_prefix_tokens
    h = m.relu(F.linear(x, m.fc1.weight, m.fc1.bias))
    conv = m.dwconv.dwconv
    maps = F.conv2d(h[:, P:].mT.unflatten(2, GRID), conv.weight, conv.bias, padding=conv.kernel_size[0] // 2, groups=h.shape[2])
    return F.linear(F.gelu(torch.cat((h[:, :P], maps.flatten(2).mT), 1)), m.fc2.weight, m.fc2.bias)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 5}, {"extra_relu": True}], ids=str)
@pytest.mark.parametrize("P", [0, 1, 3])
@pytest.mark.parametrize("backend", ["reference", None])
def test_both_paths(P, options, backend):
    m, out = module(P, **options), []
    x = torch.randn(3, P + 24, C, dtype=torch.float64)
    for call in (lambda m, x: m(x, GRID), lambda m, x: layer_by_layer(m)(x, GRID), plainly):
        twin, leaf = copy.deepcopy(m), x.clone().requires_grad_()
        with lifeops.use_backend(backend):
            y = call(twin, leaf)
            (dx,) = torch.autograd.grad(y.square().sum(), leaf, retain_graph=True)
        out.append((y, dx))
        if call is not plainly:
            assert y.requires_grad
    for y, dx in out[1:]:
        _close(y, out[0][0], 1e-11)
        _close(dx, out[0][1], 1e-10)


@pytest.mark.parametrize("P", [0, 2])
def test_eager_baseline(P):
    m = module(P)
    eager = EagerConvFeedForward(C, 2.5, P).double()
    eager.load_state_dict(m.state_dict())
    x = torch.randn(3, P + 24, C, dtype=torch.float64)
    _close(eager(x, GRID), m(x, GRID), 1e-12)


def test_in_a_vit():
    """As the feed-forward of a host's block, which hands it the grid."""

    def block(dim, num_heads, num_prefix_tokens, drop_path):
        return Block(dim, Attention(dim, num_heads), 2.0, 1e-6, drop_path, lambda dim, hidden: ConvFeedForward(dim, hidden / dim, 1))

    vit = VisionTransformer((16, 24), 4, embed_dim=C, depth=2, num_heads=3, num_classes=5, block=block).double()
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    x = torch.cat((vit.cls_token.expand(2, -1, -1), vit.patch_embed(images)), 1) + vit.pos_embed
    for b in vit.blocks:
        x = x + b.attn(b.norm1(x))
        x = x + plainly(b.mlp, b.norm2(x))
    _close(vit(images), vit.head(vit.norm(x)[:, 0]), 1e-12)


def test_parameter_gradients():
    m, x = module(), torch.randn(3, 2 + 24, C, dtype=torch.float64)
    grads = []
    for call in (lambda m: m(x, GRID), lambda m: plainly(m, x)):
        twin = copy.deepcopy(m)
        call(twin).square().sum().backward()
        grads.append({name: p.grad for name, p in twin.named_parameters()})
    assert grads[0].keys() == {f"{layer}.{name}" for layer in ("fc1", "dwconv.dwconv", "fc2") for name in ("weight", "bias")}
    for name, grad in grads[0].items():
        _close(grad, grads[1][name], 1e-10)


def test_hidden_tokens_are_kept_once():
    """Plain layers keep what the convolution and what GELU read, and what fc2 reads; here GELU's input is computed again."""
    m, x = module(0).float(), torch.randn(8, 24, C, requires_grad=True)
    ours, theirs = (saved_bytes(lambda f=f: f(m, x), [x, *m.parameters()]) for f in (lambda m, x: m(x, GRID), plainly))
    hidden = 4 * 8 * 24 * 30
    assert ours == 2 * hidden
    assert theirs >= 3 * hidden


def test_dropout():
    m = module(1, drop=0.5).train()
    x = torch.randn(2, 25, C, dtype=torch.float64)
    torch.manual_seed(3)
    y = m(x, GRID)
    assert (y == 0).double().mean() > 0.2
    torch.testing.assert_close(m.eval()(x, GRID), plainly(m, x))


def test_exchanged_layers():
    m, x = module(), torch.randn(2, 26, C, dtype=torch.float64)
    m.act = nn.SiLU()
    assert "act: it is a SiLU, the kernel computes a GELU" in str(lifeops.explain(m))
    before = m(x, GRID)
    m.act = nn.GELU()
    assert lifeops.explain(m)[0].fused
    assert (m(x, GRID) - before).abs().max() > 1e-3
    m.dwconv.dwconv = nn.Conv2d(30, 30, 3, groups=30).double()
    with pytest.raises(ValueError, match=r"ConvFeedForward: dwconv makes .* and every patch token needs its value: use stride 1"):
        m(x, GRID)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    system_checks.low_precision(module(), torch.randn(4, 26, C, dtype=torch.float64), GRID, dtype)


def test_autocast_compile_export_and_transforms():
    m, x = module(1, grid=GRID).float(), torch.randn(2, 25, C)
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), m(x), rtol=0.05, atol=0.1)
    system_checks.compiled(m, x)
    system_checks.exported(m, x)
    system_checks.traced(m, x)
    system_checks.gradients_of_each_image(m, torch.randn(3, 25, C), 1e-4)


def test_cost():
    m = module().float()
    assert count_macs(lambda: m(torch.randn(2, 26, C), GRID)) == 2 * (2 * 26 * C * 30 + 24 * 30 * 9)
    assert repr(m).startswith("ConvFeedForward(\n  dim=12, num_prefix_tokens=2")


# ------------------------------------------------------------------------------------------------ other libraries' layers


def _timm():
    declare_torchvision_ops()
    return pytest.importorskip("timm.models.pvt_v2")


@pytest.mark.parametrize("extra_relu", [False, True])
def test_timms_feed_forward(extra_relu):
    theirs = _randomised(_timm().MlpWithDepthwiseConv(C, 30, extra_relu=extra_relu).double())
    ours = ConvFeedForward(C, 2.5, extra_relu=extra_relu).double()
    ours.load_state_dict(theirs.state_dict())
    assert [*ours.state_dict()] == [f"{layer}.{name}" for layer in ("fc1", "dwconv.dwconv", "fc2") for name in ("weight", "bias")]
    ours.load_state_dict(ours.state_dict())
    x = torch.randn(2, 24, C, dtype=torch.float64)
    _close(ours(x, GRID), theirs(x, GRID), 1e-12)


def test_a_whole_timm_model():
    """pvt_v2_b0 with our layers in it, from its own state dict."""
    theirs = _timm().pvt_v2_b0(num_classes=5).double().eval()
    ours = copy.deepcopy(theirs)

    class Blocks(ConvFeedForward):
        def forward(self, x, feat_size):
            return super().forward(x, tuple(feat_size))

    class Embed(OverlapPatchEmbed):
        def forward(self, maps):
            tokens, grid = super().forward(maps)
            return tokens.unflatten(1, grid)

    for stage, dim in enumerate((32, 64, 160, 256)):
        for block in ours.stages[stage].blocks:
            block.mlp = Blocks(dim, block.mlp.fc1.out_features / dim)
    ours.patch_embed = Embed(3, 32, 7, 4)
    ours.double().load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    _close(ours(x), theirs(x), 1e-11)


def test_segformers_layers():
    declare_torchvision_ops()
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [1], "hidden_sizes": [C], "num_attention_heads": [3], "mlp_ratios": [2], "num_encoder_blocks": 1}
    options = {"sr_ratios": [1], "patch_sizes": [7], "strides": [4], "hidden_dropout_prob": 0.0}
    model = _randomised(transformers.SegformerModel(transformers.SegformerConfig(**sizes, **options)).double()).eval()
    theirs = next(m for m in model.modules() if hasattr(m, "dwconv") and not isinstance(m.dwconv, nn.Conv2d))
    ours, names = ConvFeedForward(C, 2).double(), {"dense1": "fc1", "dense2": "fc2"}  # the second of transformers before 5
    ours.load_state_dict({names.get(k.split(".")[0], k.split(".")[0]) + k[k.index(".") :]: v for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 24, C, dtype=torch.float64)
    _close(ours(x, GRID), theirs(x, *GRID), 1e-12)
    theirs = next(m for m in model.modules() if type(m).__name__ == "SegformerOverlapPatchEmbeddings")
    ours = OverlapPatchEmbed(3, C).double()
    ours.load_state_dict({k.replace("layer_norm", "norm"): v for k, v in theirs.state_dict().items()})
    images = torch.randn(2, 3, 30, 41, dtype=torch.float64)
    tokens, grid = ours(images)
    expected = theirs(images)
    _close(tokens, expected[0], 1e-12)
    assert grid == tuple(expected[1:]) == (8, 11)


@pytest.mark.parametrize(("patch_size", "stride", "padding"), [(7, 4, None), (3, 2, 0), (4, 4, 2)])
def test_patch_embedding(patch_size, stride, padding):
    """Plainly, gradients too, of images and of maps that are views of tokens."""
    embed = _randomised(OverlapPatchEmbed(C, 8, patch_size, stride, padding).double())
    images = torch.randn(2, C, 13, 18, dtype=torch.float64)
    for maps in (images, images.contiguous(memory_format=torch.channels_last)):
        leaf = maps.clone().requires_grad_()
        tokens, grid = embed(leaf)
        plain = F.conv2d(images, embed.proj.weight, embed.proj.bias, stride, patch_size // 2 if padding is None else padding)
        _close(tokens, embed.norm(plain.flatten(2).mT), 1e-12)
        assert grid == tuple(plain.shape[2:]) == lifeops.conv_grid((13, 18), patch_size, stride, padding)
        tokens.sum().backward()
        assert leaf.grad.shape == maps.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_embedding_in_other_tools(dtype):
    embed, x = OverlapPatchEmbed(3, 8, 3, 2).to(dtype), torch.randn(1, 3, 8, 12).to(dtype)
    assert embed(x)[0].dtype == dtype
    torch._dynamo.reset()
    tokens, grid = torch.compile(embed, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(tokens, embed(x)[0])
    assert grid == (4, 6)
    twin = copy.deepcopy(embed)
    twin.load_state_dict(embed.state_dict())
    with pytest.raises(RuntimeError, match="OverlapPatchEmbed: the state dict was saved with stride=2, this module has stride=1"):
        OverlapPatchEmbed(3, 8, 3, 1).load_state_dict(embed.state_dict())


@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_of_taps_that_see_padding_alone(autocast):
    """On a map smaller than the kernel torch's bfloat16 leaves them as they lay in memory (findings/bf16_depthwise_weight_gradient.sh)."""
    torch.manual_seed(0)
    x, dy, embed = torch.randn(3, 64, 2, 2), torch.randn(3, 1, 64), OverlapPatchEmbed(64, 64, 7, 4)
    exact, other = copy.deepcopy(embed).double(), embed if autocast else embed.bfloat16()
    (exact(x.double())[0] * dy).sum().backward()
    for _ in range(5):
        other.zero_grad()
        torch.full((64 * 64 * 49,), 1e20)  # what the next tensors find in their memory
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, grid = other(x if autocast else x.bfloat16())
        assert grid == (1, 1)
        (y * dy).sum().backward()
        expected, got = exact.proj.weight.grad, other.proj.weight.grad
        assert not got[expected == 0].any()
        assert (got.double() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConvFeedForward(C, 0), "ConvFeedForward: dim * mlp_ratio must be at least 1, got 12 * 0"),
        (lambda: ConvFeedForward(C, kernel_size=4), "ConvFeedForward: kernel_size must be odd, got 4"),
        (lambda: ConvFeedForward(C)(torch.ones(1, 25, C), GRID), "ConvFeedForward: x.shape[1] must be P + H*W = 0 + 4*6 = 24, got 25"),
        (lambda: ConvFeedForward(C)(torch.ones(1, 24, C)), "ConvFeedForward: the grid is unknown"),
        (lambda: OverlapPatchEmbed(3, 8)(torch.ones(1, 4, 8, 8)), "OverlapPatchEmbed: maps must be (B, 3, H, W), got (1, 4, 8, 8)"),
        (lambda: OverlapPatchEmbed(3, 8, 7, 4, 0)(torch.ones(1, 3, 5, 9)), "OverlapPatchEmbed: the kernel (7, 7) must fit the grid (5, 9)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert message in str(error.value)
