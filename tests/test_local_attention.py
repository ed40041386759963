"""local_attention: gradients, masks, dropout, what is copied, its modules, LIFE in Swin's windows. Values: tests/test_ops.py."""

import pytest
import torch
import torch.nn.functional as F

import lifeops
from conftest import declare_torchvision_ops
from lifeops import config, native_attention, registry, testing, torchlib
from lifeops.nn import LifeAttention, LocalAttention
from lifeops.ops.local_attention.formula import sequence
from lifeops.testing import Maker

BACKENDS = ["reference", "cpu"]
GRID, P, N = (3, 4), 2, 14


def _problem(dtype=torch.float64, B=2, h=2, d=4, K=3, grad=True):
    """q, k, v as chunks of one projection, weight, bias."""
    draw = Maker(0, dtype)
    qkv = draw(B, N, 3, h, d).permute(2, 0, 3, 1, 4)
    return tuple(t.detach().requires_grad_(grad) for t in (*qkv.unbind(0), draw(h * d, 1, K, K), draw(h * d)))


def _call(q, k, v, w=None, b=None, mask=None, **options):
    return lifeops.local_attention(q, k, v, w, b, grid=GRID, num_prefix_tokens=P, attn_mask=mask, **options)


def _formula(q, k, v, w=None, b=None, mask=None, scale=None):
    """Plain PyTorch, written out."""
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    attn = ((s if mask is None else s + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    if w is None:
        return attn
    map_ = v.transpose(1, 2).flatten(2)[:, P:].transpose(1, 2).unflatten(2, GRID)
    local = F.conv2d(map_, w, b, padding=w.shape[-1] // 2, groups=w.shape[0]).flatten(2).transpose(1, 2)
    return attn + F.pad(local, (0, 0, P, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("K", [1, 3, 5])
def test_values_and_gradients(backend, K):
    args = (*_problem(K=K), Maker(1, torch.float64)(2, N, N).requires_grad_())
    y, expected = _call(*args, backend=backend, scale=0.7), _formula(*args, scale=0.7)
    assert y.shape == (2, N, 8)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    g = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, args, g), torch.autograd.grad(expected, args, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    args = _problem(h=1)
    assert torch.autograd.gradcheck(lambda *a: _call(*a, backend=backend), args, fast_mode=True)
    mask = Maker(1, torch.float64)(N, N) > -0.5
    assert torch.autograd.gradcheck(lambda *a: _call(*a, mask=mask, backend=backend), args, fast_mode=True)
    dropped = lambda *a: _call(*a, dropout_p=0.3, generator=torch.Generator().manual_seed(7), backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(dropped, args, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_an_error(backend):
    q, k, v, w, b = _problem()
    (first,) = torch.autograd.grad(_call(q, k, v, w, b, backend=backend).square().sum(), q, create_graph=True)
    (plain,) = torch.autograd.grad(_call(q, k, v, w, b, backend=backend).square().sum(), q)
    assert torch.equal(first, plain)
    with pytest.raises(RuntimeError, match="local_attention: differentiable once, a second derivative was asked for"):
        first.sum().backward()


@pytest.mark.parametrize("wants", [(1, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1), (0, 0, 1, 1, 1)])
def test_frozen_inputs(wants):
    """Gradients of what is asked for alone, the same as when all are; nothing of attention runs for the convolution's own."""
    every = _problem()
    full = torch.autograd.grad(_call(*every).square().sum(), every)
    args = [t.detach().requires_grad_(bool(n)) for t, n in zip(every, wants, strict=True)]
    torchlib.last_backend.clear()
    _call(*args).square().sum().backward()
    assert ("local_attention_bwd" in torchlib.last_backend) == any(wants[:3])
    for t, expected, n in zip(args, full, wants, strict=True):
        assert (t.grad is not None) == bool(n)
        if n:
            torch.testing.assert_close(t.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_keys_is_zero_and_has_no_gradient(backend):
    args = _problem()[:3]
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[5] = False
    for attn_mask in (mask, torch.zeros(N, N, dtype=torch.float64).masked_fill(~mask, -torch.inf)):
        y = _call(*args, mask=attn_mask, backend=backend)
        assert torch.equal(y[:, 5], torch.zeros_like(y[:, 5]))
        assert (y[:, :5] != 0).all()
        grads = torch.autograd.grad(y.sum(), args)
        assert all(g.isfinite().all() for g in grads)
        assert torch.equal(grads[0][:, :, 5], torch.zeros_like(grads[0][:, :, 5]))
    y = _call(*args, key_mask=torch.tensor([True, False])[:, None].expand(2, N), backend=backend)
    assert torch.equal(y[1], torch.zeros_like(y[1]))


def _with_nan(tensors, j):
    """k and v with NaN in token ``j``."""
    q, k, v, *rest = (t.detach().clone() for t in tensors)
    k[:, :, j], v[:, :, j] = float("nan"), float("nan")
    return [t.requires_grad_() for t in (q, k, v, *rest)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_masked_key_reaches_nothing(backend, dtype):
    """Padding: neither attention nor convolution. attn_mask: no attention."""
    exists = torch.ones(2, N, dtype=torch.bool)
    exists[:, 9] = False
    clean = _problem(dtype)
    args = _with_nan(clean, 9)
    y = _call(*args, key_mask=exists, backend=backend)
    assert torch.equal(y, _call(*clean, key_mask=exists, backend=backend))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), args))
    hidden = exists[:1].expand(N, N)
    for mask in (hidden, torch.zeros(N, N).masked_fill(~hidden, -torch.inf)):
        y = _call(*args[:3], mask=mask, backend=backend)
        torch.testing.assert_close(y, _call(*clean[:3], mask=mask, backend=backend), rtol=0, atol=0)
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), args[:3]))


def test_padding_is_as_if_the_tokens_were_not_there():
    """An image of 3x2 patches in a batch of 3x4."""
    q, k, v, w, b = _problem(B=1)
    columns = torch.arange(12).view(GRID)[:, :2].flatten() + P
    rows = torch.cat((torch.arange(P), columns))
    exists = torch.zeros(1, N, dtype=torch.bool).index_fill_(1, rows, True)
    small = [t[:, :, rows] for t in (q, k, v)]
    expected = lifeops.local_attention(*small, w, b, grid=(3, 2), num_prefix_tokens=P)
    torch.testing.assert_close(_call(q, k, v, w, b, key_mask=exists)[:, rows], expected)


@pytest.mark.parametrize("name", ["plain", "inference", "width_20", "n257_mask", "padding_and_mask", "bool_mask", "n1026"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa, dtype, name, monkeypatch):
    """Vectors of other lengths: other panels, other blocks of keys, other tails."""
    monkeypatch.setattr(config, "settings", config.settings._replace(cpu_isa=isa))
    for op in (registry.ops["local_attention"], registry.ops["local_attention_bwd"]):
        for sample in (s for s in op.samples() if s.name == name):
            args = testing.make(op, sample, dtype, backend="cpu")
            testing.check(op, args, torchlib.overload(op)(*args), terms=op.reduces(sample))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ["", "bool", "float", "padding", "expanded", "hidden"])
def test_plain_attention_without_the_compiled_kernels(kind, dtype, monkeypatch):
    """torch's own kernel behind the same backend: values, gradients, and NaN where the compiled one has it."""
    q, k, v = _problem(dtype)[:3]
    options = {"backend": "cpu"}
    if kind == "padding":
        options["key_mask"] = torch.arange(N).expand(2, N) < 9
    if kind in ("bool", "float"):
        drawn = Maker(2, torch.float64)(2, 1, N, N)
        options["mask"] = drawn > -0.5 if kind == "bool" else drawn.float()
    if kind == "expanded":
        k = k[:, :, :1].expand(-1, -1, N, -1)
    if kind == "hidden":  # a query of NaN, whom torch's kernel takes for one without keys, and infinite scores
        q = torch.where(torch.arange(N)[:, None] == 3, torch.nan, q)
        k = torch.where(torch.arange(N)[:, None] == 5, torch.inf, k)
    g = torch.randn(2, N, 8, dtype=dtype)
    results = []
    for missing in (False, True):
        if missing:
            monkeypatch.setitem(registry._unavailable, "cpu", "left out")
            for name in ("local_attention", "local_attention_bwd"):
                monkeypatch.setattr(native_attention, name, None)
        y = _call(q, k, v, **options)
        results.append((y, *torch.autograd.grad(y, (q, k, v), g)))
    eps = 16 * max(testing.EPS[dtype], 1e-6 if dtype == torch.float32 else 0)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=eps, atol=eps, equal_nan=True)


MASKS = {"shared": (N, N), "heads": (2, N, N), "images": (2, 1, N, N), "all": (2, 2, N, N), "rows": (1, 1, 1, N)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_mask_gradient_has_the_masks_shape(backend, shape):
    args = (*_problem()[:3], None, None, Maker(2, torch.float64)(*shape).requires_grad_())
    needed = *args[:3], args[5]
    ours, theirs = (torch.autograd.grad(f(*args).square().sum(), needed) for f in (lambda *a: _call(*a, backend=backend), _formula))
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_a_function_of_the_generator(backend):
    q, k, v = (t.detach() for t in _problem(B=8, h=4)[:3])
    one, again, other = (_call(q, k, v, dropout_p=0.4, generator=torch.Generator().manual_seed(s), backend=backend) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    default = _call(q, k, v, dropout_p=0.4, backend=backend)
    torch.manual_seed(3)
    assert torch.equal(default, _call(q, k, v, dropout_p=0.4, backend=backend))
    ones = torch.ones_like(v)
    means = _call(q, k, ones, dropout_p=0.4, generator=torch.Generator().manual_seed(1), backend=backend)
    assert abs(means.mean() - 1) < 0.05  # 6000 kept or dropped probabilities, rescaled
    assert means.std() > 0.1


def test_only_a_width_without_stride_1_is_copied():
    q, k, v, w, b = _problem(torch.float32, grad=False)
    scales = torch.randn(2, N, 3 * 8 + 5)[:, :, 5:].chunk(3, -1)
    before = torchlib.copies["count"]
    _call(q, k, v, w, b)
    _call(*(t.unflatten(2, (2, 4)).transpose(1, 2) for t in scales), w, b)
    assert torchlib.copies["count"] == before
    y = _call(q.transpose(-1, -2).contiguous().transpose(-1, -2), k, v, w, b)
    assert torchlib.copies["count"] == before + 1
    torch.testing.assert_close(y, _call(q, k, v, w, b))


def test_nothing_is_copied_around_attention():
    """One kernel for attention and its local term, and no operator that moves a sequence."""
    q, k, v = torch.randn(4, 198, 3, 2, 32).permute(2, 0, 3, 1, 4)
    weight = torch.randn(64, 1, 3, 3)
    with torch.profiler.profile(record_shapes=True) as prof, torch.no_grad():
        lifeops.local_attention(q, k, v, weight, grid=(14, 14), num_prefix_tokens=2)
    ran = {e.key for e in prof.key_averages() if e.key.startswith(("aten::", "lifeops"))}
    assert {k for k in ran if k.startswith("lifeops")} == {"lifeops::local_attention", "lifeops_native::local_attention"}
    moved = [e for e in prof.events() if e.name in ("aten::copy_", "aten::clone", "aten::cat")]
    large = [e for e in moved if any(torch.Size(s).numel() >= v.numel() for s in e.input_shapes if s)]
    assert not large


def test_per_sample_gradients_and_compile():
    args = _problem(grad=False)
    loss = lambda q, k, v, w, b: _call(q, k, v, w, b).square().sum()  # noqa: E731
    got = torch.func.vmap(torch.func.grad(lambda q, k, v, w, b: loss(q[None], k[None], v[None], w, b)), (0, 0, 0, None, None))(*args)
    torch.testing.assert_close(got, torch.func.grad(loss)(*args))
    torch._dynamo.reset()
    leaves = _problem()
    compiled = torch.compile(_call, fullgraph=True, dynamic=True, backend="aot_eager")
    y = compiled(*leaves)
    torch.testing.assert_close(y, _call(*leaves))
    g = torch.randn_like(y)
    for a, e in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(_call(*leaves), leaves, g), strict=True):
        torch.testing.assert_close(a, e)
    torch.compile(lambda *a: _call(*a, dropout_p=0.5), fullgraph=True, backend="aot_eager")(*leaves).sum().backward()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_backend_asked_for_runs_under_torch_func(backend):
    q, weight = torch.randn(1, 2, 7, 4), torch.randn(8, 1, 3, 3)

    def loss(q):
        return lifeops.local_attention(q, q, q, weight, grid=(2, 3), num_prefix_tokens=1, backend=backend).sum()

    torchlib.last_backend.pop("token_dwconv", None)
    torch.func.grad(loss)(q)
    assert torchlib.last_backend["token_dwconv"] == backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    args = _problem(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = _call(*args)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), _call(*args), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in args)


def test_explain_names_every_op_of_the_call():
    args = _problem()
    report = lifeops.explain("local_attention", *args, grid=GRID, num_prefix_tokens=P)
    assert [e.op for e in report] == ["local_attention", "local_attention_bwd", "token_dwconv", "token_dwconv_bwd_dw"]
    assert report[0].chosen == "cpu"


# ------------------------------------------------------------------------------------------------ modules


def test_life_attention_is_what_it_was(monkeypatch):
    """Bit for bit torch's scaled_dot_product_attention around the same projections, masks and causality included."""
    torch.manual_seed(0)
    for heads in (3, 4):
        module = LifeAttention(24, heads, 2)
        x = torch.randn(2, N, 24)
        for options in ({}, {"attn_mask": torch.randn(N, N)}, {"attn_mask": torch.rand(2, 1, N, N) > 0.3}, {"is_causal": True}):
            q, k, v = module.qkv_heads(x, GRID)
            expected = module.proj(sequence(F.scaled_dot_product_attention(q, k, v, **options)))
            torch.testing.assert_close(module(x, GRID, **options), expected, rtol=1e-5, atol=1e-6)
    assert torchlib.last_backend["local_attention"] == "cpu"
    with lifeops.use_backend("reference"):
        module(x, GRID)
    assert torchlib.last_backend["local_attention"] == "reference"
    with pytest.raises(ValueError, match="LifeAttention: attn_mask must be None where is_causal is set"):
        module(x, GRID, attn_mask=torch.randn(N, N), is_causal=True)
    module = LifeAttention(24, 3, 2, attn_drop=0.5)
    assert not torch.equal(module(x, GRID), module(x, GRID))
    module.eval()
    assert torch.equal(module(x, GRID), module(x, GRID))


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "proj_bias": False}, {"gated": True}])
def test_module_is_timms_attention_plus_the_local_term(options):
    declare_torchvision_ops()
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    ours = LocalAttention(24, 4, 5, num_prefix_tokens=P, **options).double()
    try:
        theirs = layers.Attention(24, 4, norm_layer=torch.nn.LayerNorm, **options).double()
    except TypeError:
        pytest.skip("this timm has fewer options")
    missing, unexpected = theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("local.")}, strict=False)
    assert not missing
    assert not unexpected
    x = torch.randn(2, N, 24, dtype=torch.float64)
    torch.nn.init.zeros_(ours.local.weight), torch.nn.init.zeros_(ours.local.bias)
    torch.testing.assert_close(ours(x, GRID), theirs(x))
    if not options:
        torch.nn.init.normal_(ours.local.weight), torch.nn.init.normal_(ours.local.bias)
        q, k, v = ours.qkv(x).unflatten(2, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        torch.testing.assert_close(ours(x, GRID), ours.proj(_formula(q, k, v, ours.local.weight, ours.local.bias)))


def test_module_messages_and_grid():
    module = LocalAttention(8, 2, num_prefix_tokens=P, grid=GRID)
    assert module(torch.randn(1, N, 8)).shape == (1, N, 8)
    assert set(module.state_dict()) == {"qkv.weight", "local.weight", "local.bias", "proj.weight", "proj.bias"}
    with pytest.raises(ValueError, match="LocalAttention: the grid is unknown"):
        LocalAttention(8, 2)(torch.randn(1, N, 8))
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got dim = 8, num_heads = 3"):
        LocalAttention(8, 3)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        LocalAttention(8, 2, 4)
    with pytest.raises(ValueError, match="num_prefix_tokens must not be negative, got -1"):
        LocalAttention(8, 2, num_prefix_tokens=-1)


# ------------------------------------------------------------------------------------------------ LIFE in Swin V2


def _windows(x, ws):
    """(B, H, W, C) to (B * windows, ws², C)."""
    B, H, W, C = x.shape
    return x.view(B, H // ws, ws, W // ws, ws, C).transpose(2, 3).reshape(-1, ws * ws, C)


def _swin_life(x, weights, logit_scale, position, mask, h, ws):
    """Swin V2's cosine attention over LIFE's q, k, v, window by window, from the authors' definition: q, k, v of every window are
    made of three scales, each convolved inside the window with zeros around it.
    """
    w1, b1, dw2, pw2, dw3, pw3 = weights
    d = x.shape[-1] // 3
    z = [F.linear(x, w1, b1)]
    for dw, pw in ((dw2, pw2), (dw3, pw3)):
        map_ = z[-1].transpose(1, 2).unflatten(2, (ws, ws))
        z.append(F.linear(F.conv2d(map_, dw, padding=dw.shape[-1] // 2, groups=dw.shape[0]).flatten(2).transpose(1, 2), pw))
    q, k, v = (torch.cat([s[..., i * d : (i + 1) * d] for s in z], -1).unflatten(2, (h, -1)).transpose(1, 2) for i in range(3))
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
    attn = attn * logit_scale.clamp(max=torch.log(torch.tensor(100.0))).exp() + 16 * torch.sigmoid(position)
    attn = attn.view(-1, len(mask), h, ws * ws, ws * ws) + mask[:, None]
    return (attn.flatten(0, 1).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("h", [3, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_swin_windows_with_life(backend, h):
    """life_qkv without prefix tokens inside each window after the cyclic shift, local_attention with Swin V2's bias."""
    C, ws, B, draw = 12, 4, 2, Maker(3, torch.float64)
    image = torch.roll(draw(B, 8, 8, C), (-2, -2), (1, 2))
    region = torch.zeros(1, 8, 8, 1)
    for i, (rows, columns) in enumerate((a, b) for a in ((0, 4), (4, 6), (6, 8)) for b in ((0, 4), (4, 6), (6, 8))):
        region[:, slice(*rows), slice(*columns)] = i
    region = _windows(region, ws).squeeze(-1)
    mask = torch.where(region[:, None] == region[:, :, None], 0.0, -100.0).double()  # (windows, ws², ws²)
    weights = [draw(C, C), draw(C), draw(C, 1, 3, 3), draw(C, C), draw(C, 1, 5, 5), draw(C, C)]
    leaves = [t.requires_grad_() for t in (image, *weights, draw(h, 1, 1) + 4, draw(h, ws * ws, ws * ws))]

    def ours(image, *rest):
        *w, logit_scale, position = rest
        x = _windows(image, ws)
        q, k, v = (t.unflatten(2, (h, -1)).transpose(1, 2) for t in lifeops.life_qkv(x, *w, grid=(ws, ws), num_prefix_tokens=0))
        q = F.normalize(q, dim=-1) * logit_scale.clamp(max=torch.log(torch.tensor(100.0))).exp()
        bias = 16 * torch.sigmoid(position) + mask.repeat(B, 1, 1)[:, None]
        return lifeops.local_attention(q, F.normalize(k, dim=-1), v, grid=(ws, ws), scale=1.0, attn_mask=bias)

    with lifeops.use_backend(backend):
        y = ours(*leaves)
    expected = _swin_life(_windows(leaves[0], ws), leaves[1:7], leaves[7], leaves[8], mask, h, ws)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    g = torch.randn_like(y)
    for a, e in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-9)
