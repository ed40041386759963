#!/usr/bin/env bash
# torch 2.13.0 on a CPU: whether a bfloat16 linear layer keeps denormals depends on how many rows it is given
#
# Expected: bfloat16 has float32's exponents, so that 1e-39 is a number in it, and a row's result does not depend on the rows beside it by
#   more than the rounding of its last bits.
# What happens: with a few rows results below 1.18e-38 are there; with a few hundred rows, which oneDNN takes, every one of them is zero.
#   float32 keeps them either way. torch.set_flush_denormal has not been called.
# Versions: torch 2.13.0, x86-64 with AVX-512.
#
# Exits non-zero where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 numpy
cd "$work"
venv/bin/python - <<'PYTHON'
import sys

import torch

torch.manual_seed(0)
seen = {}
for dtype in (torch.float32, torch.bfloat16):
    weight = (torch.randn(12, 4) * 1e-19).to(dtype)
    x = (torch.randn(1000, 4) * 1e-20).to(dtype)
    exact = x.double() @ weight.double().T
    denormal = (exact.abs() > 1e-39) & (exact.abs() < 1.17e-38)
    for rows in (16, 1000):
        y = torch.nn.functional.linear(x[:rows], weight)
        lost, of = int((y[denormal[:rows]] == 0).sum()), int(denormal[:rows].sum())
        seen[dtype, rows] = "none" if lost == 0 else "all" if lost == of else "some"
        print(f"torch {torch.__version__}, {dtype}, {rows} rows: {lost} of {of} denormal results are zero")
expected = {(torch.float32, 16): "none", (torch.float32, 1000): "none", (torch.bfloat16, 16): "none", (torch.bfloat16, 1000): "all"}
if seen != expected:
    sys.exit("the behaviour has changed")
PYTHON
