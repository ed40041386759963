"""The feed-forward of a Transformer block, with GELU or QuickGELU; keys are those of its two layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.config import requested_backend
from lifeops.nn.plain import exactly, gelu, is_fused
from lifeops.ops.feed_forward import feed_forward

ALPHA = 1.702


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), which is SiLU(1.702 x) / 1.702."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(ALPHA * x)


class FeedForward(nn.Module):
    """``fc2(act(fc1(x)))`` on (B, N, C), ``act`` the exact GELU or, with ``quick``, QuickGELU; ``dim_out`` channels come out, by default C.

    On the fast path the activated tokens are computed again in backward, not kept. QuickGELU's factors of SiLU(1.702 x) / 1.702 are
    multiplied into the weights, where those are fewer than the hidden values; half precision would round them: it calls its layers.
    """

    def __init__(self, dim: int, hidden_dim: int, quick: bool = False, dim_out: int | None = None, **dd):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim, **dd), nn.Linear(hidden_dim, dim if dim_out is None else dim_out, **dd)
        self.act = QuickGELU() if quick else nn.GELU()

    def fused_layers(self):
        act = exactly(QuickGELU) if isinstance(self.act, QuickGELU) else gelu
        return [("fc1", exactly(nn.Linear)), ("act", act), ("fc2", exactly(nn.Linear))]

    def _fast(self, x: Tensor) -> bool:
        if torchlib.calls_layers() or x.dim() != 3 or not is_fused(self):
            return False
        wide = x.dtype in (torch.float32, torch.float64) and torchlib.autocast_dtype(x) is None
        return not isinstance(self.act, QuickGELU) or (wide and x.shape[0] * x.shape[1] >= 2 * x.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        if not self._fast(x):
            return self.fc2(self.act(self.fc1(x)))
        first, second, backend = self.fc1, self.fc2, requested_backend("channel_act", None)
        if not isinstance(self.act, QuickGELU):
            return feed_forward(x, first.weight, first.bias, second.weight, second.bias, "gelu", backend)
        bias = None if first.bias is None else first.bias * ALPHA
        return feed_forward(x, first.weight * ALPHA, bias, second.weight / ALPHA, second.bias, "silu", backend)


def quick_feed_forward(dim: int, hidden_dim: int) -> FeedForward:
    """With QuickGELU."""
    return FeedForward(dim, hidden_dim, quick=True)
