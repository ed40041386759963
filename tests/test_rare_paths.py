"""Paths of the library that few models take, each held against plain torch or against the usual path."""

import copy
import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hosts import small_vit
from torch import nn

import lifeops
from lifeops import pointwise, registry, testing, torchlib
from lifeops.integrations import attention_check
from lifeops.integrations.attention_check import off
from lifeops.integrations.convert_localvit import LocalityBranch
from lifeops.integrations.life_projection import LifeInProjection, LifeProjection
from lifeops.integrations.timm_indices import _taken
from lifeops.models import VisionTransformer
from lifeops.nn.dw_shortcut_fold import ChannelAffine
from lifeops.nn.eager_life import EagerLifeQKV
from lifeops.nn.shortcut_blocks import SquareShortcutBlocks
from lifeops.ops.channel import batch_norm
from lifeops.ops.channel import gate as gates
from lifeops.ops.local_attention import function as attention
from lifeops.ops.token_dwconv.samples import lay_out

B, H, W, C = 2, 4, 6, 12
EXPLAINERS = importlib.import_module("lifeops.explain")._EXPLAINERS  # lifeops.explain is the function


@pytest.mark.parametrize(("P", "key"), [(0, "multiscale"), (2, "multiscale"), (2, "scale1")])
def test_life_as_its_authors_wrote_it(P, key):
    """The eager module and the fused one give the same queries, keys and values, without prefix tokens and with scale 1's keys."""
    eager, fused = EagerLifeQKV(C, P, aux_key=key).double(), lifeops.nn.LifeQKV(C, 3, P, aux_key=key).double()
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(B, P + H * W, C, dtype=torch.float64)
    for got, expected in zip(fused(x, (H, W)), eager(x, (H, W)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["projection", "projection beside an MLP", "locality"])
def test_maps_in_place_of_tokens(kind):
    """What stands in for a layer of a host takes (B, H, W, C) as it takes (B, H*W, C)."""
    made = {
        "projection": lambda: LifeProjection(C, 3, 0), "projection beside an MLP": lambda: LifeInProjection(C, 3, 0, 20, True),
        "locality": lambda: LocalityBranch(C, 4, num_prefix_tokens=0),
    }  # fmt: skip
    module = made[kind]().eval()
    x = torch.randn(B, H, W, C)
    if kind == "projection beside an MLP":  # whose MLP's half reads the last dimension of either
        torch.testing.assert_close(module.fc1(x).flatten(1, 2), module.fc1(x.flatten(1, 2)))
    else:
        torch.testing.assert_close(module(x).flatten(1, 2), module(x.flatten(1, 2), (H, W)))


def test_what_a_folded_norm_leaves():
    """scale * u + shift for every channel of maps, in their dtype."""
    scale, shift, maps = torch.randn(C, dtype=torch.float64), torch.randn(C, dtype=torch.float64), torch.randn(B, C, H, W)
    norm = nn.BatchNorm2d(C, eps=0).double().eval()
    norm.weight.data, norm.bias.data = scale, shift
    got = ChannelAffine(scale, shift)(maps)
    assert got.dtype == maps.dtype
    torch.testing.assert_close(got, norm(maps.double()).float())


def test_explained_operators():
    """Which operators a call leads to: of LIFE its filters' gradients, of an activation behind a convolution the one pass for all three."""
    x = torch.randn(B, 1 + H * W, C)
    weights = [torch.randn(s) for s in ((C, C), (C,), (C, 1, 3, 3), (C, C), (C, 1, 5, 5), (C, C))]
    parts = lifeops.explain("life_qkv", x, *weights, grid=(H, W))
    assert [part.op for part in parts] == ["life_qkv", "token_dwconv_bwd_dw", "token_dwconv_bwd_dw"]
    for act in ("relu6", "gelu", "hardswish"):
        parts = lifeops.explain("token_dwconv", x, weights[2], grid=(H, W), num_prefix_tokens=1, epilogue=lifeops.ChannelAct(act=act))
        assert [part.op for part in parts] == ["token_dwconv_act", "token_dwconv_act_bwd"], act
    parts = lifeops.explain("token_dwconv", x, weights[2], grid=(H, W), num_prefix_tokens=1, prologue=lifeops.ChannelAct(act="gelu"))
    assert [part.op for part in parts] == ["token_dwconv_act", "token_dwconv_act_bwd_dx", "token_dwconv_act_bwd_dw"]


def test_explained_options_are_given_by_name():
    r, q = torch.zeros(1, 1, 5), torch.zeros(1, 2, 5, 4)
    assert [part.op for part in lifeops.explain("rollout_step", r, q, q, head_fusion="max")] == ["rollout_step"]
    with pytest.raises(TypeError, match="positional"):
        lifeops.explain("rollout_step", r, q, q, 0.5)


def test_backends_say_what_they_cannot_take():
    meta = torch.empty(B, H * W, C, device="meta")
    text = str(lifeops.explain("token_dwconv", meta, torch.empty(C, 1, 17, 17, device="meta"), grid=(H, W)))
    assert "tensors are on meta" in text
    assert registry.unavailable("cpu") or "K = 17 is larger than 15" in text


def test_gradients_of_single_images():
    """vmap over grad for the weight with a bias and for the bias alone."""
    x, weight, bias = torch.randn(3, H * W, C), torch.randn(C, 1, 3, 3), torch.randn(C)

    def loss(weight, bias, x):
        return lifeops.token_dwconv(x[None], weight, bias, grid=(H, W)).square().sum()

    for argnums in ((0, 1), (1,)):
        got = torch.func.vmap(torch.func.grad(loss, argnums), (None, None, 0))(weight, bias, x)
        for i in range(3):
            for g, e in zip(got, torch.func.grad(loss, argnums)(weight, bias, x[i]), strict=True):
                torch.testing.assert_close(g[i], e)


def test_squares_that_are_none():
    """NesT's tokens: the shortcut is told when parts or patches are no square number."""
    blocks = SquareShortcutBlocks([nn.Identity()], lifeops.nn.DWShortcut(C, 3, 0))
    with pytest.raises(ValueError, match=r"x must be \(B, t \* t, n \* n, C\), got \(2, 4, 6, 12\)"):
        blocks(torch.randn(B, 4, 6, C))


def test_blocks_by_number():
    assert _taken(None, 4) == [0, 1, 2, 3]
    assert _taken(2, 4) == [2, 3]
    assert _taken([-1, 0], 4) == [3, 0]
    for wrong in (5, [4], [-5], []):
        with pytest.raises(ValueError, match=r"^prune_intermediate_layers: indices must name some of the 4 blocks, got"):
            _taken(wrong, 4)


def test_rollout_of_a_model_that_does_not_run_its_patches():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)

        def forward(self, x):
            return self.vit.blocks[0](torch.zeros(1, 17, 48), (4, 4))

    with pytest.raises(ValueError, match="rollout: PatchEmbed, the patch embedding of VisionTransformer, has not run"):
        lifeops.rollout(Idle().eval(), torch.zeros(1, 3, 32, 32))


def test_how_far_attention_may_be_off(monkeypatch):
    """TF32 rounds products to 11 bits: on a GPU that is allowed to use it much more."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    cpu, gpu = (attention_check._tolerance(torch.float32, torch.device(kind), 10.0) for kind in ("cpu", "cuda"))
    assert 2**-9 < gpu / 10 < 2**-7
    assert gpu > 100 * cpu
    assert attention_check._tolerance(torch.float64, torch.device("cuda"), 10.0) < 1e-8
    torch.backends.cuda.matmul.allow_tf32 = False
    assert attention_check._tolerance(torch.float32, torch.device("cuda"), 10.0) == cpu


def test_how_far_off():
    a = torch.tensor([1.0, -4.0, torch.inf])
    assert off(a, a) == 0.0
    assert off(a, torch.tensor([1.0, -3.0, 0.0])) == 0.25
    assert off(a, a[:2]) == 1.0
    assert off(torch.tensor([torch.nan]), torch.tensor([1.0])) == 0.0


def test_the_vendor_of_an_unknown_machine(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    pointwise.vendor.cache_clear()
    monkeypatch.setattr(pointwise.Path, "read_text", missing)
    monkeypatch.setattr(pointwise.platform, "machine", lambda: "sparc")
    assert pointwise.vendor() == "sparc"
    monkeypatch.undo()
    pointwise.vendor.cache_clear()


def test_a_block_hands_its_grid_to_attention_that_asks():
    """LocalViT's block around LIFE's attention: the grid of the call reaches both."""
    block = lifeops.nn.LocalViTBlock(nn.LayerNorm(C), lifeops.nn.LifeAttention(C, 3, 1), lifeops.nn.LocalityFeedForward(C, 4)).eval()
    x = torch.randn(B, 1 + H * W, C)
    y = x + block.attn(block.norm1(x), grid=(H, W))
    torch.testing.assert_close(block(x, (H, W)), block.conv(y, (H, W)))
    assert not torch.allclose(block(x, (H, W)), block(x, (W, H)))


def test_an_unknown_layout():
    with pytest.raises(ValueError, match="unknown layout 'diagonal'"):
        lay_out(torch.ones(1, 2, 3), "diagonal")


@pytest.mark.parametrize("biased", [(0, 1, 2), (1,), (0, 2)], ids=str)
def test_biases_in_front_of_norms(biased):
    """LocalViT's feed-forward, some of whose convolutions have biases in front of their batch norms: a training step, its gradients, and
    an evaluation, folded and not.
    """
    module = lifeops.nn.LocalityFeedForward(C, 2, num_prefix_tokens=1).double()
    convs = [i for i, layer in enumerate(module.conv) if isinstance(layer, nn.Conv2d)]
    for i in (convs[n] for n in biased):
        old = module.conv[i]
        shape = {"kernel_size": old.kernel_size, "padding": old.padding, "groups": old.groups, "dtype": torch.float64}
        module.conv[i] = nn.Conv2d(old.in_channels, old.out_channels, **shape)
    plain = copy.deepcopy(module.conv)
    x = torch.randn(B, 1 + H * W, C, dtype=torch.float64)
    maps = x[:, 1:].mT.unflatten(2, (H, W))
    for training in (True, False):
        module.train(training), plain.train(training)
        y, expected = module(x, (H, W)), torch.cat((x[:, :1], x[:, 1:] + plain(maps).flatten(2).mT), 1)
        torch.testing.assert_close(y, expected)
        if not training:
            with torch.no_grad():
                torch.testing.assert_close(module(x, (H, W)), expected)
        grads = [torch.autograd.grad(t.square().sum(), [*layers.parameters()]) for t, layers in ((y, module.conv), (expected, plain))]
        for got, e in zip(*grads, strict=True):
            torch.testing.assert_close(got, e, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(lifeops.fuse_(module)(x, (H, W)), expected)


@pytest.mark.parametrize("op", ["token_dwconv", "local_attention"])
def test_kernels_name_dtypes_that_they_have_not(op):
    """Asked past the operators' own checks."""
    if registry.unavailable("cpu"):
        pytest.skip("needs the compiled kernels")
    op = registry.ops[op]
    args = testing.make(op, next(s for s in op.samples() if s.tiny), torch.float32, backend="cpu")
    problem = op.problem(*args)
    supports = op.impls["cpu"].supports
    assert not supports(problem)
    assert any("torch.int32" in reason for reason in supports(problem._replace(dtype=torch.int32)))


def test_scripting_is_refused():
    with pytest.raises(RuntimeError, match=r"LifeAttention"):
        torch.jit.script(lifeops.nn.LifeAttention(C, 3, 1))


def test_batch_statistics_of_no_patches():
    """Refused as torch's own batch norm does, where the layers are called one by one, too."""
    module = lifeops.nn.LocalityFeedForward(C, 2, num_prefix_tokens=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected more than 1 value per channel when training"):
            module(torch.randn(B, 1, C), (0, 3))
        module.conv[0].register_forward_hook(lambda *args: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("N", [2, 3, 6])
def test_attention_of_tokens_that_share_memory(N, dtype):
    """Expanded and overlapping queries, keys and values give what copies of them give, gradients too."""
    run, other = torch.randn(64, dtype=dtype), torch.randn(1, 2, N, 4, dtype=dtype)
    for step in (0, 1, 3):
        shared = run.as_strided((1, 2, N, 4), (0, 30, step, 1))
        for tensors in ((shared, other, other), (other, shared, other), (other, other, shared)):
            grads = []
            for clone in (False, True):
                leaves = [(t.contiguous() if clone else t).detach().requires_grad_() for t in tensors]
                y = lifeops.local_attention(*leaves, torch.ones(8, 1, 3, 3, dtype=dtype), grid=(1, N))
                grads.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
            for got, expected in zip(*grads, strict=True):
                torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", EXPLAINERS)
def test_explain_takes_what_the_function_takes(op):
    """The same arguments in the same places and by the same names, but those that only add outputs."""
    call, explained = (inspect.signature(f).parameters.values() for f in (getattr(lifeops, op), EXPLAINERS[op]))
    names = {p.name for p in explained}
    assert [(p.name, p.kind, p.default) for p in call if p.name in names] == [(p.name, p.kind, p.default) for p in explained]


def test_a_model_that_does_not_say_how_many_tokens_come_first():
    model = small_vit()()
    del model.num_prefix_tokens
    found = lifeops.describe(model)
    assert found.host.prefix is None
    assert "tokens before the patches: an unknown number of" in str(found)
    with pytest.raises(ValueError, match="VisionTransformer does not say num_prefix_tokens, how many tokens"):
        lifeops.convert(model, "life")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_roll_out_step_under_autocast(backend):
    """Nothing is cast down: the bits of a step without autocast."""
    r, q, k = torch.rand(1, 2, 20), torch.randn(1, 3, 20, 8), torch.randn(1, 3, 20, 8)
    expected = lifeops.rollout_step(r, q, k, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lifeops.rollout_step(r, q, k, backend=backend), expected)
    assert lifeops.rollout_step(r.to("meta"), q.to("meta"), k.to("meta"), backend="reference").shape == r.shape


@pytest.mark.parametrize("kind", ["se", "eca", "ecah"])
def test_gates_at_their_kinks(kind):
    """Channel attention at, beside and between the hard sigmoid's ends and ReLU's zero: values and gradients of torch's own layers."""
    m = torch.tensor([[-3.0, 3.0, -3.25, 3.25, 0.0, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    width, hard = m.shape[1], F.hardsigmoid if kind != "eca" else torch.sigmoid
    if kind == "se":
        params = [torch.eye(width, dtype=m.dtype), torch.zeros(width, dtype=m.dtype)] * 2
        params[3] = torch.linspace(-3, 3, width, dtype=m.dtype)
    else:
        params = [torch.tensor([[[0.0, 1.0, 0.0]]], dtype=m.dtype)]
    params = [p.clone().requires_grad_() for p in params]
    if kind == "se":
        expected = hard(F.linear(F.relu(F.linear(m, *params[:2])), *params[2:]))
    else:
        expected = hard(F.conv1d(m[:, None], params[0], padding=1)[:, 0])
    torch.testing.assert_close(gates.gate(kind, m, params), expected)
    ds = torch.linspace(1, 2, width, dtype=m.dtype)[None]
    dm, grads = gates.gate_backward(kind, ds, m.detach(), [p.detach() for p in params])
    for got, e in zip((dm, *grads), torch.autograd.grad(expected, [m, *params], ds), strict=True):
        torch.testing.assert_close(got, e)


@pytest.mark.parametrize("size", [(1, 0, 5, 4), (1, 2, 5, 0), (2, 5, 4), (1, 1, 2, 5, 4)])
def test_a_roll_out_step_without_heads_or_width(size):
    r = torch.rand(1, 1, 5)
    with pytest.raises(ValueError, match=r"^rollout_step: q must"):
        lifeops.rollout_step(r, torch.zeros(size), torch.zeros(size))
    one = torch.randn(1, 1, 5, 1)  # one head of one channel is enough
    weights = (one @ one.mT).softmax(-1)[0].double()
    expected = 0.5 * r[0].double() + 0.5 * r[0].double() @ weights[0]
    torch.testing.assert_close(lifeops.rollout_step(r, one, one)[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("convolved", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32, torch.float64], ids=str)
def test_attention_as_exported_programs_have_it(mask, padded, convolved):
    """torch's own operators, whatever masks there are, give what the kernels give."""
    q, k, v = (torch.randn(B, 3, 1 + H * W, 4) for _ in range(3))
    weight, bias = (torch.randn(C, 1, 3, 3), torch.randn(C)) if convolved else (None, None)
    attn_mask = None if mask is None else torch.randn(1, 3, 1 + H * W, 1 + H * W)
    attn_mask = attn_mask > -1 if mask == torch.bool else attn_mask if mask is None else attn_mask.to(mask)
    key_mask = torch.arange(1 + H * W) < torch.tensor([[20], [1 + H * W]]) if padded else None
    args = attention._arguments(q, k, v, weight, bias, (H, W), 1, None, attn_mask, key_mask, 0.0, None, None)
    expected = lifeops.local_attention(q, k, v, weight, bias, grid=(H, W), num_prefix_tokens=1, attn_mask=attn_mask, key_mask=key_mask)
    if padded:  # as the caller does: nothing of padding is read, and 0 is put there
        args = (*(attention._existing(t, key_mask) for t in args[:3]), *args[3:])
    got = attention._exported(*args)
    got = got.masked_fill(~key_mask[:, :, None], 0) if padded else got
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_several_processes(monkeypatch):
    """Mean, squares and counts of three processes with different numbers of tokens are those of all their tokens."""
    parts = [torch.randn(n, C, dtype=torch.float64) * 2 + n for n in (3, 7, 1)]
    own = [torch.cat((t.mean(0), (t - t.mean(0)).square().sum(0), t.new_tensor([len(t)]))) for t in parts]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 3)
    monkeypatch.setattr(torch.distributed, "all_gather", lambda every, mine, group: [a.copy_(b) for a, b in zip(every, own, strict=True)])
    mean, m2, n = batch_norm.merge(own[0][:C], own[0][C : 2 * C], 3, None)
    whole = torch.cat(parts)
    torch.testing.assert_close(mean, whole.mean(0))
    torch.testing.assert_close(m2, (whole - whole.mean(0)).square().sum(0))
    assert n == 11


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", registry.ops)
def test_operators_under_autocast(name, backend):
    """An operator has the dtypes of its arguments: autocast changes not a bit of what it gives."""
    op = registry.ops[name]
    if backend != "reference" and backend not in op.impls:
        pytest.skip(f"no kernel of {name}")
    args = testing.make(op, next(s for s in op.samples() if s.tiny), torch.float32, backend=backend)
    expected = testing.tensors(torchlib.overload(op)(*args))
    with torch.autocast("cpu", torch.bfloat16):
        got = testing.tensors(torchlib.overload(op)(*args))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_torch_attends_where_no_kernel_is_built(monkeypatch):
    """What no query sees does not reach it, NaN included; forward and backward as of the reference."""
    from lifeops.ops.local_attention import cpu

    monkeypatch.setattr(cpu, "_compiled", lambda seed: False)
    attn_mask = torch.rand(1, 3, 1 + H * W, 1 + H * W) > 0.3
    attn_mask[..., 5] = False
    found = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(B, 3, 1 + H * W, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
        with torch.no_grad():
            k[0, :, 5], v[1, :, 5] = torch.nan, torch.inf
        y = lifeops.local_attention(q, k, v, grid=(H, W), num_prefix_tokens=1, attn_mask=attn_mask, backend=backend)
        found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    assert found[0][0].isfinite().all()
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_feed_forward_on_another_device(act):
    """Shapes and dtypes of what a device without kernels of ours computes, gradients too."""
    from lifeops.ops.feed_forward import FeedForward

    sizes = (B, H * W, C), (2 * C, C), (2 * C,), (C, 2 * C), (C,)
    args = [torch.empty(size, device="meta", dtype=torch.bfloat16, requires_grad=True) for size in sizes]
    y = FeedForward.apply(*args, act, None)
    assert (y.shape, y.dtype) == (args[0].shape, torch.bfloat16)
    y.sum().backward()
    assert [(a.grad.shape, a.grad.dtype) for a in args] == [(a.shape, a.dtype) for a in args]
