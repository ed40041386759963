"""What a wheel must do where it is installed, with torch alone: `python tests/smoke.py` from any folder; exit code 0."""

import subprocess
import sys

import torch

import lifeops
from lifeops import registry

assert registry.unavailable("cpu") is None, registry.unavailable("cpu")
x, weight = torch.randn(2, 7, 8), torch.randn(8, 1, 3, 3)
results = [lifeops.token_dwconv(x, weight, grid=(2, 3), num_prefix_tokens=1, backend=backend) for backend in ("cpu", "reference")]
torch.testing.assert_close(*results)
model = lifeops.convert(lifeops.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3), "life")
model(torch.randn(2, 3, 32, 32)).sum().backward()
said = subprocess.run([sys.executable, "-m", "lifeops", "info"], capture_output=True, text=True, check=True).stdout
assert "built backends" in said, said
print(f"lifeops {lifeops.__version__} in {lifeops.__file__}")
