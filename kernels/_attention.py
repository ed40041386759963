"""What the attention kernels share: tiles of q, k, v, scores with their masks, dropout, and how tiles are sized.

Scores are kept in units of log 2, so that a probability is one exp2. Rows past N are loaded as zeros.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAX_WIDTH = 128
MAX_DROPOUT_TOKENS = 65535  # a 32-bit counter numbers the N² probabilities of a head


@triton.jit
def head_base(p, i_b, i_h, stride_b, stride_h, ALIGN: tl.constexpr):
    """Where head ``i_h`` of image ``i_b`` starts; strides in units of ALIGN elements."""
    return p + (i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h) * ALIGN


@triton.jit
def rows(p, o_n, N, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """Tokens ``o_n`` of one head, (tokens, BLOCK_D), zero outside."""
    o_d = tl.arange(0, BLOCK_D)
    m = (o_n < N)[:, None]
    if D != BLOCK_D:
        m = m & (o_d < D)[None, :]
    return tl.load(p + (o_n.to(tl.int64) * (stride_n.to(tl.int64) * ALIGN))[:, None] + o_d[None, :], mask=m, other=0.0)


@triton.jit
def dot(b_left, b_right, acc, PRECISION: tl.constexpr):
    """acc + left right. "widened": Triton's interpreter multiplies the bit patterns of bfloat16."""
    if PRECISION == "widened":
        return tl.dot(b_left.to(tl.float32), b_right.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(b_left, b_right, acc, input_precision=PRECISION)


@triton.jit
def store_rows(p, b, o_n, N, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    m = (o_n < N)[:, None]
    if D != BLOCK_D:
        m = m & (o_d < D)[None, :]
    tl.store(p + (o_n.to(tl.int64) * stride_n)[:, None] + o_d[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def head_seed(seed_ptr, i_bh):
    """The seed of one head's dropout; 0 without dropout."""
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr) + i_bh
    return seed


@triton.jit
def scores(b_left, b_right, o_i, o_j, N, scale, mask_ptr, o_mask, stride_mi, stride_mj, key_ptr, o_key, PRECISION: tl.constexpr):
    """left rightᵀ * scale in units of log 2 with the masks applied; ``o_i`` (queries) and ``o_j`` (keys) broadcast against each
    other, one as a column and one as a row. ``o_mask``, ``o_key``: where the head's mask and the image's keys begin.
    """
    b_s = dot(b_left, tl.trans(b_right), None, PRECISION) * scale
    m = o_j < N
    if key_ptr is not None:
        m = m & (tl.load(key_ptr + o_key + o_j, mask=m, other=0) != 0)
    if mask_ptr is not None:
        m_inside = (o_i < N) & (o_j < N)
        p_mask = mask_ptr + o_mask + o_i.to(tl.int64) * stride_mi + o_j.to(tl.int64) * stride_mj
        if p_mask.dtype.element_ty == tl.uint8:
            m = m & (tl.load(p_mask, mask=m_inside, other=0) != 0)
        else:
            b_mask = tl.load(p_mask, mask=m_inside, other=float("-inf")).to(tl.float32) * LOG2E
            m = m & (b_mask != float("-inf"))
            b_s += b_mask
    return tl.where(m, b_s, float("-inf"))


@triton.jit
def read_keys(b_rows, b_s, MASKED: tl.constexpr):
    """``b_rows`` (k or v) with zeros for the keys that no query of the tile sees: 0 times what lies there could be NaN."""
    if MASKED:
        seen = tl.max((b_s > float("-inf")).to(tl.int32), 0)
        b_rows = tl.where((seen != 0)[:, None], b_rows, 0.0)
    return b_rows


@triton.jit
def drop(b, o_i, o_j, N, seed, dropout_p):
    """``b`` with dropout: the same probabilities of a head are dropped in every kernel."""
    keep = tl.rand(seed, o_i * N + o_j) >= dropout_p
    return tl.where(keep, b * (1 / (1 - dropout_p)), 0.0)


@dataclass(frozen=True)
class Config:
    """Constants a kernel is compiled with. KEYS: all keys of a head at once, padded; 0 streams over blocks of BLOCK_N."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    KEYS: int
    warps: int
    stages: int


ONE_BLOCK = (16, 32, 64, 128, 208, 256)  # 208: 14x14 patches and up to 12 prefix tokens


@lru_cache(4096)
def width(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


@lru_cache(4096)
def one_block(N: int) -> int:
    """The keys of a one-block kernel for N tokens, or 0."""
    return next((keys for keys in ONE_BLOCK if N <= keys), 0)


@lru_cache(4096)
def forward_config(N: int, d: int, dtype: torch.dtype, extras: bool) -> Config:
    """``extras``: attn_mask or dropout, whose tiles take the registers that one block of more than 64 keys needs. float32 products
    keep their operands in registers: one block of up to 32 keys.
    """
    wide, keys = width(d), one_block(N)
    warps = 4 if wide <= 64 else 8
    if dtype == torch.float32:
        return Config(32, 32, wide, keys if keys <= 32 else 0, warps, 1)
    if keys and (keys <= 64 or not extras):
        return Config(32 if keys == 256 else min(64, keys), 64, wide, keys, warps, 2)
    return Config(64, 32 if extras or wide > 64 else 64, wide, 0, warps, 2)


@lru_cache(4096)
def backward_config(N: int, d: int, dtype: torch.dtype, extras: bool) -> Config:
    """A width that is no power of two needs masks of its own, which count as extras here."""
    wide, block = width(d), min(64, one_block(N) or 64)
    if dtype == torch.float32:
        return Config(32, 32, wide, 0, 4 if wide == 16 else max(8, wide // 8), 1)
    narrow = min(32, block)
    return Config(narrow if extras and wide != 64 else block, narrow if extras or wide != d else block, wide, 0, 4 if wide <= 64 else 8, 2)


@lru_cache(4096)
def mask_config(d: int, dtype: torch.dtype) -> Config:
    """For the gradient of the mask: a small tile and nothing prefetched, so that its sum stays in registers."""
    wide = width(d)
    return Config(32, 32, wide, 0, max(4, wide // (8 if dtype == torch.float32 else 16)), 1)
