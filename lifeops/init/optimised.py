"""The optimised form of 2024: queries and keys fitted to impulses by Adam, all heads and layers in one batch.

    minimise  mean over (h, N, N) of (softmax(X Q K Xᵀ / √d) - S)²,   X = LayerNorm(E)

with, every 100 steps and before the first, every column of Q (over C) and of K (over d) rescaled to the norm √(C / 3dh), which is
what the columns of a uniform ±√(1/dh) Q have on average. Source: arXiv 2404.01139 and the authors' code: 10 000 steps from there.

Warm start: with P = (XᵀX + λ²)⁻¹ Xᵀ, ``A = P (S - row mean) Pᵀ`` is the ridge solution of X A Xᵀ = S - row mean; its rank-d factors,
turned so that their columns have alike norms, are where the optimisation starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lifeops import geometry
from lifeops.arguments import check_flags, check_int, check_positive, got
from lifeops.init.closed_form import check_embedding, check_generator, normalised
from lifeops.init.offsets import check_kernel_size, random_offsets, shift_matrix
from lifeops.init.threads import one_thread

OP = "optimised_qk"
STEPS, RENORM_EVERY = 500, 100
_RIDGE = 1 / 50  # λ² over ‖X‖², between the sharp ridge (too little norm left per direction) and the flat one (blurred impulses)


class OptimisedQK(NamedTuple):
    """``Q`` (L, h, C, d), ``K`` (L, h, d, C), ``offsets[l][i]`` of every head, ``loss`` (L,) at the end."""

    Q: Tensor
    K: Tensor
    offsets: list[list[tuple[int, int]]]
    loss: Tensor


def sincos_position_embedding(grid: tuple[int, int], dim: int) -> Tensor:
    """(H*W, C): sines and cosines of row and column at C/4 frequencies 10000^(-i / (C/4)). Raises ValueError unless C % 4 == 0."""
    name = "sincos_position_embedding"
    g, dim = geometry.to_grid(name, grid, 0), check_int(name, "dim", dim, 0)
    if dim % 4:
        raise ValueError(f"sincos_position_embedding: dim must be a multiple of 4, got {dim}")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(g.height).double(), torch.arange(g.width).double(), indexing="ij")
    angles = [p.flatten()[:, None] * frequencies for p in (y, x)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def attention_of(X: Tensor, Q: Tensor, K: Tensor) -> Tensor:
    """softmax(X Q K Xᵀ / √d), (…, h, N, N)."""
    return ((X @ Q) @ (K @ X.T) * Q.shape[-1] ** -0.5).softmax(-1)


def impulse_loss(X: Tensor, Q: Tensor, K: Tensor, S: Tensor) -> Tensor:
    """Mean squared distance of the attention from the shift matrices S (L, h, N, N), (L,)."""
    return (attention_of(X, Q, K) - S).square().mean((1, 2, 3))


@one_thread()
def optimised_qk(
    position_embedding: Tensor, *, grid: tuple[int, int], num_heads: int, head_dim: int, kernel_size: int = 3, num_layers: int = 1,
    offsets: Sequence[Sequence[tuple[int, int]]] | None = None, steps: int = STEPS, lr: float = 1e-4, warm_start: bool = True,
    generator: torch.Generator | None = None, progress: bool = False,
) -> OptimisedQK:  # fmt: skip
    """Queries and keys of ``num_layers`` independent layers by optimisation; see the module's formula.

    Args:
        position_embedding: E (H*W, C), fixed during the training of the model too (:func:`sincos_position_embedding`).
        grid, num_heads, head_dim: (H, W), h, d < H*W.
        offsets: per layer and head; default: uniform from the kernel_size x kernel_size ones (3 or 5).
        steps, lr: of Adam. ``warm_start=False, steps=10000`` is the authors' run.
        generator: a CPU generator; everything is computed on the CPU in float32.
        progress: show a bar in a terminal, where rich is installed.

    Raises ValueError, TypeError where sizes do not fit.
    """
    check_generator(OP, generator)
    counts = {"steps": steps, "num_layers": num_layers, "num_heads": num_heads}
    steps, num_layers, num_heads = (check_int(OP, name, n) for name, n in counts.items())
    check_positive(OP, "lr", lr), check_flags(OP, warm_start=warm_start, progress=progress), check_kernel_size(OP, kernel_size)
    if steps < 0 or num_layers < 1 or num_heads < 1:
        raise ValueError(f"{OP}: steps must be at least 0, num_layers and num_heads at least 1, got {steps}, {num_layers} and {num_heads}")
    grid = check_embedding(OP, position_embedding, grid, head_dim)
    offsets = [random_offsets(num_heads, kernel_size, generator) for _ in range(num_layers)] if offsets is None else _pairs(offsets)
    X = normalised(position_embedding).float()
    if [len(layer) for layer in offsets] != [num_heads] * num_layers:
        raise ValueError(f"{OP}: offsets must be {num_layers} lists of {num_heads} pairs, got {[len(layer) for layer in offsets]}")
    S = torch.stack([torch.stack([shift_matrix(grid, o) for o in layer]) for layer in offsets])
    norm = (X.shape[1] / (3 * head_dim * num_heads)) ** 0.5
    start = _warm(X, S, head_dim, generator) if warm_start else _cold(X, S, head_dim, generator)
    Q, K = _fit(X, S, start, norm, steps, lr, progress)
    with torch.no_grad():
        return OptimisedQK(Q, K, [list(layer) for layer in offsets], impulse_loss(X, Q, K, S))


def _pairs(offsets) -> list[list[tuple[int, int]]]:
    """Offsets as users write them: per layer a list of (dy, dx), one for each head."""
    try:
        pairs = [[tuple(check_int(OP, "offsets", n) for n in pair) for pair in layer] for layer in offsets]
    except TypeError as error:
        raise TypeError(f"{OP}: offsets must be lists of pairs of ints, one list per layer, got {got(offsets)}") from error
    if not pairs or not all(pairs) or any(len(pair) != 2 for layer in pairs for pair in layer):
        raise ValueError(f"{OP}: offsets must be lists of pairs of ints, one list per layer, got {got(offsets)}")
    return pairs


def _cold(X, S, head_dim, generator):
    bound = (1 / (head_dim * S.shape[1])) ** 0.5
    shape = (*S.shape[:2], X.shape[1], head_dim)
    Q, K = (torch.empty(s).uniform_(-bound, bound, generator=generator) for s in (shape, (*shape[:2], shape[3], shape[2])))
    return Q, K


def _warm(X, S, head_dim, generator):
    X, S = X.double(), S.double()
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    ridge = U * (s / (s.square() + _RIDGE * s.square().sum()))
    u, values, vh = torch.linalg.svd(ridge.T @ (S - S.mean(-1, keepdim=True)) @ ridge)
    rank = min(head_dim, len(s))
    root = values[..., :rank].sqrt()
    # d orthonormal rows spread `rank` directions over all d columns
    turn = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator).double())[0][:rank]
    Q = Vh.T @ (u[..., :rank] * root[..., None, :]) @ turn
    K = turn.T @ (root[..., :, None] * vh[..., :rank, :]) @ Vh
    return Q.float(), K.float()


@torch.no_grad()
def _rescale(weights, norm):
    for w in weights:
        w.mul_(norm / w.norm(dim=-2, keepdim=True).clamp_min(1e-12))


def _fit(X, S, start, norm, steps, lr, progress):
    weights = [w.clone().requires_grad_() for w in start]
    _rescale(weights, norm)
    optimizer = torch.optim.Adam(weights, lr=lr)
    with torch.enable_grad(), _bar(steps, progress) as advance:
        for step in range(steps):
            if step % RENORM_EVERY == 0:
                _rescale(weights, norm)
            optimizer.zero_grad()
            impulse_loss(X, *weights, S).sum().backward()
            optimizer.step()
            advance()
    return tuple(w.detach() for w in weights)


@contextlib.contextmanager
def _bar(steps, progress):
    """A function to call after each step."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        progress = False
    if not progress or not Console(stderr=True).is_terminal:
        yield lambda: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("fitting impulses", total=steps)
        yield lambda: bar.advance(task)
