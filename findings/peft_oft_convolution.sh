#!/usr/bin/env bash
# peft: merging an OFT adapter into a convolution larger than 1x1 changes what the model computes
#
# Expected: merge_and_unload() leaves the outputs where they were, as it does for OFT on Linear and on 1x1 convolutions, and for LoRA on
#   convolutions of every size.
# What happens: for K > 1 the merged convolution is another one. No error, no warning: the outputs are off by as much as they are large.
# Versions: peft 0.21.2, torch 2.13.0, transformers 5.24.0.
#
# Exits non-zero where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.24.0
cd "$work"
venv/bin/python - 2> errors.txt <<'PYTHON' || { cat errors.txt; exit 1; }
import sys
import warnings
from importlib.metadata import version

import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import nn

print(", ".join(f"{name} {version(name)}" for name in ("peft", "torch", "transformers")))


def off(layer, shape, config):
    """How far the outputs move when a trained adapter is merged, relative to the largest one."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(layer), config)
    x, wanted = torch.randn(shape), None
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(5):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
    model.eval()
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = model(x)
        after = model.merge_and_unload()(x)
    return ((after - before).abs().max() / before.abs().max()).item(), len(seen)


def oft():
    return OFTConfig(target_modules=["0"], r=1, oft_block_size=0)


maps = (2, 4, 8, 8)
rows = {
    "OFT, Linear": off(nn.Linear(4, 6), (2, 5, 4), oft()),
    "OFT, Conv2d 1x1": off(nn.Conv2d(4, 6, 1), maps, oft()),
    "OFT, Conv2d 3x3": off(nn.Conv2d(4, 6, 3, padding=1), maps, oft()),
    "OFT, Conv2d 4x4, stride 4": off(nn.Conv2d(4, 6, 4, stride=4), maps, oft()),
    "LoRA, Conv2d 3x3": off(nn.Conv2d(4, 6, 3, padding=1), maps, LoraConfig(target_modules=["0"], r=2)),
}
for name, (error, warned) in rows.items():
    print(f"{name}: outputs move by {error:.2g} of the largest one, {warned} warnings")
wrong = [rows[name] for name in rows if "3x3" in name and "OFT" in name or "4x4" in name]
right = [error for name, (error, _) in rows.items() if not ("OFT" in name and ("3x3" in name or "4x4" in name))]
if any(error < 1e-3 or warned for error, warned in wrong) or max(right) > 1e-4:
    sys.exit("the behaviour has changed")
PYTHON
