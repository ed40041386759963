#!/usr/bin/env bash
# torch on a CPU: an attention mask of three dimensions costs scaled_dot_product_attention its fused kernel
#
# Expected: masks that broadcast to the scores are alike: (N, N), (heads, N, N) and (1, heads, N, N), as the documentation asks for no more
#   than "broadcastable". A bias per head, as of relative positions, is (heads, N, N).
# What happens: with two and with four dimensions the flash kernel runs. With three, the same values one view away, nothing is said and
#   the composed path runs, which writes all scores to memory: 1.5 times as long for 3 heads of 196 tokens, and N x N numbers a head kept.
#   mask[None] brings the kernel back.
# Version: torch 2.13.0, CPU.
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
import time

import torch
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils._python_dispatch import TorchDispatchMode

print("torch", torch.__version__)
torch.manual_seed(0)
torch.set_num_threads(1)
q, mask = torch.randn(4, 3, 196, 64), torch.randn(3, 196, 196)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(str(op))
        return op(*args, **(kwargs or {}))


def fused(m):
    with torch.no_grad(), Seen() as seen:
        attention(q, q, q, attn_mask=m)
    return any("flash_attention_for_cpu" in name for name in seen.names)


def fastest(m):
    times = []
    for _ in range(50):
        start = time.thread_time()
        with torch.no_grad():
            attention(q, q, q, attn_mask=m)
        times.append(time.thread_time() - start)
    return min(times)


masks = {"two": mask[0], "three": mask, "four": mask[None]}
found = {name: fused(m) for name, m in masks.items()}
base = fastest(masks["four"])
for name, m in masks.items():
    print(f"{name} dimensions {tuple(m.shape)}: {'fused' if found[name] else 'composed'}, {fastest(m) / base:.2f} of the time of four")
torch.testing.assert_close(attention(q, q, q, attn_mask=mask), attention(q, q, q, attn_mask=mask[None]), rtol=1e-4, atol=1e-4)
if found != {"two": True, "three": False, "four": True}:
    sys.exit("the behaviour has changed")
PYTHON
