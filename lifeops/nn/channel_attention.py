"""Channel attention of LocalViT's feed-forward: maps or tokens times a gate of their mean; state-dict keys are the authors'."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from lifeops.nn.plain import channel_conv, exactly, is_fused, linear_with_bias, sequence_of
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.channel.gate import gate


class _ChannelAttention(nn.Module):
    """x * gate(mean over the patches), for tokens (B, N, C) and maps (B, C, H, W)."""

    kind: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        over = 1 if x.dim() == 3 else (2, 3)
        count = x.shape[1] if x.dim() == 3 else x.shape[2] * x.shape[3]
        dtype = accumulate_dtype(x.dtype)
        mean = x.to(dtype).sum(over) / max(1, count)  # no patches: no NaN
        if is_fused(self):
            s = gate(self.kind, mean, tuple(p.to(dtype) for p in self.gate_params())).to(x.dtype)
        else:
            s = self.gate_by_layer(mean.to(x.dtype))
        return x * (s[:, None] if x.dim() == 3 else s[:, :, None, None])


class SELayer(_ChannelAttention):
    """Squeeze and excitation: hsigmoid(V2 relu(V1 m + c1) + c2); ``fc.0`` and ``fc.2`` as the authors'."""

    def __init__(self, channels: int, reduction: int, **dd):
        super().__init__()
        width = channels // reduction
        self.fc = nn.Sequential(nn.Linear(channels, width, **dd), nn.ReLU(), nn.Linear(width, channels, **dd), nn.Hardsigmoid())
        self.kind = "se"

    def fused_layers(self):
        kinds = linear_with_bias, exactly(nn.ReLU), linear_with_bias, exactly(nn.Hardsigmoid)
        return [("fc", sequence_of(len(kinds))), *((f"fc.{i}", rule) for i, rule in enumerate(kinds))]

    def gate_params(self):
        return self.fc[0].weight, self.fc[0].bias, self.fc[2].weight, self.fc[2].bias

    def gate_by_layer(self, m):
        return self.fc(m)


class ECALayer(_ChannelAttention):
    """Efficient channel attention, a convolution over neighbouring channels; ``conv.weight`` (1, 1, k), k the odd number from
    (log2 C + 1) / 2, then a sigmoid, hard or not.
    """

    def __init__(self, channels: int, hard: bool, **dd):
        super().__init__()
        size = int(abs((math.log2(channels) + 1) / 2))
        size = size if size % 2 else size + 1
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False, **dd)
        self.kind = "ecah" if hard else "eca"

    def fused_layers(self):
        return [("conv", channel_conv)]

    def gate_params(self):
        return (self.conv.weight,)

    def gate_by_layer(self, m):
        m = self.conv(m[:, None])[:, 0]
        return F.hardsigmoid(m) if self.kind == "ecah" else m.sigmoid()
