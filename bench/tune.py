"""`python -m bench tune`: measure both point-wise paths on this CPU and write its rows of lifeops/data/cpu_gemm.json.

A row is committed after a look: the two paths differ in the last bit, so results depend on the table.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F

from bench.measure import interleaved
from lifeops import pointwise
from lifeops.files import written

WIDTHS = {"narrow": 192, "wide": 768}


def measure(dtype: torch.dtype, channels: int) -> dict[str, float]:
    """Median ms of a C -> C product over 16 images of 197 tokens, forward and both gradients, by path."""
    x, w = torch.randn(16, 197, channels, dtype=dtype, requires_grad=True), torch.randn(channels, channels, dtype=dtype, requires_grad=True)
    kernel, dy = w.detach()[:, :, None, None].requires_grad_(), torch.randn(16, 197, channels, dtype=dtype)

    def conv1x1():
        y = F.conv2d(x.transpose(1, 2).unsqueeze(3), kernel).squeeze(3).transpose(1, 2)
        return torch.autograd.grad(y, (x, kernel), dy)

    variants = {"linear": lambda: torch.autograd.grad(F.linear(x, w), (x, w), dy), "conv1x1": conv1x1}
    return {name: timing.median for name, timing in interleaved({k: [fn] for k, fn in variants.items()}, seconds=2.0).items()}


def main(argv: list[str] | None = None) -> int:
    table = json.loads(pointwise._TABLE.read_text())
    machine = {"vendor": pointwise.vendor(), "isa": torch.backends.cpu.get_cpu_capability()}
    for dtype in (torch.float32, torch.bfloat16):
        for shape, channels in WIDTHS.items():
            ms = measure(dtype, channels)
            row = {**machine, "dtype": str(dtype).removeprefix("torch."), "shape": shape, "path": min(ms, key=ms.get)}
            print(row, {name: round(t, 2) for name, t in ms.items()})
            same = [r for r in table["rows"] if all(r[k] == row[k] for k in ("vendor", "isa", "dtype", "shape"))]
            table["rows"] = [r for r in table["rows"] if r not in same] + [row]
    with written(pointwise._TABLE) as part:
        part.write_text(json.dumps(table, indent=2) + "\n")
    return 0
