"""Attention of the hosts PVT, TNT, T2T-ViT, Swin and Swin V2 as LocalViT's and LIFE's authors run it: the baseline, not for use.

A transcription of the computation in github.com/ofsoundof/LocalViT and github.com/NeurAI-Lab/LIFE, not of their code: scores are written
out, one operator after another. Each is made of the layers of ours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.nn.eager_life import EagerLifeQKV


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q kᵀ) v of heads (B, h, N, d) as tokens (B, N, h d)."""
    y = ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


class _OfLayers(nn.Module):
    """The parameters, buffers, layers and numbers of ``ours``."""

    def __init__(self, ours: nn.Module):
        super().__init__()
        self.__dict__.update({name: value for name, value in ours.__dict__.items() if not name.startswith("_")})
        for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[held] = ours.__dict__[held].copy()

    def _split(self, t: Tensor, parts: int) -> tuple[Tensor, ...]:
        B, N, C = t.shape
        return t.reshape(B, N, parts, self.num_heads, C // parts // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)


class EagerAttention(_OfLayers):
    """Of a :class:`lifeops.models.blocks.TokenAttention`."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split(self.qkv(x), 3)
        return self.proj(_attend(q, k, v, q.shape[-1] ** -0.5))


class EagerSpatialReductionAttention(_OfLayers):
    """Of a :class:`lifeops.models.pvt.SpatialReductionAttention`."""

    needs_grid = True

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        keys, (B, _, C) = x, x.shape
        if self.sr_ratio > 1:
            keys = self.sr(x.permute(0, 2, 1).reshape(B, C, *grid)).reshape(B, C, -1).permute(0, 2, 1)
            keys = self.norm(keys)
        (q,), (k, v) = self._split(self.q(x), 1), self._split(self.kv(keys), 2)
        return self.proj(_attend(q, k, v, q.shape[-1] ** -0.5))


class EagerSplitAttention(_OfLayers):
    """Of a :class:`lifeops.models.tnt.SplitAttention`."""

    def forward(self, x: Tensor) -> Tensor:
        (q, k), (v,) = self._split(self.qk(x), 2), self._split(self.v(x), 1)
        return self.proj(_attend(q, k, v, q.shape[-1] ** -0.5))


class EagerTokenPerformer(_OfLayers):
    """Of a :class:`lifeops.models.t2t.TokenPerformer` with LocalViT's feed-forward."""

    def _features(self, t: Tensor) -> Tensor:
        m = self.w.shape[0]
        half = (t * t).sum(-1, keepdim=True).repeat(1, 1, m) / 2
        return torch.exp(torch.einsum("bti,mi->btm", t, self.w) - half) / math.sqrt(m)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        k, q, v = torch.split(self.kqv(self.norm1(x)), self.emb, dim=-1)
        kp, qp = self._features(k), self._features(q)
        total = torch.einsum("bti,bi->bt", qp, kp.sum(1)).unsqueeze(2)
        y = torch.einsum("bti,bni->btn", qp, torch.einsum("bin,bim->bnm", v, kp)) / (total.repeat(1, 1, self.emb) + 1e-8)
        return self.conv(v + self.drop(self.proj(y)), grid)


class _Windows(_OfLayers):
    def _softmax(self, scores: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Of scores (B * nW, h, n, n) with the bias (1, h, n, n) and the mask (nW, n, n) added one after the other."""
        scores = scores + bias
        if mask is not None:
            scores = scores.view(-1, mask.shape[0], *scores.shape[1:]) + mask[None, :, None]
            scores = scores.view(-1, *scores.shape[2:])
        return scores.softmax(-1)

    def _gathered(self, table: Tensor) -> Tensor:
        n = self.relative_position_index.shape[0]
        return table[self.relative_position_index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()[None]


class EagerWindowAttention(_Windows):
    """Of a :class:`lifeops.models.swin.WindowAttention`."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self._split(self.qkv(x), 3)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        y = self._softmax(scores, self._gathered(self.relative_position_bias_table), mask) @ v
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class EagerCosineWindowAttention(_Windows):
    """Of a :class:`lifeops.models.swin_v2.CosineWindowAttention` with LIFE, which becomes an :class:`EagerLifeQKV`."""

    def __init__(self, ours: nn.Module):
        super().__init__(ours)
        self.qkv = EagerLifeQKV(ours.proj.in_features, 0).to(ours.proj.weight.dtype)
        self.qkv.load_state_dict(ours.qkv.state_dict())

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self._split(torch.cat(self.qkv(x, self.grid), 2), 3)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * self.logit_scale.clamp(max=math.log(100)).exp()
        table = self._gathered(self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads))
        y = self._softmax(scores, 16 * torch.sigmoid(table), mask) @ v
        return self.proj(y.transpose(1, 2).reshape(x.shape))
