"""Curriculum by Smoothing: the authors' numbers, prefix tokens, the schedule, what is saved and what is not, bad input."""

import copy

import pytest
import system_checks
import torch
import torch.nn.functional as F
from torch import nn

import lifeops
from lifeops.cost.model_cost import count_macs
from lifeops.nn import TokenSmoothing
from lifeops.nn.eager_smoothing import EagerSmoothing
from test_localvit import _close, golden_with_act

GRID = (4, 6)


def tokens(maps, P=0):
    patches = maps.flatten(2).transpose(1, 2)
    return torch.cat((torch.full((len(maps), P, maps.shape[1]), 7.0, dtype=maps.dtype), patches), 1)


@pytest.mark.parametrize("P", [0, 2])
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("K", [3, 5, 7])
def test_golden(K, backend, P):
    """Of three sigmas the filter, the result and the gradient to 1e-10; the authors' own filter is rounded to float32."""
    d = golden_with_act(f"cbs_k{K}")
    module = TokenSmoothing(kernel_size=K, num_prefix_tokens=P, padding=int(d["padding"]))
    for i, sigma in enumerate(d["sigmas"].tolist()):
        module.sigma = sigma
        _close(module.filter(torch.float64).expand(3, -1, -1, -1), d[f"weight_{i}"], 1e-15)
        _close(module.filter().expand(3, -1, -1, -1), d[f"weight32_{i}"], 1e-7)
        x, g = tokens(d["x"], P).requires_grad_(), tokens(d[f"g_{i}"], P)
        with lifeops.use_backend(backend):
            y = module(x, (9, 8))
            y.backward(g)
        _close(y, tokens(d[f"y_{i}"], P))
        _close(x.grad[:, P:], tokens(d[f"grad_x_{i}"]))
        assert torch.equal(x.grad[:, :P], g[:, :P])


@pytest.mark.parametrize("K", [3, 5, 7])
def test_eager_baseline_is_the_authors(K):
    d = golden_with_act(f"cbs_k{K}")
    module = EagerSmoothing(3, 0.9, K, padding=int(d["padding"])).double()
    _close(module.conv.weight, d["weight32_1"].double(), 1e-7)
    _close(module(tokens(d["x"]), (9, 8)), tokens(d["y_1"]), 1e-6)


def test_sigma_zero_is_the_identity():
    """Nothing runs; without the padding what is left is the inner part of the map. A tiny sigma comes to the same."""
    x = torch.randn(2, 1 + 24, 5)
    module = TokenSmoothing(0, 3, 1)
    with torch.profiler.profile() as profile:
        assert module(x, GRID) is x
    assert not profile.key_averages()
    inner = x[:, 1:].unflatten(1, GRID)[:, 1:-1, 1:-1].flatten(1, 2)
    assert torch.equal(TokenSmoothing(0, 3, 1, padding=0)(x, GRID), torch.cat((x[:, :1], inner), 1))
    module.sigma = 1e-300
    assert torch.equal(module(x, GRID), x)


def test_large_sigma_is_the_mean():
    maps = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    _close(TokenSmoothing(1e9, 3)(tokens(maps), GRID), tokens(F.avg_pool2d(maps, 3, 1, 1)), 1e-12)


def test_schedule():
    module = TokenSmoothing()
    sigmas = [module.sigma, *(module.step() for _ in range(11))]
    assert sigmas == pytest.approx([1.0] * 5 + [0.9] * 5 + [0.81] * 2)
    assert TokenSmoothing(2.0).step(20) == pytest.approx(2 * 0.9**4)
    linear = TokenSmoothing(schedule=lambda epoch: max(0.0, 1 - epoch / 4))
    assert [linear.step() for _ in range(5)] == [0.75, 0.5, 0.25, 0, 0]
    assert linear.step(1) == 0.75
    assert linear.epoch == 1


def test_not_in_the_state_dict():
    module = nn.Sequential(nn.Linear(5, 5), TokenSmoothing(grid=GRID))
    assert [*module.state_dict()] == ["0.weight", "0.bias"]
    assert sum(p.numel() for p in module.parameters()) == 30
    module[1].step(10)
    twin = copy.deepcopy(module)
    assert (twin[1].sigma, twin[1].epoch) == (module[1].sigma, 10)
    assert repr(twin[1]) == "TokenSmoothing(sigma=0.81, kernel_size=3, num_prefix_tokens=0)"
    assert repr(TokenSmoothing(1, 7, padding=0)).endswith("kernel_size=7, num_prefix_tokens=0, padding=0)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    system_checks.low_precision(TokenSmoothing(0.8, 5, 2), torch.randn(2, 2 + 24, 12, dtype=torch.float64, requires_grad=True), GRID, dtype)


def test_autocast_compile_export_and_transforms():
    module, x = TokenSmoothing(0.8, 3, 1, grid=GRID), torch.randn(2, 1 + 24, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    system_checks.compiled(module, x)
    system_checks.exported(module, x.detach())
    system_checks.traced(module, x.detach())
    xs = torch.randn(3, 2, 1 + 24, 8)
    torch.testing.assert_close(torch.func.vmap(module)(xs), torch.stack([module(t) for t in xs]))


def test_one_program_for_every_sigma():
    """And one more for none at all; moved, cast and built without memory the filter is what sigma says."""
    module, x, programs = TokenSmoothing(1.0, 3, 1, grid=GRID), torch.randn(2, 1 + 24, 8), []
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=lambda graph, args: programs.append(graph) or graph.forward)
    for epoch in range(12):
        module.sigma = 0.9**epoch
        torch.testing.assert_close(compiled(x), module(x))
    assert len(programs) == 1
    module.sigma = 0
    assert torch.equal(compiled(x), x)
    module.sigma = 0.7
    expected = module.filter(torch.float64)
    assert torch.equal(copy.deepcopy(module).bfloat16().filter(torch.float64), expected)
    with torch.device("meta"):
        bare = nn.Sequential(TokenSmoothing(0.7, 3, 1))
    assert torch.equal(bare.to_empty(device="cpu")[0].filter(torch.float64), expected)
    assert not bare[0].taps.requires_grad


def test_cost():
    x = torch.randn(2, 1 + 24, 8)
    assert count_macs(lambda: TokenSmoothing(1, 5, 1)(x, GRID)) == 2 * 24 * 8 * 25
    assert count_macs(lambda: TokenSmoothing(0, 5, 1)(x, GRID)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenSmoothing(-1), "TokenSmoothing: sigma must be finite and not negative, got -1"),
        (lambda: TokenSmoothing(1, 4), "TokenSmoothing: kernel_size must be odd, got 4"),
        (lambda: TokenSmoothing(schedule=lambda epoch: -1).step(), "TokenSmoothing: sigma must be finite and not negative, got -1"),
        (lambda: TokenSmoothing()(torch.ones(1, 24, 3)), "TokenSmoothing: the grid is unknown"),
        (lambda: TokenSmoothing()(torch.ones(1, 25, 3), GRID), "TokenSmoothing: x.shape[1] must be P + H*W = 0 + 4*6 = 24, got 25"),
        (
            lambda: TokenSmoothing(1, 7, padding=0)(torch.ones(1, 24, 3), GRID),
            "TokenSmoothing: the kernel (7, 7) must fit the grid (4, 6) padded by (0, 0)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert message in str(error.value)
