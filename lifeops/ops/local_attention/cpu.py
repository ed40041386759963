"""local_attention on CPU: one compiled kernel for attention and its local term, one for their gradients.

Where they are not built, plain attention takes torch's own flash kernel, which writes (B, N, h, d), so that its output is the sequence
(B, N, C) without a copy. That one knows no gradient of a mask; those calls take the explicit formulas, and so do calls with dropout and
those whose NaN it would hide (see ``_hides``).
"""

from __future__ import annotations

import math

import torch

from lifeops import native_attention, registry, torchlib
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.local_attention.formula import attend, attend_bwd, by_token, heads, in_dtype, sequence, unread, visible
from lifeops.ops.local_attention.spec import _convolve, _nothing, bwd_op, composed, composed_bwd, fwd_op
from lifeops.ops.token_dwconv.spec import DTYPES
from lifeops.ops.token_dwconv.spec import Problem as Convolution
from lifeops.ops.token_dwconv.spec import fwd_op as convolution
from lifeops.registry import BACKEND_PRIORITY, reasons_against, register

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _added(mask, dtype):
    """A bool mask as numbers to add."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _mask(q, k, v, attn_mask, key_mask):
    """(k, v, one mask to add or None): k and v without what no query may see, the mask in a dtype that torch's kernel takes."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if attn_mask is None:
        return k, v, None if key_mask is None else _added(key_mask[:, None, None], dtype)
    attn_mask = in_dtype(attn_mask, dtype)
    if not visible(attn_mask).any(-2).all():
        k, v = unread(k, v, attn_mask)
    mask = _added(attn_mask, dtype) if attn_mask.dtype == torch.bool else attn_mask
    return k, v, mask if key_mask is None else mask.masked_fill(~key_mask[:, None, None], -torch.inf)


def _hides(q, k, lse) -> bool:
    """Whether torch's kernel may have put 0 where NaN belongs: in half precision for a score of inf, whose lse is inf too; of fewer
    keys than a vector has lanes for a query of NaN, as if it were masked (lse = 0).
    """
    if q.dtype in (torch.float16, torch.bfloat16) and not math.isfinite(lse.sum().item()):
        return True
    return q.shape[2] < 16 and not lse.all() and not (q.isfinite().all() and k.isfinite().all())


def _apart(*tensors):
    """(B, h, N, d) whose tokens do not share memory (expanded, overlapping views): torch's kernel gives their strides to matrix products,
    which take them for other ones, or refuse them.
    """
    return [t.contiguous() if t.shape[2] > 1 and t.stride(2) < t.shape[3] else t for t in tensors]


def _attention(q, k, v, attn_mask, key_mask, seed, scale, dropout_p):
    if seed is not None:
        return attend(q, k, v, attn_mask, key_mask, seed, scale, dropout_p)
    q, k, v = _apart(*torchlib.contiguous_channels(q, k, v))
    k, v, mask = _mask(q, k, v, attn_mask, key_mask)
    attn, lse = _flash(q, k, v, attn_mask=mask, scale=scale)
    if _hides(q, k, lse):
        return attend(q, k, v, attn_mask, key_mask, seed, scale, dropout_p)
    return sequence(attn), lse.contiguous()


def _attention_bwd(dy, q, k, v, attn, lse, attn_mask, key_mask, seed, scale, dropout_p, mask_grad):
    if seed is not None or mask_grad:
        return attend_bwd(dy, q, k, v, attn, lse, attn_mask, key_mask, seed, scale, dropout_p, mask_grad)
    q, k, v = _apart(*torchlib.contiguous_channels(q, k, v))
    k, v, mask = _mask(q, k, v, attn_mask, key_mask)
    dy, attn = _apart(*(heads(t, q.shape[1]) for t in (dy, attn)))
    return *map(by_token, _flash_bwd(dy, q, k, v, attn, lse, 0.0, False, attn_mask=mask, scale=scale)), None


_by_torch, _by_torch_bwd = composed(_attention, _convolve), composed_bwd(_attention_bwd, _convolve)


def _compiled(seed) -> bool:
    """Whether the compiled kernels take a call; they know no dropout."""
    return seed is None and registry.unavailable("cpu") is None


def _forward(q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, keep, backend):
    if not _compiled(seed):
        return _by_torch(q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, keep, backend)
    q, k, v = torchlib.contiguous_channels(q, k, v)
    attn_mask = in_dtype(attn_mask, accumulate_dtype(q.dtype))
    return native_attention.local_attention(q, k, v, weight, bias, attn_mask, key_mask, H, W, P, scale, keep)


def _backward(dy, q, k, v, weight, attn, lse, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, mask_grad, backend):
    if not _compiled(seed):
        kept = weight, attn, lse, attn_mask, key_mask, seed
        return _by_torch_bwd(dy, q, k, v, *kept, H, W, P, scale, dropout_p, mask_grad, backend)
    dy, q, k, v, attn = torchlib.contiguous_channels(dy, q, k, v, attn)
    mask = in_dtype(attn_mask, accumulate_dtype(q.dtype))
    args = dy, q, k, v, weight, attn, lse, mask, key_mask, H, W, P, scale
    dq, dk, dv, ds = native_attention.local_attention_bwd(*args, mask_grad)
    return dq, dk, dv, ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype) if mask_grad else _nothing(q)


def supports(problem) -> list[str]:
    found = [] if problem.device.type == "cpu" else [f"tensors are on {problem.device.type}"]
    if problem.dtype not in DTYPES:
        found.append(f"dtype {problem.dtype}")
    if problem.K:
        found += reasons_against(convolution, "cpu", Convolution(*problem[:5]))
    return list(dict.fromkeys(found))


for op, run in ((fwd_op, _forward), (bwd_op, _backward)):
    register(op.name, "cpu", run, supports=supports, priority=BACKEND_PRIORITY["cpu"])
