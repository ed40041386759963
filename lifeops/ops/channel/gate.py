"""Channel attention of a pooled sequence: s = gate(m), m (B, C) the mean over the patches; forward and hand-written backward.

    "se"     s = hsigmoid(V2 relu(V1 m + c1) + c2)       squeeze and excitation (arXiv 1709.01507) with a hard sigmoid
    "eca"    s = sigmoid(conv1d(m; w))                   over neighbouring channels (arXiv 1910.03151)
    "ecah"   s = hsigmoid(conv1d(m; w))

A gate is B x C numbers: torch's own operators are fast enough, and the backward is written out so that it can run inside another
Function's backward without a second autograd graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lifeops import torchlib

GATES = ("", "se", "eca", "ecah")


def _conv(m, w):
    return F.conv1d(m[:, None], w, padding=w.shape[-1] // 2)[:, 0]


def _preactivation(kind, m, params):
    """What the (hard) sigmoid is taken of, and the hidden layer of "se"."""
    if kind != "se":
        return _conv(m, params[0]), None
    v1, c1, v2, c2 = params
    hidden = F.relu(F.linear(m, v1, c1))
    return F.linear(hidden, v2, c2), hidden


def gate(kind: str, m: torch.Tensor, params: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """s (B, C). ``params``: (V1, c1, V2, c2) of "se", (w,) with w (1, 1, k) of the others, in m's dtype, autocast or not."""
    with torchlib.without_autocast(m):
        p, _ = _preactivation(kind, m, params)
    return torch.sigmoid(p) if kind == "eca" else F.relu6(p + 3) / 6  # F.hardsigmoid multiplies by a float32 1/6


def gate_backward(kind, ds, m, params):
    """(dm, gradients of ``params``) from ds."""
    with torchlib.without_autocast(m):
        return _backward(kind, ds, m, params)


def _backward(kind, ds, m, params):
    p, hidden = _preactivation(kind, m, params)
    if kind == "eca":
        s = torch.sigmoid(p)
        dp = ds * s * (1 - s)
    else:
        dp = torch.where((p > -3) & (p < 3), ds / 6, 0)
    if kind != "se":
        (w,) = params
        half = w.shape[-1] // 2
        windows = F.pad(m, (half, half)).unfold(1, w.shape[-1], 1)  # (B, C, k)
        return _conv(dp, w.flip(-1)), ((windows * dp[:, :, None]).sum((0, 1))[None, None],)
    v1, _, v2, _ = params
    dh = torch.where(hidden > 0, dp @ v2, 0)  # a product would spread NaN
    return dh @ v1, (dh.t() @ m, dh.sum(0), dp.t() @ hidden, dp.sum(0))
