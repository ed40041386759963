"""rollout_step: against a naive one, its invariances, its memory and its messages."""

import re

import pytest
import torch

import lifeops
from lifeops import registry, testing
from lifeops.demo.measure import peak_memory

needs_cpu = pytest.mark.skipif(registry.unavailable("cpu") is not None, reason="no compiled CPU kernels")


def naive_layer(q, k, head_fusion="mean", residual=0.5, discard_ratio=0.0):
    """Â (B, N, N) as one would write it down."""
    attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    fused = {"mean": attention.mean, "max": attention.amax, "min": attention.amin}[head_fusion](1)
    kept = fused.shape[-1] - int(discard_ratio * fused.shape[-1])
    fused = fused * (fused >= fused.topk(kept, dim=-1).values[..., -1:])
    matrix = (1 - residual) * fused + residual * torch.eye(fused.shape[-1])
    return matrix / matrix.sum(-1, keepdim=True)


def naive_rollout(layers, **options):
    """Â_L … Â_1 (B, N, N) of (q, k) pairs, first layer first."""
    product = None
    for q, k in layers:
        layer = naive_layer(q, k, **options)
        product = layer if product is None else layer @ product
    return product


def _layers(count, B, h, N, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, B, h, N, d, generator=generator)) for _ in range(count)]


# ------------------------------------------------------------------------------------------------ the op

OPTIONS = [{}, {"residual": 0.0}, {"head_fusion": "max"}, {"head_fusion": "min", "residual": 0.3}, {"discard_ratio": 0.75},
           {"head_fusion": "max", "discard_ratio": 0.5}]  # fmt: skip


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpu), "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_naive_rollout(backend, options):
    layers, r = _layers(3, 2, 3, 301, 16), torch.rand(2, 4, 301)
    r = start = r / r.sum(-1, keepdim=True)
    for q, k in reversed(layers):
        r = lifeops.rollout_step(r, q, k, backend=backend, **options)
    assert (r - start @ naive_rollout(layers, **options)).abs().max() <= 1e-6
    assert (r.sum(-1) - 1).abs().max() <= 1e-6


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fusion", ["mean", "min"])
def test_same_bits_at_any_thread_count_and_alone_or_in_a_batch(dtype, fusion, threads):
    (q, k), r = _layers(1, 5, 2, 333, 24)[0], torch.rand(5, 3, 333)
    q, k, r = q.to(dtype), k.to(dtype), r.double() if dtype == torch.float64 else r

    def step(r, q, k):
        return lifeops.rollout_step(r, q, k, head_fusion=fusion, discard_ratio=0.1 if fusion == "min" else 0.0, backend="cpu")

    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(step(r, q, k))
    assert all(torch.equal(results[0], other) for other in results[1:])
    for b in range(5):
        assert torch.equal(step(r[b : b + 1], q[b : b + 1], k[b : b + 1])[0], results[0][b])


@needs_cpu
def test_ties_at_the_threshold_stay():
    """Equal keys give equal attention: nothing lies below the threshold, so nothing is discarded."""
    q, k, r = torch.randn(1, 2, 9, 4), torch.zeros(1, 2, 9, 4), torch.rand(1, 1, 9)
    for backend in ("cpu", "reference"):
        full, dropped = (lifeops.rollout_step(r, q, k, discard_ratio=ratio, backend=backend) for ratio in (0.0, 0.9))
        torch.testing.assert_close(dropped, full)


@needs_cpu
def test_nan_reaches_the_maps_it_belongs_to():
    (q, k), r = _layers(1, 2, 2, 40, 8)[0], torch.rand(2, 1, 40)
    k[1, 0, 3, 2] = float("nan")
    out = lifeops.rollout_step(r, q, k, backend="cpu")
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_no_matrix_of_all_pairs_is_allocated():
    N, h = 1536, 4
    (q, k), r = _layers(1, 1, h, N, 8)[0], torch.rand(1, 2, N)
    reference = peak_memory(lambda: lifeops.rollout_step(r, q, k, backend="reference"))
    naive = peak_memory(lambda: r @ naive_layer(q, k))
    assert naive >= h * N * N * 4
    assert reference <= 0.8 * naive  # in blocks of 2**22 scores, whatever N is
    if registry.unavailable("cpu") is None:
        assert peak_memory(lambda: lifeops.rollout_step(r, q, k, backend="cpu")) <= N * N * 4 / 100


def test_explain_names_the_backend_and_the_copy():
    (q, k), r = _layers(1, 1, 2, 9, 4)[0], torch.rand(1, 9, 2).transpose(1, 2)
    text = str(lifeops.explain("rollout_step", r, q, k, backend="reference"))
    assert text.startswith("rollout_step: reference")
    assert "not triton: Triton needs a CUDA device" in text or "not triton: triton cannot be imported" in text
    if registry.unavailable("cpu") is None:
        assert "copies r" in str(lifeops.explain("rollout_step", r, q, k))


def test_flops_count_both_products():
    from torch.utils.flop_counter import FlopCounterMode

    (q, k), r = _layers(1, 2, 3, 10, 4)[0], torch.rand(2, 5, 10)
    with FlopCounterMode(display=False) as counter:
        lifeops.rollout_step(r, q, k)
    assert counter.get_total_flops() == 2 * 2 * 10 * 10 * (3 * 4 + 5)


def test_the_operator_passes_opcheck():
    op = registry.ops["rollout_step"]
    args = testing.make(op, op.samples()[0], torch.float32)
    results = torch.library.opcheck(torch.ops.lifeops.rollout_step.default, args, test_utils=("test_schema", "test_faketensor"))
    assert set(results.values()) == {"SUCCESS"}


_Q, _R = torch.randn(2, 3, 9, 4), torch.rand(2, 1, 9)
STEP_ERRORS = {
    "rank": ((_R, _Q[0], _Q[0]), {}, ValueError, "q must have shape (B, h, N, d) with h > 0 and d > 0, got (3, 9, 4)"),
    "k": ((_R, _Q, _Q[:, :, :8]), {}, ValueError, "k must be like q, (2, 3, 9, 4), torch.float32 on cpu, got (2, 3, 8, 4)"),
    "r": ((_R[:, :, :8], _Q, _Q), {}, ValueError, "r must have shape (B, R, N) = (2, R, 9), got (2, 1, 8)"),
    "r_dtype": ((_R.double(), _Q, _Q), {}, TypeError, "r.dtype must be torch.float32 beside torch.float32 q, got torch.float64"),
    "dtype": ((_R, _Q.int(), _Q.int()), {}, TypeError, "q.dtype must be float64, float32, float16 or bfloat16, got torch.int32"),
    "fusion": ((_R, _Q, _Q), {"head_fusion": "sum"}, ValueError, "head_fusion must be one of 'mean', 'max', 'min', got 'sum'"),
    "residual": ((_R, _Q, _Q), {"residual": 1.5}, ValueError, "residual must be between 0 and 1, got 1.5"),
    "discard": ((_R, _Q, _Q), {"discard_ratio": 1.0}, ValueError, "discard_ratio must be at least 0 and below 1, got 1.0"),
    "grad": ((_R, _Q.clone().requires_grad_(), _Q), {}, RuntimeError, "rollout_step: is not differentiable"),
}  # fmt: skip


@pytest.mark.parametrize("name", STEP_ERRORS)
def test_op_messages(name):
    args, options, error, message = STEP_ERRORS[name]
    with pytest.raises(error, match=re.escape(message)):
        lifeops.rollout_step(*args, **options)
