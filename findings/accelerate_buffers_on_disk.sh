#!/usr/bin/env bash
# accelerate: load_checkpoint_and_dispatch leaves the running statistics of a batch norm on disk unread, without a word
#
# Expected: a model built under init_empty_weights() and loaded with load_checkpoint_and_dispatch(model, file, device_map=…) gives the
#   outputs of the model that was saved, wherever its layers are put. offload_buffers (default False) is about where buffers live,
#   "whether or not to offload the buffers with the model parameters", so that False reads as: they are loaded and stay in memory.
# What happens: with a batch norm mapped to "disk" its running mean and variance keep their initial 0 and 1. No error, no warning, every
#   key of the checkpoint is there, and the outputs are wrong. With offload_buffers=True, or the same layer mapped to "cpu", they are right.
# Versions: accelerate 1.15.0, torch 2.13.0, safetensors 0.8.0.
#
# Exits non-zero where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 safetensors==0.8.0 numpy
cd "$work"
venv/bin/python - <<'PYTHON'
import sys
import warnings

import accelerate
import safetensors
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import save_file
from torch import nn

print(f"accelerate {accelerate.__version__}, torch {torch.__version__}, safetensors {safetensors.__version__}")


def build():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()


torch.manual_seed(0)
model = build()
model.train()
for _ in range(50):  # running statistics that are not 0 and 1
    model(3 + 2 * torch.randn(8, 3, 4, 4))
model.eval()
save_file(model.state_dict(), "model.safetensors")
x = torch.randn(2, 3, 4, 4)


def loaded(place, offload_buffers):
    with init_empty_weights():
        empty = build()
    devices = {"0": "cpu", "1": place, "2": "cpu"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = load_checkpoint_and_dispatch(
            empty, "model.safetensors", device_map=devices, offload_folder="away", offload_buffers=offload_buffers
        )
    with torch.no_grad():
        error = (found(x) - model(x)).abs().max().item()
    mean = found[1].running_mean
    mean = "on meta" if mean.is_meta else mean.tolist()
    print(f"batch norm on {place}, offload_buffers={offload_buffers}: error {error:.3g}, running_mean {mean}, {len(seen)} warnings")
    return error, len(seen)


print(f"saved running_mean {model[1].running_mean.tolist()}")
wrong, warned = loaded("disk", False)
fine = loaded("disk", True)[0], loaded("cpu", False)[0]
if wrong < 0.1 or warned or max(fine) > 1e-5:
    sys.exit("the behaviour has changed")
PYTHON
