"""What an initialisation reached: each head's attention computed from the written weights and the position embedding alone."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lifeops.init.closed_form import normalised
from lifeops.init.offsets import shift_targets
from lifeops.init.optimised import attention_of
from lifeops.init.projections import Projections


class HeadReport(NamedTuple):
    """One head of one layer. ``mass``: its mean attention on the impulse over the rows that have a target; ``hit_rate``: the share of
    them whose largest attention is there. ``offset`` (dy, dx), ``mass`` and ``hit_rate`` are None where there is nothing to hit."""

    layer: int
    path: str
    head: int
    offset: tuple[int, int] | None
    mass: float | None
    hit_rate: float | None


@dataclass
class Report:
    """What ``structured_`` did. ``diagonals[l]``: mean diagonal of proj∘v of layer l. ``loss``: per layer, of the 2024 optimisation."""

    method: str
    version: int | None
    heads: list[HeadReport] = field(default_factory=list)
    diagonals: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        return len(self.diagonals)

    def layer(self, index: int) -> list[HeadReport]:
        return [h for h in self.heads if h.layer == index]

    def __str__(self) -> str:
        version = "" if self.version is None else f" {self.version}"
        lines = [f"{self.method}{version}: {self.num_layers} layers, mean diagonal of proj∘v {statistics.fmean(self.diagonals):+.3f}"]
        for i in sorted({h.head for h in self.heads}):
            heads = [h for h in self.heads if h.head == i]
            offsets = {h.offset for h in heads}
            name = "offset varies" if len(offsets) > 1 else f"offset {offsets.pop()}"
            if heads[0].mass is None:
                lines.append(f"  head {i}: no impulse")
            else:
                mass, hits = (statistics.fmean(getattr(h, n) for h in heads) for n in ("mass", "hit_rate"))
                lines.append(f"  head {i}: {name}, mean attention mass {mass:.3f}, hits {hits:.3f}")
        return "\n".join(lines)


@torch.no_grad()
def initial_attention(p: Projections, patches: Tensor) -> Tensor:
    """(h, N, N) float32 on the CPU: softmax(LN(E) Wqᵀ Wk LN(E)ᵀ / √d), biases left out."""
    q, k = (w.detach().float().cpu().unflatten(0, (p.num_heads, p.head_dim)) for w in (p.q, p.k))
    return attention_of(normalised(patches).float(), q.transpose(-1, -2), k)


def measure(attention: Tensor, grid: tuple[int, int], offset: tuple[int, int]) -> tuple[float, float]:
    """(mass, hit rate) of one head's (N, N) attention; (nan, nan) where no row has a target."""
    rows, targets = shift_targets(grid, offset)
    chosen = attention[rows]
    return chosen[torch.arange(len(rows)), targets].mean().item(), (chosen.argmax(-1) == targets).float().mean().item()


@torch.no_grad()
def mean_diagonal(p: Projections) -> float:
    """Mean of the diagonal of proj @ v (C, C)."""
    return torch.einsum("oi,io->", p.proj.float(), p.v.float()).item() / p.dim


def add_layer(report: Report, index: int, p: Projections, patches: Tensor | None, grid, offsets) -> None:
    """Measure what layer ``index`` came to; ``offsets`` None: no impulse was asked for."""
    report.diagonals.append(mean_diagonal(p))
    if patches is None or offsets is None:
        report.heads += [HeadReport(index, p.path, i, None, None, None) for i in range(p.num_heads)]
        return
    for i, (attention, offset) in enumerate(zip(initial_attention(p, patches), offsets, strict=True)):
        report.heads.append(HeadReport(index, p.path, i, tuple(offset), *measure(attention, grid, offset)))
