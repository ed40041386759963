"""The output projection of attention computed scale by scale: y = [o1 | o2 | o3] Wᵀ + b without joining o1, o2, o3.

Not a kernel of ours: three accumulating matrix products into one buffer. Joining costs a read and a write of a whole sequence
and keeps a second copy of it for backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lifeops import torchlib


class ProjectScales(torch.autograd.Function):
    """y = sum_s o_s W[:, columns of s]ᵀ + b."""

    @staticmethod
    def forward(weight, bias, *parts):
        start, y = 0, None
        for o in parts:
            w = weight[:, start : start + o.shape[-1]].t()
            rows = o.flatten(0, 1)
            if y is None:
                y = rows @ w if bias is None else torch.addmm(bias, rows, w)
            else:
                # not addmm_, which torch's FLOP counter does not know; a mode that caches results must not see them change
                y = torch.addmm(y, rows, w) if torchlib.modes_look_on() else torch.addmm(y, rows, w, out=y)
            start += o.shape[-1]
        return y.unflatten(0, parts[0].shape[:2])

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, _, *parts = inputs
        ctx.save_for_backward(weight, *parts)

    @staticmethod
    def backward(ctx, dy):
        weight, *parts = ctx.saved_tensors
        need = ctx.needs_input_grad
        widths = [o.shape[-1] for o in parts]
        slices = weight.split(widths, 1)
        grads = [dy @ w if needed else None for w, needed in zip(slices, need[2:], strict=True)]
        rows = dy.flatten(0, 1)
        dw = None
        if need[0] and torch.is_grad_enabled():
            dw = torch.cat([rows.t() @ o.flatten(0, 1) for o in parts], 1)
        elif need[0]:
            dw = torch.empty_like(weight)
            for o, out in zip(parts, dw.split(widths, 1), strict=True):
                torch.mm(rows.t(), o.flatten(0, 1), out=out)
        return dw, rows.sum(0) if need[1] else None, *grads


def project_scales(parts, weight, bias):
    """parts: sequences (B, N, C_s); weight (C_out, sum C_s), bias (C_out,) or None -> (B, N, C_out). Follows autocast."""
    dtype = torchlib.autocast_dtype(parts[0])
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        parts = [o.to(dtype) for o in parts]
    if torch.compiler.is_compiling() or torchlib.calls_layers():
        return F.linear(torch.cat(parts, -1), weight, bias)
    return torchlib.apply(ProjectScales, ProjectScales.forward, weight, bias, *parts)
