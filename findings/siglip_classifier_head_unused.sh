#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU.
#
# SigLIP's vision tower ends in an attention pooling head, whose output is what its image embeddings are; a classifier on SigLIP, one would
# guess, classifies that. SiglipForImageClassification builds the tower with the head, and the forward pass runs it, but the scores are a
# linear layer of the mean over the patch tokens. The head's parameters, a quarter of this small model's tower, get no gradient, and an
# explanation of the scores through the head (its attention map, say) explains what they do not depend on.
#
# Seen: scores equal to classifier(mean of last_hidden_state); all parameters without a gradient belong to vision_model.head.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy
"$tmp/venv/bin/python" - <<'PY'
import torch
from transformers import SiglipConfig, SiglipForImageClassification

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
model = SiglipForImageClassification(SiglipConfig(vision_config=sizes, num_labels=3)).eval()
images = torch.randn(2, 3, 32, 32)
tower = next(m for name, m in model.named_modules() if name.endswith("vision_model"))
seen = []
tower.register_forward_hook(lambda module, args, output: seen.append(output))
scores = model(pixel_values=images).logits
scores.sum().backward()
expected = model.classifier(seen[0].last_hidden_state.mean(1))
print("pooled by the head:", tuple(seen[0].pooler_output.shape), "; scores - classifier(mean of the patches):", (scores - expected).abs().max().item())
without = {name: p.numel() for name, p in model.named_parameters() if p.grad is None and "vision_model" in name}
share = sum(without.values()) / sum(p.numel() for p in tower.parameters())
print(f"{len(without)} parameters of the tower without a gradient, {share:.0%} of it: {', '.join(without)}")
assert (scores - expected).abs().max() < 1e-6 and without and all(".head." in name for name in without), "the behaviour has changed"
PY
