#!/usr/bin/env bash
# torch on a CPU: scaled_dot_product_attention of few keys and no mask hides a NaN query
#
# Expected: softmax of scores that are NaN is NaN, and so is the output of a query of NaN, however many keys there are.
# What happens: with fewer keys than a vector has lanes (16 of float32, bfloat16 and float16 with AVX-512, 8 of float64; half of that with
#   AVX2) and no attn_mask the output is 0, as if the query were masked: a broken token leaves no trace. With a mask of zeros it is NaN.
# Version: torch 2.13.0, CPU.
#
# Output seen (AVX-512):
#   float64  1 0.0 | 7 0.0 | 9 nan | 15 nan | 16 nan    with a mask of zeros: nan everywhere
#   float32  1 0.0 | 7 0.0 | 9 0.0 | 15 0.0 | 16 nan    with a mask of zeros: nan everywhere
#   bfloat16 1 0.0 | 7 0.0 | 9 0.0 | 15 0.0 | 16 nan    with a mask of zeros: nan everywhere
#
# Exits non-zero where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

print("torch", torch.__version__)
torch.manual_seed(0)
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    found, masked = {}, []
    for keys in (1, 7, 9, 15, 16):
        q, k = torch.full((1, 1, 3, 8), torch.nan, dtype=dtype), torch.randn(1, 1, keys, 8, dtype=dtype)
        found[keys] = attention(q, k, k)[0, 0, 1, 0].item()
        masked.append(attention(q, k, k, attn_mask=torch.zeros(1, 1, 1, keys, dtype=dtype)).isnan().all().item())
    seen = " | ".join(f"{keys} {value}" for keys, value in found.items())
    print(f"{str(dtype)[6:]:8} {seen}    with a mask of zeros: {'nan everywhere' if all(masked) else masked}")
    assert found[1] == 0 and found[16] != found[16] and all(masked)
PYTHON
