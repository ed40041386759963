"""Named samples of token_dwconv, each with its reason, and how their tensors are made. Tests are generated from them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sample(NamedTuple):
    """One problem. ``x_layout`` and ``dy_layout`` name how the sequences lie in memory (see ``lay_out``)."""

    name: str
    reason: str
    B: int = 2
    H: int = 4
    W: int = 5
    P: int = 1
    C: int = 8
    K: int = 3
    prefix: str = "keep"
    bias: bool = True
    residual: bool = False
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    weight_dtype: torch.dtype | None = None
    tiny: bool = True  # small enough for interpreters and host shims


def samples() -> tuple[Sample, ...]:
    return (
        Sample("plain", "the common case in small"),
        Sample("one_pixel", "1x1 grid: the filter's centre alone", H=1, W=1),
        Sample("narrow", "grid smaller than the kernel in both directions", H=2, W=1, K=7),
        Sample("wide_2x8", "H and W swapped would show", H=2, W=8, K=5),
        Sample("tall_8x2", "H and W swapped would show", H=8, W=2, K=5),
        Sample("no_prefix", "windows and class-token-free models", P=0),
        Sample("dist", "cls and dist tokens", P=2, residual=True),
        Sample("registers", "cls and four registers", P=5, prefix="zero"),
        Sample("zero_residual", "the DW shortcut: zero prefix plus the block's output", P=2, prefix="zero", residual=True),
        Sample("drop", "patches only come out", P=2, prefix="drop"),
        Sample("drop_residual", "residual in the shorter output's shape", P=2, prefix="drop", residual=True, bias=False),
        Sample("one_channel", "C = 1", C=1),
        Sample("three_channels", "C below any vector width", C=3, K=5),
        Sample("odd_channels", "C one past a vector", C=33, K=3, W=7),
        Sample("k1", "point-wise scaling: no halo", K=1),
        Sample("k7", "the largest tuned kernel", H=9, W=8, K=7, C=16),
        Sample("k9", "past the tuned kernels", H=6, W=7, K=9, bias=False),
        Sample("k11", "filter gradients have code for every K", H=6, W=5, K=11, C=5),
        Sample("k13", "filter gradients have code for every K", H=5, W=7, K=13, C=17, bias=False),
        Sample("k15", "the largest kernel promised", H=5, W=6, K=15, C=5),
        Sample("segments", "W past one column segment", H=3, W=35, C=16, K=5),
        Sample("w16", "exactly one segment of 16", H=3, W=16, C=8, K=7),
        Sample("sliced_x", "x is a slice of a longer sequence", x_layout="slice"),
        Sample("qkv_chunk", "x is a third of a qkv projection", x_layout="chunk", dy_layout="chunk"),
        Sample("expanded", "stride 0 in the batch", x_layout="expand", dy_layout="expand", residual=True),
        Sample("transposed_dy", "dy from a transposed consumer: one counted copy", dy_layout="transpose"),
        Sample("transposed_x", "channels not contiguous: one counted copy", x_layout="transpose"),
        Sample("scalar_dy", "dy of sum(): every stride 0", dy_layout="scalar"),
        Sample("fp32_weight", "weights kept in fp32 beside low-precision tokens", weight_dtype=torch.float32),
        Sample("empty_batch", "B = 0", B=0),
        Sample("empty_grid", "H*W = 0: prefix tokens only", H=0, W=3),
        Sample("vit_t", "C 192 at 14x14: several channel blocks", B=2, H=14, W=14, P=2, C=192, tiny=False),
        Sample("vit_s_k5", "C 384, K 5", B=1, H=14, W=14, C=384, K=5, tiny=False),
        Sample("wide_k7", "W 37, three segments, K 7, C 100", B=1, H=7, W=37, C=100, K=7, tiny=False),
        Sample("c1000", "many channels, a tail of 40", B=3, H=5, W=5, C=1000, tiny=False),
        Sample("long_sum", "a long sum for dW and db", B=24, H=16, W=16, C=64, K=5, tiny=False),
    )


def lay_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``t`` (B, N, C) in another memory layout; views are surrounded by NaN so that a stray read shows."""
    B, N, C = t.shape
    if layout == "contiguous":
        return t.contiguous()
    if layout == "slice":
        holder = t.new_full((B, N + 3, C + 5), float("nan"))
        view = holder[:, 2 : 2 + N, 1 : 1 + C]
    elif layout == "chunk":
        view = t.new_full((B, N, 3, C), float("nan"))[:, :, 1]
    elif layout == "transpose":
        view = t.new_full((B, C, N), float("nan")).transpose(1, 2)
    elif layout == "expand":
        return t[:1].expand(B, N, C)
    elif layout == "scalar":
        return t.flatten()[:1].reshape(1, 1, 1).expand(B, N, C) if t.numel() else t
    else:
        raise ValueError(f"unknown layout {layout!r}")
    view.copy_(t)
    return view


class Maker:
    """Draws the tensors of a sample, uniform in [-1, 1) or integers, the same for every dtype that can hold them."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str = "cpu", integers: bool = False):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device, self.integers = dtype, device, integers

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: int = 2) -> torch.Tensor:
        if self.integers:
            t = torch.randint(-scale, scale + 1, shape, generator=self.generator).double()
        else:
            t = torch.rand(shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        return t.to(self.device, dtype or self.dtype)


def _geometry(s: Sample) -> tuple[int, int, int, str]:
    return s.H, s.W, s.P, s.prefix


def _weight(s: Sample, draw: Maker) -> torch.Tensor:
    return draw(s.C, 1, s.K, s.K, dtype=s.weight_dtype, scale=1)


def _dy(s: Sample, draw: Maker, scale: int = 2) -> torch.Tensor:
    rows = s.H * s.W + (0 if s.prefix == "drop" else s.P)
    return lay_out(draw(s.B, rows, s.C, scale=scale), s.dy_layout)


def _x(s: Sample, draw: Maker, scale: int = 2) -> torch.Tensor:
    return lay_out(draw(s.B, s.P + s.H * s.W, s.C, scale=scale), s.x_layout)


def make_fwd(s: Sample, draw: Maker, backend: str) -> tuple:
    x, weight = _x(s, draw), _weight(s, draw)
    bias = draw(s.C, dtype=s.weight_dtype) if s.bias else None
    residual = _dy(s, draw) if s.residual else None
    return x, weight, bias, residual, *_geometry(s), backend


def make_bwd_dx(s: Sample, draw: Maker, backend: str) -> tuple:
    return _dy(s, draw), _weight(s, draw), *_geometry(s), backend


def make_bwd_dw(s: Sample, draw: Maker, backend: str) -> tuple:
    dtype = s.weight_dtype or draw.dtype
    dy, x = _dy(s, draw, scale=1), _x(s, draw, scale=1)
    return dy, x, s.K, *_geometry(s), dtype, dtype if s.bias else None, backend


def make_bwd_db(s: Sample, draw: Maker, backend: str) -> tuple:
    return _dy(s, draw, scale=1), *_geometry(s), s.weight_dtype or draw.dtype, backend
