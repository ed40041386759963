"""The registry's own tests on the Triton backend, in its interpreter: dispatch, strides and LIFE's chain on top.

A selection: the interpreter takes about a second a case. tests/test_triton_interpreter.py holds the kernels' own cases; all of
the registry's run with TRITON_INTERPRET=1 LIFEOPS_TEST_BACKEND=triton pytest tests/test_ops.py (12 minutes).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SAMPLES = "plain", "zero_residual", "drop_residual", "transposed_dy", "scalar_dy", "cls", "eval", "border", "linear"
SELECTION = f"test_oracle and float32 and ({' or '.join(SAMPLES)})"


def _interpreted(file: str, selection: str = "", *options: str) -> int:
    """How many of the tests chosen pass with every kernel interpreted; all must."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "LIFEOPS_TEST_BACKEND": "triton"}
    chosen = ["-k", selection] if selection else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", file, *chosen, *options]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return int(done.stdout.split(" passed")[0].split()[-1])


def test_registry_cases_in_the_interpreter():
    assert _interpreted("test_ops.py", SELECTION) >= 20


def test_localvit_in_the_interpreter():
    """The authors' numbers through Triton's kernels: a training step and an evaluation."""
    assert _interpreted("test_localvit.py", "test_golden and hs_se and triton-1") == 2


def test_dw_shortcut_in_the_interpreter():
    """A training step and an evaluation."""
    assert _interpreted("test_dw_shortcut.py", "test_the_authors_computation and 3-1 and triton") == 2
