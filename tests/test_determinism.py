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
    sample = sample._replace(B=B, H=9, W=11, P=2, C=C)
    return sample._replace(K=K) if hasattr(sample, "K") else sample


def _args(name, dtype, B=6, C=100, K=5):
    op = registry.ops[name]
    return op, testing.make(op, _sized(op, B, C, K), dtype, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [n for n in registry.ops if n.startswith(("token_dwconv", "channel", "local_attention"))])
def test_same_bits_at_any_thread_count_and_every_run(name, dtype, threads):
    op, args = _args(name, dtype)
    results = []
    for count in (1, 2, 2, 3, 1):
        threads(count)
        results.append(testing.tensors(torchlib.overload(op)(*args)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["token_dwconv", "token_dwconv_bwd_dx", "token_dwconv_act", "local_attention"])
def test_batch_invariance(name, dtype):
    op, args = _args(name, dtype)
    together = testing.tensors(torchlib.overload(op)(*args))[0]
    B, batched = len(args[0]), 3 if name == "local_attention" else 1  # q, k and v
    for b in range(B):
        alone = testing.tensors(torchlib.overload(op)(*(a[b : b + 1] for a in args[:batched]), *args[batched:]))[0]
        assert torch.equal(alone[0], together[b])
