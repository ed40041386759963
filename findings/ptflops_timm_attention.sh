#!/usr/bin/env bash
# ptflops: the projections of timm's Attention are counted as nothing, with the default backend
#
# Expected: a Linear is counted wherever it is. ptflops' hook for timm's Attention counts the products of q, k and v, and its comments
#   say that the qkv and the final projection are covered by the Linear layers' own hooks.
# What happens: backend="pytorch", the default, gives a module with a hook of its own that hook's count and does not add its children's.
#   So 4 N C² multiply-accumulates of every block are missing, 28 % of a plain ViT-Tiny at 224 pixels. Put the same two layers beside
#   the attention, or take backend="aten", and they are counted.
# Versions: ptflops 0.7.5, timm 1.0.31, torch 2.13.0.
#
# Exits non-zero where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 torchvision==0.28.0 timm==1.0.31 ptflops==0.7.5
cd "$work"
venv/bin/python - <<'PYTHON'
import sys
from importlib.metadata import version

import torch

_ops = torch.library.Library("torchvision", "FRAGMENT")
try:
    import torchvision
except (RuntimeError, AttributeError):  # a torch and a torchvision from different indices; timm needs it to be importable, no more
    for name in ("nms", "qnms"):
        _ops.define(f"{name}(Tensor dets, Tensor scores, float t) -> Tensor")

import timm
from ptflops import get_model_complexity_info
from torch import nn

print(", ".join(f"{name} {version(name)}" for name in ("ptflops", "timm", "torch")))
torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224").eval()
N, C, depth = 197, 192, 12


def count(m, backend, shape=(3, 224, 224)):
    return get_model_complexity_info(m, shape, as_strings=False, print_per_layer_stat=False, backend=backend)[0]


class Tokens(nn.Module):
    """(B, N, C) through one part of the first block's attention."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return [part(x) for part in self.parts]


attn = model.blocks[0].attn
whole = count(Tokens(attn), "pytorch", (N, C))
projections = count(Tokens(attn.qkv, attn.proj), "pytorch", (N, C))
expected = N * C * 4 * C
print(f"one attention: {whole} MACs, of which its products and softmax {2 * N * N * C + N * N * attn.num_heads + N * C}")
print(f"its qkv and proj on their own: {projections} (4 N C² = {expected}, and biases)")
total, aten = count(model, "pytorch"), count(model, "aten")
print(f"the model: pytorch backend {total / 1e9:.3f} GMACs, aten backend {aten / 1e9:.3f}; missing {depth * expected / 1e9:.3f}")
share = depth * expected / (total + depth * expected)
print(f"{share:.0%} of it all")
only_products = whole == 2 * N * N * C + N * N * attn.num_heads + N * C
if not only_products or projections < expected:
    sys.exit("the behaviour has changed")
PYTHON
