"""life_qkv: LIFE's multi-scale query, key and value (arXiv 2305.08551). Three cascaded scales of the same tokens:

    z1 = x W1ᵀ + b1        z2 = DW3(z1) P2ᵀ        z3 = DW5(z2) P3ᵀ
    q|k|v of scale s = thirds of z_s;   q = z1[:d1] | z2[:d2] | z3[:d3], k and v likewise (| joins channels)

DW_K is token_dwconv with prefix="keep": prefix tokens skip the depth-wise steps and take the point-wise ones. Scale s carries
d_s = C//3 + (s < C%3) channels (s = 0, 1, 2) of each of q, k and v. With ``keep`` the depth-wise outputs d2, d3 come out too, for
backward; without it they are empty and one buffer serves both. With ``scale1_key`` the prefix rows of every scale's key third are
scale 1's, as the authors' code (not their figure) has it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lifeops import geometry, torchlib
from lifeops.arguments import check_floating
from lifeops.ops.full_precision import full_precision
from lifeops.ops.token_dwconv import spec as dwconv
from lifeops.ops.token_dwconv.samples import Maker, lay_out
from lifeops.pointwise import pointwise
from lifeops.registry import BACKEND_PRIORITY, Op, reasons_against, register

NAME = "life_qkv"
AUX_KEYS = ("multiscale", "scale1")


def scale_dims(dim: int) -> tuple[int, int, int]:
    """Channels of each of q, k and v that scales 1, 2 and 3 carry; they sum to ``dim``."""
    return tuple(dim // 3 + (s < dim % 3) for s in range(3))


class Problem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    C: int
    K2: int
    K3: int

    def steps(self) -> tuple[dwconv.Problem, dwconv.Problem]:
        """Those of the two depth-wise convolutions."""
        return tuple(dwconv.Problem(*self[:4], K) for K in (self.K2, self.K3))


def _check_dwconv(name, weight):
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"{NAME}: {name} must have shape ({weight.shape[0]}, 1, K, K) with an odd K, got {tuple(weight.shape)}")
    check_floating(NAME, name, weight)


def check(x, w1, b1, dw2, pw2, dw3, pw3, H, W, P, scale1_key, keep, backend):
    if x.dim() != 3:
        raise ValueError(f"{NAME}: x must have shape (B, N, C), got {tuple(x.shape)}")
    check_floating(NAME, "x", x)
    geometry.check_tokens(NAME, "x", x.shape[1], H, W, P)
    C = x.shape[2]
    if C < 3:
        raise ValueError(f"{NAME}: three scales need at least 3 channels, got C = {C}")
    if scale1_key and C % 3:
        raise ValueError(f"{NAME}: aux_key='scale1' needs a dim divisible by 3 (the authors' models), got {C}")
    a, b, c = (3 * d for d in scale_dims(C))
    expected = {"w1": (a, C), "dw2": (a, 1), "pw2": (b, a), "dw3": (b, 1), "pw3": (c, b), "b1": (a,)}
    got = {"w1": w1, "dw2": dw2, "pw2": pw2, "dw3": dw3, "pw3": pw3, "b1": b1}
    for name, t in got.items():
        if t is None and name == "b1":
            continue
        if tuple(t.shape[:2]) != expected[name] or (name.startswith("pw") and t.dim() != 2):
            tail = " + (K, K)" if name.startswith("dw") else ""
            raise ValueError(f"{NAME}: {name} must have shape {expected[name]}{tail} for C = {C}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{NAME}: {name} must be on x's device {x.device}, got {t.device}")
        if name.startswith("dw"):
            _check_dwconv(name, t)
        elif t.dtype != x.dtype:
            raise TypeError(f"{NAME}: {name}.dtype must be x.dtype = {x.dtype}, got {t.dtype}")


def _scales(x, w1, b1, dw2, pw2, dw3, pw3, scale1_key, keep, P, convolve, product):
    z1 = product(x, w1, b1)
    d2 = convolve(z1, dw2)
    z2 = product(d2, pw2)
    if not keep:
        d2 = x.new_empty(0)  # frees its memory for d3, which has just been in the caches
    d3 = convolve(z2, dw3)
    z3 = product(d3, pw3)
    if not keep:
        d3 = x.new_empty(0)
    if scale1_key and P and torchlib.wants_grad((z3,)):  # whose gradient needs what is copied over
        z2, z3 = scale1_keys(z1, z2, z3, P)[1:]
    elif scale1_key and P:
        d = x.shape[2] // 3
        for z in (z2, z3):
            z[:, :P, d : 2 * d] = z1[:, :P, d : 2 * d]
    return z1, z2, z3, d2, d3


def scale1_keys(z1, z2, z3, P):
    """The scales with scale 1's prefix keys in all of them: aux_key="scale1". Out of place, differentiable."""
    rows = torch.arange(z1.shape[1], device=z1.device)[:, None] < P
    columns = torch.arange(z1.shape[2], device=z1.device) // (z1.shape[2] // 3) == 1
    return z1, *(torch.where(rows & columns, z1, z) for z in (z2, z3))


@full_precision
def reference(x, w1, b1, dw2, pw2, dw3, pw3, H, W, P, scale1_key, keep, backend):
    """The formula with F.linear and token_dwconv's reference."""

    def convolve(z, weight):
        return dwconv.reference(z, weight, None, None, H, W, P, "keep", "reference")

    return _scales(x, w1, b1, dw2, pw2, dw3, pw3, scale1_key, keep, P, convolve, F.linear)


def _composed(backend):
    """The chain on one backend's depth-wise kernel: each product writes its scale once, nothing is joined or permuted."""

    @full_precision
    def run(x, w1, b1, dw2, pw2, dw3, pw3, H, W, P, scale1_key, keep, _):
        def convolve(z, weight):
            return dwconv.fwd_op.impls[backend].fn(z, weight, None, None, H, W, P, "keep", backend)

        return _scales(x, w1, b1, dw2, pw2, dw3, pw3, scale1_key, keep, P, convolve, pointwise)

    def supports(problem):
        return list(dict.fromkeys(reason for step in problem.steps() for reason in reasons_against(dwconv.fwd_op, backend, step)))

    return run, supports


def fake(x, w1, b1, dw2, pw2, dw3, pw3, H, W, P, scale1_key, keep, backend):
    scales = [x.new_empty((*x.shape[:2], w.shape[0])) for w in (w1, pw2, pw3)]
    kept = [x.new_empty((*x.shape[:2], w.shape[0]) if keep else 0) for w in (w1, pw2)]
    return (*scales, *kept)


def flops(x, w1, b1, dw2, pw2, dw3, pw3, H, W, P, *rest):
    """The three products over all tokens and the two depth-wise convolutions over the patches. Shapes, not tensors."""
    batch, tokens, _ = x
    products = sum(w[0] * w[1] for w in (w1, pw2, pw3)) * batch * tokens
    taps = sum(w[0] * w[2] * w[3] for w in (dw2, dw3)) * batch * H * W
    return 2 * (products + taps)


class Sample(NamedTuple):
    name: str
    reason: str
    B: int = 2
    H: int = 4
    W: int = 5
    P: int = 1
    C: int = 12
    scale1_key: bool = False
    keep: bool = True
    x_layout: str = "contiguous"
    tiny: bool = True


def samples():
    return (
        Sample("cls", "DeiT"),
        Sample("dist", "cls and dist tokens", P=2),
        Sample("registers", "cls and four registers", P=5),
        Sample("window", "attention windows have no prefix", P=0, H=4, W=4),
        Sample("scale1_key", "the authors' checkpoints", scale1_key=True),
        Sample("scale1_key_dist", "the authors' key with two prefix tokens", P=2, scale1_key=True),
        Sample("inference", "d2 and d3 are not kept", keep=False),
        Sample("dim_10", "C % 3 = 1: scales of 4, 3, 3", C=10),
        Sample("dim_32", "C % 3 = 2: scales of 11, 11, 10", C=32, P=2),
        Sample("narrow", "grid smaller than the 5x5 kernel", H=2, W=1),
        Sample("sliced", "x is a slice of a longer sequence", x_layout="slice"),
        Sample("empty_batch", "B = 0", B=0),
        Sample("vit_t", "DeiT-T at 14x14", H=14, W=14, P=2, C=192, tiny=False),
    )


def make(s: Sample, draw: Maker, backend: str) -> tuple:
    a, b, c = (3 * d for d in scale_dims(s.C))
    scale = 1.0 if draw.integers else s.C**-0.5  # keeps z3 of the order of x

    def weight(*shape):
        return draw(*shape, scale=1) * scale if len(shape) == 2 else draw(*shape, scale=1)

    x = lay_out(draw(s.B, s.P + s.H * s.W, s.C, scale=1), s.x_layout)
    weights = weight(a, s.C), draw(a, scale=1), weight(a, 1, 3, 3), weight(b, a), weight(b, 1, 5, 5), weight(c, b)
    return x, *weights, s.H, s.W, s.P, s.scale1_key, s.keep, backend


op = Op(
    NAME,
    f"{NAME}(Tensor x, Tensor w1, Tensor? b1, Tensor dw2, Tensor pw2, Tensor dw3, Tensor pw3, SymInt H, SymInt W, SymInt P,"
    " bool scale1_key, bool keep, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference,
    check,
    fake,
    problem=lambda x, w1, b1, dw2, pw2, dw3, *rest: Problem(x.device, x.dtype, dw2.dtype, x.shape[2], dw2.shape[-1], dw3.shape[-1]),
    flops=flops,
    samples=samples,
    make=make,
    reduces=lambda sample: sample.C,
    is_empty=lambda x, w1, b1, dw2, pw2, dw3, pw3, H, W, *rest: x.shape[0] * H * W == 0,
)
torchlib.install(op)
for name in ("cpu", "cuda", "triton"):
    fn, supports = _composed(name)
    register(NAME, name, fn, supports=supports, priority=BACKEND_PRIORITY[name])
