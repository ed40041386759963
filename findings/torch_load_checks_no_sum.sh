#!/usr/bin/env bash
# torch 2.13.0: torch.save writes a checksum of every tensor, torch.load does not look at it.
#
# Expected: a checkpoint with a damaged byte is an error, as of any zip archive. Seen: torch.load(weights_only=True) returns the damaged
# tensor in silence; Python's zipfile finds the damage in the same file.
#
# Output seen:
#   torch.load: loads, 1 of 1000 values changed
#   zipfile:    x/data/0 is damaged
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
venv/bin/python - <<'PY'
import zipfile

import torch

print("torch", torch.__version__.split("+")[0])
t = torch.arange(1000.0)
torch.save({"a": t}, "x.pth")
data = bytearray(open("x.pth", "rb").read())
data[data.find(t.numpy().tobytes()) + 405] ^= 255
open("y.pth", "wb").write(data)
changed = int((torch.load("y.pth", weights_only=True)["a"] != t).sum())
damaged = zipfile.ZipFile("y.pth").testzip()
print(f"torch.load: loads, {changed} of {len(t)} values changed")
print(f"zipfile:    {damaged} is damaged")
assert changed == 1 and damaged == "x/data/0"
PY
