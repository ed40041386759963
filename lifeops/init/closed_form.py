"""Closed forms: impulse queries and keys (arXiv 2505.19985), mimetic ones (arXiv 2305.09828), values and projections.

Impulse. X = LayerNorm(E) of the patches' position embedding E (N, C), X⁺ its pseudo-inverse truncated to rank d. For each head

    A = X⁺ M X⁺ᵀ (C, C),   M = 1000 S + 3 T on the zeros of S,   A = U S Vᵀ,   Q = U_d √S_d,   K = √S_d V_dᵀ

with the head's shift matrix S and truncated normal noise T. X⁺ = V_d Σ_d⁻¹ U_dᵀ has rank d, so A = V_d B V_dᵀ with a d x d matrix
B = Σ_d⁻¹ U_dᵀ M U_d Σ_d⁻¹: the SVD of B is that of A, at (d/C)³ of its cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops import arguments, geometry
from lifeops.arguments import check_floating, check_int, check_tensor, got
from lifeops.init.offsets import check_kernel_size, head_offsets, shift_targets
from lifeops.init.threads import one_thread

OP = "impulse_qk"
_IMPULSE, _NOISE, _NOISE_STD = 1000.0, 3.0, 0.6


class RowSpace(NamedTuple):
    """X⁺ = basis @ solver.T, of rank d: ``basis`` (C, d) orthonormal, ``solver`` (N, d)."""

    basis: Tensor
    solver: Tensor


def normalised(position_embedding: Tensor) -> Tensor:
    """LayerNorm(E) without affine, eps 1e-5, in float64 on the CPU."""
    E = position_embedding.detach().to("cpu", torch.float64)
    return F.layer_norm(E, E.shape[-1:])


def check_embedding(op: str, position_embedding: Tensor, grid, head_dim: int) -> tuple[int, int]:
    """The grid, if embedding, grid and head width fit each other."""
    g, head_dim = geometry.to_grid(op, grid, 0), check_int(op, "head_dim", head_dim, 1)
    check_numbers(op, "position_embedding", position_embedding)
    if position_embedding.dim() != 2 or position_embedding.shape[0] != g.num_patches:
        expected = f"({g.height}*{g.width} = {g.num_patches}, C)"
        raise ValueError(f"{op}: position_embedding must have shape {expected}, patches only, got {tuple(position_embedding.shape)}")
    if head_dim >= g.num_patches:
        raise ValueError(
            f"{op}: the head width must be smaller than the number of patches {g.height}*{g.width} = {g.num_patches}, got {head_dim}"
            " (use more heads or smaller patches)"
        )
    if head_dim >= position_embedding.shape[1]:
        raise ValueError(
            f"{op}: the head width must be smaller than the {position_embedding.shape[1]} channels, whose LayerNorm leaves one"
            f" dimension less, got {head_dim} (use more than one head)"
        )
    return g.height, g.width


def check_numbers(op: str, name: str, t) -> None:
    """A floating-point tensor with memory: what the solvers read."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    check_tensor(op, name, t), check_floating(op, name, t)
    if t.is_meta:
        raise ValueError(f"{op}: {name} is on the meta device and must have memory, got {got(t)}")
    if not torch.isfinite(t).all():
        raise ValueError(f"{op}: {name} must be finite")


def row_space(op: str, X: Tensor, head_dim: int) -> RowSpace:
    """The rank-d pseudo-inverse of X (N, C)."""
    if not torch.isfinite(X).all():
        raise ValueError(f"{op}: position_embedding must be finite")
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum()) if s[0] > 1e-6 else 0  # exactly equal embeddings leave rounding errors only
    if rank < head_dim:
        raise ValueError(
            f"{op}: the normalised position embedding has rank {rank}, less than the head width {head_dim}"
            " (constant and sine-cosine embeddings do not tell enough positions apart: use random ones, or version=2024)"
        )
    return RowSpace(Vh[:head_dim].T, U[:, :head_dim] / s[:head_dim])


def _draw_noise(num_patches: int, generator: torch.Generator | None) -> Tensor:
    T = torch.empty(num_patches, num_patches)
    return nn.init.trunc_normal_(T, std=_NOISE_STD, a=-2.0, b=2.0, generator=generator)


def solve_impulse(
    space: RowSpace, grid: tuple[int, int], offsets: Sequence[tuple[int, int]], noise: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """(Q (h, C, d), K (h, d, C)) in float64, unit Frobenius norm each."""
    Q, K = [], []
    for i, offset in enumerate(offsets):
        T = _draw_noise(len(space.solver), generator) if noise is None else noise[i]
        M = _NOISE * T.to("cpu", torch.float64)
        M[shift_targets(grid, offset)] = _IMPULSE
        u, s, vh = torch.linalg.svd(space.solver.T @ M @ space.solver)
        root = (s / s.sum()).sqrt()
        Q.append(space.basis @ (u * root))
        K.append((root[:, None] * vh) @ space.basis.T)
    return torch.stack(Q), torch.stack(K)


@one_thread()
def impulse_qk(
    position_embedding: Tensor, *, grid: tuple[int, int], num_heads: int, head_dim: int, noise: Tensor | None = None,
    generator: torch.Generator | None = None, kernel_size: int = 3,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Query and key matrices whose attention on the position embedding alone is a shift by a few patches, one per head.

    Args:
        position_embedding: E (H*W, C), the patches' rows only, C > d, any floating-point dtype and device.
        grid: (H, W), row-major.
        num_heads, head_dim: h and d, d < H*W. Head i shifts by ``head_offsets(num_heads, kernel_size)[i]``.
        noise: T (h, N, N) to use instead of a drawn truncated normal (std 0.6, cut at +-2).
        generator: a CPU generator; everything is drawn and solved (in float64) on the CPU.
        kernel_size: 3 or 5.

    Returns:
        Q (h, C, d), K (h, d, C) of unit Frobenius norm, with E's dtype (float32 for half precision) and device. Attention is
        ``softmax(49 · LN(E) Q K LN(E)ᵀ / √d)`` with the authors' scale of 7 each. Only the product Q·K is unique.

    Raises ValueError, TypeError: sizes that do not fit, an embedding of rank below d. Source: arXiv 2505.19985.
    """
    check_kernel_size(OP, kernel_size)
    num_heads = check_int(OP, "num_heads", num_heads, 1)
    check_generator(OP, generator)
    grid = check_embedding(OP, position_embedding, grid, head_dim)
    N = len(position_embedding)
    if noise is not None:
        check_numbers(OP, "noise", noise)
    if noise is not None and tuple(noise.shape) != (num_heads, N, N):
        raise ValueError(f"{OP}: noise must have shape (h, N, N) = {(num_heads, N, N)}, got {tuple(noise.shape)}")
    space = row_space(OP, normalised(position_embedding), head_dim)
    Q, K = solve_impulse(space, grid, head_offsets(num_heads, kernel_size), noise, generator)
    dtype = torch.promote_types(position_embedding.dtype, torch.float32)
    return Q.to(position_embedding.device, dtype), K.to(position_embedding.device, dtype)


def check_generator(op: str, generator: torch.Generator | None) -> None:
    """None or one of the CPU's."""
    arguments.check_generator(op, generator)
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"{op}: generator must be a CPU generator (numbers are drawn on the CPU and copied), got {generator.device}")


def near_identity_factors(
    shape: tuple[int, ...], noise: float, identity: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """A = noise · U(-√(3/C), √(3/C)) + identity · I as A = L R, ``L = U √S``, ``R = √S Vᵀ``; ``shape`` is (…, C, C)."""
    C = shape[-1]
    A = torch.empty(shape).uniform_(-((3 / C) ** 0.5), (3 / C) ** 0.5, generator=generator)
    u, s, vh = torch.linalg.svd(noise * A + identity * torch.eye(C))
    root = s.sqrt()
    return u * root[..., None, :], root[..., :, None] * vh


def mimetic_qk(dim: int, num_heads: int, head_dim: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(Q (h, C, d), K (h, d, C)): Q K is the rank-d part of 0.7 noise + 0.7 I, independent per head. Source: arXiv 2305.09828."""
    L, R = near_identity_factors((num_heads, dim, dim), 0.7, 0.7, generator)
    return L[..., :head_dim], R[..., :head_dim, :]


def value_projection(dim: int, width: int, transposed: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(v rows (width, C), projection (C, width)) from A = 0.4 noise - 0.4 I = L R.

    ``transposed`` (impulse): v = Lᵀ, proj = Rᵀ, so proj∘v = Aᵀ. Otherwise (mimetic): v = L, proj = R, so v·proj = A and
    proj∘v = R L of the same trace. A ``width`` below C keeps the first rows and columns.
    """
    L, R = near_identity_factors((dim, dim), 0.4, -0.4, generator)
    v, proj = (L.T, R.T) if transposed else (L, R)
    return v[:width], proj[:, :width]
