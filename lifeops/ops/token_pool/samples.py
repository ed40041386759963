"""Named samples of token_pool, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops import geometry
from lifeops.ops.token_dwconv.samples import Maker, lay_out


class Sample(NamedTuple):
    """One problem; H and W are those of the fine side."""

    name: str
    reason: str
    mode: str = "max"
    B: int = 2
    H: int = 6
    W: int = 7
    P: int = 1
    C: int = 8
    Kh: int = 3
    Kw: int = 3
    sh: int = 2
    sw: int = 2
    ph: int = 1
    pw: int = 1
    prefix: str = "keep"
    ceil_mode: bool = False
    count_include_pad: bool = True
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    tiny: bool = True


def _square(name, reason, K, s, p, **fields):
    return Sample(name, reason, Kh=K, Kw=K, sh=s, sw=s, ph=p, pw=p, **fields)


def samples() -> tuple[Sample, ...]:
    return (
        Sample("plain", "MViT's skip: max, kernel s + 1"),
        Sample("average", "CvT's avg and its rounding up", mode="avg", ceil_mode=True),
        Sample("average_inside", "padding left out of the divisor", mode="avg", ceil_mode=True, count_include_pad=False, H=7),
        _square("skip_s4", "MViT's skip over four tokens", 5, 4, 2, H=9, W=8),
        _square("subsample", "EdgeViT's pick: one token of every window", 1, 2, 0, mode="avg", P=0),
        _square("windows", "windows that tile the grid", 2, 2, 0, mode="avg", H=6, W=8),
        _square("max_up", "max, rounded up", 2, 3, 0, ceil_mode=True, H=7, W=8),
        Sample("rectangle", "another window for each axis", Kh=1, Kw=4, sh=1, sw=3, ph=0, pw=2, H=4, W=9),
        Sample("overlap", "stride 1: a token is in many windows", sh=1, sw=1, mode="max", H=4, W=3),
        Sample("drop", "patches only come out", P=2, prefix="drop"),
        Sample("zero", "zero prefix", P=5, prefix="zero", mode="avg"),
        Sample("one_pixel", "1x1 grid", H=1, W=1),
        Sample("odd_channels", "C one past a vector", C=33, W=9),
        Sample("one_channel", "C = 1", C=1, mode="avg"),
        Sample("qkv_chunk", "x is a third of a qkv projection", x_layout="chunk", dy_layout="chunk"),
        Sample("expanded", "stride 0 in the batch", x_layout="expand", dy_layout="expand"),
        Sample("transposed", "channels not contiguous: one counted copy", x_layout="transpose", dy_layout="transpose", mode="avg"),
        Sample("scalar_dy", "dy of sum(): every stride 0", dy_layout="scalar"),
        Sample("empty_batch", "B = 0", B=0),
        Sample("empty_grid", "H*W = 0: prefix tokens only", H=0, W=3),
        _square("mvit", "96 channels a head at 28x28", 3, 2, 1, H=28, W=28, C=96, tiny=False),
        _square("wide", "past a column segment", 3, 2, 1, B=1, H=5, W=301, C=70, mode="avg", tiny=False),
    )


def _window(s: Sample) -> tuple:
    return s.mode, s.Kh, s.Kw, s.H, s.W, s.P, s.sh, s.sw, s.ph, s.pw, s.prefix, s.ceil_mode, s.count_include_pad


def _x(s: Sample, draw: Maker) -> torch.Tensor:
    return lay_out(draw(s.B, s.P + s.H * s.W, s.C), s.x_layout)


def make_fwd(s: Sample, draw: Maker, backend: str) -> tuple:
    return _x(s, draw), *_window(s), backend


def make_bwd(s: Sample, draw: Maker, backend: str) -> tuple:
    h, w = geometry.filtered_grid("token_pool", s.H, s.W, (s.Kh, s.Kw), (s.sh, s.sw), (s.ph, s.pw), s.ceil_mode)
    dy = lay_out(draw(s.B, h * w + (0 if s.prefix == "drop" else s.P), s.C), s.dy_layout)
    return dy, _x(s, draw) if s.mode == "max" else None, *_window(s), backend
