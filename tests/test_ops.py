"""Every op x backend x sample x dtype against the oracle: generated from the registry, nothing is listed here."""

import os

import pytest
import torch

from lifeops import registry, testing, torchlib

BACKEND = os.environ.get("LIFEOPS_TEST_BACKEND", "cpu")  # triton: tests/test_triton_ops.py, in Triton's interpreter
INTERPRETED = BACKEND == "triton"
HALF = (torch.float16, torch.bfloat16)
registry.load(BACKEND)


def _id(value):
    return getattr(value, "name", None) or str(value).removeprefix("torch.")


def _cases(backend, **kwargs):
    return [pytest.param(*case, id="-".join(map(_id, case))) for case in testing.cases(backend, **kwargs)]


CASES = _cases(BACKEND, tiny_only=INTERPRETED)


def _run(op, args):
    out = torchlib.overload(op)(*args)
    if not op.is_empty(*args):
        assert torchlib.last_backend[op.name] == args[-1]
    return out


@pytest.mark.parametrize(("op", "sample", "dtype"), CASES)
def test_oracle(op, sample, dtype, poison):
    args = testing.make(op, sample, dtype, backend=BACKEND)
    testing.check(op, args, _run(op, args), terms=op.reduces(sample) if op.reduces else 1, truncates=INTERPRETED)


@pytest.mark.parametrize(("op", "sample", "dtype"), CASES)
def test_exact(op, sample, dtype, poison):
    if not op.exact(sample):
        pytest.skip("integers do not stay integers here")
    args = testing.make(op, sample, dtype, backend=BACKEND, integers=True)
    stored = (getattr(sample, "weight_dtype", None) or dtype) if op.name.endswith(("dw", "db")) else dtype
    limit = {torch.bfloat16: 256, torch.float16: 2048}.get(stored)
    expected = testing.oracle(op, args)
    if limit and any(e.numel() and e.abs().max() > limit for e in expected):
        pytest.skip(f"sums pass {limit}: not every integer is representable")
    testing.check_exact(op, args, _run(op, args))


@pytest.mark.parametrize(("op", "sample", "dtype"), _cases("reference", tiny_only=True, dtypes=(torch.float32,)))
def test_reference_exact(op, sample, dtype):
    if INTERPRETED:
        pytest.skip("runs beside the cpu backend")
    if not op.exact(sample):
        pytest.skip("integers do not stay integers here")
    args = testing.make(op, sample, dtype, backend="reference", integers=True)
    testing.check_exact(op, args, _run(op, args))


@pytest.mark.skipif(INTERPRETED, reason="runs beside the cpu backend")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=_id)
def test_every_instruction_set(isa, dtype, monkeypatch, poison):
    """Asking for less than the CPU has gives that; asking for more gives what it has."""
    from lifeops import config

    monkeypatch.setattr(config, "settings", config.settings._replace(cpu_isa=isa))
    ran = 0
    for op, sample, _ in testing.cases("cpu", tiny_only=True, dtypes=(dtype,)):
        args = testing.make(op, sample, dtype, backend="cpu")
        testing.check(op, args, _run(op, args), terms=op.reduces(sample) if op.reduces else 1)
        ran += 1
    assert ran > 100 or registry.unavailable("cpu")
