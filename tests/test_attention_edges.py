"""local_attention where types, masks and sizes meet: autocast, masks of any dtype, padding of NaN, nothing to attend to."""

import itertools

import pytest
import torch

import lifeops
from lifeops.nn.attend import fused_attention

BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
GRID, P, h, d = (2, 3), 1, 2, 4
N, C = P + GRID[0] * GRID[1], h * d


def _id(value):
    return str(value).removeprefix("torch.")


def _qkv(dtype, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, h, N, d, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def _mask(kind, dtype=None):
    values = torch.randn(N, N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    if kind == "bool":
        return values > -1
    return values.to(dtype).requires_grad_() if kind == "float" else None


def _call(q, k, v, dropout=0.0, **options):
    options.setdefault("weight", torch.ones(C, 1, 3, 3, dtype=q.dtype) / 9)
    generator = torch.Generator().manual_seed(3)
    return lifeops.local_attention(q, k, v, grid=GRID, num_prefix_tokens=P, dropout_p=dropout, generator=generator, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_autocast(dtype, backend):
    """Every way through: a step runs, its result has autocast's dtype, and the explicit formulas keep float32 inside."""
    for mask, dropout, padded in itertools.product(("", "bool", "float"), (0.0, 0.3), (False, True)):
        attn_mask = _mask(mask, torch.float32)
        key_mask = torch.arange(N).expand(2, N) < 5 if padded else None
        q, k, v = _qkv(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = _call(q, k, v, dropout, attn_mask=attn_mask, key_mask=key_mask, backend=backend)
        lower = dtype if dtype == torch.float64 else torch.bfloat16
        assert y.dtype == lower
        leaves = [q, k, v] + ([attn_mask] if mask == "float" else [])
        grads = torch.autograd.grad(y.sum(), leaves)
        cast = [t.detach().to(lower).requires_grad_() for t in (q, k, v)]
        options = {"weight": torch.ones(C, 1, 3, 3, dtype=dtype) / 9, "attn_mask": attn_mask, "key_mask": key_mask, "backend": backend}
        plain = _call(*cast, dropout, **options)
        torch.testing.assert_close(y, plain, rtol=2e-2, atol=2e-2)
        expected = torch.autograd.grad(plain.sum(), [*cast, *leaves[3:]])
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want.to(got.dtype), rtol=3e-2, atol=3e-2)
    q, k, v = (t.detach() for t in _qkv(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mask = _mask("float", torch.float32).detach()
        y = _call(q, k, v, attn_mask=mask)
        one = lambda q: _call(q[None], k[:1], v[:1], attn_mask=mask)[0]  # noqa: E731
        torch.testing.assert_close(torch.func.vmap(one, randomness="same")(q)[:1], y[:1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_a_mask_of_any_dtype(dtype, mask_dtype, backend):
    """Added up in the scores' dtype; its gradient comes back in its own."""
    mask = _mask("float", mask_dtype)
    wide = torch.promote_types(dtype, torch.float32)
    same = mask.detach().to(wide).requires_grad_()
    for dropout in (0.0, 0.4):
        grads = []
        for m in (mask, same):
            y = _call(*_qkv(dtype), dropout, attn_mask=m, backend=backend)
            grads.append((y, *torch.autograd.grad(y.sum(), [m])))
        assert torch.equal(grads[0][0], grads[1][0])
        assert grads[0][1].dtype == mask_dtype
        assert torch.equal(grads[0][1], grads[1][1].to(mask_dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("mask", ["", "bool", "float"])
def test_what_lies_in_padding_reaches_nothing(mask, dtype, backend):
    """Neither forward nor back, with NaN in q, k, v and in the gradient of its output; its own output and gradients are zero."""
    exists = torch.ones(2, N, dtype=torch.bool)
    exists[1, 4:] = False
    results = []
    for filling in (0.0, torch.nan):
        qkv = [t.detach().masked_fill(~exists[:, None, :, None], filling).requires_grad_() for t in _qkv(dtype)]
        weight = torch.randn(C, 1, 3, 3, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
        bias, attn_mask = torch.ones(C, dtype=dtype, requires_grad=True), _mask(mask, torch.float32)
        y = _call(*qkv, weight=weight, bias=bias, key_mask=exists, attn_mask=attn_mask, backend=backend)
        dy = torch.randn(2, N, C, generator=torch.Generator().manual_seed(6)).to(dtype)
        dy = dy.masked_fill(~exists[:, :, None], filling)
        leaves = [*qkv, weight, bias] + ([attn_mask] if mask == "float" else [])
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    y, dq, dk, dv = results[1][:4]
    assert not y[~exists].any()
    for g in (dq, dk, dv):
        assert not g.transpose(1, 2)[~exists].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_nan_shows(backend):
    mask = torch.zeros(N, N)
    mask[2, 3] = torch.nan
    y = _call(*(t.detach() for t in _qkv(torch.float32)), weight=None, attn_mask=mask, backend=backend)
    assert torch.equal(y.isnan().any(-1), torch.arange(N).expand(2, N) == 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_nothing_to_attend_to(dtype):
    """Empty batches and sequences give empty results and zero gradients; heads without channels are refused."""
    for B, grid, prefix in ((0, GRID, P), (2, (0, 3), 0), (2, (0, 0), 2), (0, (0, 0), 0)):
        n = prefix + grid[0] * grid[1]
        q, k, v = (torch.randn(B, h, n, d, dtype=dtype, requires_grad=True) for _ in range(3))
        weight = torch.ones(C, 1, 3, 3, dtype=dtype, requires_grad=True)
        mask = torch.zeros(n, n, requires_grad=True)
        for key_mask in (None, torch.ones(B, n, dtype=torch.bool)):
            options = {"grid": grid, "num_prefix_tokens": prefix, "attn_mask": mask, "key_mask": key_mask}
            y = lifeops.local_attention(q, k, v, weight, **options)
            assert y.shape == (B, n, C)
            grads = torch.autograd.grad(y.sum(), [q, k, v, weight, mask])
            assert all(g.isfinite().all() for g in grads)
            assert not grads[3].any()
    for shape in ((2, h, N, 0), (2, 0, N, d)):
        with pytest.raises(ValueError, match="local_attention: q must have at least one head and one channel a head"):
            lifeops.local_attention(*(torch.randn(shape),) * 3, grid=GRID, num_prefix_tokens=P)


SWIN = {"img_size": 16, "patch_size": 2, "embed_dim": 6, "depths": (2, 2), "num_heads": (1, 2), "window_size": 2}
REGIONS = {"img_size": 20, "patch_size": 2, "stem": "1conv", "embed_dim": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}


@pytest.mark.parametrize(
    ("build", "options", "kernel"),
    [(lifeops.models.SwinTransformer, SWIN, "lifeops::local_attention"),
     (lifeops.models.RegionViT, REGIONS, "aten::_scaled_dot_product_flash_attention_for_cpu")],
    ids=["Swin", "RegionViT"],
)  # fmt: skip
def test_windows_keep_a_fused_kernel(build, options, kernel):
    """Shifted and padded ones too: torch takes a bias of two or four dimensions, and composes with any other, which takes twice as long."""
    model, side = build(**options).eval(), options["img_size"]
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        model(torch.randn(3, 3, side, side))
    calls = {event.key: event.count for event in seen.key_averages()}
    assert calls.get(kernel) == 4
    assert not any("softmax" in name for name in calls)


@pytest.mark.parametrize("keys", [1, 2, 7, 8, 15, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_a_query_of_nan_shows_among_few_keys(dtype, keys):
    """Torch's own kernel gives 0 for it, of fewer keys than a vector has lanes: findings/cpu_attention_nan_of_few_keys.sh."""
    q, k = torch.ones(2, 2, 3, 4, dtype=dtype), torch.ones(2, 2, keys, 4, dtype=dtype)
    q[1, 0, 2, 1] = torch.nan
    y = fused_attention(q, k, k)
    expected = torch.ones_like(q)
    expected[1, 0, 2] = torch.nan
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_row_of_the_smallest_numbers(backend, dtype):
    """As transformers hides what is padding: all keys the same for that query, none of them n times; gradients of the formula."""
    q, k, v = (torch.randn(2, 3, 21, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 1, 21, 21, dtype=dtype)
    mask[..., 4, :] = torch.finfo(dtype).min
    y = lifeops.local_attention(q, k, v, grid=(4, 5), num_prefix_tokens=1, attn_mask=mask, backend=backend)
    expected = ((q @ k.transpose(-1, -2) * 8**-0.5 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    if backend == "reference":
        got, wanted = (torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (y, expected))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
