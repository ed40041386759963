"""token_dwconv with a prologue on its input and an epilogue on its output, and the gradients of the prologue.

    u = f(scale[c] * x + shift[c])                        prologue, on patch rows, before the zero padding: the padding stays 0;
                                                          "gelu_first": u = scale[c] * gelu(x) + shift[c]
    z = DW_K(u) + bias[c]                                 as in token_dwconv
    y = g(out_scale[c] * z + out_shift[c])                epilogue; pool[b, c] = sum of y over the patches;
                                                          mean[c], m2[c] = sum (y - mean)² over B and the patches, of y as stored
    result = y + residual, behind the prefix rows, which bypass prologue, convolution and epilogue

With du = DWᵀ(dy), dv = f'(scale x + shift) du:  dx = scale dv + a + b x,  dscale = sum x dv,  dshift = sum dv,  dW = corr(dy, u);
"gelu_first":   dx = gelu'(x) (scale du + a + b gelu(x)),   dscale = sum gelu(x) du,   dshift = sum du.
a[c] and b[c] are what a batch norm inside the prologue adds; absent they are 0. scale, shift, out_scale, out_shift, a, b, pool, mean
and m2 are float32 (float64 for float64 tokens). Where pool or the statistics were not asked for they come out empty.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops import torchlib
from lifeops.ops.channel import activations
from lifeops.ops.channel.act import accumulate_dtype, check_values, stats_of
from lifeops.ops.channel.activations import GELU_FIRST, PROLOGUES, affine
from lifeops.ops.token_dwconv import samples as cases
from lifeops.ops.token_dwconv import spec as dwconv
from lifeops.registry import Op

NAME = "token_dwconv_act"


class Problem(NamedTuple):
    """What the choice of a backend may depend on: token_dwconv's facts and the two activations."""

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    C: int
    K: int
    act: str
    out_act: str


# ------------------------------------------------------------------------------------------------ checks


def check(x, weight, bias, scale, shift, act, out_scale, out_shift, out_act, residual, H, W, P, prefix, pool, stats, backend, op=NAME):
    dwconv.check(x, weight, bias, residual, H, W, P, prefix, backend, op)
    activations.check(op, "act", act, PROLOGUES)
    activations.check(op, "out_act", out_act)
    check_values(op, x, scale=scale, shift=shift, out_scale=out_scale, out_shift=out_shift)


def check_bwd_dx(dy, x, weight, scale, shift, act, a, b, H, W, P, prefix, backend, op=f"{NAME}_bwd_dx"):
    dwconv.check_bwd_dx(dy, weight, H, W, P, prefix, backend, op)
    _check_prologue(op, dy, x, act, H, W, P, scale=scale, shift=shift, a=a, b=b)


def check_bwd_dw(dy, x, K, scale, shift, act, H, W, P, prefix, weight_dtype, bias_dtype, backend):
    op = f"{NAME}_bwd_dw"
    dwconv.check_bwd_dw(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, backend, op)
    _check_prologue(op, dy, x, act, H, W, P, scale=scale, shift=shift)


def _check_prologue(op, dy, x, act, H, W, P, **values):
    activations.check(op, "act", act, PROLOGUES)
    dwconv._check_sequence(op, "x", x, H, W, P)
    if (x.shape[0], x.shape[2], x.dtype, x.device) != (dy.shape[0], dy.shape[2], dy.dtype, dy.device):
        got = f"{tuple(x.shape)} {x.dtype} and {tuple(dy.shape)} {dy.dtype}"
        raise ValueError(f"{op}: x and dy must agree in B, C, dtype and device, got {got}")
    check_values(op, x, **values)


# ------------------------------------------------------------------------------------------------ references


def _prologue(x, scale, shift, act, P):
    """x in the accumulation dtype, the prologue applied to its patch rows."""
    x = x.to(accumulate_dtype(x.dtype))
    return torch.cat((x[:, :P], activations.prologue(x[:, P:], scale, shift, act)), 1)


def reference(x, weight, bias, scale, shift, act, out_scale, out_shift, out_act, residual, H, W, P, prefix, pool, stats, backend):
    u = _prologue(x, scale, shift, act, P)
    z = dwconv.reference(u, weight, bias, None, H, W, P, "drop", backend)
    patches = activations.value(affine(z, out_scale, out_shift), out_act).to(x.dtype)
    stored = patches.to(u.dtype)
    sums = stored.sum(1) if pool else stored.new_empty(0)
    mean, m2 = stats_of(stored) if stats else (stored.new_empty(0), stored.new_empty(0))
    y = dwconv._with_prefix(patches, x, P, prefix)
    return y if residual is None else y + residual, sums, mean, m2


def reference_bwd_dx(dy, x, weight, scale, shift, act, a, b, H, W, P, prefix, backend):
    dtype = accumulate_dtype(x.dtype)
    du = dwconv.reference_bwd_dx(dy.to(dtype), weight, H, W, P, prefix, backend)
    patches, dv = x[:, P:].to(dtype), du[:, P:]
    if act == GELU_FIRST:
        factor, slope = activations.value(patches, "gelu"), activations.derivative(patches, "gelu")
    else:
        factor, slope = patches, None
        dv = dv * activations.derivative(affine(patches, scale, shift), act)
    dx = affine(dv, scale, a)
    dx = dx if b is None else dx + b * factor
    dx = dx if slope is None else dx * slope
    return torch.cat((du[:, :P], dx), 1).to(x.dtype), (dv * factor).sum((0, 1)), dv.sum((0, 1))


def reference_bwd_dw(dy, x, K, scale, shift, act, H, W, P, prefix, weight_dtype, bias_dtype, backend):
    u = _prologue(x, scale, shift, act, P)
    dw, db = dwconv.reference_bwd_dw(dy.to(u.dtype), u, K, H, W, P, prefix, weight_dtype, bias_dtype, backend)
    return dw, x.new_empty((0,)) if bias_dtype is None else db


# ------------------------------------------------------------------------------------------------ fakes, costs


def fake(x, weight, bias, scale, shift, act, out_scale, out_shift, out_act, residual, H, W, P, prefix, pool, stats, backend):
    sums = x.new_empty((x.shape[0], x.shape[2]) if pool else (0,), dtype=accumulate_dtype(x.dtype))
    mean, m2 = (sums.new_empty((x.shape[2],) if stats else (0,)) for _ in range(2))
    return dwconv.fake(x, weight, bias, residual, H, W, P, prefix, backend), sums, mean, m2


def fake_bwd_dx(dy, x, weight, scale, shift, act, a, b, H, W, P, prefix, backend):
    dscale, dshift = (x.new_empty((x.shape[2],), dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    return dwconv.fake_bwd_dx(dy, weight, H, W, P, prefix, backend), dscale, dshift


def fake_bwd_dw(dy, x, K, scale, shift, act, H, W, P, prefix, weight_dtype, bias_dtype, backend):
    return dwconv.fake_bwd_dw(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, backend)


def flops(x, weight, bias, scale, shift, act, out_scale, out_shift, out_act, residual, H, W, *rest):
    return dwconv.flops(x, weight, bias, residual, H, W, 0)


# ------------------------------------------------------------------------------------------------ samples


class Sample(NamedTuple):
    """A sample of token_dwconv with what happens before and after."""

    name: str
    reason: str
    base: cases.Sample
    act: str = "hardswish"
    affine: bool = True
    out_act: str = "none"
    out_affine: bool = False
    pool: bool = False
    stats: bool = False
    tiny: bool = True

    def __getattr__(self, name):  # B, H, W, weight_dtype: where tests ask for them
        return getattr(self.base, name)


def samples():
    def make(name, reason, *, tiny=True, **options):
        ours = {k: options.pop(k) for k in tuple(options) if k in Sample._fields}
        return Sample(name, reason, cases.Sample(name, reason, **options), tiny=tiny, **ours)

    everything = {"act": "relu6", "out_act": "relu6", "out_affine": True, "pool": True}
    return (
        make("plain", "batch norm and h-swish before, statistics after: LocalViT's training step", P=0, bias=False, stats=True),
        make("eval", "h-swish twice, pool: LocalViT's folded forward", affine=False, out_act="hardswish", pool=True, prefix="drop"),
        make("relu6", "integer inputs stay integers", **everything, residual=True),
        make("relu", "ReLU before: PVT v2 with linear attention", act="relu", affine=False, P=0, out_act="relu"),
        make("border", "f(0 + shift) is not 0: the padding must come after the prologue", act="none", H=2, W=3, K=5),
        make("gelu", "GELU before, residual after", act="gelu", affine=False, prefix="zero", residual=True),
        make("gelu_first", "the DW shortcut: batch norm of GELU before, residual after", act=GELU_FIRST, prefix="zero", residual=True),
        make("gelu_border", "GELU, then a shift: the padding must come after both", act=GELU_FIRST, H=2, W=9, K=7, C=17, P=2),
        make("registers", "five prefix rows bypass everything", **everything, P=5),
        make("drop", "patches only come out", **everything, P=2, prefix="drop"),
        make("zero", "zero prefix and statistics", act="relu6", stats=True, pool=True, prefix="zero", P=2),
        make("one_pixel", "1x1 grid", **everything, H=1, W=1),
        make("narrow", "grid smaller than the kernel", **everything, H=2, W=1, K=7),
        make("odd_channels", "C one past a vector", **everything, C=33, W=7),
        make("segments", "W past one column segment", **everything, H=3, W=35, K=5),
        make("sliced", "x and dy are slices of longer sequences", **everything, x_layout="slice", dy_layout="slice", residual=True),
        make("transposed", "channels not contiguous: counted copies", act="relu6", stats=True, x_layout="transpose", dy_layout="transpose"),
        make("fp32_weight", "weights kept in fp32 beside low-precision tokens", act="relu6", weight_dtype=torch.float32),
        make("k9", "past the tuned kernels", **everything, H=6, W=7, K=9),
        make("empty_batch", "B = 0", **everything, B=0),
        make("empty_grid", "prefix tokens only", **everything, H=0, W=3, stats=True),
        make("hidden", "LocalViT-T's hidden width at 14x14", B=2, H=14, W=14, P=0, C=768, bias=False, stats=True, tiny=False),
        make("strips", "row strips and segments share the sums", B=1, H=40, W=140, C=20, act="relu6", pool=True, stats=True, tiny=False),
    )  # fmt: skip


def _values(s: Sample, draw, present: bool):
    """scale and shift, or None twice."""
    dtype = accumulate_dtype(draw.dtype)
    return tuple(draw(s.base.C, dtype=dtype, scale=1) if present else None for _ in range(2))


def make_fwd(s: Sample, draw, backend):
    x, weight, bias, residual, *geo, _ = cases.make_fwd(s.base, draw, backend)
    prologue, epilogue = (*_values(s, draw, s.affine), s.act), (*_values(s, draw, s.out_affine), s.out_act)
    return x, weight, bias, *prologue, *epilogue, residual, *geo, s.pool, s.stats, backend


def make_bwd_dx(s: Sample, draw, backend):
    dy, weight, *geo, _ = cases.make_bwd_dx(s.base, draw, backend)
    inner = _values(s, draw, s.affine and s.act in (GELU_FIRST, "hardswish", "relu", "relu6"))
    return dy, cases._x(s.base, draw, scale=1), weight, *_values(s, draw, s.affine), s.act, *inner, *geo, backend


def make_bwd_dw(s: Sample, draw, backend):
    dy, x, K, *rest = cases.make_bwd_dw(s.base, draw, backend)
    return dy, x, K, *_values(s, draw, s.affine), s.act, *rest


# ------------------------------------------------------------------------------------------------ ops

_PROLOGUE = "Tensor? scale, Tensor? shift, str act"


def _exact(s: Sample) -> bool:
    return s.act in activations.EXACT and s.out_act in activations.EXACT and not s.stats


fwd_op = Op(
    NAME,
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, {_PROLOGUE}, Tensor? out_scale, Tensor? out_shift, str out_act, Tensor? residual,"
    f" {dwconv.GEOMETRY}, bool pool, bool stats, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    check,
    fake,
    problem=lambda x, weight, *a: Problem(x.device, x.dtype, weight.dtype, x.shape[2], weight.shape[2], a[3], a[6]),
    flops=flops,
    samples=samples,
    make=make_fwd,
    reduces=lambda s: s.B * s.H * s.W if s.pool or s.stats else 1,
    is_empty=lambda *args: dwconv._empty(args[0], *args[10:12]),
    exact=_exact,
)
bwd_dx_op = Op(
    f"{NAME}_bwd_dx",
    f"{NAME}_bwd_dx(Tensor dy, Tensor x, Tensor weight, {_PROLOGUE}, Tensor? a, Tensor? b, {dwconv.GEOMETRY}, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    reference_bwd_dx,
    check_bwd_dx,
    fake_bwd_dx,
    problem=lambda dy, x, weight, *a: Problem(x.device, x.dtype, weight.dtype, x.shape[2], weight.shape[2], a[2], "none"),
    flops=lambda dy, x, weight, scale, shift, act, a, b, H, W, *rest: dwconv.flops_bwd_dx(dy, weight, H, W),
    samples=samples,
    make=make_bwd_dx,
    reduces=lambda s: s.B * s.H * s.W,
    is_empty=lambda *args: dwconv._empty(args[1], *args[8:10]),
    exact=_exact,
)
bwd_dw_op = Op(
    f"{NAME}_bwd_dw",
    f"{NAME}_bwd_dw(Tensor dy, Tensor x, SymInt K, {_PROLOGUE}, {dwconv.GEOMETRY}, ScalarType weight_dtype, ScalarType? bias_dtype,"
    " str backend) -> (Tensor, Tensor)",
    reference_bwd_dw,
    check_bwd_dw,
    fake_bwd_dw,
    problem=lambda dy, x, K, scale, shift, act, *a: Problem(x.device, x.dtype, a[4], x.shape[2], K, act, "none"),
    flops=lambda dy, x, K, scale, shift, act, H, W, *rest: dwconv.flops_bwd_dw(dy, x, K, H, W),
    samples=samples,
    make=make_bwd_dw,
    reduces=lambda s: s.B * s.H * s.W,
    is_empty=lambda *args: dwconv._empty(args[1], *args[6:8]),
    exact=_exact,
)
for op in (fwd_op, bwd_dx_op, bwd_dw_op):
    torchlib.install(op)
