"""Self-slimmed ViT's token slimming as its authors run it, one torch operator after another. The baseline, not for use.

A transcription of the computation in github.com/Sense-X/SiT, not of its code; state dicts are those of
:class:`lifeops.nn.TokenSlimming` and :class:`lifeops.models.SiT`'s blocks.
"""

from __future__ import annotations

import torch
from torch import nn

from lifeops.nn.token_slimming import TokenSlimming


class EagerTokenSlimming(nn.Module):
    """Tokens (B, P + N, C) to (B, P + K, C), with the layers of ``ours``."""

    def __init__(self, ours: TokenSlimming):
        super().__init__()
        self.weight, self.scale, self.num_prefix_tokens = ours.weight, ours.scale, ours.num_prefix_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        weight = torch.softmax(self.weight(tokens) * self.scale, dim=1).transpose(2, 1)
        return torch.cat((prefix, torch.bmm(weight, tokens)), dim=1)


class EagerBlock(nn.Module):
    """x + attn(norm1(x)) / skip, then x + mlp(norm2(x)) / skip, with the layers of ``ours``; scores are written out, in float32."""

    def __init__(self, ours: nn.Module):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp, self.skip = ours.norm1, ours.attn, ours.norm2, ours.mlp, ours.skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._attended(self.norm1(x)) / self.skip
        return x + self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm2(x)))) / self.skip

    def _attended(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        h = self.attn.num_heads
        q, k, v = self.attn.qkv(x).reshape(B, N, 3, h, C // h).permute(2, 0, 3, 1, 4)
        attn = ((q @ k.transpose(-2, -1)) * (C // h) ** -0.5).softmax(dim=-1)
        return self.attn.proj((attn @ v).transpose(1, 2).reshape(B, N, C))
