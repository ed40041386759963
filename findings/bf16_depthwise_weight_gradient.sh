#!/usr/bin/env bash
# torch on a CPU: the weight gradient of a bfloat16 depth-wise convolution holds stale memory at taps that see nothing but padding
#
# Expected: taps of a filter that see nothing but padding, wherever it stands, have a gradient of exactly zero: on a map smaller than the
#   kernel, as in the last stage of a model that is given a small image. So it is in float32 and in float16.
# What happens: with channels-last tensors those taps' gradients are whatever lay in memory before, infinity included, another number in
#   every step (98 of 100 steps of a plain run, up to 1e38); the other taps are right. Contiguous (NCHW) tensors give zeros. The loss
#   stays finite; the optimiser's step does not.
# Version: torch 2.13.0 (oneDNN's convolution), x86-64 with AVX-512.
#
# Exits non-zero where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 numpy
cd "$work"
# glibc fills fresh memory with that byte, so that every run shows it; without it the numbers are what was there before.
MALLOC_PERTURB_=170 venv/bin/python - <<'PYTHON'
import sys

import torch

print("torch", torch.__version__)
torch.manual_seed(0)
torch.set_num_threads(1)


def blind_taps(dtype, memory_format, C, side, K, stride, padding, steps=100):
    """In how many training steps a tap that sees padding alone has a gradient, and the largest."""
    conv = torch.nn.Conv2d(C, C, K, stride, padding, groups=C, bias=False).to(dtype).to(memory_format=memory_format)
    ones = torch.ones(C, 1, K, K, requires_grad=True)
    (seen,) = torch.autograd.grad(torch.nn.functional.conv2d(torch.ones(1, C, side, side), ones, None, stride, padding, groups=C).sum(), ones)
    found = []
    for _ in range(steps):
        x = torch.randn(2, C, side, side).to(dtype).contiguous(memory_format=memory_format)
        (dw,) = torch.autograd.grad(conv(x).float().square().sum(), conv.weight)
        found.append(dw[seen == 0].abs().nan_to_num(torch.inf).max().item())
    return sum(v > 0 for v in found), max(found)


stale = {}
for sizes in ((64, 1, 3, 2, 1), (96, 2, 5, 4, 2)):
    print("%d channels, a %dx%d map, kernel %d, stride %d, padding %d" % (sizes[0], sizes[1], *sizes[1:]))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            count, most = blind_taps(dtype, memory_format, *sizes)
            stale[sizes, dtype, memory_format] = count
            print(f"  {dtype}, {memory_format}: not zero in {count} of 100 steps, at most {most:.3g}")
wrong = [key for key, count in stale.items() if count]
if not wrong or any(key[1:] != (torch.bfloat16, torch.channels_last) for key in wrong):
    sys.exit("the behaviour has changed")
PYTHON
