"""Same bits at any thread count, run after run, and for a sample alone or in its batch (forward and dX)."""

import pytest
import torch

from lifeops import registry, testing, torchlib

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _sized(op, B, C, K):
    """A sample of the op, with every sum it can make, at a size that is cut into several tasks."""
    samples = {s.name: s for s in op.samples()}
    sample = samples.get("zero", next(iter(samples.values())))
    if hasattr(sample, "base"):
        return sample._replace(base=sample.base._replace(B=B, H=9, W=11, P=2, C=C, K=K))
    if hasattr(sample, "patches"):
        return sample._replace(B=B, patches=99, C=C)
    if hasattr(sample, "mask_batch"):
        return sample._replace(B=B, H=9, W=11, P=2, h=5, d=C // 5, K=K)
    if hasattr(sample, "discard_ratio"):
        return sample._replace(B=B, R=3, N=199, h=5, d=C // 5, discard_ratio=0.2)
    sample = sample._replace(B=B, H=9, W=11, P=2, C=C)
    return sample._replace(K=K) if hasattr(sample, "K") else sample


def _args(name, dtype, B=6, C=100, K=5):
    op = registry.ops[name]
    return op, testing.make(op, _sized(op, B, C, K), dtype, backend="cpu")


def _at(counts, threads, op, args):
    """The results at each number of threads."""
    for count in counts:
        threads(count)
        yield testing.tensors(torchlib.overload(op)(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [n for n in registry.ops if n.startswith(("token_dwconv", "channel", "dw_shortcut", "rollout"))])
def test_same_bits_at_any_thread_count_and_every_run(name, dtype, threads):
    """All operators but those with torch's own products: life_qkv and local_attention."""
    for size in ({}, {"B": 1, "C": 40}):
        op, args = _args(name, dtype, **size)
        first, *others = _at((1, 2, 2, 3, 4, 1), threads, op, args)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["local_attention", "local_attention_bwd"])
def test_attention_is_close_at_any_thread_count(name, dtype, threads):
    """torch's kernel promises no bits."""
    op, args = _args(name, dtype)
    first, *others = _at((1, 2, 3, 4), threads, op, args)
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(b, a, rtol=4 * testing.EPS[dtype], atol=4 * testing.EPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["token_dwconv", "token_dwconv_bwd_dx", "token_dwconv_act", "local_attention"])
def test_batch_invariance(name, dtype):
    op, args = _args(name, dtype)
    together = testing.tensors(torchlib.overload(op)(*args))[0]
    B, batched = len(args[0]), 3 if name == "local_attention" else 1  # q, k and v
    for b in range(B):
        alone = testing.tensors(torchlib.overload(op)(*(a[b : b + 1] for a in args[:batched]), *args[batched:]))[0]
        assert torch.equal(alone[0], together[b])
