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

from lifeops import config, torchlib

_TABLE = Path(__file__).parent / "data" / "cpu_gemm.json"
WIDE = 256  # channels from which a product counts as wide
LEAST = 8_000_000  # multiply-adds, below which a convolution's set-up costs more than it saves
MANY = 1024  # rows from which a weight gradient is worth cutting in two where they have no divisor


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


@functools.lru_cache(4096)
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
        and (x.shape[0] * x.shape[1] * weight.numel() >= LEAST or config.settings.cpu_gemm != "auto")
        and not torchlib.modes_look_on()  # counters and tracers know torch's usual products
        and not torchlib.captured()
        and x.device.type == "cpu"
        and x.dtype != torch.float64
        and x.is_contiguous()
        and x.numel() > 0
        and weight.dtype == x.dtype
    )


def _map(x: torch.Tensor, images: int) -> torch.Tensor:
    """(B, N, C) contiguous as a channels-last (images, C, B*N / images, 1) view."""
    return x.view(images, -1, 1, x.shape[2]).permute(0, 3, 1, 2)  # unsqueeze's stride of 1 would not be channels last


def _tokens(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Back to (B, N, C). A tiny convolution may come out channels first: then this is a copy, else a view."""
    return y.permute(0, 2, 3, 1).contiguous().view(*like.shape[:2], y.shape[1])


def _convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``weight`` (C_out, C_in, 1, 1). On one thread conv2d leaves a 1x1 convolution of fewer than 16 images to the other library."""
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        bias = bias if bias is None else bias.contiguous()  # which is read as if it were (torch 2.13)
        return torch.mkldnn_convolution(_map(x, 1), weight, bias, [0, 0], [1, 1], [1, 1], 1)
    return F.conv2d(_map(x, x.shape[0]), weight, bias)


@functools.lru_cache(4096)
def _images(tokens: int) -> int | None:
    """Into how many images of at least 8 tokens the weight gradient's sum is cut, so that oneDNN takes it on one thread too."""
    return next((n for n in range(16, min(128, tokens // 8) + 1) if tokens % n == 0), None)


def _gradients(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, count: int, of_x: bool) -> torch.Tensor:
    """A gradient of the convolution over ``count`` images by oneDNN. Only sizes are read of what it is not of."""
    sizes = [0], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [of_x, not of_x, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(_map(dy, count), _map(x, count), weight[:, :, None, None], *sizes)
    return _tokens(dx, x) if of_x else dw[:, :, 0, 0]


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (B, N, C_in), weight (C_out, C_in), bias (C_out,) or None -> (B, N, C_out), contiguous."""
    if _as_convolution(x, weight):
        return _tokens(_convolved(x, weight[:, :, None, None], bias), x)
    return F.linear(x, weight, bias)


def pointwise_bwd_dx(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dy W: (B, N, C_out) -> (B, N, C_in)."""
    if not _as_convolution(dy, weight):
        return torch.matmul(dy, weight)
    count = _images(dy.shape[0] * dy.shape[1])
    if count is None:  # forwards one image is enough
        return _tokens(_convolved(dy, weight.t().contiguous()[:, :, None, None], None), dy)
    return _gradients(dy, dy.new_empty((*dy.shape[:2], weight.shape[1])), weight, count, True)


def pointwise_bwd_dw(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dyᵀ x summed over (B, N): (C_out, C_in)."""
    weight, rows = x.new_empty((dy.shape[2], x.shape[2])), dy.shape[0] * dy.shape[1]
    if not _as_convolution(dy, weight) or not x.is_contiguous():
        return torch.mm(dy.flatten(0, 1).t(), x.flatten(0, 1))
    count = _images(rows)
    if count is not None:
        return _gradients(dy, x, weight, count, False)
    dy, x, even = dy.flatten(0, 1), x.flatten(0, 1), rows - rows % 16
    # in half precision what is left over would be rounded on its own
    if dy.dtype != torch.float32 or _images(even) is None or (rows < MANY and config.settings.cpu_gemm == "auto"):
        return torch.mm(dy.t(), x)
    return _gradients(dy[None, :even], x[None, :even], weight, _images(even), False).addmm_(dy[even:].t(), x[even:])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return pointwise(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need, again = ctx.needs_input_grad, torch.is_grad_enabled()  # a second derivative goes through torch's own operators
        dx = (torch.matmul(dy, weight) if again else pointwise_bwd_dx(dy, weight)) if need[0] else None
        dw = (torch.einsum("bno,bni->oi", dy, x) if again else pointwise_bwd_dw(dy, x)) if need[1] else None
        return dx, dw, dy.sum((0, 1)) if need[2] else None


def _recorded(x, weight, bias):
    """The product with gradients where one is wanted."""
    return (_Product.apply if torchlib.wants_grad((x, weight, bias)) else pointwise)(x, weight, bias)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear for x (B, N, C_in) by the faster path, with gradients."""
    if torchlib.autocast_dtype(x) is not None or not _as_convolution(x, weight):
        return F.linear(x, weight, bias)
    return _recorded(x, weight, bias)


def product(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    """``layer(x)`` for x (B, N, C_in) by the faster path, with gradients; ``layer`` must be plainly what nn.Linear is."""
    if x.dim() != 3 or torchlib.autocast_dtype(x) is not None or not _as_convolution(x, layer.weight):
        return layer(x)
    return _recorded(x, layer.weight, layer.bias)
