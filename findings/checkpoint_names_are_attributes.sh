#!/usr/bin/env bash
# torch.distributed.checkpoint: every name in a state dict has to be an attribute of the model, too
#
# Expected: get_model_state_dict(model) gives what model.state_dict() gives, also of a module that saves a weight under a second name in its
#   _save_to_state_dict and takes it back in _load_from_state_dict, which state_dict and load_state_dict allow.
# What happens: AttributeError. Each name is walked from the model, attribute by attribute. A property under the second name is enough.
# Versions: torch 2.13.0.
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
from torch.distributed.checkpoint.state_dict import get_model_state_dict

print(f"torch {torch.__version__}")


class TwoNames(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(2, 2)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.proj.state_dict(destination=destination, prefix=f"{prefix}again.", keep_vars=keep_vars)


class WithProperty(TwoNames):
    again = property(lambda self: self.proj)


print("state_dict():", *TwoNames().state_dict())
try:
    found = get_model_state_dict(TwoNames())
except AttributeError as error:
    found = None
    print(f"get_model_state_dict(): AttributeError: {error}")
print("with a property:", *get_model_state_dict(WithProperty()))
if found is not None:
    sys.exit("the behaviour has changed")
PYTHON
