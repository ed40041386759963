"""Roll-out's Triton kernels: the interpreter against the oracle, and the machine code for three architectures, both without a GPU.

Interpreting and compiling need processes of their own. All samples: TRITON_INTERPRET=1 LIFEOPS_TEST_BACKEND=triton pytest
tests/test_ops.py -k rollout; all compiled variants: python -m bench.rollout_budgets.
"""

import json

import pytest
import torch

pytest.importorskip("triton")

from test_triton_budgets import python
from test_triton_ops import _interpreted


def test_samples_in_the_interpreter():
    names = "one_token", "min", "discard_max", "transposed", "expanded", "wide_maps", "peaked"
    chosen = " or ".join(f"rollout_step-{name}-float32" for name in names)
    assert _interpreted("test_ops.py", f"test_oracle and ({chosen} or rollout_step-max-bfloat16)") == len(names) + 1


@pytest.mark.parametrize(
    ("dtype", "pieces"),
    [
        (torch.float32, {1: 16, 17: 32, 32: 32, 48: 16, 64: 32, 72: 32, 80: 16, 128: 32}),
        (torch.bfloat16, {24: 32, 48: 16, 64: 64, 80: 16, 96: 32, 128: 64}),
        (torch.float64, {24: 16, 64: 16}),
    ],
    ids=str,
)
def test_heads_are_read_in_pieces(dtype, pieces):
    """That divide the width where multiples of 16 do, else masked; the shared memory bounds them."""
    from lifeops.kernels.rollout_step import blocks_of

    assert {d: blocks_of(d, 1, dtype)["BLOCK_D"] for d in pieces} == pieces


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_doubles_are_given_all_registers(dtype):
    """Unasked, ptxas keeps some of them on the stack; the other dtypes' kernels need fewer."""
    from lifeops.kernels.rollout_step import launches

    r, q = torch.zeros(1, 1, 5, dtype=dtype), torch.zeros(1, 2, 5, 16, dtype=dtype)
    asked = [arguments.get("maxnreg") for _, _, arguments in launches(r, q, q, 1.0, "mean", 0.5, 0, torch.empty_like(r))]
    assert asked[0] == (255 if dtype == torch.float64 and torch.version.hip is None else None)


def test_bfloat16_on_older_devices(monkeypatch):
    """As the driver would refuse it; float32 runs there."""
    from lifeops.kernels.rollout_step import supports
    from lifeops.ops.rollout_step import op

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    q = torch.zeros(1, 2, 5, 16)
    problem = op.problem(torch.zeros(1, 1, 5), q, q, 1.0, "mean", 0.5, 0.0, "triton")._replace(device=torch.device("cuda"))
    for capability, dtype, reasons in (
        ((7, 5), torch.bfloat16, ["bfloat16 needs compute capability 8.0, got 7.5"]),
        ((7, 5), torch.float32, []),
        ((8, 0), torch.bfloat16, []),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert supports(problem._replace(dtype=dtype)) == reasons


def test_compiled_without_spills():
    """main's exit status says whether shared memory and spills are within the budget; `make budgets` compiles the other variants."""
    rows = json.loads(python("-m", "bench.rollout_budgets", "--json", "--only", "bf16-64-mean"))
    assert [row[2] for row in rows] == [80, 80, 90, 90, 100, 100]
    assert all(row[4] == 0 for row in rows)
