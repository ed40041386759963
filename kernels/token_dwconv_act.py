"""token_dwconv with prologue and epilogue in Triton: the same kernels, and their sums merged."""

import torch

from lifeops import registry
from lifeops.kernels import _tile
from lifeops.kernels._sums import moments, row_sums
from lifeops.kernels.token_dwconv import MAX_KERNEL, PLAIN, ROWS, forward, segments, token_dwconv_fwd_kernel
from lifeops.kernels.token_dwconv_grad import grad_weight
from lifeops.ops.channel.act import accumulate_dtype


def _step(scale, shift, act) -> str:
    """The kernel's name of an affine step and an activation: "" where nothing happens."""
    return "" if scale is None and shift is None and act == "none" else act


def _job_sums(x, H, W, K):
    """(B, pairs, segments, 3, C)."""
    segment, _ = segments(H, W, K)
    return torch.empty((x.shape[0], -(-H // ROWS), -(-W // segment), 3, x.shape[2]), dtype=accumulate_dtype(x.dtype), device=x.device)


def _pooled(sums, H, W, segment):
    """(B, C): the sums of every image from (k, sum of y - k, m2) of its jobs."""
    rows = (H - torch.arange(0, H, ROWS, device=sums.device)).clamp_max(ROWS)
    columns = (W - torch.arange(0, W, segment, device=sums.device)).clamp_max(segment)
    n = (rows[:, None] * columns)[..., None].to(sums.dtype)
    return (sums[..., 0, :] * n + sums[..., 1, :]).sum((1, 2))


def token_dwconv_act(x, weight, bias, scale, shift, act, out_scale, out_shift, out_act, residual, H, W, P, prefix, pool, stats, backend):
    K = weight.shape[-1]
    sums = _job_sums(x, H, W, K) if pool or stats else None
    around = PLAIN | dict(
        scale_ptr=_tile.contiguous(scale), shift_ptr=_tile.contiguous(shift), ACT=_step(scale, shift, act),
        out_scale_ptr=_tile.contiguous(out_scale), out_shift_ptr=_tile.contiguous(out_shift), OUT_ACT=_step(out_scale, out_shift, out_act),
        sums_ptr=sums, SUMS=sums is not None,
    )  # fmt: skip
    y = forward(x, weight, bias, residual, H, W, P, 0 if prefix == "drop" else P, prefix == "keep", False, around)
    nothing = [x.new_empty((0,), dtype=accumulate_dtype(x.dtype)) for _ in range(3)]
    if sums is None:
        return y, *nothing
    segment, _ = segments(H, W, K)
    total = _pooled(sums, H, W, segment) if pool else nothing[0]
    return y, total, *(moments(sums, H, W, ROWS, segment) if stats else nothing[1:])


def token_dwconv_act_bwd_dx(dy, x, weight, scale, shift, act, a, b, H, W, P, prefix, backend):
    sums = _job_sums(x, H, W, weight.shape[-1])
    around = PLAIN | dict(
        scale_ptr=_tile.contiguous(scale), shift_ptr=_tile.contiguous(shift), ACT=act, DERIVATIVE=True, pre_ptr=x, pre_prefix=P,
        out_scale_ptr=_tile.contiguous(b), out_shift_ptr=_tile.contiguous(a), sums_ptr=sums, SUMS=True,
        OUT_ACT="none" if b is not None else "shift" if a is not None else "",
    )  # fmt: skip
    dx = forward(dy, weight, None, None, H, W, 0 if prefix == "drop" else P, P, prefix == "keep", True, around)
    dshift, dscale = row_sums(sums.view(1, -1, *sums.shape[-2:]), first=1, two=True)
    return dx, dscale[0], dshift[0]


def token_dwconv_act_bwd_dw(dy, x, K, scale, shift, act, H, W, P, prefix, weight_dtype, bias_dtype, backend):
    prologue = _tile.contiguous(scale), _tile.contiguous(shift), _step(scale, shift, act)
    return grad_weight(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, *prologue)


def supports(problem) -> list[str]:
    return _tile.unsupported(problem, token_dwconv_fwd_kernel, MAX_KERNEL)


for _fn in (token_dwconv_act, token_dwconv_act_bwd_dx, token_dwconv_act_bwd_dw):
    registry.register(_fn.__name__, "triton", _fn, supports=supports, priority=10)
