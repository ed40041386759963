#!/usr/bin/env bash
# torchinfo: a Linear layer on a sequence counts as if there were one token
#
# Expected: "mult-adds" of Linear(C, D) on (B, N, C) are B N C D, as those of the same product written as a 1x1 convolution are.
# What happens: torchinfo counts its parameters once an image, whatever N is. A Transformer's number is too low by nearly a factor of N
#   (197 for a ViT at 224 pixels), beside convolutions that are counted right. No warning.
# Versions: torchinfo 1.8.0, torch 2.13.0.
#
# Exits non-zero where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 torchinfo==1.8.0 numpy
cd "$work"
venv/bin/python - <<'PYTHON'
import sys

import torch
import torchinfo
from torch import nn
from torchinfo import summary

print(f"torchinfo {torchinfo.__version__}, torch {torch.__version__}")
B, N, C, D = 2, 197, 192, 768


def count(layer, *shape):
    return summary(layer, input_data=torch.zeros(shape), verbose=0).total_mult_adds


tokens, pixels = count(nn.Linear(C, D, bias=False), B, N, C), count(nn.Conv2d(C, D, 1, bias=False), B, C, N, 1)
print(f"B N C D = {B * N * C * D}")
print(f"Linear on (B, N, C): {tokens} = B C D; 1x1 convolution on (B, C, N, 1): {pixels}")
model = count(nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, C)), B, N, C)
print(f"a ViT-Tiny's MLP on {N} tokens: {model}, expected {2 * B * N * C * D} and biases")
if tokens != B * C * D or pixels != B * N * C * D or model >= 2 * B * N * C * D:
    sys.exit("the behaviour has changed")
PYTHON
