"""Roll-out's Triton kernels: the interpreter against the oracle, and the machine code for three architectures, both without a GPU.

Interpreting and compiling need processes of their own. All samples: TRITON_INTERPRET=1 LIFEOPS_TEST_BACKEND=triton pytest
tests/test_ops.py -k rollout; all compiled variants: python -m bench.rollout_budgets.
"""

import json

import pytest

pytest.importorskip("triton")

from test_triton_budgets import python
from test_triton_ops import _interpreted


def test_samples_in_the_interpreter():
    names = "one_token", "min", "discard_max", "transposed", "expanded", "wide_maps", "peaked"
    chosen = " or ".join(f"rollout_step-{name}-float32" for name in names)
    assert _interpreted("test_ops.py", f"test_oracle and ({chosen} or rollout_step-max-bfloat16)") == len(names) + 1


def test_compiled_without_spills():
    """main's exit status says whether shared memory and spills are within the budget; `make budgets` compiles the other variants."""
    rows = json.loads(python("-m", "bench.rollout_budgets", "--json", "--only", "bf16-64-mean"))
    assert [row[2] for row in rows] == [80, 80, 90, 90, 100, 100]
    assert all(row[4] == 0 for row in rows)
