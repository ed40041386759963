"""rollout_step: one layer of attention roll-out, without the N x N attention matrix ever being written.

    A_h = softmax(scale * q_h k_hᵀ)                                  every head, rows over the N keys
    F   = fuse_h A_h                                                 mean, max or min over the heads
    F_ij = 0 below the (m + 1)-th smallest entry of row i            m = floor(discard_ratio * N); ties with it stay
    Â   = (1 - residual) * F + residual * I                          rows divided by their sums, which the plain mean has as 1
    out = r Â                                                        row vectors r from the layer above

r (B, R, N): R weightings of the N tokens per image; q, k (B, h, N, d) in any strides. r and out are float32 (float64 for float64 q);
scores, softmax and sums are float32 or wider. The reference and the CPU kernel hold one block of queries against all keys, Triton's
kernel one tile, so the memory is O(B (N C + R N)), C = h d. Sum over the tokens: out has the sum of r. A query to which no map gives
weight adds nothing, whatever lies in it (NaN). Not differentiable.

Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020), multiplied from the left.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lifeops import config, registry, torchlib
from lifeops.arguments import check_choice, check_number, check_tensors
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.full_precision import full_precision
from lifeops.ops.token_dwconv.samples import Maker, lay_out
from lifeops.ops.token_dwconv.spec import DTYPES
from lifeops.options import Backend, HeadFusion
from lifeops.registry import Op

NAME = "rollout_step"
FUSIONS = ("mean", "max", "min")
_BLOCK = 2**22  # scores that the reference holds at a time
_LEAST = {torch.float64: 1e-300, torch.float32: 1e-37}  # a row of zeros stays one (min of heads that agree nowhere, residual 0)


class Problem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    d: int
    head_fusion: str


def dropped_entries(discard_ratio: float, N: int) -> int:
    """How many entries of a row of N are set to zero; 1e-9 so that 0.29 of 100 is 29."""
    return min(math.floor(discard_ratio * N + 1e-9), N - 1)


# ------------------------------------------------------------------------------------------------ check, reference, fake


def _check_options(head_fusion, residual, discard_ratio, op=NAME):
    """(residual, discard_ratio) as floats."""
    check_choice(op, "head_fusion", head_fusion, FUSIONS)
    residual = check_number(op, "residual", residual, "between 0 and 1", lambda v: 0 <= v <= 1)
    return residual, check_number(op, "discard_ratio", discard_ratio, "at least 0 and below 1", lambda v: 0 <= v < 1)


def check(r, q, k, scale, head_fusion, residual, discard_ratio, backend):
    _check_options(head_fusion, residual, discard_ratio)
    if q.dim() != 4 or q.shape[1] * q.shape[3] == 0:
        raise ValueError(f"{NAME}: q must have shape (B, h, N, d) with h > 0 and d > 0, got {tuple(q.shape)}")
    if q.dtype not in DTYPES:
        raise TypeError(f"{NAME}: q.dtype must be float64, float32, float16 or bfloat16, got {q.dtype}")
    if k.shape != q.shape or k.dtype != q.dtype or k.device != q.device:
        expected, got = (f"{tuple(t.shape)}, {t.dtype} on {t.device}" for t in (q, k))
        raise ValueError(f"{NAME}: k must be like q, {expected}, got {got}")
    dtype = accumulate_dtype(q.dtype)
    if r.dim() != 3 or r.shape[0] != q.shape[0] or r.shape[2] != q.shape[2]:
        raise ValueError(f"{NAME}: r must have shape (B, R, N) = ({q.shape[0]}, R, {q.shape[2]}), got {tuple(r.shape)}")
    if r.device != q.device:
        raise ValueError(f"{NAME}: r must be on q's device {q.device}, got {r.device}")
    if r.dtype != dtype:
        raise TypeError(f"{NAME}: r.dtype must be {dtype} beside {q.dtype} q, got {r.dtype}")


def fuse(attention: torch.Tensor, head_fusion: str) -> torch.Tensor:
    """(B, h, n, N) to (B, n, N)."""
    return attention.mean(1) if head_fusion == "mean" else attention.amax(1) if head_fusion == "max" else attention.amin(1)


def discard(rows: torch.Tensor, discard_ratio: float) -> torch.Tensor:
    """Rows (…, N) with their smallest entries set to zero."""
    dropped = dropped_entries(discard_ratio, rows.shape[-1])
    if dropped == 0:
        return rows
    threshold = rows.kthvalue(dropped + 1, dim=-1, keepdim=True).values
    return rows.masked_fill(rows < threshold, 0)


def shares(own, attention, head_fusion, residual, discard_ratio):
    """Of some rows of a layer, attention (B, h, n, N), and their weights own (B, R, n): own over the sums of the rows of Â, and what they
    give to the keys, (1 - residual) own F (B, R, N).
    """
    rows = discard(fuse(attention, head_fusion), discard_ratio)
    if head_fusion != "mean" or discard_ratio > 0:
        own = own / ((1 - residual) * rows.sum(-1) + residual).clamp_min(_LEAST[own.dtype])[:, None]
    return own, (1 - residual) * (own @ rows)


def roll(r, attention, first, head_fusion, residual, discard_ratio):
    """What the rows ``first``, ``first`` + 1, … of a layer add to r Â: r (B, R, N), attention (B, h, n, N)."""
    rows = slice(first, first + attention.shape[2])
    own, out = shares(r[..., rows], attention, head_fusion, residual, discard_ratio)
    out[..., rows] += residual * own
    return out


def blocks(count, scores):
    """``count`` rows of ``scores`` scores each, as many of them at a time as the reference holds."""
    block = max(1, _BLOCK // max(1, scores))
    return (slice(first, first + block) for first in range(0, count, block))


def roll_blocks(r, heads, attend, head_fusion, residual, discard_ratio):
    """r Â, a block of queries at a time: attend(rows) gives their attention (B, h, n, N)."""
    (B, _, N), out = r.shape, torch.zeros_like(r)
    wanted = (r != 0).any(1)[:, None, :, None]
    for rows in blocks(N, B * heads * N):
        out += roll(r, torch.where(wanted[:, :, rows], attend(rows), 0), rows.start, head_fusion, residual, discard_ratio)
    return out


@full_precision
def reference(r, q, k, scale, head_fusion, residual, discard_ratio, backend):
    q, k = q.to(r.dtype), k.to(r.dtype).transpose(-2, -1)
    return roll_blocks(r, q.shape[1], lambda rows: (scale * q[:, :, rows] @ k).softmax(-1), head_fusion, residual, discard_ratio)


def _fake(r, q, k, scale, head_fusion, residual, discard_ratio, backend):
    return torch.empty(r.shape, dtype=r.dtype, device=r.device)


def _flops(r, q, *rest):
    (B, h, N, d), R = q, r[1]
    return 2 * B * N * N * (h * d + R)


# ------------------------------------------------------------------------------------------------ samples


class Sample(NamedTuple):
    name: str
    reason: str
    B: int = 2
    R: int = 2
    h: int = 3
    N: int = 21
    d: int = 8
    head_fusion: str = "mean"
    residual: float = 0.5
    discard_ratio: float = 0.0
    scale: float = 1.0
    layout: str = "contiguous"  # of q and k as sequences (B, N, h*d), see lay_out; "heads": (B, h, d, N) transposed
    rows: str = "dense"  # r: "dense", "one": a single output token, "uniform"
    tiny: bool = True


def samples() -> tuple[Sample, ...]:
    return (
        Sample("plain", "the common case in small"),
        Sample("one_token", "N = 1: every attention is 1", N=1),
        Sample("one_head", "fusion of one head", h=1, head_fusion="max"),
        Sample("max", "rows renormalised", head_fusion="max"),
        Sample("min", "rows renormalised", head_fusion="min"),
        Sample("discard", "the smallest 0.6 of each row", discard_ratio=0.6),
        Sample("discard_max", "discarded after fusion", head_fusion="max", discard_ratio=0.9, residual=0.3),
        Sample("no_residual", "attention alone", residual=0.0),
        Sample("identity", "residual 1: r comes back", residual=1.0, head_fusion="min"),
        Sample("cls", "one output token: one row of the layer is needed", rows="one", R=1),
        Sample("qkv_chunk", "q and k are thirds of a projection", layout="chunk"),
        Sample("transposed", "the channels of a head lie apart", layout="heads", head_fusion="max"),
        Sample("expanded", "stride 0 in the batch", layout="expand"),
        Sample("odd", "d and N one past a vector", d=17, N=33, R=5),
        Sample("wide_maps", "more maps than registers", R=19, N=9),
        Sample("peaked", "large scores: the maximum must be taken off", scale=60.0),
        Sample("empty_batch", "B = 0", B=0),
        Sample("no_maps", "R = 0", R=0),
        Sample("vit_t", "ViT-T at 14x14 with cls and dist", N=198, d=64, R=1, scale=0.125, tiny=False),
        Sample("long", "several strips and query blocks, keys past one panel", B=1, N=1111, d=32, h=2, R=3, scale=0.5, tiny=False),
        Sample("long_min", "the same, renormalised", B=1, N=700, d=24, h=2, R=9, head_fusion="min", discard_ratio=0.25, tiny=False),
    )


def _heads(s: Sample, draw: Maker):
    if s.layout == "heads":
        return draw(s.B, s.h, s.d, s.N).transpose(2, 3)
    return lay_out(draw(s.B, s.N, s.h * s.d), s.layout).unflatten(2, (s.h, s.d)).transpose(1, 2)


def _make(s: Sample, draw: Maker, backend: str) -> tuple:
    dtype = accumulate_dtype(draw.dtype)
    r = draw(s.B, s.R, s.N, dtype=dtype).abs()
    if s.rows == "one":
        r[..., 1:] = 0
    return r, _heads(s, draw), _heads(s, draw), s.scale, s.head_fusion, s.residual, s.discard_ratio, backend


# ------------------------------------------------------------------------------------------------ op and public function


op = Op(
    NAME,
    f"{NAME}(Tensor r, Tensor q, Tensor k, float scale, str head_fusion, float residual, float discard_ratio, str backend) -> Tensor",
    reference, check, _fake, flops=_flops, samples=samples, make=_make, reduces=lambda s: s.N * s.d,
    problem=lambda r, q, k, scale, fusion, residual, ratio, backend: Problem(q.device, q.dtype, q.shape[3], fusion),
    is_empty=lambda r, q, *rest: r.numel() == 0 or q.numel() == 0, exact=lambda sample: False,
)  # fmt: skip
torchlib.install(op)
_step = torchlib.overload(op)


def _arguments(r, q, k, scale, head_fusion, residual, discard_ratio, backend):
    """The schema's arguments from the user's."""
    check_tensors(NAME, r=r, q=q, k=k)
    residual, discard_ratio = _check_options(head_fusion, residual, discard_ratio)
    scale = check_number(NAME, "scale", scale, optional=True)
    if scale is None:
        scale = max(1, q.shape[-1]) ** -0.5 if q.dim() else 1.0  # check refuses q without dimensions
    return r, q, k, scale, head_fusion, residual, discard_ratio, config.requested_backend(NAME, backend)


def rollout_step(
    r: Tensor, q: Tensor, k: Tensor, *, scale: float | None = None, head_fusion: HeadFusion = "mean", residual: float = 0.5,
    discard_ratio: float = 0.0, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """One layer of attention roll-out: r Â with Â = (1 - residual) fuse_h(softmax(scale q kᵀ)) + residual I, rows summing to 1.

    Args:
        r: (B, R, N) weights of the layer's output tokens, float32 (float64 beside float64 q); row sums are kept.
        q, k: (B, h, N, d), float64, float32, float16 or bfloat16, views in any strides.
        scale: of the scores; default d ** -0.5.
        head_fusion: "mean", "max" or "min" over the heads.
        residual: ρ in [0, 1], the share of the skip connection.
        discard_ratio: in [0, 1), the share of each fused row, its smallest entries, that is set to zero.
        backend: "reference", "cpu", "triton"; None chooses.

    Returns:
        (B, R, N), the weights of the layer's input tokens. No gradient: RuntimeError where an input needs one and grad is on.

    Raises:
        ValueError, TypeError: sizes, dtypes or options that do not fit. NotSupported: ``backend`` cannot run it.
    """
    args = _arguments(r, q, k, scale, head_fusion, residual, discard_ratio, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (r, q, k)):
        raise RuntimeError(f"{NAME}: is not differentiable; call it under torch.no_grad() or on detached tensors")
    with torchlib.without_autocast(q):  # which would cast the reference's products down
        return _step(*args)


def explain(r, q, k, *, scale=None, head_fusion="mean", residual=0.5, discard_ratio=0.0, backend=None):
    """What :func:`lifeops.explain` reports of a call."""
    args = _arguments(r, q, k, scale, head_fusion, residual, discard_ratio, backend)
    op.check(*args)
    return [registry.explain_op(op, args[-1], op.problem(*args), () if torchlib.channels_contiguous(r) else ("r",))]
