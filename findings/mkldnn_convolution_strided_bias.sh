#!/usr/bin/env bash
# torch 2.13.0, CPU.
#
# torch.mkldnn_convolution takes a bias whose elements do not lie side by side (every second of a longer vector, say) without a word, and
# adds the elements that do lie side by side from its first one on. F.conv2d, F.linear and the depth-wise convolution copy such a bias
# first; one would guess that the operator beneath does, or refuses it, as it does for what it cannot take otherwise. Weights and images
# with strides of their own come out right.
#
# Seen: with a bias [0, 2, 4, …] read from [0, 1, 2, …] each channel gets [0, 1, 2, …]; F.conv2d on the same tensors is right.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$tmp/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

assert torch.backends.mkldnn.is_available()
x, weight = torch.zeros(1, 8, 2, 2), torch.zeros(8, 8, 1, 1)
bias = torch.arange(16.0)[::2]
direct = torch.mkldnn_convolution(x, weight, bias, [0, 0], [1, 1], [1, 1], 1)[0, :, 0, 0]
usual = F.conv2d(x, weight, bias)[0, :, 0, 0]
print("bias", bias.tolist(), "\nmkldnn_convolution adds", direct.tolist(), "\nF.conv2d adds         ", usual.tolist())
assert torch.equal(usual, bias) and torch.equal(direct, torch.arange(8.0)), "the behaviour has changed"
PY
