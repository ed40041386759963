"""Point-wise products of token sequences: y = x Wᵀ + b over (B, N, C), and its two gradients.

On CPU two library paths compute the same numbers to the last bit or so at very different speed: ``F.linear`` and oneDNN's 1x1
convolution on the channels-last view. Which one is better depends on the vendor of the CPU, not on us, so a committed table
(data/cpu_gemm.json, written by ``python -m bench tune``) decides; ``LIFEOPS_CPU_GEMM`` overrides it.
"""

from __future__ import annotations

import functools
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F

from lifeops import config

_TABLE = Path(__file__).parent / "data" / "cpu_gemm.json"
WIDE = 256  # channels from which a product counts as wide


@functools.cache
def vendor() -> str:
    """The CPU's vendor string ("GenuineIntel", "AuthenticAMD", …), or the machine's name where there is none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":")[1].strip()
    except OSError:
        pass
    return platform.machine() or "unknown"


@functools.cache
def _table() -> dict[tuple[str, str, str, str], str]:
    rows = json.loads(_TABLE.read_text())["rows"]
    return {(r["vendor"], r["isa"], r["dtype"], r["shape"]): r["path"] for r in rows}


@functools.cache
def choose(dtype: torch.dtype, channels: int, setting: str) -> str:
    """ "linear" or "conv1x1" for products of this dtype and input width on this CPU; unknown machines take F.linear."""
    if setting != "auto":
        return setting
    shape = "wide" if channels >= WIDE else "narrow"
    key = (vendor(), torch.backends.cpu.get_cpu_capability(), str(dtype).removeprefix("torch."), shape)
    return _table().get(key, "linear")


def _as_convolution(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # a compiler chooses products itself
    return (
        choose(x.dtype, x.shape[2], config.settings.cpu_gemm) == "conv1x1"  # first: on most machines it is the whole answer
        and x.device.type == "cpu"
        and x.dtype != torch.float64
        and x.is_contiguous()
        and x.numel() > 0
        and weight.dtype == x.dtype
    )


def _map(x: torch.Tensor) -> torch.Tensor:
    """(B, N, C) contiguous as a channels-last (B, C, N, 1) view."""
    return x.transpose(1, 2).unsqueeze(3)


def _tokens(y: torch.Tensor) -> torch.Tensor:
    """Back to (B, N, C). A tiny convolution may come out channels first: then this is a copy, else a view."""
    return y.squeeze(3).transpose(1, 2).contiguous()


_CONV = ([0], [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (B, N, C_in), weight (C_out, C_in), bias (C_out,) or None -> (B, N, C_out), contiguous."""
    if _as_convolution(x, weight):
        return _tokens(F.conv2d(_map(x), weight[:, :, None, None], bias))
    return F.linear(x, weight, bias)


def pointwise_bwd_dx(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dy W: (B, N, C_out) -> (B, N, C_in)."""
    if _as_convolution(dy, weight):
        return _tokens(F.conv2d(_map(dy), weight.t()[:, :, None, None]))
    return torch.matmul(dy, weight)


def pointwise_bwd_dw(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dyᵀ x summed over (B, N): (C_out, C_in)."""
    if _as_convolution(x, dy) and dy.is_contiguous():
        weight = x.new_empty((dy.shape[2], x.shape[2], 1, 1))
        grads = torch.ops.aten.convolution_backward(_map(dy), _map(x), weight, *_CONV, [False, True, False])
        return grads[1][:, :, 0, 0]
    return torch.mm(dy.flatten(0, 1).t(), x.flatten(0, 1))
