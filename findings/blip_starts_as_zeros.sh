#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU.
#
# A Vision Transformer made from a configuration starts with weights of standard deviation 0.02, one would guess, as ViT, CLIP and the
# others do. BlipVisionConfig's default initializer_range is 1e-10: linear layers and position embeddings are all but zero, each token
# leaves the encoder as its patch embedding alone with nothing of position or of other patches in it, and attention is uniform to the last
# digit. Whatever scales or measures a fresh model (initialisations that multiply the position embedding, for one) works on rounding noise.
#
# Seen: initializer_range 1e-10; standard deviations 1e-10; attention between 0.058823526 and 0.058823533 for 17 tokens.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy
"$tmp/venv/bin/python" - <<'PY'
import torch
from transformers import BlipVisionConfig, BlipVisionModel, CLIPVisionConfig, ViTConfig

torch.manual_seed(0)
sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
model = BlipVisionModel(BlipVisionConfig(**sizes, attn_implementation="eager")).eval()
print("initializer_range", BlipVisionConfig().initializer_range, ViTConfig().initializer_range, CLIPVisionConfig().initializer_range)
assert BlipVisionConfig().initializer_range == 1e-10
assert ViTConfig().initializer_range == CLIPVisionConfig().initializer_range == 0.02
with torch.no_grad():
    stds = [model.get_parameter(n).std().item() for n in ("embeddings.position_embedding", "encoder.layers.0.self_attn.qkv.weight")]
    attention = model(torch.randn(1, 3, 32, 32), output_attentions=True).attentions[0]
print("standard deviations", stds, "attention", attention.min().item(), attention.max().item())
assert max(stds) < 2e-10
assert (attention - 1 / attention.shape[-1]).abs().max() < 1e-7
PY
