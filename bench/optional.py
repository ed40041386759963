"""Baselines from packages that may not be there: timm's blocks, and other local ops on tokens, for scale; these need a GPU.

``natten``: neighbourhood attention, K x K keys around each query (shifted inwards at the borders), in the place of attention with a
local term. ``causal_conv1d``: a depth-wise convolution of K taps along the sequence, its nearest relative in the literature.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

from bench.case import Inputs, Variant
from bench.problems import Problem

PACKAGES = {"natten": "neighbourhood attention", "causal_conv1d": "a depth-wise convolution along the sequence", "timm": "its own blocks"}
WINDOW, TAPS = 7, (2, 3, 4)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def missing() -> list[str]:
    """One line for each package that is not there."""
    return [f"{name} ({what}): not installed, no row" for name, what in PACKAGES.items() if not installed(name)]


def variants(p: Problem, device: str) -> dict[str, Variant]:
    """What is installed and fits ``p``."""
    found = {}
    if device != "cuda" or p.mode in ("dw", "bwd"):
        return found
    if p.system == "local_attention" and p.P == 0 and min(p.H, p.W) >= WINDOW and installed("natten"):
        found["natten"] = neighbourhood(p)
    if p.system == "token_dwconv" and p.K in TAPS and installed("causal_conv1d"):
        found["causal_conv1d"] = causal()
    return found


def near(H: int, W: int, device) -> torch.Tensor:
    """(H*W, H*W) bool: which keys a query sees, WINDOW x WINDOW of them, shifted inwards at the borders."""

    def line(n):
        at = torch.arange(n, device=device)
        first = (at - WINDOW // 2).clamp(0, n - WINDOW)
        return (at >= first[:, None]) & (at < first[:, None] + WINDOW)

    return (line(H)[:, None, :, None] & line(W)[None, :, None, :]).reshape(H * W, H * W)


def neighbourhood(p: Problem) -> Variant:
    import natten

    def forward(i: Inputs):
        q, k, v = (i[n].transpose(1, 2).unflatten(1, (p.H, p.W)) for n in "qkv")
        return natten.na2d(q, k, v, kernel_size=WINDOW).flatten(1, 2).flatten(2)

    def masked(i: Inputs):
        y = F.scaled_dot_product_attention(i["q"], i["k"], i["v"], attn_mask=near(p.H, p.W, i["q"].device))
        return y.transpose(1, 2).flatten(2)

    return Variant(forward, tuple("qkv"), truth=Variant(masked, tuple("qkv")))


def causal() -> Variant:
    import causal_conv1d

    def forward(i: Inputs):
        return causal_conv1d.causal_conv1d_fn(i["x"].transpose(1, 2), i["w"][:, 0, 0].contiguous()).transpose(1, 2)

    def plain(i: Inputs):
        w = i["w"][:, :, 0]
        return F.conv1d(F.pad(i["x"].transpose(1, 2), (w.shape[-1] - 1, 0)), w, groups=w.shape[0]).transpose(1, 2)

    return Variant(forward, ("x", "w"), truth=Variant(plain, ("x", "w")))
