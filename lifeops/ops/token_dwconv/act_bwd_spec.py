"""Backward of token_dwconv with an activation behind it, in one pass over x and dy: nothing but x is kept for it.

    z = DW_K(x) + bias, computed again         dz = g'(z) dy on the patch rows
    dx = DWᵀ(dz)       dW = corr(dz, x)        db = sum dz                        prefix rows as in token_dwconv_bwd_dx

dW and db have the parameters' dtypes; db is empty where there is no bias.
"""

from __future__ import annotations

import torch

from lifeops import torchlib
from lifeops.ops.channel import activations
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.token_dwconv import act_spec as act
from lifeops.ops.token_dwconv import samples as cases
from lifeops.ops.token_dwconv import spec as dwconv
from lifeops.registry import Op

NAME = "token_dwconv_act_bwd"


def check(dy, x, weight, bias, out_act, H, W, P, prefix, backend):
    activations.check(NAME, "out_act", out_act)
    dwconv.check(x, weight, bias, None, H, W, P, prefix, backend, NAME)
    dwconv.check_bwd_dw(dy, x, weight.shape[2], H, W, P, prefix, weight.dtype, None, backend, NAME)


def reference(dy, x, weight, bias, out_act, H, W, P, prefix, backend):
    dtype = accumulate_dtype(x.dtype)
    wide, rows = x.to(dtype), dwconv._rows(H, W, P, prefix)
    z = dwconv.reference(wide, weight, bias, None, H, W, P, "drop", backend)
    dz = torch.cat((dy[:, :rows].to(dtype), dy[:, rows:].to(dtype) * activations.derivative(z, out_act)), 1)
    dx = dwconv.reference_bwd_dx(dz, weight, H, W, P, prefix, backend).to(dy.dtype)
    bias_dtype = None if bias is None else bias.dtype
    dw, db = dwconv.reference_bwd_dw(dz, wide, weight.shape[2], H, W, P, prefix, weight.dtype, bias_dtype, backend)
    return dx, dw, x.new_empty((0,)) if bias is None else db


def fake(dy, x, weight, bias, out_act, H, W, P, prefix, backend):
    dw, db = dwconv.fake_bwd_dw(dy, x, weight.shape[2], H, W, P, prefix, weight.dtype, None if bias is None else bias.dtype, backend)
    return dwconv.fake_bwd_dx(dy, weight, H, W, P, prefix, backend), dw, db


def flops(dy, x, weight, bias, out_act, H, W, *rest):
    """Of both gradients, and of z, which is computed again."""
    of_z = dwconv.flops(x, weight, bias, None, H, W, 0)
    return of_z + dwconv.flops_bwd_dx(dy, weight, H, W) + dwconv.flops_bwd_dw(dy, x, weight[2], H, W)


def samples():
    def make(name, reason, *, out_act="relu", tiny=True, **options):
        return act.Sample(name, reason, cases.Sample(name, reason, **options), "none", False, out_act, tiny=tiny)

    return (
        make("gelu", "PVT v2's and Segformer's feed-forward", out_act="gelu", P=0),
        make("relu6", "integer inputs stay integers; the prefix gets its gradient as it is", out_act="relu6", P=2),
        make("hardswish", "no bias, zero prefix", out_act="hardswish", bias=False, prefix="zero", P=5),
        make("none", "no activation: the two gradients of the convolution", out_act="none", prefix="drop", P=1),
        make("border", "K beyond half of the grid: z of the border misses rows and columns on both sides", H=5, W=4, K=5),
        make("one_pixel", "1x1 grid", H=1, W=1),
        make("narrow", "grid smaller than the kernel", H=2, W=1, K=7),
        make("odd_rows", "an odd number of rows: the last step has one", H=7, W=9, K=3, P=0),
        make("odd_channels", "C one past a vector", C=33, W=7),
        make("segments", "W past one column segment: z of the columns beside it", H=3, W=135, K=5, C=5),
        make("sliced", "x and dy are slices of longer sequences", x_layout="slice", dy_layout="slice"),
        make("transposed", "channels not contiguous: counted copies", x_layout="transpose", dy_layout="transpose"),
        make("fp32_weight", "weights kept in fp32 beside low-precision tokens", weight_dtype=torch.float32),
        make("k1", "nothing to recompute beside the row itself", K=1),
        make("k9", "past the tuned kernels", H=6, W=7, K=9),
        make("empty_batch", "B = 0", B=0),
        make("empty_grid", "prefix tokens only", H=0, W=3),
        make("hidden", "a hidden width at 14x14: two row strips", out_act="gelu", B=1, H=14, W=14, P=0, C=640, tiny=False),
        make("strips", "row strips and segments share the sums", B=1, H=40, W=140, C=20, K=7, out_act="hardswish", tiny=False),
    )  # fmt: skip


def _make(s, draw, backend):
    dy, weight, *geo, _ = cases.make_bwd_dx(s.base, draw, backend)
    x, _, bias, *_ = cases.make_fwd(s.base, draw, backend)
    return dy, x, weight, bias, s.out_act, *geo, backend


op = Op(
    NAME,
    f"{NAME}(Tensor dy, Tensor x, Tensor weight, Tensor? bias, str out_act, {dwconv.GEOMETRY}, str backend) -> (Tensor, Tensor, Tensor)",
    reference,
    check,
    fake,
    problem=lambda dy, x, weight, bias, out_act, *a: act.Problem(
        x.device, x.dtype, weight.dtype, x.shape[2], weight.shape[2], "none", out_act
    ),
    flops=flops,
    samples=samples,
    make=_make,
    reduces=lambda s: s.B * s.H * s.W,
    is_empty=lambda dy, x, weight, bias, out_act, H, W, *rest: dwconv._empty(x, H, W),
    exact=lambda s: s.out_act in activations.EXACT,
)
torchlib.install(op)
