"""The DW shortcut with one kernel in Triton: three launches for a training step's forward, five for its backward, one or two in evaluation.

The passes over tokens are those of the other modules; here is what lies between them: sums joined in float64 in a fixed order, and the
values per channel that come of them. lifeops/ops/dw_shortcut has the formulas. Nothing is read on the host.
"""

import torch
import triton
import triton.language as tl

from lifeops import registry
from lifeops.kernels import _tile
from lifeops.kernels._sums import BLOCK_C, ROWS, cut, joined_moments, store_affine
from lifeops.kernels._tile import inside, load_block, per_channel, row_offset, strides
from lifeops.kernels.channel_act import SUM_TOKENS, channel_stats_parts
from lifeops.kernels.token_dwconv import MAX_KERNEL, PLAIN, forward, token_dwconv_fwd_kernel
from lifeops.kernels.token_dwconv_grad import grad_launch, token_dwconv_bwd_dw_kernel
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.channel.activations import GELU_FIRST

VALUES = ROWS * BLOCK_C  # of a tile


@triton.jit(do_not_specialize=["rows", "cuts", "segments", "H", "W"])
def dw_shortcut_norm_kernel(
    partial_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, affine_ptr, rows, cuts, segments, H, W, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    C: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """affine (3, C): scale, shift and rstd of BLOCK_C channels. With partial statistics (rows, 3, C) mean and unbiased variance are
    written; without them they are read.
    """
    o_c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    if partial_ptr is None:
        b_mean, b_var = per_channel(mean_ptr, o_c, m_c, 0.0, tl.float64), per_channel(var_ptr, o_c, m_c, 0.0, tl.float64)
    else:
        n, b_mean, b_m2 = joined_moments(partial_ptr, o_c, m_c, rows, cuts, segments, H, W, HEIGHT, WIDTH, C, ROWS, BLOCK_C)
        b_var = b_m2 / n
        tl.store(mean_ptr + o_c, b_mean.to(mean_ptr.dtype.element_ty), mask=m_c)
        tl.store(var_ptr + o_c, (b_m2 / tl.maximum(n - 1.0, 1.0)).to(var_ptr.dtype.element_ty), mask=m_c)
    store_affine(affine_ptr, gamma_ptr, beta_ptr, b_mean, b_var, o_c, m_c, C, EPS)


@triton.jit(do_not_specialize=["B", "first", "stride_b", "stride_n"])
def dw_shortcut_images_kernel(
    dy_ptr, total_ptr, B, first, stride_b, stride_n,
    C: tl.constexpr, STRIDE_N: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """total (patches, C): the sum over the images, a patch and BLOCK_C channels to a program."""
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    i_n = tl.program_id(0) // BLOCKS_C
    stride_b, stride_n = strides(stride_b, stride_n, STRIDE_N, ALIGN)
    b_sum = tl.zeros([ROWS, BLOCK_C], dtype=ACC)
    for i in range(0, B, ROWS):
        o_b = i + tl.arange(0, ROWS)
        b_sum += load_block(dy_ptr + row_offset(o_b, first + i_n, stride_b, stride_n)[:, None] + o_c, inside(o_b, B) & (o_c < C), True, ACC)
    o_c = tl.reshape(o_c, [BLOCK_C])
    tl.store(total_ptr + i_n.to(tl.int64) * C + o_c, tl.sum(b_sum, 0), mask=o_c < C)


@triton.jit(do_not_specialize=["parts", "H", "W"])
def dw_shortcut_taps_kernel(
    partial_ptr, total_ptr, sums_ptr, parts, H, W, C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums (2, K², C) of one tap: G from its partial sums (parts, K², C), and S from the images' total: that over the patches whose
    neighbour at the tap is on the grid.
    """
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    i_tap = tl.program_id(0) // BLOCKS_C
    b_zero = tl.zeros([ROWS, BLOCK_C], dtype=sums_ptr.dtype.element_ty)
    b_g, b_s = b_zero, b_zero
    for i in range(0, parts, ROWS):
        o_part = i + tl.arange(0, ROWS)
        p = partial_ptr + ((o_part.to(tl.int64) * (K * K) + i_tap) * C)[:, None] + o_c
        b_g += load_block(p, inside(o_part, parts) & m_c, True, b_zero.dtype)
    for i in range(0, H * W, ROWS):
        o_n = i + tl.arange(0, ROWS)
        o_r, o_q = o_n // W + i_tap // K - K // 2, o_n % W + i_tap % K - K // 2
        m = inside(o_n, H * W) & inside(o_r, H) & inside(o_q, W) & m_c
        b_s += load_block(total_ptr + (o_n.to(tl.int64) * C)[:, None] + o_c, m, True, b_zero.dtype)
    o_c = tl.reshape(o_c, [BLOCK_C])
    tl.store(sums_ptr + i_tap * C + o_c, tl.sum(b_g, 0), mask=o_c < C)
    tl.store(sums_ptr + (K * K + i_tap) * C + o_c, tl.sum(b_s, 0), mask=o_c < C)


@triton.jit(do_not_specialize=["images", "patches"])
def dw_shortcut_gradients_kernel(
    sums_ptr, weight_ptr, mean_ptr, affine_ptr, dw_ptr, dbias_ptr, dgamma_ptr, dbeta_ptr, ab_ptr, images, patches,
    C: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The parameters' gradients from sums (2, TAPS, C), and ab (2, C): what dx gets of the norm, a + b gelu(x)."""
    o_c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    o_t = tl.arange(0, BLOCK_T)[:, None]
    m = (o_t < TAPS) & m_c
    b_g = load_block(sums_ptr + o_t * C + o_c, m, True, tl.float64)
    b_s = load_block(sums_ptr + (TAPS + o_t) * C + o_c, m, True, tl.float64)
    b_w = load_block(weight_ptr + o_c * TAPS + o_t, m, True, tl.float64)
    b_scale, b_shift = per_channel(affine_ptr, o_c, m_c, 0.0, tl.float64), per_channel(affine_ptr + C, o_c, m_c, 0.0, tl.float64)
    b_rstd, b_mean = per_channel(affine_ptr + 2 * C, o_c, m_c, 0.0, tl.float64), per_channel(mean_ptr, o_c, m_c, 0.0, tl.float64)
    b_dscale, b_dshift = tl.sum(b_w * b_g, 0)[None, :], tl.sum(b_w * b_s, 0)[None, :]
    n = images.to(tl.float64) * patches.to(tl.float64)
    b_gain = b_rstd * (b_dscale - b_mean * b_dshift)
    b_slope = -b_scale * b_rstd * b_gain / n
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    tl.store(dw_ptr + o_c * TAPS + o_t, (b_scale * b_g + b_shift * b_s).to(ACC), mask=m)
    tl.store(dbias_ptr + o_c, tl.load(sums_ptr + (TAPS + TAPS // 2) * C + o_c, mask=m_c, other=0.0), mask=m_c)
    tl.store(dgamma_ptr + o_c, b_gain.to(ACC), mask=m_c)
    tl.store(dbeta_ptr + o_c, b_dshift.to(ACC), mask=m_c)
    tl.store(ab_ptr + o_c, (-b_scale * b_dshift / n - b_slope * b_mean).to(ACC), mask=m_c)
    tl.store(ab_ptr + C + o_c, b_slope.to(ACC), mask=m_c)


def _norm(x, partial, mean, var, gamma, beta, eps, patches):
    """affine (3, C); mean and var are written where there are partial statistics."""
    C, rows = x.shape[2], 0 if partial is None else partial.shape[0] * partial.shape[1]
    affine = torch.empty((3, C), dtype=accumulate_dtype(x.dtype), device=x.device)
    arguments = dict(
        partial_ptr=partial, mean_ptr=mean, var_ptr=var, gamma_ptr=_tile.contiguous(gamma), beta_ptr=_tile.contiguous(beta),
        affine_ptr=affine, **cut(rows, patches, 1, SUM_TOKENS, 1), C=C, EPS=eps, ROWS=ROWS, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    _tile.launch(dw_shortcut_norm_kernel, -(-C // BLOCK_C), affine, arguments)
    return affine


def _convolution(x, block_output, weight, bias, scale, shift, H, W, P):
    around = PLAIN | dict(scale_ptr=_tile.contiguous(scale), shift_ptr=_tile.contiguous(shift), ACT=GELU_FIRST)
    return forward(x, weight, bias, block_output, H, W, P, P, False, False, around)


def dw_shortcut(x, block_output, weight, bias, gamma, beta, eps, H, W, P, backend):
    partial = channel_stats_parts(x, "gelu", H * W)
    mean, var = (torch.empty((x.shape[2],), dtype=partial.dtype, device=x.device) for _ in range(2))
    affine = _norm(x, partial, mean, var, gamma, beta, eps, H * W)
    return _convolution(x, block_output, weight, bias, affine[0], affine[1], H, W, P), mean, var, affine


def dw_shortcut_eval(x, block_output, weight, bias, mean, var, gamma, beta, eps, H, W, P, backend):
    if mean is not None:
        gamma, beta, _ = _norm(x, None, mean.contiguous(), var.contiguous(), gamma, beta, eps, H * W)
    return _convolution(x, block_output, weight, bias, gamma, beta, H, W, P)


def _image_sums(dy, H, W, P):
    """(H * W, C): dy summed over the images."""
    C = dy.shape[2]
    total = torch.empty((H * W, C), dtype=accumulate_dtype(dy.dtype), device=dy.device)
    block_c, align = _tile.block_of_channels(C, 128), _tile.alignment(C, *dy.stride()[:2])
    arguments = dict(
        dy_ptr=dy, total_ptr=total, B=dy.shape[0], first=P, stride_b=dy.stride(0) // align, stride_n=dy.stride(1) // align,
        C=C, STRIDE_N=_tile.common_stride(dy.stride(1), C), ALIGN=align, ACC=_tile.accumulator(dy.dtype),
        ROWS=VALUES // block_c, BLOCK_C=block_c,
    )  # fmt: skip
    _tile.launch(dw_shortcut_images_kernel, H * W * -(-C // block_c), dy, arguments)
    return total


def _tap_sums(dy, x, K, H, W, P):
    """(2, K², C): G and S."""
    C, block_c = x.shape[2], 16
    programs, arguments = grad_launch(dy, x, K, H, W, P, P, False, act="gelu")
    _tile.launch(token_dwconv_bwd_dw_kernel, programs, x, arguments)
    partial = arguments["partial_ptr"]
    sums = torch.empty((2, K * K, C), dtype=partial.dtype, device=x.device)
    arguments = dict(
        partial_ptr=partial, total_ptr=_image_sums(dy, H, W, P), sums_ptr=sums, parts=partial.shape[0], H=H, W=W, C=C, K=K,
        ROWS=VALUES // block_c, BLOCK_C=block_c,
    )  # fmt: skip
    _tile.launch(dw_shortcut_taps_kernel, K * K * -(-C // block_c), x, arguments)
    return sums


def dw_shortcut_bwd(dy, x, weight, mean, affine, H, W, P, need_dx, backend):
    C, K = x.shape[2], weight.shape[-1]
    dw = torch.empty((C, 1, K, K), dtype=mean.dtype, device=x.device)
    grads, ab = [torch.empty_like(mean) for _ in range(3)], torch.empty((2, C), dtype=mean.dtype, device=x.device)
    arguments = dict(
        sums_ptr=_tap_sums(dy, x, K, H, W, P), weight_ptr=weight.contiguous(), mean_ptr=mean.contiguous(), affine_ptr=affine.contiguous(),
        dw_ptr=dw, **dict(zip(("dbias_ptr", "dgamma_ptr", "dbeta_ptr"), grads, strict=True)), ab_ptr=ab,
        images=x.shape[0], patches=H * W, C=C, TAPS=K * K, BLOCK_T=triton.next_power_of_2(K * K), BLOCK_C=BLOCK_C,
    )  # fmt: skip
    _tile.launch(dw_shortcut_gradients_kernel, -(-C // BLOCK_C), x, arguments)
    if not need_dx:
        return x.new_empty((0,)), dw, *grads
    a, b = ab.unbind(0)
    around = PLAIN | dict(
        scale_ptr=affine[0].contiguous(), ACT=GELU_FIRST, DERIVATIVE=True, pre_ptr=x, pre_prefix=P,
        out_scale_ptr=b, out_shift_ptr=a, OUT_ACT="none",
    )  # fmt: skip
    return forward(dy, weight, None, None, H, W, P, P, False, True, around), dw, *grads


def supports(problem) -> list[str]:
    return _tile.unsupported(problem, token_dwconv_fwd_kernel, MAX_KERNEL)


for _fn in (dw_shortcut, dw_shortcut_bwd, dw_shortcut_eval):
    registry.register(_fn.__name__, "triton", _fn, supports=supports, priority=10)
