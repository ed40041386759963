"""Layers whose attention goes over all tokens, as roll-out needs them: what they were given, and the way back through them.

Of a layer only what it was given is kept, its input (B, N, C) and, where one comes with the call, its rotation or bias; q and k are
computed again when roll-out gets there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.attention_maps.protocol import Options, Tokens
from lifeops.hosts.attention import Kind, parallel_attentions
from lifeops.hosts.heads import Call, Heads
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.rollout_step import fuse, roll, roll_blocks, rollout_step


def _versions(call: Call) -> list[int]:
    return [0 if t.is_inference() else t._version for t in call.tensors()]


class GlobalLayer:
    """Attention of all tokens to all tokens; several of them where they stand side by side in ``block`` and are summed."""

    attends, loses = True, False

    def __init__(self, path: str, kind: Kind, call: Call, block: nn.Module):
        self.path, self.kind, self.block, self.calls, self.versions = path, kind, block, [], []
        self.reads = self.gives = Tokens(call.x.shape[1])
        self.device, self.dtype = call.x.device, call.x.dtype
        self.add(call)

    def add(self, call: Call) -> None:
        self.calls.append(call)
        self.versions.append(_versions(call))

    def alone(self, image: int, count: int) -> GlobalLayer:
        """The layer of one image, whose first ``count`` tokens are no padding."""
        self._unchanged()
        calls = [call.alone("rollout", self.path, image, count) for call in self.calls]
        layer = type(self)(self.path, self.kind, calls[0], self.block)
        for call in calls[1:]:
            layer.add(call)
        return layer

    def takes(self, block: nn.Module) -> bool:
        """Whether another attention of ``block`` stands beside those that are there."""
        return block is self.block and len(self.calls) < len(parallel_attentions(block))

    def heads(self) -> list[Heads]:
        """One for each attention of the layer."""
        self._unchanged()
        return [self.kind.read(call, False) for call in self.calls]

    def _unchanged(self) -> None:
        if any(_versions(call) != before for call, before in zip(self.calls, self.versions, strict=True)):
            raise ValueError(f"rollout: the input of {self.path} was overwritten after the layer had read it")

    def back(self, r: Tensor, options: Options) -> Tensor:
        """r (B, R, N) of the layer's output to that of its input."""
        heads, (fusion, residual, discard_ratio, backend) = self.heads(), options
        r = r.to(accumulate_dtype(heads[0].q.dtype))
        if all(h.plain for h in heads) and (len(heads) == 1 or (fusion == "mean" and discard_ratio == 0)):
            steps = [rollout_step(r, h.q, h.k, scale=h.scale, head_fusion=fusion, residual=residual, discard_ratio=discard_ratio,
                                  backend=backend) for h in heads]  # fmt: skip
            return sum(steps) / len(steps)
        with torchlib.without_autocast(r):
            mixed, count = any(h.mix is not None for h in heads), heads[0].q.shape[1]
            step = "max" if mixed else fusion  # of one matrix, which is what "max" leaves it; rows are divided by their sums
            return roll_blocks(r, count, lambda rows: _fused(heads, rows, fusion), step, residual, discard_ratio)


def _fused(heads: list[Heads], rows: slice, head_fusion: str) -> Tensor:
    """(B, 1, n, N): the mean over the attentions of their fused heads, negative weights (of talking heads) as zero."""
    fused = [fuse(h.weights(h.scores(rows)), head_fusion).clamp_min(0) for h in heads]
    return torch.stack(fused).mean(0)[:, None]


class ClassLayer(GlobalLayer):
    """Attention of the class token to all tokens; the others stay as they are."""

    def back(self, r: Tensor, options: Options) -> Tensor:
        [heads] = self.heads()
        r = r.to(accumulate_dtype(heads.q.dtype))
        with torchlib.without_autocast(r):
            out = roll(r, heads.weights(heads.scores(slice(0, 1))), 0, *options[:3])
        out[..., 1:] += r[..., 1:]
        return out


class JoinLayer:
    """``count`` tokens that join in front of the others: what falls on them has come from no patch."""

    attends, loses = False, True

    def __init__(self, path: str, before: Tokens, count: int):
        self.path, self.count, self.reads, self.gives = path, count, before, before._replace(count=before.count + count)

    def back(self, r: Tensor, options: Options) -> Tensor:
        return r[..., self.count :]
