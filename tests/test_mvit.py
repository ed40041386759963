"""MViT: the authors' numbers, timm's models, relative positions at other sizes, exchanged layers."""

import itertools
import re

import numpy as np
import pytest
import system_checks
import torch
import torch.nn.functional as F
from torch import nn

import lifeops
from conftest import declare_torchvision_ops
from lifeops.models import MViT, mvitv2
from lifeops.models.mvit import VARIANTS, MultiscaleBlock
from lifeops.nn import PoolingAttention
from lifeops.nn.eager_mvit import EagerMaxPool, EagerPoolingAttention
from lifeops.nn.relative import distances, relative_bias, resized
from test_life import GOLDEN
from test_localvit import _close

TINY = {"img_size": 32, "num_classes": 5, "embed_dim": 8, "depths": (1, 2, 1), "num_heads": 1}
BLOCKS = sorted(path.stem for path in GOLDEN.glob("mvitv*_block*.npz"))
POOLS = sorted(path.stem for path in GOLDEN.glob("mvit_pool_*.npz"))
SKIPS = sorted(path.stem for path in GOLDEN.glob("mvit_skip_*.npz"))


def _golden(name):
    raw = np.load(GOLDEN / f"{name}.npz")
    return {k: torch.from_numpy(raw[k]) if raw[k].ndim else raw[k].item() for k in raw}


def _randomised(model, scale=0.3):
    """Every tensor random: norms, biases and tables, too, so that each shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * scale + (1 if p.ndim == 1 else 0))
    return model


def _called(module):
    """Layers that are hooked are called, not read."""
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            m.register_forward_hook(lambda *_: None)
    return module


# ------------------------------------------------------------------------------------------------ the authors' numbers


def _block(d):
    """The block of a golden file, its state in our names, and how its parameters are called there."""
    state = {k.removeprefix("param."): v for k, v in d.items() if k.startswith("param.")}
    grid, (dim, dim_out) = tuple(d["grid"].tolist()), (d["x"].shape[-1], d["y"].shape[-1])
    tables = tuple(d["built_grid"].tolist()) if "built_grid" in d else grid
    in_attention, positions = bool(d.get("dim_mul_in_att")), "attn.rel_pos_h" in state
    attn = PoolingAttention(
        dim, d["heads"], d["prefix"], dim_out=dim_out if in_attention else dim, mode=d.get("mode", "conv"), stride_q=d["stride_q"],
        stride_kv=d["stride_kv"], kernel_q=3 if d.get("q_pool", 1) else 1, pool_first=bool(d.get("pool_first")),
        residual_pooling=bool(d.get("residual_pooling", positions)), rel_pos=tables if positions else None,
    )  # fmt: skip
    ours = "shortcut_proj_attn." if in_attention else "shortcut_proj_mlp."
    state = {re.sub(r"^proj\.", ours, k): v[:, :, 0] if v.ndim == 5 else v for k, v in state.items()}
    block = MultiscaleBlock(attn, dim_out, 2.0).double()
    block.load_state_dict(state)
    return block, grid, lambda name: name.replace(ours, "proj.")


UNTRANSCRIBED = "mvitv1_block_q1_kv2_cls_unshared_poolfirst", "mvitv2_block_slowfast_6x6_run_8x5"


@pytest.mark.parametrize(("name", "how"), [
    (name, how) for name in BLOCKS for how in ("fused", "called", "eager") if how != "eager" or name not in UNTRANSCRIBED
])  # fmt: skip
def test_golden_blocks(name, how):
    """Outputs and every gradient of the authors' blocks; by the ops, by the layers, and by the transcription of their code."""
    d = _golden(name)
    block, grid, theirs = _block(d)
    if how == "called":
        _called(block)
    if how == "eager":
        block.attn = EagerPoolingAttention(block.attn)
    x = d["x"].requires_grad_()
    y, new = block(x, grid)
    y.backward(d["g"])
    _close(y, d["y"])
    assert y.shape[1] == d["prefix"] + new[0] * new[1]
    _close(x.grad, d["grad_x"])
    for key, p in block.named_parameters():
        _close(p.grad, d[f"grad.{theirs(key)}"].reshape(p.shape))
    with torch.no_grad():  # torch's fused attention
        _close(block(x, grid)[0], d["y"])


def test_there_are_golden_files():
    assert (len(BLOCKS), len(POOLS), len(SKIPS)) == (8, 8, 2)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_golden_pools(name, called):
    d = _golden(name)
    module = PoolingAttention(24, 3, d["prefix"], mode=d["mode"], stride_q=d["stride"]).double()
    with torch.no_grad():
        for key in ("pool.weight", "norm.weight", "norm.bias"):
            if f"param.{key}" in d:
                module.get_parameter(key.replace(".", "_q.")).copy_(d[f"param.{key}"])
    assert (module.norm_q is None) == (d["mode"] != "conv")
    if called:
        _called(module)
    x = d["x"].requires_grad_()
    y, grid = module._pool("q", x, tuple(d["grid"].tolist()), not called)
    y.backward(d["g"])
    _close(y, d["y"])
    _close(x.grad, d["grad_x"])
    assert y.shape[2] == d["prefix"] + grid[0] * grid[1]
    for key, p in (("pool.weight", "pool_q.weight"), ("norm.weight", "norm_q.weight"), ("norm.bias", "norm_q.bias")):
        if f"grad.{key}" in d:
            _close(module.get_parameter(p).grad, d[f"grad.{key}"])


@pytest.mark.parametrize("how", ["fused", "eager"])
@pytest.mark.parametrize("name", SKIPS)
def test_golden_skips(name, how):
    """The shortcut's maximum: of a block that gives nothing else."""
    d = _golden(name)
    block = MultiscaleBlock(PoolingAttention(8, 1, 1, stride_q=d["stride"]), 8).double()
    nn.init.zeros_(block.attn.proj.weight), nn.init.zeros_(block.attn.proj.bias)
    nn.init.zeros_(block.mlp.fc2.weight), nn.init.zeros_(block.mlp.fc2.bias)
    pool = block.shortcut_pool_attn
    if how == "eager":
        block.shortcut_pool_attn = EagerMaxPool(pool.kernel_size, pool.stride, pool.padding)
    x = d["x"].requires_grad_()
    y, _ = block(x, tuple(d["grid"].tolist()))
    y.backward(d["g"])
    _close(y, d["y"])
    _close(x.grad, d["grad_x"])


# ------------------------------------------------------------------------------------------------ timm's models


def _timm():
    declare_torchvision_ops()
    return pytest.importorskip("timm").models.mvitv2


@pytest.mark.parametrize("variant", VARIANTS)
def test_timms_keys_and_shapes(variant):
    with torch.device("meta"):
        ours, theirs = mvitv2(variant), getattr(_timm(), f"mvitv2_{variant}")()
    shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


TIMM = {
    "tiny": ({}, {}),
    "class token": ({"use_cls_token": True}, {"class_token": True}),
    "channels grow in the MLP": ({"expand_attn": False}, {"expand_attn": False}),
    "mean": ({"mode": "avg", "rel_pos_type": ""}, {"mode": "avg", "rel_pos": False}),
    "maximum": ({"mode": "max", "residual_pooling": False, "qkv_bias": False},
                {"mode": "max", "residual_pooling": False, "qkv_bias": False}),
    "one stride": ({"stride_kv_adaptive": (1, 1)}, {"stride_kv": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_timms_logits(name):
    theirs, ours = TIMM[name]
    mvitv2_ = _timm()
    sizes = {"depths": (1, 2, 2), "embed_dim": (24, 48, 96), "num_heads": (1, 2, 4), "stride_q": ((1, 1), (2, 2), (2, 2))}
    reference = _randomised(mvitv2_.MultiScaleVit(mvitv2_.MultiScaleVitCfg(**{**sizes, **theirs}), (64, 64), num_classes=7)).double().eval()
    model = MViT(64, num_classes=7, embed_dim=24, depths=(1, 2, 2), **ours).double().eval()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    _close(model(x), reference(x))
    with torch.no_grad():
        _close(model(x), reference(x))


def test_timms_tiny():
    reference = _randomised(_timm().mvitv2_tiny(img_size=64), 0.05).double().eval()
    model = mvitv2("tiny", img_size=64).double().eval()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        _close(model(x), reference(x))
        assert model(x).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------ any sizes


def _oracle(m, x, grid):
    """The formula with torch's own convolutions on maps, positions added entry by entry."""
    P, h = m.num_prefix_tokens, m.num_heads

    def pooled(t, pool, norm):
        B, N, C = t.shape
        heads = t.view(B, N, h, C // h).transpose(1, 2)
        maps = pool(heads[:, :, P:].transpose(2, 3).reshape(B * h, C // h, *grid))
        t = torch.cat((heads[:, :, :P], maps.flatten(2).transpose(1, 2).unflatten(0, (B, h))), 2)
        return F.layer_norm(t, t.shape[-1:], norm.weight, norm.bias, norm.eps), tuple(maps.shape[2:])

    q, k, v = m.qkv(x).chunk(3, -1)
    (q, a), (k, b), (v, _) = pooled(q, m.pool_q, m.norm_q), pooled(k, m.pool_k, m.norm_k), pooled(v, m.pool_v, m.norm_v)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5)
    for axis, table in ((0, m.rel_pos_h), (1, m.rel_pos_w)):
        n, many = a[axis], b[axis]
        table = F.interpolate(table.T[None], size=2 * max(n, many) - 1, mode="linear")[0].T
        for i, j in itertools.product(range(n), range(many)):
            stretch, along = max(many / n, 1), max(n / many, 1)
            row = table[int(i * stretch - j * along + (many - 1) * along + 1e-9)]
            queries = [P + y * a[1] + z for y in range(a[0]) for z in range(a[1]) if (y, z)[axis] == i]
            keys = [P + y * b[1] + z for y in range(b[0]) for z in range(b[1]) if (y, z)[axis] == j]
            added = torch.zeros_like(scores)
            added[:, :, np.array(queries)[:, None], keys] = (q[:, :, queries] @ row)[..., None]
            scores = scores + added
    y = scores.softmax(-1) @ v
    y = torch.cat((y[:, :, :P], y[:, :, P:] + q[:, :, P:]), 2) if not m.residual_prefix else y + q
    return m.proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("resize", ["interpolate", "own"])
@pytest.mark.parametrize("options", [
    {"stride_q": 2}, {"stride_kv": (2, 1)}, {"stride_q": (1, 2), "stride_kv": 4, "kernel_q": (3, 5)},
    {"kernel_kv": 2, "residual_prefix": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("P", [0, 1, 3])
def test_any_prefix_grid_and_stride(P, options, resize):
    grid = (5, 7)
    torch.manual_seed(0)
    module = _randomised(PoolingAttention(6, 2, P, dim_out=8, rel_pos=grid if resize == "own" else (4, 6), **options).double())
    x = torch.randn(2, P + 35, 6, dtype=torch.float64, requires_grad=True)
    grads = []
    for f in (module, lambda x, grid: _oracle(module, x, grid)):
        y = f(x, grid)
        grads.append((y, *torch.autograd.grad(y.square().sum(), (x, *module.parameters()))))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert y.shape == (2, P + np.prod(module.queries_grid(grid)), 8)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (8, 2), (7, 2), (7, 4), (4, 8), (39, 10)])
def test_distances(queries, keys):
    """floor(i max(K/Q, 1) - j max(Q/K, 1) + (K - 1) max(Q/K, 1)) in exact arithmetic: (39, 10) comes out otherwise in float32."""
    from fractions import Fraction

    stretch, along = max(Fraction(keys, queries), Fraction(1)), max(Fraction(queries, keys), Fraction(1))
    expected = [[int(i * stretch - j * along + (keys - 1) * along) for j in range(keys)] for i in range(queries)]
    assert distances(queries, keys).tolist() == expected


def test_tables_of_another_size():
    table = torch.randn(15, 4, dtype=torch.float64)
    assert resized(table, 15, "interpolate") is table
    assert torch.equal(resized(table, 11, "middle"), table[2:13])
    line = torch.linspace(0, 1, 15, dtype=torch.float64)[:, None]
    _close(resized(line, 15, "middle"), line)
    for resize in ("interpolate", "middle"):
        assert resized(table, 19, resize).shape == (19, 4)
        _close(resized(table, 19, resize), F.interpolate(table.T[None], size=19, mode="linear")[0].T)
    assert resized(table.bfloat16(), 9, "interpolate").dtype == torch.bfloat16


@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (1, 4), (2, 2)], ids=str)
def test_middle_rows_are_those_of_the_same_distances(strides):
    """A smaller map adds to a pair of patches what the larger one adds to a pair as far apart."""
    q_stride, k_stride = strides
    tables = [torch.randn(2 * max(16 // q_stride, 16 // k_stride) - 1, 6, dtype=torch.float64) for _ in "hw"]
    one = torch.randn(6, dtype=torch.float64)

    def bias(side):
        q, k = side // q_stride, side // k_stride
        return relative_bias(one.expand(1, 1, q * q, 6), tables, (q, q), (k, k), "middle").view(q, q, k, k)

    large, small = bias(16), bias(8)
    _close(small, large[: 8 // q_stride, : 8 // q_stride, : 8 // k_stride, : 8 // k_stride])


@pytest.mark.parametrize("resize", ["interpolate", "middle"])
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (30, 52), (64, 64), (28, 28)], ids=str)
def test_images_of_any_size(size, resize):
    """Tables of the model's own size read at another one: as the model of that size with resized tables."""
    torch.manual_seed(0)
    model = _randomised(MViT(**TINY, rel_pos_resize=resize)).double().eval()
    other = MViT(**{**TINY, "img_size": size}).double().eval()
    state = model.state_dict()
    for name, t in other.state_dict().items():
        if "rel_pos" in name:
            state[name] = resized(state[name], t.shape[0], resize)
    other.load_state_dict(state)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    _close(model(x), other(x))
    assert other(x).shape == (2, 5)


# ------------------------------------------------------------------------------------------------ layers that are not plain


def test_exchanged_layers_are_called():
    torch.manual_seed(0)
    module = _randomised(PoolingAttention(8, 2, 1, stride_q=2).double())
    x = torch.randn(2, 25, 8, dtype=torch.float64)
    assert lifeops.explain(module)[0].fused
    before = module(x, (4, 6))
    module.pool_q.padding_mode = "circular"
    assert [path.reasons for path in lifeops.explain(module)] == [("pool_q: padding_mode is 'circular', the kernel computes 'zeros'",)]
    assert (module(x, (4, 6)) - before).abs().max() > 1e-3
    module.pool_q.padding_mode = "zeros"
    assert torch.equal(module(x, (4, 6)), before)
    module.pool_k = nn.MaxPool2d(3, 1, 1)
    fused = module(x, (4, 6))
    module.pool_k.dilation = 1, 1
    assert torch.equal(module(x, (4, 6)), fused)
    module.pool_k = nn.AvgPool2d(3, 1, 1, divisor_override=5)
    assert lifeops.explain(module)[0].reasons == ("pool_k: divisor_override is 5, the kernel computes None",)
    assert not torch.equal(module(x, (4, 6)), fused)
    module.pool_k = nn.Conv2d(4, 8, 3, padding=1).double()
    with pytest.raises(ValueError, match=r"PoolingAttention: pool_k makes \(4, 8, 4, 6\) of \(4, 4, 4, 6\), .* \(groups is 1, the kernel"):
        module(x, (4, 6))
    module.pool_k = nn.MaxPool2d(2, 2)
    with pytest.raises(ValueError, match=r"keys and values must lie on one grid, pool_k makes \(2, 3\) and pool_v \(4, 6\)"):
        module(x, (4, 6))


def test_hooks_see_their_layers():
    module, x, seen = PoolingAttention(8, 2, 1, stride_kv=2), torch.randn(2, 25, 8), []
    y = module(x, (4, 6))
    hook = module.pool_v.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    torch.testing.assert_close(module(x, (4, 6)), y)
    hook.remove()
    assert torch.equal(module(x, (4, 6)), y)
    assert seen == [(4, 4, 2, 3)]


# ------------------------------------------------------------------------------------------------ what is refused

REFUSED = {
    "heads": (lambda: PoolingAttention(8, 3), "PoolingAttention: dim and dim_out must be multiples of num_heads 3, got 8 and 8"),
    "mode": (lambda: PoolingAttention(8, 2, mode="mean"), "PoolingAttention: mode must be one of 'conv', 'max', 'avg', 'conv_unshared'"),
    "unshared": (lambda: PoolingAttention(8, 2, mode="conv_unshared"), "PoolingAttention: mode='conv_unshared' needs pool_first=True"),
    "pool first": (lambda: PoolingAttention(6, 4, dim_out=8, pool_first=True), "dim and dim_out must be multiples of num_heads 4"),
    "stride": (lambda: PoolingAttention(8, 2, stride_q=0), "PoolingAttention: stride_q must be at least 1, got 0"),
    "rel_pos": (lambda: PoolingAttention(8, 2, rel_pos=(0, 4)), "PoolingAttention: rel_pos must be at least 1, got 0"),
    "resize": (lambda: PoolingAttention(8, 2, rel_pos_resize="first"), "rel_pos_resize must be 'interpolate' or 'middle', got 'first'"),
    "tokens": (lambda: PoolingAttention(8, 2)(torch.randn(1, 11, 8), (3, 4)), r"PoolingAttention: x.shape\[1\] must be P \+ H\*W"),
    "width": (lambda: PoolingAttention(8, 2)(torch.randn(1, 12, 6), (3, 4)), r"PoolingAttention: x must have shape \(B, N, 8\)"),
    "no patches": (lambda: PoolingAttention(8, 2, 1)(torch.randn(1, 1, 8), (0, 4)), r"grid must have patches, got \(0, 4\)"),
    "no grid": (lambda: PoolingAttention(8, 2)(torch.randn(1, 12, 8)), "PoolingAttention: the grid is unknown"),
    "block": (lambda: MultiscaleBlock(PoolingAttention(8, 2, dim_out=16), 12), "attn.dim_out must be its dim 8 or the block's 12, got 16"),
    "variant": (lambda: mvitv2("huge"), "mvitv2: variant must be one of 'tiny', 'small', 'base', 'large', got 'huge'"),
    "model": (lambda: mvitv2("tiny", num_heads=5), "mvitv2: MViT: PoolingAttention: dim and dim_out must be multiples of num_heads 5"),
    "images": (lambda: MViT(**TINY)(torch.randn(1, 4, 32, 32)), r"MViT: x must be images \(B, 3, 32, 32\), got \(1, 4, 32, 32\)"),
    "no images": (lambda: MViT(**TINY)(torch.randn(3, 32, 32)), r"MViT: x must be images"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------ torch's tools


def test_compile_export_and_state_dict(tmp_path):
    torch.manual_seed(0)
    small = {**TINY, "depths": (1, 1), "class_token": True}
    model = _randomised(MViT(**small)).eval()
    x = torch.randn(2, 3, 32, 32)
    y = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), y)
    system_checks.exported(model, x)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = MViT(**small).eval()
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(again(x), y)
    other = MViT(**small, residual_prefix=False)
    with pytest.raises(RuntimeError, match="saved with residual_prefix=True, this module has residual_prefix=False"):
        other.load_state_dict(torch.load(tmp_path / "model.pt"))
    with pytest.raises(RuntimeError, match=r"cannot be compiled by torch\.jit\.script"):
        torch.jit.script(model)


def test_gradients_of_each_image():
    torch.manual_seed(0)
    system_checks.gradients_of_each_image(_randomised(MViT(**TINY)).double(), torch.randn(2, 3, 32, 28, dtype=torch.float64), 1e-8)


@pytest.mark.parametrize("grad", [True, False])
def test_autocast(grad):
    torch.manual_seed(0)
    model = MViT(**TINY).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), model.float()(x), rtol=0.05, atol=0.05)
