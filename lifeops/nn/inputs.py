"""What modules are built with and called with, checked under their own names before an op, or torch, finds fault under another."""

from __future__ import annotations

import numbers

import torch

from lifeops import geometry, torchlib
from lifeops.arguments import check_int, check_tensor, got
from lifeops.nn.plain import global_hooks, why_not
from lifeops.ops.token_dwconv.spec import check_rows

# ------------------------------------------------------------------------------------------------ at construction


def check_heads(op: str, dim, num_heads):
    """(dim, num_heads), one a multiple of the other."""
    dim, num_heads = check_int(op, "dim", dim, 1), check_int(op, "num_heads", num_heads, 1)
    if dim % num_heads:
        raise ValueError(f"{op}: dim must be a multiple of num_heads, got dim = {dim}, num_heads = {num_heads}")
    return dim, num_heads


def check_kernel_size(op: str, kernel_size) -> int:
    kernel_size = check_int(op, "kernel_size", kernel_size, 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"{op}: kernel_size must be odd, got {kernel_size}")
    return kernel_size


def kernel_sizes(op: str, name: str, kernel_size) -> tuple[int, ...]:
    """One odd number or several as a tuple, checked."""
    sizes = (kernel_size,) if isinstance(kernel_size, numbers.Integral) else kernel_size
    if (
        not isinstance(sizes, (tuple, list))
        or not sizes
        or any(isinstance(k, bool) or not isinstance(k, numbers.Integral) or k < 1 or k % 2 == 0 for k in sizes)
    ):
        raise ValueError(f"{op}: {name} must be an odd positive int or several of them, got {got(kernel_size)}")
    return tuple(map(int, sizes))


# ------------------------------------------------------------------------------------------------ in forward


def check_input(op: str, x, dim: int | None, grid, num_prefix_tokens: int, name: str = "x") -> tuple[int, int]:
    """The grid, if ``x`` is its tokens (B, P + H*W, dim)."""
    check_sequence(op, name, x, dim)
    g = geometry.to_grid(op, grid, num_prefix_tokens)
    geometry.check_tokens(op, name, x.shape[1], g.height, g.width, g.prefix)
    return g.height, g.width


def check_sequence(op: str, name: str, x, dim: int | None = None) -> None:
    """Tokens (B, N, C) of ``dim`` channels, if that is known."""
    check_tensor(op, name, x)
    check_rows(op, name, x)
    if dim is not None and x.shape[2] != dim:
        raise ValueError(f"{op}: {name} must have shape (B, N, {dim}), got {tuple(x.shape)}")


def check_like(op: str, name: str, x: torch.Tensor, layer, any_dtype: bool = False) -> None:
    """Raise where ``layer``, which reads ``x`` first, cannot: its weight is of another dtype (autocast is off) or on another device.

    Layers that were hooked, adapted, quantised, sharded or offloaded (weights on meta, which a hook on what holds them loads) may know
    how, and are left to try.
    """
    weight = getattr(layer, "_parameters", {}).get("weight")  # reading a parametrised one would compute it
    if not isinstance(weight, torch.Tensor) or (x.device == weight.device and (any_dtype or x.dtype == weight.dtype)):
        return
    if not weight.is_floating_point() or weight.is_meta or why_not(layer, lambda _: []) or global_hooks():
        return
    if x.device != weight.device:
        raise ValueError(f"{op}: {name} must be on the weights' device {weight.device}, got {x.device}")
    if not any_dtype and torchlib.autocast_dtype(x) is None:
        raise TypeError(f"{op}: {name}.dtype must be the weights' {weight.dtype}, got {x.dtype}")


def check_mask(op: str, attn_mask, x: torch.Tensor, num_heads: int) -> None:
    """An attention mask that broadcasts to (B, h, N, N) for the tokens ``x``, or None."""
    if attn_mask is None:
        return
    check_tensor(op, "attn_mask", attn_mask, optional=True)
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"{op}: attn_mask.dtype must be bool (True: attend) or floating point (added), got {attn_mask.dtype}")
    if attn_mask.device != x.device:
        raise ValueError(f"{op}: attn_mask must be on x's device {x.device}, got {attn_mask.device}")
    full = x.shape[0], num_heads, x.shape[1], x.shape[1]
    given = tuple(attn_mask.shape)
    if len(given) > 4 or any(n not in (1, most) for n, most in zip(reversed(given), reversed(full), strict=False)):
        raise ValueError(f"{op}: attn_mask must broadcast to (B, h, N, N) = {full}, got {given}")
