"""local_attention on CPU: torch's own flash kernel, and token_dwconv's compiled one with the attention as its residual.

torch's kernel writes (B, N, h, d), so that its output is the sequence (B, N, C) without a copy. It knows neither dropout nor the
gradient of a mask; those calls take the explicit formulas, and so do calls whose NaN it would hide (see ``_hides``).

Its products are torch's (MKL, oneDNN), whose last bits may depend on how many threads there are and where the tensors lie: seen in
gradients (float64 at 3 threads, N = 58), rarely in ``lse``. life_qkv has such products too; no other operator has.
"""

from __future__ import annotations

import math

import torch

from lifeops import torchlib
from lifeops.ops.local_attention.formula import attend, attend_bwd, by_token, heads, in_dtype, sequence, unread, visible
from lifeops.ops.local_attention.spec import register_attention
from lifeops.ops.token_dwconv.spec import DTYPES
from lifeops.ops.token_dwconv.spec import Problem as Convolution
from lifeops.ops.token_dwconv.spec import fwd_op as convolution
from lifeops.registry import reasons_against

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


def supports(problem) -> list[str]:
    found = [] if problem.device.type == "cpu" else [f"tensors are on {problem.device.type}"]
    if problem.dtype not in DTYPES:
        found.append(f"dtype {problem.dtype}")
    if problem.K:
        found += reasons_against(convolution, "cpu", Convolution(*problem[:5]))
    return list(dict.fromkeys(found))


register_attention("cpu", _attention, _attention_bwd, supports)
