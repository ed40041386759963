"""What the token kernels share: offsets of token rows, exact unpacking, and the host side of a launch.

Names in the kernels say where a value lives: i_ program or tile index, o_ offsets, m_ mask, p_ pointers, b_ block of values.
"""

import contextlib
from functools import lru_cache
from operator import itemgetter

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime.errors import InterpreterError

from lifeops import registry
from lifeops.errors import KernelNotBuilt

TL_DTYPE = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WARPS = 4  # 128 threads: up to 168 registers each leave three programs on an SM


@triton.jit
def load_block(p, m, MASKED: tl.constexpr, ACC: tl.constexpr):
    """A block in the accumulator's dtype, zero where ``m`` is false. Without MASKED no register is cleared beforehand.

    bfloat16 is widened as an integer: LLVM then takes the upper half of a register pair with one AND. Its own conversion
    is a PRMT and a shift, 1 of 15 instructions per element at K = 3.
    """
    if MASKED:
        b = tl.load(p, mask=m, other=0.0)
    else:
        b = tl.load(p)
    if b.dtype == tl.bfloat16 and ACC == tl.float32:
        return (b.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return b.to(ACC)


@triton.jit
def per_channel(p, o_c, m_c, otherwise: tl.constexpr, ACC: tl.constexpr):
    """(1, BLOCK_C) values of the channels, or a constant where there are none."""
    if p is None:
        return tl.full(o_c.shape, otherwise, ACC)
    else:
        return load_block(p + o_c, m_c, True, ACC)


@triton.jit
def store_block(p, b, m, MASKED: tl.constexpr):
    if MASKED:
        tl.store(p, b.to(p.dtype.element_ty), mask=m)
    else:
        tl.store(p, b.to(p.dtype.element_ty))


@triton.jit
def inside(o, size):
    """Whether row or column ``o`` of each job is on the grid, (BLOCK_R, 1): one unsigned comparison."""
    return (o.to(tl.uint32) < tl.cast(size, tl.uint32))[:, None]


@triton.jit
def row_mask(o_r, H, m_c, TAIL: tl.constexpr):
    """Whether each job's row exists, and its channels if the last block of channels is not full."""
    m = inside(o_r, H)
    if TAIL:
        m = m & m_c
    return m


@triton.jit
def prefix_rows(p_x, p_r, p_y, m_x, m_y, rows, x_col, r_col, y_col, ACC: tl.constexpr):
    """Copy or clear the prefix rows of some images, and add the residual's."""
    for _ in range(rows):
        b_y = load_block(p_x, m_x, True, ACC)
        p_x += x_col
        if p_r is not None:
            b_y += load_block(p_r, m_y, True, ACC)
            p_r += r_col
        store_block(p_y, b_y, m_y, True)
        p_y += y_col


@triton.jit
def row_offset(o_b, o_n, stride_b, stride_n):
    """int64 offset of token ``o_n`` of image ``o_b``."""
    return o_b.to(tl.int64) * stride_b + o_n.to(tl.int64) * stride_n


@triton.jit
def strides(stride_b, stride_n, STRIDE_N: tl.constexpr, ALIGN: tl.constexpr):
    """Strides of images and tokens in elements, from those in units of ALIGN elements: so Triton knows that ALIGN divides
    them and loads whole vectors. A common STRIDE_N is a constant: columns are then immediate offsets.
    """
    if STRIDE_N == 0:
        return stride_b.to(tl.int64) * ALIGN, stride_n.to(tl.int64) * ALIGN
    else:
        return stride_b.to(tl.int64) * ALIGN, STRIDE_N


@triton.jit
def divide(o_a, d):
    """(o_a // d, o_a % d) of non-negative int32; unsigned division is half as long as signed."""
    o_q = (o_a.to(tl.uint32) // d.to(tl.uint32)).to(tl.int32)
    return o_q, o_a - o_q * d


def contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """Per-channel values as the kernels read them: a strided or expanded view is copied."""
    return None if t is None else t.contiguous()


def interpreted(kernel) -> bool:
    """Whether ``kernel`` was made with TRITON_INTERPRET=1, which runs on CPU tensors."""
    return not isinstance(kernel, triton.JITFunction)


def accumulator(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def common_stride(stride_n: int, C: int) -> int:
    """``stride_n`` where it is worth a compiled variant: whole rows and chunks of qkv. Else 0, a run-time stride."""
    return stride_n if stride_n in (C, 2 * C, 3 * C) else 0


@lru_cache(4096)
def alignment(*numbers: int) -> int:
    """The largest power of two up to 16 that divides every number: how far a row's vectors may be trusted."""
    align = 16
    while any(n % align for n in numbers):
        align //= 2
    return align


@lru_cache(4096)
def block_of_channels(C: int, widest: int) -> int:
    """Channels per program: the fewest padded channels, then the widest rows (128-byte rows cost 7 % of bandwidth)."""
    return min((widest, widest // 2, widest // 4), key=lambda block: (-(-C // block) * block, -block))


@lru_cache(4096)
def channels_per_lane(K: int, dtype: torch.dtype) -> int:
    """What the K² values per channel leave room for in 128 registers; a double takes two."""
    channels = 4 if K <= 3 else 2 if K <= 7 else 1
    return max(1, channels // 2) if dtype == torch.float64 else channels


compiled: dict[tuple, CompiledKernel] = {}
"""By kernel, device and what Triton specialises on: calls past the first are bound by position, without its binder of 40 keywords."""


@lru_cache(64)
def _parameters(kernel):
    """(all arguments in order, the constants among them, (name, whether Triton asks for its value) of the others)."""
    names = [p.name for p in kernel.params]
    constants = [p.name for p in kernel.params if p.is_constexpr]
    return itemgetter(*names), itemgetter(*constants), [(p.name, not p.do_not_specialize) for p in kernel.params if not p.is_constexpr]


def specialised(kernel, arguments: dict) -> tuple:
    """What ``kernel`` is compiled for: constants, dtypes and 16-byte alignment of tensors, the width of integers."""
    _, constants, others = _parameters(kernel)
    key = [*constants(arguments)]
    for name, by_value in others:
        value = arguments[name]
        if value is None:
            key.append(None)
        elif isinstance(value, torch.Tensor):
            key += value.dtype, value.data_ptr() % 16 == 0
        elif by_value:
            key.append((type(value), value))
        else:
            key.append(-0x80000000 <= value < 0x80000000)
    return tuple(key)


def launch(kernel, programs: int, on: torch.Tensor, arguments: dict) -> None:
    """Run ``programs`` programs on the device of ``on``. The sums are explicit FMAs; fusion is asked for all the same,
    because Triton 3.9 warns when it is left to a default that 3.10 turns off.
    """
    with on_device(on, kernel):
        if interpreted(kernel):
            kernel[(programs,)](**arguments, num_warps=WARPS, enable_fp_fusion=True)
            return
        key = id(kernel), on.device, *specialised(kernel, arguments)
        found = compiled.get(key)
        if found is not None:
            found[programs, 1, 1](*_parameters(kernel)[0](arguments))
            return
        found = kernel[(programs,)](**arguments, num_warps=WARPS, enable_fp_fusion=True)
        if isinstance(found, CompiledKernel):
            compiled[key] = found


@contextlib.contextmanager
def on_device(on: torch.Tensor, kernel):
    """Launches on the device of ``on``. What fails before a kernel runs is KernelNotBuilt: no C compiler, a cache that cannot be written
    to, an error of Triton's compiler or of ptxas. What fails as it runs keeps its error ("Triton Error [CUDA]: …").
    """
    try:
        with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
            yield
    except (torch.OutOfMemoryError, MemoryError, InterpreterError):
        raise
    except Exception as error:
        if str(error).startswith("Triton Error"):
            raise
        raise KernelNotBuilt(f"Triton cannot build {kernel.fn.__name__} here: {registry.one_line(error)}") from error


def unsupported(problem, kernel, max_kernel: int = 0) -> list[str]:
    """Every reason why Triton cannot run ``problem``; ``max_kernel`` is of the ops with one odd kernel size K."""
    reasons, device = [], problem.device
    if device.type != "cuda" and not (device.type == "cpu" and interpreted(kernel)):
        reasons.append(f"Triton needs a CUDA device (or TRITON_INTERPRET=1 set before it is imported), got {device.type}")
    K = getattr(problem, "K", 0)
    dtypes = {problem.dtype, getattr(problem, "weight_dtype", None)} - {None}
    for dtype in sorted(dtypes - TL_DTYPE.keys(), key=str):
        reasons.append(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    if K and (K % 2 == 0 or K > max_kernel):
        reasons.append(f"K must be odd and at most {max_kernel}, got {K}")
    if torch.bfloat16 in dtypes:
        reasons += below((8, 0), device, "bfloat16")
    return reasons


def below(least: tuple[int, int], device: torch.device, what: str) -> list[str]:
    """Why ``what`` does not run on a CUDA device of less than this compute capability, if it does not."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return []
    has = torch.cuda.get_device_capability(device)
    return [f"{what} needs compute capability {least[0]}.{least[1]}, got {has[0]}.{has[1]}"] if has < least else []


def too_large(kernel: tuple[int, int], most: int) -> list[str]:
    """Why a kernel of rows x columns is too large, if it is."""
    return [f"kernels have at most {most} rows and columns, got {tuple(kernel)}"] if max(kernel) > most else []
