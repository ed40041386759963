"""Named samples of local_attention, each with its reason, and how their tensors are made. Tests are generated from them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.local_attention.formula import attend
from lifeops.ops.token_dwconv.samples import Maker, lay_out


class Sample(NamedTuple):
    """One problem. ``layout`` says how q, k and v lie in memory (see ``_qkv``), K = 0 is plain attention."""

    name: str
    reason: str
    B: int = 2
    H: int = 3
    W: int = 4
    P: int = 1
    h: int = 2
    d: int = 16
    K: int = 3
    bias: bool = True
    mask: str = ""  # "float", "bool": (1, h, N, N); "batch": float (B, h, N, N); "shared": float (B, 1, N, N); "dead": bool, a row of False
    key_mask: bool = False
    layout: str = "qkv"
    dy_layout: str = "contiguous"
    tiny: bool = True
    keep: bool = True

    @property
    def mask_batch(self) -> int:
        """How many score matrices the gradient of one mask is summed over."""
        return {"float": self.B, "shared": self.h}.get(self.mask, 1)


def samples() -> tuple[Sample, ...]:
    return (
        Sample("plain", "the common case in small"),
        Sample("no_local", "plain attention", K=0),
        Sample("inference", "neither attention alone nor its log-sum-exp is kept", keep=False),
        Sample("one_token", "N = 1", H=1, W=1, P=0),
        Sample("below_a_tile", "N = 15, five prefix tokens, K 5", H=2, W=5, P=5, h=1, K=5),
        Sample("a_tile", "N = 16, no prefix: a window", H=4, W=4, P=0, d=32),
        Sample("past_a_tile", "N = 17, two prefix tokens, no bias", H=3, W=5, P=2, bias=False),
        Sample("width_48", "heads of 48 channels", d=48, h=1),
        Sample("width_20", "heads no power of two, five of them", d=20, h=5, B=1),
        Sample("life_scale", "the views of one of LIFE's scales", layout="scales"),
        Sample("by_head", "q, k, v contiguous as (B, h, N, d): v is copied once", layout="heads"),
        Sample("transposed", "the width does not have stride 1: counted copies", layout="transposed", dy_layout="transpose"),
        Sample("scalar_dy", "dy of sum(): every stride 0", dy_layout="scalar"),
        Sample("bool_mask", "True: attend", mask="bool", K=0),
        Sample("float_mask", "relative positions, with their gradient", mask="float"),
        Sample("batch_mask", "a mask per image and head, with its gradient", mask="batch", K=0),
        Sample("shared_mask", "a mask per image, with its gradient", mask="shared", K=0),
        Sample("no_keys", "a query without keys gets zero", mask="dead", K=0),
        Sample("padding", "keys that do not exist", key_mask=True),
        Sample("padding_and_mask", "both", key_mask=True, mask="float"),
        Sample("empty_batch", "B = 0", B=0),
        Sample("prefix_only", "H*W = 0", H=0, W=3, P=2),
        Sample("deit", "N = 197", B=1, H=14, W=14, d=64, h=3, tiny=False),
        Sample("deit_dist", "N = 198", B=1, H=14, W=14, P=2, d=32, h=1, tiny=False),
        Sample("n256", "the last N of one block, K 7, heads of 96", B=1, H=16, W=16, P=0, d=96, h=1, K=7, tiny=False),
        Sample("n257", "the first N that streams, heads of 128", B=1, H=16, W=16, d=128, h=1, tiny=False),
        Sample("n257_mask", "the same with relative positions", B=2, H=16, W=16, h=1, mask="float", tiny=False),
        Sample("n1026", "32x32 and two prefix tokens", B=1, H=32, W=32, P=2, d=16, h=1, tiny=False),
    )


def samples_bwd() -> tuple[Sample, ...]:
    """Without N = 1: its dq and dk are zero by cancellation, and a bound relative to zero says nothing."""
    return tuple(s for s in samples() if s.name != "one_token" and s.keep)


def _qkv(s: Sample, draw: Maker):
    """q, k, v (B, h, N, d); views are surrounded by NaN where there is room."""
    B, h, N, d = s.B, s.h, s.P + s.H * s.W, s.d
    values = [draw(B, N, h, d, scale=1) for _ in range(3)]
    if s.layout == "heads":
        return [t.transpose(1, 2).contiguous() for t in values]
    if s.layout == "transposed":
        return [t.permute(0, 2, 3, 1).contiguous().transpose(2, 3) for t in values]
    if s.layout == "qkv":
        return [t.transpose(1, 2) for t in torch.stack(values, 2).unbind(2)]
    holder = values[0].new_full((B, N + 1, 3 * h * d + 8), float("nan"))
    views = holder[:, 1:, 8:].chunk(3, -1)
    return [view.copy_(t.flatten(2)).unflatten(2, (h, d)).transpose(1, 2) for view, t in zip(views, values, strict=True)]


def _attn_mask(s: Sample, draw: Maker):
    N = s.P + s.H * s.W
    if s.mask in ("", "float", "batch", "shared"):
        shape = {"float": (1, s.h), "batch": (s.B, s.h), "shared": (s.B, 1)}.get(s.mask)
        return None if shape is None else draw(*shape, N, N, dtype=torch.float64, scale=1).to(accumulate_dtype(draw.dtype))
    mask = draw(1, s.h, N, N, dtype=torch.float64, scale=1) > -0.5
    if s.mask == "dead" and N:
        mask[:, :, N // 2] = False
        mask[:, 0, :, N // 3] = False  # and a key that no query of a head sees
    return mask


def _key_mask(s: Sample, draw: Maker):
    if not s.key_mask:
        return None
    mask = draw(s.B, s.P + s.H * s.W, dtype=torch.float64, scale=1) > -0.5
    mask[0] = False  # an image without any token
    return mask


def _inputs(s: Sample, draw: Maker):
    C = s.h * s.d
    qkv = _qkv(s, draw)
    weight = draw(C, 1, s.K, s.K, scale=1) if s.K else None
    bias = draw(C, scale=1) if s.K and s.bias else None
    masks = _attn_mask(s, draw), _key_mask(s, draw), None
    return qkv, weight, bias, masks, (s.H, s.W, s.P, s.d**-0.5, 0.0)


def make_fwd(s: Sample, draw: Maker, backend: str) -> tuple:
    qkv, weight, bias, masks, settings = _inputs(s, draw)
    return *qkv, weight, bias, *masks, *settings, s.keep, backend


def make_bwd(s: Sample, draw: Maker, backend: str) -> tuple:
    """attn and lse are those of the forward pass in float64, rounded."""
    (q, k, v), weight, _, (attn_mask, key_mask, _), settings = _inputs(s, draw)
    doubles = [t.double() for t in (q, k, v)]
    wide = attn_mask.double() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    attn, lse = attend(*doubles, wide, key_mask, None, settings[3], 0.0)
    attn, lse = attn.to(q.dtype), lse.to(accumulate_dtype(q.dtype))
    dy = lay_out(draw(s.B, s.P + s.H * s.W, s.h * s.d, scale=1), s.dy_layout)
    mask_grad = attn_mask is not None and attn_mask.is_floating_point()
    return dy, q, k, v, weight, attn, lse, attn_mask, key_mask, None, *settings, mask_grad, backend
