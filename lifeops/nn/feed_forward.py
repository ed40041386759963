"""The feed-forward of a Transformer block, with GELU or QuickGELU, by the faster products and in one pass over its hidden tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.config import requested_backend
from lifeops.nn.plain import exactly, gelu, is_fused
from lifeops.ops.token_dwconv.act_function import ChannelAct, activated
from lifeops.pointwise import multiply, product

ALPHA = 1.702


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), which is SiLU(1.702 x) / 1.702."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(ALPHA * x)


def exact_gelu(x: Tensor) -> Tensor:
    """F.gelu of tokens (B, N, C). On the CPU the kernel of ``channel_act`` takes half the time; a compiler writes its own."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.gelu(x)
    return activated(x, ChannelAct(act="gelu"), 0, requested_backend("channel_act", None))


class FeedForward(nn.Module):
    """``fc2(act(fc1(x)))`` on (B, N, C), ``act`` the exact GELU or, with ``quick``, QuickGELU.

    QuickGELU's factors of SiLU(1.702 x) / 1.702 are multiplied into the weights, where those are fewer than the hidden values: the
    activation is then one of torch's, and backward keeps one tensor less. Half precision would round the weights: it calls its layers.
    """

    def __init__(self, dim: int, hidden_dim: int, quick: bool = False):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.act = QuickGELU() if quick else nn.GELU()

    def fused_layers(self):
        act = exactly(QuickGELU) if isinstance(self.act, QuickGELU) else gelu
        return [("fc1", exactly(nn.Linear)), ("act", act), ("fc2", exactly(nn.Linear))]

    def _quick(self, x: Tensor) -> Tensor:
        first, second = self.fc1, self.fc2
        wide = x.dtype in (torch.float32, torch.float64) and torchlib.autocast_dtype(x) is None
        if not wide or x.shape[0] * x.shape[1] < 2 * x.shape[2]:
            return product(self.act(product(x, first)), second)
        h = multiply(x, first.weight * ALPHA, None if first.bias is None else first.bias * ALPHA)
        return multiply(F.silu(h, inplace=not torchlib.wants_grad((h,))), second.weight / ALPHA, second.bias)

    def forward(self, x: Tensor) -> Tensor:
        transformed = torchlib.captured() or torch._C._are_functorch_transforms_active()
        if transformed or x.dim() != 3 or not is_fused(self):
            return self.fc2(self.act(self.fc1(x)))
        if isinstance(self.act, QuickGELU):
            return self._quick(x)
        return product(exact_gelu(product(x, self.fc1)), self.fc2)


def quick_feed_forward(dim: int, hidden_dim: int) -> FeedForward:
    """With QuickGELU."""
    return FeedForward(dim, hidden_dim, quick=True)
