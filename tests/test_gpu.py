"""Every op x backend x sample x dtype on a CUDA device, where there is one: oracle, exact tier, determinism."""

import pytest
import torch

from lifeops import registry, testing, torchlib

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
BACKENDS = ("cuda", "triton")
CASES = []
if torch.cuda.is_available():
    CASES = [pytest.param(b, *case, id=f"{b}-{case[0].name}-{case[1].name}-{case[2]}") for b in BACKENDS for case in testing.cases(b)]


def _run(backend, op, args):
    reasons = registry.reasons_against(op, backend, op.problem(*args))
    if reasons:
        pytest.skip("; ".join(reasons))
    out = torchlib.overload(op)(*args)
    if not op.is_empty(*args):
        assert torchlib.last_backend[op.name] == backend
    return out


@pytest.mark.parametrize(("backend", "op", "sample", "dtype"), CASES)
def test_oracle(backend, op, sample, dtype):
    args = testing.make(op, sample, dtype, backend=backend, device="cuda")
    testing.check(op, args, _run(backend, op, args), terms=op.reduces(sample) if op.reduces else 1)


@pytest.mark.parametrize(("backend", "op", "sample", "dtype"), CASES)
def test_exact_and_repeatable(backend, op, sample, dtype):
    args = testing.make(op, sample, dtype, backend=backend, device="cuda", integers=op.exact(sample))
    first, again = _run(backend, op, args), _run(backend, op, args)
    assert all(torch.equal(a, b) for a, b in zip(testing.tensors(first), testing.tensors(again), strict=True))
    if not op.exact(sample):
        pytest.skip("repeatable; integers do not stay integers here")
    limit = {torch.bfloat16: 256, torch.float16: 2048}.get(dtype)
    if limit and any(e.numel() and e.abs().max() > limit for e in testing.oracle(op, args)):
        pytest.skip(f"sums pass {limit}: not every integer is representable")
    testing.check_exact(op, args, first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_to_the_31_elements(backend):
    """The last sample of a tensor past 32-bit offsets equals the same sample computed alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    op = registry.ops["token_dwconv"]
    B, N, C = 2730, 1 + 32 * 32, 768
    x, w = torch.randn(B, N, C, device="cuda", dtype=torch.bfloat16), torch.randn(C, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    rest = (w, None, None, 32, 32, 1, "keep", backend)
    together, alone = _run(backend, op, (x, *rest)), _run(backend, op, (x[-1:], *rest))
    assert torch.equal(together[-1], alone[0])
