"""What the layers of a roll-out have in common: what each reads and gives, and how its heads become one matrix.

A layer has ``path``, ``attends`` (whether it counts as an attention layer), ``loses`` (whether some of the weight may fall on no token),
``reads`` and ``gives`` (:class:`Tokens`), and ``back(r, options)``: the weights r (B, R, N) of the tokens it gives to those it reads.
"""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """How a layer's heads become one matrix: see :func:`lifeops.rollout_step`."""

    head_fusion: str
    residual: float
    discard_ratio: float
    backend: str | None


class Tokens(NamedTuple):
    """``count`` tokens, or ``count`` of them in front of the patches of ``grid``."""

    count: int
    grid: tuple[int, int] | None = None

    @property
    def total(self) -> int:
        return self.count + (0 if self.grid is None else self.grid[0] * self.grid[1])
