#!/usr/bin/env bash
# torch 2.13.0, CPU, float32 and bfloat16: GELU of +infinity depends on how many elements the tensor has.
#
# Expected: x * Phi(x) of +inf is +inf, in whatever company. Seen: +inf in a tensor of one element, NaN in one of two or more (the
# vectorised loop); float64 and float16 give +inf everywhere, and so does the tanh approximation. A test of one element proves nothing
# about the kernel that a model runs.
#
# Output seen:
#   float32  1 inf | 2 nan | 16 nan | 17 nan
#   bfloat16 1 inf | 2 nan | 16 nan | 17 nan
#   float16  1 inf | 2 inf | 16 inf | 17 inf
#   float64  1 inf | 2 inf | 16 inf | 17 inf
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__.split("+")[0])
seen = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    values = {n: set(map(str, torch.nn.functional.gelu(torch.full((n,), torch.inf, dtype=dtype)).tolist())) for n in (1, 2, 16, 17)}
    seen[dtype] = ["/".join(sorted(v)) for v in values.values()]
    print(f"{str(dtype)[6:]:8}", " | ".join(f"{n} {v}" for n, v in zip(values, seen[dtype])))
assert seen[torch.float32] == seen[torch.bfloat16] == ["inf", "nan", "nan", "nan"]
assert seen[torch.float64] == seen[torch.float16] == ["inf"] * 4
PY
