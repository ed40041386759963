"""Whether a layer attends as it is read: a few query rows of softmax(scale q kᵀ) v, computed again, against what it gave in that very pass.

A layer can have q, k and v and do more with them than is known: a bias, a mask, a window, a second softmax. Its output tells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.hosts.heads import Heads
from lifeops.hosts.projections import gated, joining, of_heads

ROWS, IMAGES = 8, 2  # O(N) memory and a small part of the layer's time
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_TF32 = 5e-3


class Rows(NamedTuple):
    """``values`` (b, n, h*d): the heads' joined outputs of the tokens ``index`` of ``images``, of ``count``. ``tolerance``: relative."""

    values: Tensor
    images: list[int]
    index: Tensor
    tolerance: float
    count: int

    def of(self, tokens: Tensor) -> Tensor:
        return tokens[self.images][:, self.index.to(tokens.device)]


def some_images(batch: int) -> list[int]:
    return sorted({0, batch - 1}) if batch else []


def _tolerance(dtype: torch.dtype, device: torch.device, largest_score: float) -> float:
    """Scores are rounded before the exponential, in q's precision where the model attends eagerly."""
    if device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return _TF32 + largest_score * 2**-9
    return _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16]) + 4 * torch.finfo(dtype).eps * largest_score


def attention_tolerance(q: Tensor, k: Tensor, num_heads: int) -> float:
    """For outputs of softmax(q kᵀ / √d) v, from q and k (B, N, h*d): the largest score is at most the product of the largest norms."""
    norms = [t.unflatten(2, (num_heads, -1)).to(torch.float64).norm(dim=-1).max().item() for t in (q, k)]
    return _tolerance(q.dtype, q.device, norms[0] * norms[1] * (q.shape[2] // num_heads) ** -0.5)


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float | None, images: list[int]) -> Rows:
    """q, k, v (b, h, N, d) of ``images`` to some rows of the attention's output."""
    return attended_by(Heads(q, k, v, scale), images)


def attended_by(heads: Heads, images: list[int]) -> Rows:
    """The same of whatever an attention layer does between its q and its output."""
    q, v = heads.q, heads.v
    with torchlib.without_autocast(q):
        index = torch.linspace(0, q.shape[2] - 1, min(q.shape[2], ROWS)).round().long().unique().to(q.device)
        scores = heads.scores(index)
        values = heads.weights(scores) @ v.to(scores.dtype)
        if heads.plus_q is not None:
            values = values + torch.where(index[:, None] >= heads.plus_q, q[:, :, index], 0)
        values = values.transpose(1, 2).flatten(2)
    largest = scores.abs().nan_to_num(0, 0, 0).max().item() if scores.numel() else 0.0
    return Rows(values, images, index, _tolerance(q.dtype, q.device, largest), q.shape[2])


def off(real: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry; where either is not finite nothing can be said. 1 for other shapes."""
    if real.shape != expected.shape:
        return 1.0
    real, expected = real.to(torch.float64), expected.to(torch.float64)
    both = real.isfinite() & expected.isfinite()
    if not both.any():
        return 0.0
    difference = (real - expected)[both].abs().max()
    return (difference / real[both].abs().maximum(expected[both].abs()).max().clamp_min(1e-300)).item()


def drops(module: nn.Module) -> bool:
    """Whether some attention or output is dropped at random, so that nothing can be compared."""
    if not module.training:
        return False
    rates = [m.p for m in module.modules() if isinstance(m, nn.Dropout) and m.training]
    rates += [getattr(module, name, 0) for name in ("attention_dropout", "dropout_prob", "dropout")]
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


class LayerCheck:
    """One run of one layer: ``rows`` are what is expected, ``done`` once they were compared."""

    def __init__(self, path: str, module: nn.Module, rows: Rows, x: Tensor):
        self.path, self.module, self.rows, self.x, self.done = path, module, rows, x, False

    def merged(self, tokens: Tensor) -> None:
        """Compare with what the merge point is given."""
        expected = gated(self.module, self.rows.values, self.rows.of(self.x))
        self._compare(of_heads(self.module, tokens, expected.shape[-1]), expected, "what its heads give")

    def ended(self, output) -> None:
        """Compare with what the layer gives, if nothing was compared before."""
        if self.done:
            return
        output, expected = output[0] if isinstance(output, (tuple, list)) else output, self.rows.values
        if (proj := joining(self.module)) is not None:
            dtype = next((p.dtype for p in proj.parameters() if p.is_floating_point()), expected.dtype)
            expected = proj(expected.to(dtype))
        self._compare(output, expected, "its output")

    def _compare(self, tokens: Tensor, expected: Tensor, what: str) -> None:
        tokens = tokens.flatten(1, 2) if isinstance(tokens, Tensor) and tokens.dim() == 4 else tokens  # maps
        fits = isinstance(tokens, Tensor) and tokens.dim() == 3 and tokens.shape[:2] == (self.x.shape[0], self.rows.count)
        found = off(self.rows.of(tokens), expected) if fits else 1.0
        if found > self.rows.tolerance:
            got = f"is off by {found:.2g} of its largest entry" if fits else f"has shape {tuple(tokens.shape)}"
            raise ValueError(
                f"{self.path} is {type(self.module).__name__}, which does not compute softmax(scale q kᵀ) v of its own q, k and v"
                f" over all tokens: {what} {got}"
            )
        self.done = True
