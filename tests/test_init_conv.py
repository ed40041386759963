"""Depth-wise initialisations: their energy and sharing, and what a frozen impulse costs in token_dwconv."""

import re

import pytest
import torch
from torch import nn

import lifeops
from lifeops.init import box_, gaussian_, impulse_conv_, random_conv_
from lifeops.ops.token_dwconv import function

INITS = {
    "impulse": impulse_conv_,
    "box": lambda w, **o: box_(w, 3, **o),
    "gaussian": lambda w, **o: gaussian_(w, 0.5, **o),
    "random": random_conv_,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("K", [3, 5])
@pytest.mark.parametrize("name", INITS)
def test_energy(name, K):
    """Every one has mean squared norm 1/3, as U(-1/K, 1/K)."""
    w = INITS[name](torch.empty(4000, 1, K, K), generator=generator())
    assert w.square().sum((1, 2, 3)).mean().item() == pytest.approx(1 / 3, abs=0.01)
    half = INITS[name](torch.empty(4000, 1, K, K), generator=generator(), norm=0.5 * 3**-0.5)
    torch.testing.assert_close(half, w / 2)
    assert torch.equal(w, INITS[name](torch.empty(4000, 1, K, K), generator=generator()))


def test_shapes_of_the_filters():
    impulse = impulse_conv_(torch.empty(900, 1, 3, 3), norm=1, generator=generator()).flatten(1)
    assert torch.equal(impulse.sort(1).values, torch.eye(9)[8].expand(900, 9))
    assert (impulse.sum(0) > 50).all()  # every tap, about 100 times
    box = box_(torch.empty(50, 1, 5, 5), 4, generator=generator()).flatten(1)
    assert (box.count_nonzero(1) == 4).all()
    gaussian = gaussian_(torch.empty(200, 1, 5, 5), 0.25, generator=generator())
    peak = gaussian.flatten(1).max(1).values
    centred = gaussian[gaussian[:, 0, 2, 2] == peak][0, 0]
    torch.testing.assert_close(centred[1, 2] / centred[2, 2], torch.tensor(-2.0).exp())  # exp(-1 / (2 · 0.25))
    torch.testing.assert_close(centred[1, 1] / centred[2, 2], torch.tensor(-4.0).exp())
    assert random_conv_(torch.empty(500, 1, 5, 5), generator=generator()).abs().max().item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("name", INITS)
@pytest.mark.parametrize("assign", ["random", "groups"])
def test_shared_filters(name, assign):
    w = INITS[name](torch.empty(40, 1, 5, 5), num_filters=4, assign=assign, generator=generator()).flatten(1)
    assert len(w.unique(dim=0)) <= 4
    if assign == "groups":
        assert torch.equal(w, w[::10].repeat_interleave(10, 0))


def test_modules_and_freezing():
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 5, groups=4))
    point = model[1].weight.detach().clone()
    assert impulse_conv_(model, frozen=True, norm=1, generator=generator()) is model
    assert [m.weight.requires_grad for m in model] == [False, True, False]
    assert model[0].weight.sum() == 6
    assert model[2].weight.sum() == 4
    assert torch.equal(model[1].weight, point)
    life = lifeops.nn.LifeAttention(12, 3)
    box_(life, 2, generator=generator())
    assert life.qkv.scale3.depthwise.weight.flatten(1).count_nonzero(1).tolist() == [2] * 12


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_frozen_impulse_is_a_shift_without_dw(backend, monkeypatch):
    """Forward and dX are exact shifts; no weight gradient is computed and x is not kept for one."""
    if backend == "cpu" and lifeops.registry.unavailable("cpu"):
        pytest.skip("no compiled kernels")
    H, W, P, C = 4, 5, 2, 8
    weight = impulse_conv_(nn.Parameter(torch.empty(C, 1, 3, 3)), norm=1, frozen=True, generator=generator())
    x = torch.randn(2, P + H * W, C, requires_grad=True)
    monkeypatch.setattr(function, "_bwd_dw", None)  # a call would raise
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = lifeops.token_dwconv(x, weight, grid=(H, W), num_prefix_tokens=P, backend=backend)
    assert saved == [weight.shape]
    dy = torch.randn_like(y)
    y.backward(dy)
    expected, expected_dx = torch.zeros_like(y), torch.zeros_like(y)
    expected[:, :P], expected_dx[:, :P] = x[:, :P].detach(), dy[:, :P]
    for c, tap in enumerate(weight.flatten(1).argmax(1).tolist()):
        rows, targets = lifeops.init.offsets.shift_targets((H, W), (tap // 3 - 1, tap % 3 - 1))
        expected[:, P + rows, c] = x[:, P + targets, c].detach()
        expected_dx[:, P + targets, c] = dy[:, P + rows, c]
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, expected_dx)
    assert weight.grad is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: impulse_conv_(torch.empty(4, 4, 3, 3)), ValueError, "impulse_conv_: weight must have shape (C, 1, K, K)"),
        (lambda: impulse_conv_(nn.Linear(3, 3)), ValueError, "Linear has no depth-wise nn.Conv2d"),
        (lambda: impulse_conv_([1]), TypeError, "weight must be a tensor or a module, got list"),
        (lambda: box_(torch.empty(4, 1, 3, 3), 10), ValueError, "box_: taps must be an int between 1 and K*K = 9, got 10"),
        (lambda: gaussian_(torch.empty(4, 1, 3, 3), 0), ValueError, "gaussian_: variance must be positive, got 0"),
        (
            lambda: random_conv_(torch.empty(4, 1, 3, 3), num_filters=5),
            ValueError,
            "must be between 1 and the 4 channels, got 5",
        ),
        (lambda: random_conv_(torch.empty(4, 1, 3, 3), assign="all"), ValueError, "assign must be 'random' or 'groups', got 'all'"),
        (lambda: random_conv_(torch.empty(4, 1, 3, 3), generator="0"), TypeError, "generator must be a torch.Generator or None, got str"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
