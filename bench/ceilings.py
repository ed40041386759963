"""Ceilings, measured in the same run as what they are compared with: a copy of the problem's bytes, a large matrix product.

No table of peaks: the copy is timed in turn with the variants, in the same cache regime, and its lower quartile counts, for a ceiling is
what the machine can do in a quiet moment; the product is the better of the problem's dtype and float32, in which the convolutions
accumulate, of a square and of tokens by a layer's weight, and on a CPU of the two libraries that compute products: on AMD the one behind
torch.matmul takes twice the other's time. On a GPU instruction issue is the third: the instructions per
element that ``bench.budgets`` reads from the compiled kernels, over what the multiprocessors can issue.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from bench import device
from bench.problems import Problem

GEMM = {"cpu": ((1536, 1536, 1536), (3136, 384, 1152)), "cuda": ((8192, 8192, 8192),)}  # rows, inputs, outputs
CALLS = 7
LANES = 128  # instructions of single threads that a multiprocessor issues per clock


def _best_ms(run, where: str) -> float:
    """The fastest of a few calls: a ceiling is what the machine can do in a quiet moment."""
    run()
    return min(device.once(run, device.Clock(where, None, 0.0)) for _ in range(CALLS))


def _paths(a: torch.Tensor, b: torch.Tensor, where: str):
    """a @ b, and on a CPU the same by oneDNN's 1x1 convolution."""
    yield lambda: a @ b
    if where == "cpu":
        maps, weight = a[None, None].permute(0, 3, 1, 2), b.t().contiguous()[..., None, None]
        yield lambda: F.conv2d(maps, weight)


@functools.lru_cache
def _product(dtype: torch.dtype, where: str) -> float:
    best = 0.0
    for m, k, n in GEMM[where]:
        a, b = torch.randn(m, k, device=where).to(dtype), torch.randn(k, n, device=where).to(dtype)
        best = max(best, *(2 * m * k * n / _best_ms(run, where) / 1e9 for run in _paths(a, b, where)))
    return best


def gemm_tflops(dtype: str, where: str = "cpu") -> float:
    """TFLOP/s of the fastest of the large products."""
    return max(_product(d, where) for d in {getattr(torch, dtype), torch.float32})


def clone_source(bytes: int, where: str = "cpu") -> torch.Tensor:
    """A tensor whose copy reads and writes ``bytes`` in all."""
    return torch.rand(max(1, bytes // 8), device=where)


def instructions(p: Problem) -> float:
    """Instructions that token_dwconv's Triton kernels issue for ``p``, single threads'; 0 for what is not known."""
    if p.system != "token_dwconv":
        return 0.0
    from bench.budgets import BUDGET

    wide = "-w32" if p.W >= 32 else ""
    forward, dw = BUDGET[f"forward-{p.K}{wide}"][0], BUDGET[f"dw-{p.K}"][0]
    per_element = {"fwd": forward, "dw": dw, "bwd": forward + dw, "fwdbwd": 2 * forward + dw}[p.mode]
    return per_element * p.B * p.H * p.W * p.C


def issue_ms(p: Problem, where: str = "cpu") -> float:
    """Milliseconds to issue the instructions of ``p``; 0 on a CPU, whose vector width the product's ceiling contains."""
    if where != "cuda":
        return 0.0
    gpu = torch.cuda.get_device_properties(0)
    return instructions(p) / (gpu.multi_processor_count * LANES * gpu.clock_rate * 1e3) * 1e3
