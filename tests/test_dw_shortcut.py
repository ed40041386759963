"""The DW shortcut: the authors' computation, batch norm's behaviour, dtypes, the merge for inference, wrap, bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lifeops
from lifeops.models.deit import Attention, Block, DropPath
from lifeops.nn import DWShortcut, wrap
from lifeops.nn.dw_shortcut import dw_shortcut
from lifeops.nn.dw_shortcut_fold import BorderBias, ChannelAffine
from lifeops.nn.eager_dw_shortcut import EagerDWShortcut
from test_localvit import BACKENDS, _close, _randomised

GRID = 3, 5
KERNELS = [3, (3, 5), (3, 5, 7)]


def _problem(kernel_size=3, P=1, dim=5, B=3, dtype=torch.float64, **options):
    """A module with statistics that a fresh one does not have, x and a block's output."""
    torch.manual_seed(0)
    module = _randomised(DWShortcut(dim, kernel_size, P, **options).double()).to(dtype)
    return module, *(torch.randn(B, P + GRID[0] * GRID[1], dim, dtype=torch.float64).to(dtype) for _ in range(2))


def _eager(module):
    """The authors' module with the same weights and mode."""
    sizes = tuple(conv.kernel_size[0] for conv in module.convs)
    eager = EagerDWShortcut(module.dim, sizes, module.num_prefix_tokens).to(module.convs[0].weight.dtype)
    eager.batchnorms = copy.deepcopy(module.batchnorms)  # with their options and modes
    eager.load_state_dict(module.state_dict(), strict=True)
    return eager


def _step(module, x, out, g):
    """(output, input gradients, parameter gradients, state after the step)."""
    x, out = x.clone().requires_grad_(), out.clone().requires_grad_()
    y = module(x, out, GRID)
    return y, *torch.autograd.grad(y, [x, out, *module.parameters()], g), *module.state_dict().values()


def _same(module, eager, x, out, atol=1e-11):
    g = torch.randn_like(x)
    for ours, theirs in zip(_step(module, x, out, g), _step(eager, x, out, g), strict=True):
        _close(ours, theirs, atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("P", [0, 1, 3])
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_the_authors_computation(kernel_size, P, training, backend):
    """Outputs, all gradients and running statistics, one kernel or several, any prefix, a grid that is not square, five channels."""
    module, x, out = _problem(kernel_size, P)
    module.train(training)
    with lifeops.use_backend(backend):
        _same(module, _eager(module), x, out)
        with torch.no_grad():
            _close(module(x, out, GRID), _eager(module)(x, out, GRID), 1e-11)


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 0.1}, {"affine": False}])
@pytest.mark.parametrize("frozen", [(), (0, 1), (1,)])
def test_batch_norm_options(options, frozen):
    """Momentum, cumulative average, no running statistics, no affine, frozen norms: three steps and an evaluation."""
    module, x, out = _problem((3, 5))
    module.batchnorms = nn.ModuleList(nn.BatchNorm2d(5, **options).double() for _ in range(2))
    eager = _eager(module)
    for m in (module, eager):
        for index in frozen:
            m.batchnorms[index].eval()
    for i in range(3):
        _same(module, eager, x + i, out)
    _same(module.eval(), eager.eval(), x, out)


def test_evaluation_before_any_step():
    module = DWShortcut(5).double().eval()
    _, x, out = _problem()
    _same(module, _eager(module), x, out)


def test_other_norms_are_called_as_they_are():
    """A norm of another type works, if slowly; so does an empty batch."""

    class Doubled(nn.Module):
        def forward(self, maps):
            return 2 * maps

    module, x, out = _problem((3, 5))
    module.batchnorms[0] = Doubled()
    y = module(x, out, GRID)
    module.batchnorms[0] = ChannelAffine(torch.full((5,), 2.0).double(), torch.zeros(5).double())
    _close(y, module(x, out, GRID), 1e-11)
    assert module.train()(x[:0], out[:0], GRID).shape == (0, 16, 5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_low(dtype, training):
    """A bf16 model stays bf16, prefix rows bit for bit; the authors' zeros promote it to fp32, where its next block fails."""
    module, x, out = _problem((3, 5), P=2, dtype=dtype)
    module.train(training)
    y = module(x, out, GRID)
    assert y.dtype == dtype
    assert torch.equal(y[:, :2], out[:, :2])
    assert _eager(module)(x, out, GRID).dtype == torch.float32
    wide, *_ = _problem((3, 5), P=2)
    expected = wide.train(training)(x.double(), out.double(), GRID)
    assert (y.double() - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_leaves_the_residual_stream_alone(dtype, training):
    module, x, out = _problem(P=2, dtype=dtype)
    module.train(training)
    x, out = x.requires_grad_(), out.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, out, GRID)
    assert y.dtype == dtype
    assert torch.equal(y[:, :2], out[:, :2])
    assert torch.equal(y, copy.deepcopy(module).train(training)(x, out, GRID))
    y.sum().backward()
    assert {t.grad.dtype for t in (x, out, *module.parameters())} == {dtype}


def test_x_is_read_in_the_outputs_dtype():
    module, x, out = _problem(dtype=torch.float32)
    y = module.eval()(x.bfloat16(), out, GRID)
    assert y.dtype == torch.float32
    assert torch.equal(y, module(x.bfloat16().float(), out, GRID))


def test_statistics_are_computed_once(monkeypatch):
    """Three kernels in training mode: one training call with all of them; identical running statistics afterwards."""
    from lifeops.nn import dw_shortcut as nn_dw_shortcut

    calls = []
    inner = nn_dw_shortcut.dw_shortcut_train
    monkeypatch.setattr(nn_dw_shortcut, "dw_shortcut_train", lambda *args: calls.append(len(args[2])) or inner(*args))
    module, (_, x, out) = DWShortcut(5, (3, 5, 7)).double(), _problem()
    module(x, out, GRID)
    assert calls == [3]
    for norm in module.batchnorms:
        assert torch.equal(norm.running_mean, module.batchnorms[0].running_mean)
        _close(norm.running_mean, 0.1 * F.gelu(x[:, 1:]).mean((0, 1)), 1e-12)
        assert norm.num_batches_tracked == 1


# ------------------------------------------------------------------------------------------------ the merge


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("P", [0, 2])
@pytest.mark.parametrize("kernel_size", [*KERNELS, (5, 3), (7, 7)])
def test_fuse_merges_exactly(kernel_size, P, backend):
    """One convolution of the largest size: the unmerged outputs to rounding on every grid; gradients still flow."""
    module, *_ = _problem(kernel_size, P)
    fused = lifeops.fuse_(copy.deepcopy(module.eval()))
    sizes = [kernel_size] if isinstance(kernel_size, int) else kernel_size
    assert [conv.kernel_size for conv in fused.convs] == [(max(sizes),) * 2]
    assert [type(norm) for norm in fused.batchnorms] == [ChannelAffine if len(sizes) == 1 else BorderBias]
    with lifeops.use_backend(backend):
        for H, W in (GRID, (1, 1), (2, 9), (8, 8)):
            x, out = torch.randn(2, 2, P + H * W, 5, dtype=torch.float64)
            with torch.no_grad():
                _close(fused(x, out, (H, W)), module(x, out, (H, W)), 1e-12)
            y = fused(x.requires_grad_(), out, (H, W))
            expected = torch.autograd.grad(module(x, out, (H, W)).square().sum(), x)
            _close(torch.autograd.grad(y.square().sum(), x, retain_graph=True), expected, 1e-9)
            y.sum().backward()
    assert all(p.grad is not None for p in fused.parameters())
    none = torch.randn(2, P, 5, dtype=torch.float64)
    assert torch.equal(fused(none, none, (0, 3)), none)
    again = lifeops.fuse_(copy.deepcopy(fused))
    assert torch.equal(again(x, out, (8, 8)), fused(x, out, (8, 8)))


@pytest.mark.parametrize("kernel_size", KERNELS)
def test_a_constant_bias_is_wrong_at_the_border(kernel_size):
    """What folding the batch norms into a constant bias would give: right inside, off by O(1) where taps fall outside the grid."""
    module, _, _ = _problem(kernel_size, P=0)
    module.eval()
    K = max(conv.kernel_size[0] for conv in module.convs)
    weight, bias = torch.zeros(5, 1, K, K).double(), torch.zeros(5).double()
    for conv, norm in zip(module.convs, module.batchnorms, strict=True):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        weight += F.pad(conv.weight * scale[:, None, None, None], [(K - conv.kernel_size[0]) // 2] * 4)
        bias += conv.bias + shift * conv.weight.sum((1, 2, 3))
    x, out = torch.randn(2, 2, 100, 5, dtype=torch.float64)
    naive = out + lifeops.token_dwconv(F.gelu(x), weight, bias, grid=(10, 10))
    error = (naive - module(x, out, (10, 10))).abs().unflatten(1, (10, 10))
    inside = slice(K // 2, 10 - K // 2)
    assert error[:, inside, inside].max() < 1e-12
    assert error.max() > 0.5


def test_fuse_refuses_what_it_cannot_fold():
    module, *_ = _problem((3, 5))
    with pytest.raises(ValueError, match=r"batchnorms.0 takes its statistics from the batch: call .eval\(\) first"):
        lifeops.fuse_(module)
    module.eval().batchnorms[1] = nn.BatchNorm2d(5, track_running_stats=False)
    with pytest.raises(ValueError, match=r"batchnorms.1 takes its statistics"):
        lifeops.fuse_(module)
    module.batchnorms[1] = nn.GroupNorm(1, 5)
    with pytest.raises(ValueError, match=r"batchnorms.1 must be a BatchNorm2d or SyncBatchNorm, got GroupNorm"):
        lifeops.fuse_(module)
    assert len(module.convs) == 2


# ------------------------------------------------------------------------------------------------ around blocks


def _blocks(count, dim=6, drop_path=0.0):
    torch.manual_seed(0)
    return [Block(dim, Attention(dim, 2), 2.0, 1e-6, DropPath(drop_path)) for _ in range(count)]


@pytest.mark.parametrize("kernel_size", [3, (3, 5)])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_wrap(every, kernel_size):
    """Variants 1 and 2, alone and combined: shortcuts from the input of a group to the output of its last block."""
    blocks = _blocks(6)
    wrapped = wrap(blocks, every, kernel_size=kernel_size, num_prefix_tokens=1, grid=GRID)
    assert len(wrapped) == 6 // every
    assert [b for group in wrapped for b in group.blocks] == blocks
    x = y = torch.randn(2, 16, 6)
    for group in wrapped:
        y = group(y, GRID)
    expected = x
    for i, group in enumerate(wrapped):
        start = expected
        for block in blocks[i * every : (i + 1) * every]:
            expected = block(expected, GRID)
        expected = _eager(group.shortcut)(start, expected, GRID)
    torch.testing.assert_close(y, expected)
    assert sum(p.numel() for g in wrapped for p in g.shortcut.parameters()) == {3: 72, (3, 5): 240}[kernel_size] * 6 // every


def test_wrap_follows_its_blocks():
    blocks = [b.double().eval() for b in _blocks(2)]
    wrapped = wrap(blocks, dim=6)
    assert (wrapped[0].shortcut.convs[0].weight.dtype, wrapped[0].training, wrapped[0].shortcut.training) == (torch.float64, False, False)
    with pytest.raises(ValueError, match="every must be a positive int that divides the 2 blocks, got 3"):
        wrap(blocks, 3)
    with pytest.raises(ValueError, match=r"cannot tell the width of Identity, which has no norm with a shape or with weights; pass dim="):
        wrap([nn.Identity()])


def test_drop_path_does_not_touch_the_shortcut():
    (group,) = wrap(_blocks(1, drop_path=1 - 1e-12), grid=GRID)
    x = torch.randn(2, 16, 6)
    y = group.train()(x, GRID)
    assert torch.equal(y, copy.deepcopy(group.shortcut).train()(x, x, GRID))  # the block is dropped whole, the shortcut is not
    assert (y - x)[:, 1:].abs().min(0).values.max() > 1e-3


def test_checkpointing_keeps_one_step_of_statistics():
    """Activation checkpointing runs the forward twice: the same gradients and statistics as without."""
    module, x, out = _problem((3, 5))
    twin, results = copy.deepcopy(module), []
    for m, reentrant in ((module, None), (copy.deepcopy(module), False), (copy.deepcopy(module), True)):
        leaf = x.clone().requires_grad_()
        y = m(leaf, out, GRID) if reentrant is None else torch.utils.checkpoint.checkpoint(m, leaf, out, GRID, use_reentrant=reentrant)
        y.square().sum().backward()
        results.append((y, leaf.grad, *[p.grad for p in m.parameters()], *m.state_dict().values()))
    for plain, *others in zip(*results, strict=True):
        assert all(torch.equal(plain, other) for other in others)
    assert module.batchnorms[0].num_batches_tracked == 1 + twin.batchnorms[0].num_batches_tracked


# ------------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("mode", ["train", "eval", "fused"])
def test_compiled(mode):
    torch._dynamo.reset()
    module = _problem((3, 5) if mode == "fused" else 3, dtype=torch.float32)[0].train(mode == "train")
    module = lifeops.fuse_(module) if mode == "fused" else module
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for H, W in ((3, 4), (5, 2)):
        x, out = torch.randn(2, 2, 1 + H * W, 5).requires_grad_()
        y, expected = compiled(x, out, (H, W)), twin(x, out, (H, W))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, out)), torch.autograd.grad(expected.sum(), (x, out)))
    for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["eval", "fused", "batch"])
def test_transforms(mode):
    """vmap and grad see the same; norms on the batch without running statistics too."""
    module = _problem((3, 5))[0].eval()
    if mode == "batch":
        module.batchnorms = nn.ModuleList(nn.BatchNorm2d(5, track_running_stats=False).double() for _ in range(2))
    module = lifeops.fuse_(module) if mode == "fused" else module
    x, out = torch.randn(2, 4, 2, 16, 5, dtype=torch.float64)
    mapped = torch.func.vmap(lambda a, b: module(a, b, GRID))(x, out)
    _close(mapped, torch.stack([module(a, b, GRID) for a, b in zip(x, out, strict=True)]), 1e-11)
    gradient = torch.func.grad(lambda a: module(a, out[0], GRID).square().sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    _close(gradient, torch.autograd.grad(module(leaf, out[0], GRID).square().sum(), leaf)[0], 1e-9)


def test_bad_input():
    for size in (2, 0, (3, 4), ()):
        with pytest.raises(ValueError, match="kernel_size must be an odd positive int or several of them"):
            DWShortcut(8, size)
    module = DWShortcut(8)
    x = torch.randn(2, 13, 8)
    with pytest.raises(ValueError, match=r"DWShortcut: the grid is unknown"):
        module(x, x)
    with pytest.raises(ValueError, match=r"x must have shape \(B, N, 8\), got \(2, 13, 9\)"):
        module(torch.randn(2, 13, 9), torch.randn(2, 13, 9), (3, 4))
    with pytest.raises(ValueError, match=r"x must have shape \(B, N, C\), got \(13, 8\)"):
        module(x[0], x[0], (3, 4))
    with pytest.raises(ValueError, match=r"x.shape\[1\] must be P \+ H\*W = 1 \+ 3\*4 = 13, got 12"):
        module(x[:, 1:], x[:, 1:], (3, 4))
    with pytest.raises(ValueError, match=r"block_output must be like x, \(2, 13, 8\) on cpu, got \(1, 13, 8\) on cpu"):
        module(x, x[:1], (3, 4))
    with pytest.raises(ValueError, match="equally many and not none, got 1 and 0"):
        dw_shortcut(x, x, module.convs, [], (3, 4), 1)
    with pytest.raises(ValueError, match=r"expected more than 1 value per channel when training, got \(1, 2, 8\) with a 1x1 grid"):
        module(x[:1, :2], x[:1, :2], (1, 1))
    assert module.eval()(x[:1, :2], x[:1, :2], (1, 1)).shape == (1, 2, 8)
