"""nn.TokenPyramid against plain torch convolutions of contiguous maps: every stride, odd grids, any prefix, both paths."""

import copy

import pytest
import system_checks
import torch
import torch.nn.functional as F

import lifeops
from lifeops.cost.model_cost import count_macs
from lifeops.nn import TokenPyramid
from test_edgevit import layer_by_layer
from test_mvit import _randomised

GRIDS = [(4, 6), (5, 3), (1, 7)]


def pyramid(P=2, **options):
    torch.manual_seed(0)
    return _randomised(TokenPyramid(12, 8, P, **options).double())


def tokens(grid, P=2, batch=3):
    return torch.randn(batch, P + grid[0] * grid[1], 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def oracle(weights, x, grid, P, patch_size, strides):
    """The formula by torch's own functions, from a state dict."""
    patches = x[:, P:].transpose(1, 2).unflatten(2, grid).contiguous()
    found = []
    for i, stride in enumerate(strides):
        w = {name.removeprefix(f"levels.{i}."): t for name, t in weights.items() if name.startswith(f"levels.{i}.")}
        t = F.conv2d(patches, w["proj.weight"][:, :, None, None], w["proj.bias"])
        if stride < patch_size:
            t = F.conv_transpose2d(t, w["conv.weight"], w["conv.bias"], stride=patch_size // stride, groups=8)
        else:
            t = F.conv2d(t, w["conv.weight"], w["conv.bias"], stride // patch_size, w["conv.weight"].shape[2] // 2, groups=8)
        t = F.conv2d(F.gelu(t), w["mix.weight"][:, :, None, None], w["mix.bias"])
        mean, var = t.mean(1, keepdim=True), t.var(1, keepdim=True, unbiased=False)
        shape = (1, 8, 1, 1)
        found.append((t - mean) * (var + 1e-6).rsqrt() * w["norm.weight"].view(shape) + w["norm.bias"].view(shape))
    return found


@pytest.mark.parametrize("called", [False, True], ids=["fused", "layers"])
@pytest.mark.parametrize(("patch_size", "strides"), [(16, (4, 8, 16, 32)), (14, (7, 14, 28, 56)), (6, (1, 2, 3, 18))], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("P", [0, 3])
def test_values_and_gradients(P, grid, patch_size, strides, called):
    module = pyramid(P, patch_size=patch_size, strides=strides)
    x = tokens(grid, P).requires_grad_()
    expected = oracle(dict(module.named_parameters()), x, grid, P, patch_size, strides)
    gradients = [torch.randn_like(m) for m in expected]
    leaves = [x, *module.parameters()]
    wanted = torch.autograd.grad(expected, leaves, gradients)
    twin = layer_by_layer(module) if called else module
    maps = twin(x, grid)
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-n * patch_size // s) for n in grid) for s in strides]
    got = torch.autograd.grad(maps, [x, *twin.parameters()], gradients)
    for ours, theirs in zip((*maps, *got), (*expected, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert not got[0][:, :P].any()


def test_what_runs_fused():
    module = pyramid()
    assert [path.fused for path in lifeops.explain(module)] == [True] * 4
    module.levels[1].conv.register_forward_hook(lambda *_: None)
    assert [path.fused for path in lifeops.explain(module)] == [True, False, True, True]
    module.levels[0].conv = torch.nn.Upsample(scale_factor=2)  # whatever makes maps of maps
    assert module(tokens((4, 6)), (4, 6))[0].shape == (3, 8, 8, 12)


def test_grid_of_its_own_and_empty_batch():
    module, x = pyramid(grid=(4, 6)), tokens((4, 6))
    for own, given in zip(module(x), module(x, (4, 6)), strict=True):
        assert torch.equal(own, given)
    assert [tuple(m.shape) for m in module(x[:0])] == [(0, 8, 16, 24), (0, 8, 8, 12), (0, 8, 4, 6), (0, 8, 2, 3)]


class Highest(torch.nn.Module):
    """The pyramid as a module of one output, at its own grid."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.pyramid = pyramid(grid=(4, 6)).to(dtype)

    def forward(self, x, grid=None):
        return torch.cat([m.flatten(1) for m in self.pyramid(x)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    system_checks.low_precision(Highest(torch.float64), tokens((4, 6)), (4, 6), dtype)


def test_autocast():
    module = Highest()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(tokens((4, 6)).float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(tokens((4, 6)).float()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("check", [system_checks.compiled, system_checks.exported, system_checks.traced])
def test_compilers(check):
    check(Highest(), tokens((4, 6)).float())


def test_gradients_of_each_image():
    system_checks.gradients_of_each_image(Highest(torch.float64), tokens((4, 6)), 1e-9)


def test_torch_jit_script_is_refused():
    with pytest.raises(RuntimeError, match=r"TokenPyramid cannot be compiled by torch.jit.script; use torch.jit.trace"):
        torch.jit.script(pyramid())


def test_cost():
    """Per image: products of the patches and of each map's places, and K * K for each place of a convolution."""
    module, x = pyramid(0, grid=(4, 6)).float(), tokens((4, 6), 0, 1).float()
    places = [24 * 16, 24 * 4, 24, 6]
    convs = 24 * 16 * 8, 24 * 4 * 8, 24 * 9 * 8, 6 * 9 * 8  # a transposed one's taps are those of its input
    expected = 4 * 24 * 12 * 8 + sum(convs) + sum(n * 8 * 8 for n in places)
    assert count_macs(lambda: module(x)) == expected


def test_state_dict_and_copies():
    module, x = pyramid(grid=(4, 6)), tokens((4, 6))
    other = TokenPyramid(12, 8, 2, grid=(4, 6)).double()
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module)):
        assert all(torch.equal(a, b) for a, b in zip(twin(x), module(x), strict=True))
    assert "num_prefix_tokens=2, patch_size=16, strides=(4, 8, 16, 32)" in repr(module)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenPyramid(12, strides=(4, 12)), "strides must divide patch_size 16 or be multiples of it, got 12"),
        (lambda: TokenPyramid(12, strides=(8, 4)), r"strides must increase, got \(8, 4\)"),
        (lambda: TokenPyramid(12, strides=(8, 8)), r"strides must increase, got \(8, 8\)"),
        (lambda: TokenPyramid(12, strides=()), r"strides must be one or more ints in a tuple or list, got \(\)"),
        (lambda: TokenPyramid(12, 0), "out_dim must be at least 1, got 0"),
        (lambda: TokenPyramid(12)(torch.randn(1, 0, 12), (0, 4)), r"grid must have patches, got \(0, 4\)"),
        (lambda: TokenPyramid(12, 8, 1)(torch.randn(1, 24, 12), (4, 6)), r"x.shape\[1\] must be P \+ H\*W = 1 \+ 4\*6 = 25, got 24"),
        (lambda: TokenPyramid(12)(torch.randn(1, 24, 12)), "the grid is unknown"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"TokenPyramid: {message}"):
        call()
