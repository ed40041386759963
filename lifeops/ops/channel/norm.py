"""What a batch norm by the batch's statistics needs between its passes over tokens: C numbers each, a launch where a backend has kernels.

    norm_affine      scale = gamma rstd      shift = beta - mean scale      rstd = (m2 / n + eps)^(-1/2)      var = m2 / (n - 1)
    norm_gradients   dgamma, dbeta, a and b of batch_norm.py, from sums of every image: with dv = gate dv + pool_grad slope and
                     dvx = gate dvx + pool_grad slope_x where there is a gate

Values (C,) and sums (B, C), both float32 (float64 for float64 sequences), give (4, C).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops import torchlib
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.channel.batch_norm import Affine, affine_of, norm_backward
from lifeops.registry import Op


class Problem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    C: int


# ------------------------------------------------------------------------------------------------ checks


def _check_values(op, like, shape, **values):
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: values must be float32 or float64, got {like.dtype}")
    for name, t in values.items():
        if t is not None and (tuple(t.shape) != shape or t.dtype != like.dtype or t.device != like.device):
            got = f"{tuple(t.shape)}, {t.dtype} on {t.device}"
            raise ValueError(f"{op}: {name} must have shape {shape}, dtype {like.dtype} on {like.device}, got {got}")


def _check_count(op, n):
    if n < 1:
        raise ValueError(f"{op}: n must be positive, got {n}")


def check_affine(mean, m2, gamma, beta, eps, n, backend):
    _check_values("norm_affine", mean, (mean.numel(),), mean=mean, m2=m2, gamma=gamma, beta=beta)
    _check_count("norm_affine", n)


def check_gradients(dv, dvx, slope, slope_x, gate, pool_grad, mean, scale, rstd, n, backend):
    op, some = "norm_gradients", [t is None for t in (slope, slope_x, gate, pool_grad)]
    if dv.dim() != 2:
        raise ValueError(f"{op}: dv must be (B, C), got {tuple(dv.shape)}")
    _check_values(op, dv, tuple(dv.shape), dvx=dvx, slope=slope, slope_x=slope_x, gate=gate, pool_grad=pool_grad)
    _check_values(op, dv, (dv.shape[1],), mean=mean, scale=scale, rstd=rstd)
    if any(some) and not all(some):
        raise ValueError(f"{op}: slope, slope_x, gate and pool_grad must all be given or none of them")
    _check_count(op, n)


# ------------------------------------------------------------------------------------------------ references


def reference_affine(mean, m2, gamma, beta, eps, n, backend):
    norm = affine_of(mean, m2 / n, gamma, beta, eps)
    return torch.stack((norm.scale, norm.shift, norm.rstd, m2 / max(1, n - 1)))


def reference_gradients(dv, dvx, slope, slope_x, gate, pool_grad, mean, scale, rstd, n, backend):
    if gate is not None:
        dv, dvx = gate * dv + pool_grad * slope, gate * dvx + pool_grad * slope_x
    return torch.stack(norm_backward(Affine(scale, None, mean, rstd), dvx.sum(0), dv.sum(0), True, n, None))


def _fake_affine(mean, *args):
    return mean.new_empty((4, mean.shape[0]))


def _fake_gradients(dv, *args):
    return dv.new_empty((4, dv.shape[1]))


# ------------------------------------------------------------------------------------------------ samples


class Sample(NamedTuple):
    name: str
    reason: str
    B: int = 3
    C: int = 8
    affine: bool = True
    gate: bool = False
    n: int = 24
    tiny: bool = True


def samples():
    return (
        Sample("plain", "LocalViT's third norm"),
        Sample("gated", "and its second, behind which a gate is", gate=True),
        Sample("bare", "a norm without gamma and beta", affine=False),
        Sample("one_image", "sums that are there already", B=1, C=33),
        Sample("one_value", "no unbiased variance", B=1, n=1),
        Sample("batch", "several tiles of images", B=600, C=20, gate=True, n=2**33, tiny=False),
    )


def _make(s: Sample, draw, *shape):
    return draw(*shape, dtype=accumulate_dtype(draw.dtype), scale=1)


def make_affine(s: Sample, draw, backend):
    mean, m2, gamma, beta = (_make(s, draw, s.C) for _ in range(4))
    gamma, beta = (gamma, beta) if s.affine else (None, None)
    return mean, m2.abs() * s.n + 1, gamma, beta, 1e-5, s.n, backend


def make_gradients(s: Sample, draw, backend):
    dv, dvx, *gated = (_make(s, draw, s.B, s.C) for _ in range(6))
    values = (_make(s, draw, s.C) for _ in range(3))
    return dv, dvx, *(gated if s.gate else [None] * 4), *values, s.n, backend


# ------------------------------------------------------------------------------------------------ ops


def _problem(first, *args):
    return Problem(first.device, first.dtype, first.shape[-1])


affine_op = Op(
    "norm_affine",
    "norm_affine(Tensor mean, Tensor m2, Tensor? gamma, Tensor? beta, float eps, SymInt n, str backend) -> Tensor",
    reference_affine, check_affine, _fake_affine, problem=_problem, flops=lambda *shapes: 0, samples=samples, make=make_affine,
    exact=lambda s: False, is_empty=lambda mean, *args: mean.numel() == 0,
)  # fmt: skip
gradients_op = Op(
    "norm_gradients",
    "norm_gradients(Tensor dv, Tensor dvx, Tensor? slope, Tensor? slope_x, Tensor? gate, Tensor? pool_grad, Tensor mean, Tensor scale,"
    " Tensor rstd, SymInt n, str backend) -> Tensor",
    reference_gradients, check_gradients, _fake_gradients, problem=_problem, flops=lambda *shapes: 0, samples=samples, make=make_gradients,
    reduces=lambda s: s.B, exact=lambda s: False, is_empty=lambda dv, *args: dv.numel() == 0,
)  # fmt: skip
for op in (affine_op, gradients_op):
    torchlib.install(op)
