"""local_attention: multi-head attention whose values are also convolved over the patch grid (locally-enhanced positional encoding).

    s = scale q kᵀ + attn_mask      p = softmax(s) over the keys that are not masked      attn = dropout(p) v
    y[b, n, head*d + c] = attn[b, head, n, c] + (0 for the prefix tokens, DW_K(v_patch) + bias for the patches)

q, k, v are (B, h, N, d) in any strides; y is (B, N, C = h*d), channel head*d + c. A query without any key to attend to gets
attn = 0 and lse = 0. With p = exp(s - lse), dp = dropout'(dattn vᵀ) and D = rowsum(dattn * attn), the local term left out of D,

    dv = dropout(p)ᵀ dy + DWᵀ(dy)      ds = p (dp - D)      dq = scale ds k      dk = scale dsᵀ q      d(attn_mask) = ds

DWᵀ is token_dwconv with a mirrored filter; its residual is the attention's own gradient, so the two are added in one pass. ``keep`` says
whether backward will need attn and lse; without it they come out empty.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops import geometry, torchlib
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.local_attention import samples as cases
from lifeops.ops.local_attention.formula import attend, attend_bwd, heads, sequence
from lifeops.ops.token_dwconv import spec as dwconv
from lifeops.registry import BACKEND_PRIORITY, Op, register

NAME = "local_attention"
DTYPES = dwconv.DTYPES


class Problem(NamedTuple):
    """What the choice of a backend may depend on. ``weight_dtype`` is None and K is 0 where there is no local term."""

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    C: int
    K: int
    d: int
    N: int
    dropout: bool


# ------------------------------------------------------------------------------------------------ checks


def _check_heads(op, q, k, v, H, W, P):
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} must have shape (B, h, N, d), got {tuple(t.shape)}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{op}: {name}.dtype must be float64, float32, float16 or bfloat16, got {t.dtype}")
        if (t.shape, t.dtype, t.device) != (q.shape, q.dtype, q.device):
            expected, got = (f"{tuple(a.shape)}, {a.dtype} on {a.device}" for a in (q, t))
            raise ValueError(f"{op}: {name} must be like q: {expected}, got {got}")
    if q.shape[1] * q.shape[3] == 0:
        raise ValueError(f"{op}: q must have at least one head and one channel a head, got {tuple(q.shape)}")
    geometry.check_tokens(op, "q", q.shape[2], H, W, P, dim=2)


def _check_local(op, v, weight, bias):
    C = v.shape[1] * v.shape[3]
    if weight is not None:
        dwconv._check_weight(op, weight, v.new_empty((0, 0, C)))
    if bias is not None:
        if weight is None:
            raise ValueError(f"{op}: bias belongs to weight, which is None")
        if bias.shape != (C,):
            raise ValueError(f"{op}: bias must have shape ({C},), got {tuple(bias.shape)}")
        dwconv._check_companion(op, "bias", bias, v)


def _check_masks(op, q, attn_mask, key_mask, seed, dropout_p):
    B, h, N, _ = q.shape
    if attn_mask is not None:
        if attn_mask.dim() != 4 or attn_mask.shape[0] not in (1, B) or attn_mask.shape[1] not in (1, h) or attn_mask.shape[2:] != (N, N):
            expected = f"(B or 1, h or 1, N, N) = ({B} or 1, {h} or 1, {N}, {N})"
            raise ValueError(f"{op}: attn_mask must have shape {expected}, got {tuple(attn_mask.shape)}")
        if attn_mask.dtype not in (torch.bool, *DTYPES):
            raise TypeError(f"{op}: attn_mask.dtype must be bool (True: attend) or floating point (added), got {attn_mask.dtype}")
        if attn_mask.device != q.device:
            raise ValueError(f"{op}: attn_mask must be on q's device {q.device}, got {attn_mask.device}")
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"{op}: key_mask.dtype must be bool (True: the token exists), got {key_mask.dtype}")
        if key_mask.shape != (B, N) or key_mask.device != q.device:
            got = f"{tuple(key_mask.shape)} on {key_mask.device}"
            raise ValueError(f"{op}: key_mask must have shape (B, N) = ({B}, {N}) on {q.device}, got {got}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if seed is not None and seed.device != q.device:
        raise ValueError(f"{op}: seed must be on q's device {q.device}, got {seed.device}")
    if (seed is not None) != (dropout_p > 0):
        raise ValueError(f"{op}: seed must be given exactly where dropout_p > 0, got {seed} and {dropout_p}")


def check(q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, keep, backend):
    _check_heads(NAME, q, k, v, H, W, P)
    _check_local(NAME, v, weight, bias)
    _check_masks(NAME, q, attn_mask, key_mask, seed, dropout_p)


def check_bwd(dy, q, k, v, weight, attn, lse, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, mask_grad, backend):
    op = f"{NAME}_bwd"
    _check_heads(op, q, k, v, H, W, P)
    _check_local(op, v, weight, None)
    _check_masks(op, q, attn_mask, key_mask, seed, dropout_p)
    B, h, N, d = q.shape
    for name, t in (("dy", dy), ("attn", attn)):
        if t.shape != (B, N, h * d) or t.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must have shape (B, N, C) = ({B}, {N}, {h * d}) and {q.dtype}, got {tuple(t.shape)}, {t.dtype}")
    for name, t in (("dy", dy), ("attn", attn), ("lse", lse)):
        if t.device != q.device:
            raise ValueError(f"{op}: {name} must be on q's device {q.device}, got {t.device}")
    if lse.shape != (B, h, N) or lse.dtype != accumulate_dtype(q.dtype):
        raise ValueError(f"{op}: lse must have shape (B, h, N) = ({B}, {h}, {N}), got {tuple(lse.shape)}, {lse.dtype}")
    if mask_grad and (attn_mask is None or not attn_mask.is_floating_point()):
        raise ValueError(f"{op}: only a floating-point attn_mask has a gradient")


# ------------------------------------------------------------------------------------------------ from attention to the op


def _nothing(q):
    return q.new_empty((0,))


def composed(attention, convolve):
    """The forward op from ``attention(q, k, v, attn_mask, key_mask, seed, scale, dropout_p) -> (attn, lse)`` and
    ``convolve(x, weight, bias, residual, H, W, P, backend)``, token_dwconv with a zero prefix.
    """

    def run(q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, keep, backend):
        attn, lse = attention(q, k, v, attn_mask, key_mask, seed, scale, dropout_p)
        y = attn if weight is None else convolve(sequence(v), weight, bias, attn, H, W, P, backend)
        return y, _nothing(q) if weight is None or not keep else attn, lse if keep else _nothing(lse)

    return run


def composed_bwd(attention_bwd, convolve):
    """The backward op from ``attention_bwd(dy, q, k, v, attn, lse, …, mask_grad) -> (dq, dk, dv, dmask or None)``."""

    def run(dy, q, k, v, weight, attn, lse, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, mask_grad, backend):
        dq, dk, dv, dmask = attention_bwd(dy, q, k, v, attn, lse, attn_mask, key_mask, seed, scale, dropout_p, mask_grad)
        if weight is not None:
            dv = heads(convolve(dy, weight.flip(-1, -2), None, sequence(dv), H, W, P, backend), q.shape[1])
        return dq, dk, dv, _nothing(q) if dmask is None else dmask

    return run


_dwconv = torchlib.caller(dwconv.fwd_op)


def _convolve_reference(x, weight, bias, residual, H, W, P, backend):
    return dwconv.reference(x, weight, bias, residual, H, W, P, "zero", backend)


def _convolve(x, weight, bias, residual, H, W, P, backend):
    """On the backend asked for, or on token_dwconv's own best one: the two steps are separate kernels anyway."""
    return _dwconv(x, weight, bias, residual, H, W, P, "zero", backend)


reference = composed(attend, _convolve_reference)
reference_bwd = composed_bwd(attend_bwd, _convolve_reference)


def register_attention(backend: str, attention, attention_bwd, supports, dtypes=DTYPES) -> None:
    """Both ops on ``backend``, from its attention and its token_dwconv."""
    settings = {"supports": supports, "priority": BACKEND_PRIORITY[backend], "dtypes": dtypes}
    register(fwd_op.name, backend, composed(attention, _convolve), **settings)
    register(bwd_op.name, backend, composed_bwd(attention_bwd, _convolve), **settings)


# ------------------------------------------------------------------------------------------------ fakes, costs


def fake(q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, keep, backend):
    B, h, N, d = q.shape
    y, attn = (q.new_empty((B, N, h * d)) for _ in range(2))
    lse = q.new_empty((B, h, N), dtype=accumulate_dtype(q.dtype))
    return y, _nothing(q) if weight is None or not keep else attn, lse if keep else _nothing(lse)


def fake_bwd(dy, q, k, v, weight, attn, lse, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, mask_grad, backend):
    B, h, N, d = q.shape
    dq, dk, dv = (q.new_empty((B, N, h, d)).transpose(1, 2) for _ in range(3))
    return dq, dk, dv, attn_mask.new_empty(attn_mask.shape) if mask_grad else _nothing(q)


def _flops(q, weight, products, H, W):
    """``products`` matrix products over all pairs of tokens, and the convolution. Shapes, not tensors."""
    B, h, N, d = q
    return 2 * products * B * h * N * N * d + (2 * B * H * W * weight[0] * weight[2] * weight[3] if weight is not None else 0)


def flops(q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, *rest):
    return _flops(q, weight, 2, H, W)


def flops_bwd(dy, q, k, v, weight, attn, lse, attn_mask, key_mask, seed, H, W, *rest):
    return _flops(q, weight, 5, H, W)


def problem(q, weight, dropout_p):
    """The Problem of a call."""
    _, h, N, d = q.shape
    dtype, K = (None, 0) if weight is None else (weight.dtype, weight.shape[-1])
    return Problem(q.device, q.dtype, dtype, h * d, K, d, N, dropout_p > 0)


_MASKS = "Tensor? attn_mask, Tensor? key_mask, Tensor? seed"
_SETTINGS = "SymInt H, SymInt W, SymInt P, float scale, float dropout_p"

fwd_op = Op(
    NAME,
    f"{NAME}(Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor? bias, {_MASKS}, {_SETTINGS}, bool keep, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    reference,
    check,
    fake,
    problem=lambda q, k, v, weight, *rest: problem(q, weight, rest[-3]),
    flops=flops,
    samples=cases.samples,
    make=cases.make_fwd,
    reduces=lambda s: s.P + s.H * s.W,
    is_empty=lambda q, *rest: q.numel() == 0,
    exact=lambda s: False,  # exp
    kept=(2,),  # torch's kernel has a faster exp for half precision: 3e-5 in lse
)
bwd_op = Op(
    f"{NAME}_bwd",
    f"{NAME}_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor attn, Tensor lse, {_MASKS}, {_SETTINGS},"
    " bool mask_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    reference_bwd,
    check_bwd,
    fake_bwd,
    problem=lambda dy, q, k, v, weight, *rest: problem(q, weight, rest[-3]),
    flops=flops_bwd,
    samples=cases.samples_bwd,
    make=cases.make_bwd,
    reduces=lambda s: (s.P + s.H * s.W) * s.mask_batch,
    is_empty=lambda dy, q, *rest: q.numel() == 0,
    exact=lambda s: False,
)
for op in (fwd_op, bwd_op):
    torchlib.install(op)
