#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU.
#
# Dinov2Config and Dinov2WithRegistersConfig take a non-square image_size, and the model has one position embedding per patch of it.
# One would guess that at that very size the embeddings are used as they are. They are not: whenever height and width differ the table is
# read as a square and resized to the image's grid, at the size the model was built for, too. A model built for 2 x 8 patches reads its
# 16 rows as 4 x 4. Where the number of patches is no square (8 x 12) the model cannot run on its own image size: RuntimeError.
# The same table is resized in two ways: with anti-aliasing in Dinov2WithRegisters, without in Dinov2, so that equal weights give
# different positions. ViTModel, with the same configuration, uses its rows as they are.
#
# Seen: 0.0 for ViT, 1.07 and 0.99 of the largest entry for the two; "invalid for input of size" for 8 x 12; 0.32 between the two.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy
"$tmp/venv/bin/python" - <<'PY'
import torch
import transformers

SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 24, "patch_size": 8}


def model(name, image_size):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, image_size=image_size)
    return getattr(transformers, f"{name}Model")(config).eval()


def off(name):
    """How far the positions that a blank image's patches get are from the table's rows, over the largest row entry."""
    m = model(name, (16, 64))
    with torch.no_grad():
        m.embeddings.position_embeddings.normal_()
        m.embeddings.patch_embeddings.projection.bias.zero_()
        tokens = m.embeddings(torch.zeros(1, 3, 16, 64))
    rows = m.embeddings.position_embeddings[0, -16:]
    return ((tokens[0, -16:] - rows).abs().max() / rows.abs().max()).item(), tokens[0, -16:]


found = {name: off(name) for name in ("ViT", "Dinov2", "Dinov2WithRegisters")}
print({name: round(difference, 2) for name, (difference, _) in found.items()})
assert found["ViT"][0] == 0
assert found["Dinov2"][0] > 0.5
assert found["Dinov2WithRegisters"][0] > 0.5
for name in ("Dinov2", "Dinov2WithRegisters"):
    try:
        model(name, (64, 96))(torch.zeros(1, 3, 64, 96))
    except RuntimeError as error:
        print(name, "8 x 12 patches:", str(error)[:70])
        assert "invalid for input of size" in str(error)
    else:
        raise SystemExit(f"{name} now runs at the non-square size that it was built for")

table = torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(0))
positions = []
for name in ("Dinov2", "Dinov2WithRegisters"):
    m = model(name, (16, 64))
    with torch.no_grad():
        m.embeddings.position_embeddings.copy_(table)
        positions.append(m.embeddings.interpolate_pos_encoding(torch.zeros(1, 17, 24), 16, 64)[0, -16:])
difference = ((positions[0] - positions[1]).abs().max() / positions[0].abs().max()).item()
print("equal tables, with and without registers:", round(difference, 2))
assert difference > 0.05
PY
