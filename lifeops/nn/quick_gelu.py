"""The feed-forward with QuickGELU, x sigmoid(1.702 x), in one pass over its hidden tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.nn.plain import exactly, is_fused
from lifeops.pointwise import multiply

ALPHA = 1.702


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), which is SiLU(1.702 x) / 1.702."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(ALPHA * x)


class QuickMlp(nn.Module):
    """``fc2(QuickGELU(fc1(x)))`` on (B, N, C).

    On the fast path the two factors of SiLU(1.702 x) / 1.702 are multiplied into the weights, where those are fewer than the hidden
    values: the activation is then one of torch's, and backward keeps one tensor less. Half precision would round the weights: it calls
    its layers.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden_dim), QuickGELU(), nn.Linear(hidden_dim, dim)

    def fused_layers(self):
        return [("fc1", exactly(nn.Linear)), ("act", exactly(QuickGELU)), ("fc2", exactly(nn.Linear))]

    def _pays(self, x: Tensor) -> bool:
        return (
            x.dim() == 3
            and x.shape[0] * x.shape[1] >= 2 * x.shape[2]
            and x.dtype in (torch.float32, torch.float64)
            and torchlib.autocast_dtype(x) is None
            and not torchlib.captured()
            and is_fused(self)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self._pays(x):
            return self.fc2(self.act(self.fc1(x)))
        first, second = self.fc1, self.fc2
        h = multiply(x, first.weight * ALPHA, None if first.bias is None else first.bias * ALPHA)
        return multiply(F.silu(h, inplace=not torchlib.wants_grad((h,))), second.weight / ALPHA, second.bias)
