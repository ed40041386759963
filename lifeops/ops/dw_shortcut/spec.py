"""The DW shortcut with one kernel: a training step as two operators, evaluation as one; what others compose of several.

    g = GELU(x)     mean, m2 = its mean and squared deviations over B and the patches     rstd = (m2 / n + eps)^(-1/2)     n = B*H*W
    scale = gamma * rstd      shift = beta - mean * scale
    y = block_output + [0 for the prefix | DW_K(scale * g + shift) + bias]                                  zero padding after the affine

The backward formulas are those of :mod:`lifeops.ops.dw_shortcut.function` and :mod:`lifeops.ops.channel.batch_norm`; dy is the gradient of
block_output as it is. mean, var = m2 / (n - 1), dbias, dgamma, dbeta (C,), affine (3, C), which is scale, shift and rstd, and dw are
float32 (float64 for float64 tokens).

Evaluation takes the running statistics mean and var (scale = gamma (var + eps)^(-1/2)); without them gamma and beta are the affine.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops import torchlib
from lifeops.ops.channel.act import accumulate_dtype, check_values, stats_of
from lifeops.ops.channel.activations import GELU_FIRST, value
from lifeops.ops.channel.batch_norm import Affine, affine_of, norm_backward
from lifeops.ops.token_dwconv import act_spec as act
from lifeops.ops.token_dwconv import samples as cases
from lifeops.ops.token_dwconv import spec as dwconv
from lifeops.registry import Op

NAME = "dw_shortcut"


class Problem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    C: int
    K: int


# ------------------------------------------------------------------------------------------------ checks


def _check_parameter(op, name, t, x):
    if t is not None and (tuple(t.shape) != (x.shape[2],) or t.dtype not in dwconv.DTYPES or t.device != x.device):
        raise ValueError(f"{op}: {name} must be ({x.shape[2]},) floats on {x.device}, got {tuple(t.shape)} {t.dtype} on {t.device}")


def check(x, block_output, weight, bias, gamma, beta, eps, H, W, P, backend, op=NAME):
    dwconv.check(x, weight, bias, block_output, H, W, P, "zero", backend, op)
    _check_parameter(op, "gamma", gamma, x), _check_parameter(op, "beta", beta, x)


def check_eval(x, block_output, weight, bias, mean, var, gamma, beta, eps, H, W, P, backend):
    op = f"{NAME}_eval"
    check(x, block_output, weight, bias, gamma, beta, eps, H, W, P, backend, op)
    _check_parameter(op, "mean", mean, x), _check_parameter(op, "var", var, x)
    if (mean is None) != (var is None):
        raise ValueError(f"{op}: mean and var must both be given or both be None")


def check_bwd(dy, x, weight, mean, affine, H, W, P, need_dx, backend):
    op = f"{NAME}_bwd"
    act.check_bwd_dx(dy, x, weight, None, None, GELU_FIRST, None, None, H, W, P, "zero", backend, op)
    check_values(op, x, mean=mean)
    if tuple(affine.shape) != (3, x.shape[2]) or affine.dtype != mean.dtype or affine.device != x.device:
        got = f"{tuple(affine.shape)} {affine.dtype} on {affine.device}"
        raise ValueError(f"{op}: affine must be (3, {x.shape[2]}) {mean.dtype} on {x.device}, got {got}")


# ------------------------------------------------------------------------------------------------ references


def reference(x, block_output, weight, bias, gamma, beta, eps, H, W, P, backend):
    mean, m2 = stats_of(value(x[:, P:].to(accumulate_dtype(x.dtype)), "gelu"))
    n = max(1, x.shape[0] * H * W)
    norm = affine_of(mean, m2 / n, gamma, beta, eps)
    affine = norm.scale, norm.shift, GELU_FIRST, None, None, "none"
    y = act.reference(x, weight, bias, *affine, block_output, H, W, P, "zero", False, False, backend)[0]
    return y, mean, m2 / max(1, n - 1), torch.stack((norm.scale, norm.shift, norm.rstd))


def eval_affine(dtype, mean, var, gamma, beta, eps):
    """(scale, shift) in ``dtype``; None is 1 and 0."""
    if var is None:
        return tuple(None if t is None else t.to(dtype) for t in (gamma, beta))
    return affine_of(mean.to(dtype), var.to(dtype), gamma, beta, eps)[:2]


def reference_eval(x, block_output, weight, bias, mean, var, gamma, beta, eps, H, W, P, backend):
    scale, shift = eval_affine(accumulate_dtype(x.dtype), mean, var, gamma, beta, eps)
    affine = scale, shift, GELU_FIRST, None, None, "none"
    return act.reference(x, weight, bias, *affine, block_output, H, W, P, "zero", False, False, backend)[0]


def reference_bwd(dy, x, weight, mean, affine, H, W, P, need_dx, backend):
    scale, shift, rstd = affine
    place, wide = (H, W, P, "zero"), mean.dtype
    K = weight.shape[-1]
    g = act.reference_bwd_dw(dy, x, K, None, None, "gelu", *place, wide, None, backend)[0]
    total = dy[:, P:].to(wide).sum(0, keepdim=True)
    windows, dbias = dwconv.reference_bwd_dw(total, torch.ones_like(total), K, H, W, 0, "keep", wide, wide, backend)
    dw = scale[:, None, None, None] * g + shift[:, None, None, None] * windows
    dscale, dshift = ((weight.to(wide) * t).sum((1, 2, 3)) for t in (g, windows))
    dgamma, dbeta, a, b = norm_backward(Affine(scale, shift, mean, rstd), dscale, dshift, True, max(1, x.shape[0] * H * W), None)
    if not need_dx:
        return x.new_empty((0,)), dw, dbias, dgamma, dbeta.clone()
    dx = act.reference_bwd_dx(dy, x, weight, scale, shift, GELU_FIRST, a, b, *place, backend)[0]
    return dx, dw, dbias, dgamma, dbeta.clone()


# ------------------------------------------------------------------------------------------------ fakes, costs


def fake(x, block_output, weight, bias, gamma, beta, eps, H, W, P, backend):
    y = dwconv.fake(x, weight, bias, block_output, H, W, P, "zero", backend)
    mean = x.new_empty((x.shape[2],), dtype=accumulate_dtype(x.dtype))
    return y, mean, torch.empty_like(mean), mean.new_empty((3, x.shape[2]))


def fake_eval(x, block_output, weight, bias, mean, var, gamma, beta, eps, H, W, P, backend):
    return dwconv.fake(x, weight, bias, block_output, H, W, P, "zero", backend)


def fake_bwd(dy, x, weight, mean, affine, H, W, P, need_dx, backend):
    dx = dwconv.fake_bwd_dx(dy, weight, H, W, P, "zero", backend) if need_dx else x.new_empty((0,))
    return dx, mean.new_empty(tuple(weight.shape)), *(torch.empty_like(mean) for _ in range(3))


def flops_bwd(dy, x, weight, mean, affine, H, W, P, need_dx, backend):
    one_image = 1, *x[1:]  # the window sums
    dw = sum(dwconv.flops_bwd_dw(t, t, weight[-1], H, W) for t in (x, one_image))
    return dw + (dwconv.flops_bwd_dx(dy, weight, H, W) if need_dx else 0)


# ------------------------------------------------------------------------------------------------ samples


class Sample(NamedTuple):
    """A sample of token_dwconv with what the norm has."""

    name: str
    reason: str
    base: cases.Sample
    affine: bool = True
    need_dx: bool = True
    tiny: bool = True

    def __getattr__(self, name):  # B, H, W, weight_dtype: where tests ask for them
        return getattr(self.base, name)


def samples():
    def make(name, reason, *, tiny=True, affine=True, need_dx=True, **options):
        return Sample(name, reason, cases.Sample(name, reason, prefix="zero", residual=True, **options), affine, need_dx, tiny)

    return (
        make("plain", "one cls token"),
        make("bare", "no bias, a norm without affine", bias=False, affine=False),
        make("frozen_input", "dx is not wanted", need_dx=False),
        make("registers", "five prefix rows", P=5, K=5, H=6, W=7),
        make("windows", "no prefix; a grid smaller than the kernel: no output has a whole window", P=0, K=7, H=2, W=3),
        make("one_pixel", "1x1 grid", H=1, W=1),
        make("odd_channels", "C one past a vector", C=33, W=7),
        make("segments", "W past one column segment", H=3, W=135, K=5, tiny=False),
        make("sliced", "x and dy are slices of longer sequences", x_layout="slice", dy_layout="slice"),
        make("transposed", "channels not contiguous: counted copies", x_layout="transpose", dy_layout="transpose"),
        make("fp32_weight", "parameters kept in fp32 beside low-precision tokens", weight_dtype=torch.float32),
        make("empty_batch", "B = 0", B=0),
        make("vit", "ViT-T at 14x14", B=4, H=14, W=14, C=192, tiny=False),
        make("strips", "row strips share the sums", B=1, H=40, W=40, C=20, tiny=False),
    )  # fmt: skip


def make_fwd(s: Sample, draw, backend):
    x, weight, bias, residual, H, W, P, *_ = cases.make_fwd(s.base, draw, backend)
    gamma, beta = (draw(s.base.C, dtype=s.base.weight_dtype, scale=1) if s.affine else None for _ in range(2))
    return x, residual, weight, bias, gamma, beta, 1e-5, H, W, P, backend


def make_eval(s: Sample, draw, backend):
    x, residual, weight, bias, gamma, beta, *rest = make_fwd(s, draw, backend)
    mean, var = (draw(s.base.C, dtype=s.base.weight_dtype, scale=1) if s.need_dx else None for _ in range(2))  # one sample without
    return x, residual, weight, bias, mean, None if var is None else var.abs() + 0.5, gamma, beta, *rest


def make_bwd(s: Sample, draw, backend):
    dy, weight, H, W, P, *_ = cases.make_bwd_dx(s.base, draw, backend)
    mean, affine = (draw(*shape, dtype=accumulate_dtype(draw.dtype), scale=1) for shape in ((s.base.C,), (3, s.base.C)))
    return dy, cases._x(s.base, draw, scale=1), weight, mean, affine, H, W, P, s.need_dx, backend


# ------------------------------------------------------------------------------------------------ ops


def _terms(s: Sample) -> int:
    """Of the longest sum: over the patches for the statistics, over the taps for dx."""
    return s.B * s.H * s.W + s.base.K**2


_PLACE = "SymInt H, SymInt W, SymInt P"
fwd_op = Op(
    NAME,
    f"{NAME}(Tensor x, Tensor block_output, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, float eps, {_PLACE}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    check,
    fake,
    problem=lambda x, block_output, weight, *a: Problem(x.device, x.dtype, weight.dtype, x.shape[2], weight.shape[2]),
    flops=lambda x, block_output, weight, bias, gamma, beta, eps, H, W, P, backend: dwconv.flops(x, weight, bias, None, H, W, P),
    samples=samples,
    make=make_fwd,
    reduces=_terms,
    is_empty=lambda *args: dwconv._empty(args[0], *args[7:9]),
    exact=lambda s: False,
)
bwd_op = Op(
    f"{NAME}_bwd",
    f"{NAME}_bwd(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor affine, {_PLACE}, bool need_dx,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference_bwd,
    check_bwd,
    fake_bwd,
    problem=lambda dy, x, weight, *a: Problem(x.device, x.dtype, weight.dtype, x.shape[2], weight.shape[2]),
    flops=flops_bwd,
    samples=samples,
    make=make_bwd,
    reduces=_terms,
    is_empty=lambda *args: dwconv._empty(args[1], *args[5:7]),
    exact=lambda s: False,
)
eval_op = Op(
    f"{NAME}_eval",
    f"{NAME}_eval(Tensor x, Tensor block_output, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta,"
    f" float eps, {_PLACE}, str backend) -> Tensor",
    reference_eval,
    check_eval,
    fake_eval,
    problem=fwd_op.problem,
    flops=lambda x, block_output, weight, bias, mean, var, gamma, beta, eps, H, W, P, backend: dwconv.flops(x, weight, bias, None, H, W, P),
    samples=samples,
    make=make_eval,
    is_empty=lambda *args: dwconv._empty(args[0], *args[9:11]),
    exact=lambda s: False,
)
for op in (fwd_op, bwd_op, eval_op):
    torchlib.install(op)
