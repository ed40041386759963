"""Activations that kernels apply on the way: value and derivative, the executable specification of all backends."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lifeops.arguments import check_choice

ACTS = ("none", "relu", "relu6", "hardswish", "gelu")
GELU_FIRST = "gelu_first"  # of a prologue: scale * gelu(x) + shift, where the others are f(scale * x + shift)
PROLOGUES = (*ACTS, GELU_FIRST)
EXACT = ("none", "relu", "relu6")  # integers stay integers, derivatives too


def check(op: str, name: str, act: str, known: tuple[str, ...] = ACTS) -> None:
    check_choice(op, name, act, known)


def _gelu(v: torch.Tensor) -> torch.Tensor:
    return torch.where(v == torch.inf, v, F.gelu(v))  # oneDNN's float32 kernel makes NaN of inf


def value(v: torch.Tensor, act: str) -> torch.Tensor:
    """f(v): v, max(v, 0), min(max(v, 0), 6), v·relu6(v + 3)/6 or v·Φ(v) with the exact error function.

    NaN stays; at -inf h-swish and GELU are NaN (-inf · 0), at inf they are inf.
    """
    return {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "gelu": _gelu}[act](v)


def derivative(v: torch.Tensor, act: str) -> torch.Tensor:
    """f'(v); at the kinks what torch's own backward takes. That of GELU is NaN at the infinities. At NaN it is NaN, of ReLU 1,
    of ReLU6 0: what the vector loops of torch's CPU kernels give (the elements behind their last whole vector, and CUDA, have 1).
    """
    if act == "none":
        return torch.ones_like(v)
    if act == "relu":
        return (~(v <= 0)).to(v.dtype)
    if act == "relu6":
        return ((v > 0) & (v < 6)).to(v.dtype)
    if act == "hardswish":
        return torch.where(v <= -3, 0.0, torch.where(v >= 3, 1.0, v / 3 + 0.5)).to(v.dtype)
    return 0.5 * (1 + torch.erf(v * math.sqrt(0.5))) + v * torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)


def affine(x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
    """scale * x + shift; either may be None."""
    x = x if scale is None else x * scale
    return x if shift is None else x + shift


def prologue(x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, act: str) -> torch.Tensor:
    """f(scale * x + shift), or with "gelu_first" scale * gelu(x) + shift."""
    if act == GELU_FIRST:
        return affine(value(x, "gelu"), scale, shift)
    return value(affine(x, scale, shift), act)
