"""Named samples of the general token convolution, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops import geometry
from lifeops.ops.token_dwconv.samples import Maker, lay_out


class Sample(NamedTuple):
    """One problem; H, W and C are those of the fine side."""

    name: str
    reason: str
    B: int = 2
    H: int = 6
    W: int = 7
    P: int = 1
    C: int = 8
    m: int = 1
    Kh: int = 3
    Kw: int = 3
    sh: int = 2
    sw: int = 2
    ph: int = 1
    pw: int = 1
    prefix: str = "keep"
    bias: bool = True
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    weight_dtype: torch.dtype | None = None
    tiny: bool = True


def _square(name, reason, K, s, p, **fields):
    return Sample(name, reason, Kh=K, Kw=K, sh=s, sw=s, ph=p, pw=p, **fields)


def samples() -> tuple[Sample, ...]:
    return (
        Sample("plain", "K 3, stride 2, an even and an odd side"),
        _square("s4", "MViT's keys and values", 3, 4, 1, H=9, W=8),
        _square("s8", "MViT's first keys in video sizes", 3, 8, 1, H=17, W=9),
        _square("patches_k2", "windows that tile the grid: EdgeViT's local propagation", 2, 2, 0, P=0, H=6, W=8),
        _square("patches_k4", "the same with 4", 4, 4, 0, P=0, H=8, W=12, C=33),
        _square("spare", "a last row and column that no window reaches", 2, 3, 0, H=7, W=6),
        _square("k7_s4", "an overlapping embedding", 7, 4, 2, H=9, W=11),
        _square("valid", "stride 1 without padding", 3, 1, 0, bias=False),
        _square("wide_padding", "more padding than the kernel covers", 3, 2, 3, H=3, W=2),
        _square("even_same", "an even kernel: one more row comes out", 2, 1, 1, H=3, W=4),
        Sample("rectangle", "another kernel, stride and padding for each axis", Kh=1, Kw=5, sh=1, sw=3, ph=0, pw=2, H=4, W=9),
        Sample("tall", "the other way round", Kh=5, Kw=2, sh=3, sw=1, ph=2, pw=1, H=9, W=3),
        Sample("multiplied", "RegionViT: twice the channels", m=2, P=0),
        Sample("multiplied_zero", "three times, with prefix rows", m=3, P=2, C=5, prefix="zero"),
        Sample("drop", "patches only come out", P=2, prefix="drop"),
        Sample("zero", "zero prefix", P=5, prefix="zero"),
        Sample("one_pixel", "1x1 grid", H=1, W=1),
        Sample("one_channel", "C = 1", C=1),
        Sample("odd_channels", "C one past a vector", C=33, W=9),
        _square("k15", "the largest kernel promised", 15, 2, 7, H=5, W=6, C=5),
        Sample("sliced_x", "x is a slice of a longer sequence", x_layout="slice", dy_layout="slice"),
        Sample("qkv_chunk", "x is a third of a qkv projection", x_layout="chunk", dy_layout="chunk"),
        Sample("expanded", "stride 0 in the batch", x_layout="expand", dy_layout="expand"),
        Sample("transposed", "channels not contiguous: one counted copy", x_layout="transpose", dy_layout="transpose"),
        Sample("scalar_dy", "dy of sum(): every stride 0", dy_layout="scalar"),
        Sample("fp32_weight", "weights kept in fp32 beside low-precision tokens", weight_dtype=torch.float32),
        Sample("empty_batch", "B = 0", B=0),
        Sample("empty_grid", "H*W = 0: prefix tokens only", H=0, W=3),
        _square("cvt", "CvT's keys: C 192 at 14x14", 3, 2, 1, H=14, W=14, C=192, tiny=False),
        _square("wide", "past a column segment", 3, 2, 1, B=1, H=5, W=301, C=70, tiny=False),
        _square("multiplied_wide", "m 2 in many channels, a tail of 8", 3, 2, 1, P=0, H=9, W=9, C=200, m=2, tiny=False),
        _square("uneven_shares", "more channels than a task takes, the last fewer", 3, 2, 1, P=0, H=5, W=120, C=392, m=2, tiny=False),
        _square("long_sum", "a long sum for dW and db", 3, 2, 1, B=24, H=28, W=28, C=64, tiny=False),
    )


def _geometry(s: Sample) -> tuple:
    return s.H, s.W, s.P, s.sh, s.sw, s.ph, s.pw, s.prefix


def _coarse_rows(s: Sample) -> int:
    h, w = geometry.filtered_grid("token_dwconv_strided", s.H, s.W, (s.Kh, s.Kw), (s.sh, s.sw), (s.ph, s.pw))
    return h * w + (0 if s.prefix == "drop" else s.P)


def _fine(s: Sample, draw: Maker, scale: int = 2) -> torch.Tensor:
    return lay_out(draw(s.B, s.P + s.H * s.W, s.C, scale=scale), s.x_layout)


def _coarse(s: Sample, draw: Maker, scale: int = 2) -> torch.Tensor:
    return lay_out(draw(s.B, _coarse_rows(s), s.m * s.C, scale=scale), s.dy_layout)


def _weight(s: Sample, draw: Maker) -> torch.Tensor:
    return draw(s.m * s.C, 1, s.Kh, s.Kw, dtype=s.weight_dtype, scale=1)


def make_strided(s: Sample, draw: Maker, backend: str) -> tuple:
    x, weight = _fine(s, draw), _weight(s, draw)
    return x, weight, draw(s.m * s.C, dtype=s.weight_dtype) if s.bias else None, *_geometry(s), backend


def make_transpose(s: Sample, draw: Maker, backend: str) -> tuple:
    x, weight = _coarse(s, draw), _weight(s, draw)
    return x, weight, draw(s.C, dtype=s.weight_dtype) if s.bias else None, s.m, *_geometry(s), backend


def make_bwd_dw(s: Sample, draw: Maker, backend: str) -> tuple:
    dtype = s.weight_dtype or draw.dtype
    return _coarse(s, draw, 1), _fine(s, draw, 1), s.Kh, s.Kw, *_geometry(s), dtype, dtype if s.bias else None, backend
