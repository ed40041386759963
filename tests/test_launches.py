"""How many kernels a step launches on Triton, its own and torch's, and that the host waits for none of them."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import lifeops

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))
from launches import counted_launches

from lifeops.ops.dw_shortcut.function import dw_shortcut_eval, dw_shortcut_train

B, GRID, P, C = 2, (4, 6), 1, 16
FORWARD = Counter(("channel_sums_kernel", "dw_shortcut_norm_kernel", "token_dwconv_fwd_kernel"))
BEHIND = Counter(("token_dwconv_bwd_dw_kernel", *(f"dw_shortcut_{name}_kernel" for name in ("images", "taps", "gradients"))))


def tokens(dtype=torch.float32):
    return torch.randn(B, P + GRID[0] * GRID[1], C, dtype=dtype)


def parameters(K=3):
    """Weight, bias, gamma, beta."""
    return [nn.Parameter(torch.randn(shape)) for shape in ((C, 1, K, K), (C,), (C,), (C,))]


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("K", [3, 7, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_dw_shortcut_step(monkeypatch, dtype, K, needs_dx):
    """Three launches forward and five backward, all of them lifeops' own; four without the gradient of x."""
    x, y, values = tokens(dtype).requires_grad_(needs_dx), tokens(dtype), parameters(K)
    with counted_launches(monkeypatch) as counted:
        out, *_ = dw_shortcut_train(x, y, [values], [1e-5], GRID, P, None, "triton")
        assert (counted.kernels, counted.torch) == (FORWARD, Counter())
        counted.clear()
        torch.autograd.backward(out, y)
        assert (counted.kernels, counted.torch) == (BEHIND + Counter(token_dwconv_fwd_kernel=int(needs_dx)), Counter())
        assert not counted.waits


@pytest.mark.parametrize(("running", "launches"), [(True, 2), (False, 1)])
def test_dw_shortcut_evaluation(monkeypatch, running, launches):
    x, y, (weight, bias, gamma, beta) = tokens(), tokens(), (p.detach() for p in parameters())
    with counted_launches(monkeypatch) as counted:
        dw_shortcut_eval(x, y, weight, bias, (*((beta, gamma) if running else (None, None)), gamma, beta, 1e-5), GRID, P, "triton")
    assert (counted.kernels.total(), counted.torch) == (launches, Counter())


def test_dw_shortcut_module(monkeypatch):
    """With the running statistics: one launch for both, one for the count."""
    module, x, y = lifeops.nn.DWShortcut(C, grid=GRID), tokens().requires_grad_(), tokens()
    with counted_launches(monkeypatch) as counted, lifeops.use_backend("triton"):
        out = module(x, y)
        torch.autograd.backward(out, y)
    assert (counted.kernels.total(), counted.torch, counted.waits) == (8, Counter(_foreach_lerp_=1, _foreach_add_=1), Counter())


LOCALVIT = {  # the gate's own operators, forward and backward
    "relu6": (Counter(), 0),
    "hs": (Counter(), 0),
    "hs+se": (Counter(addmm=2, relu=1, add=1, hardtanh=1, div=2), 25),
    "hs+eca": (Counter(convolution=1, sigmoid=1, div=1), 13),
}


@pytest.mark.parametrize("act", LOCALVIT)
def test_localvit_step(monkeypatch, act):
    """Fourteen launches forward, two for the running statistics, and twenty backward, beside the gate's and its pool's two."""
    module, x = lifeops.nn.LocalityFeedForward(C, act=act, grid=GRID), tokens().requires_grad_()
    forward, backward = LOCALVIT[act]
    pooled = 2 if "+" in act else 0
    with counted_launches(monkeypatch) as counted, lifeops.use_backend("triton"):
        y = module(x)
        assert counted.kernels.total() == 11 + pooled
        assert counted.torch == Counter(mm=2, clone=1, _foreach_add_=1, _foreach_lerp_=1) + forward
        counted.clear()
        torch.autograd.backward(y, x.detach())
        assert counted.kernels.total() == 16
        assert counted.torch.total() == 4 + backward
        assert not counted.waits
