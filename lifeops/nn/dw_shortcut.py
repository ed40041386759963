"""The depth-wise convolution shortcut around Transformer blocks (arXiv 2407.19394); state-dict keys are the authors'."""

from __future__ import annotations

import torch
from torch import nn

from lifeops import config, geometry, torchlib
from lifeops.arguments import check_factory, check_int, got
from lifeops.nn.batch_norm import Fusible, check_constant, check_readable, on_batch, sync_group, update_running
from lifeops.nn.dw_shortcut_fold import BorderBias, ChannelAffine, merged
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_input, check_like, check_sequence, kernel_sizes
from lifeops.nn.maps import call, to_maps, to_tokens
from lifeops.nn.plain import depthwise, exactly, is_fused, is_plain
from lifeops.nn.scripting import NotScripted
from lifeops.ops.channel import activations
from lifeops.ops.dw_shortcut.function import dw_shortcut_eval, dw_shortcut_train

NAME = "dw_shortcut"
BATCH_NORMS = nn.BatchNorm2d, nn.SyncBatchNorm
_NORM = exactly(*BATCH_NORMS, ChannelAffine, BorderBias)


# ------------------------------------------------------------------------------------------------ the functional core


def _check(op, x, block_output, convs, batchnorms, grid, num_prefix_tokens, dim):
    grid = check_input(op, x, dim, grid, num_prefix_tokens)
    check_sequence(op, "block_output", block_output)
    if block_output.shape != x.shape or block_output.device != x.device:
        expected, came = (f"{tuple(t.shape)} on {t.device}" for t in (x, block_output))
        raise ValueError(f"{op}: block_output must be like x, {expected}, got {came}")
    if not convs or len(convs) != len(batchnorms):
        raise ValueError(f"{op}: convs and batchnorms must be equally many and not none, got {len(convs)} and {len(batchnorms)}")
    check_like(op, "x", x, convs[0], any_dtype=True)
    return grid


def _fused_with_statistics(x, norm) -> bool | None:
    """Whether a fused step takes ``norm`` with the batch's statistics (True) or as a constant (False); None: the norm has to be called,
    as those of other types and, for statistics, with an empty batch, under torch.func and in programs.
    """
    if type(norm) not in BATCH_NORMS:
        return False if isinstance(norm, (ChannelAffine, BorderBias)) else None
    if not on_batch(norm):
        return False
    return True if x.numel() > 0 and not torchlib.calls_layers() else None


def _train(x, y, pairs, group, grid, P, backend):
    """The kernels whose norms take the batch's statistics, shared in one process group; updates the running statistics."""
    n = x.shape[0] * grid[0] * grid[1]
    if n < 2 and group is None:
        got = f"{tuple(x.shape)} with a {grid[0]}x{grid[1]} grid"
        raise ValueError(f"{NAME}: expected more than 1 value per channel when training, got {got}")
    kernels = [(conv.weight, conv.bias, norm.weight, norm.bias) for conv, norm in pairs]
    y, mean, var = dw_shortcut_train(x, y, kernels, [norm.eps for _, norm in pairs], grid, P, group, backend)
    for _, norm in pairs:
        update_running(norm, mean, var)
    return y


def _values(norm):
    """A constant norm as :func:`dw_shortcut_eval` takes it."""
    if isinstance(norm, ChannelAffine):
        return None, None, norm.scale, norm.shift, 0.0
    if isinstance(norm, BorderBias):
        return None, None, None, None, 0.0
    return norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps


def _constant(x, y, conv, norm, grid, P, backend):
    """One kernel whose norm is constant."""
    y = dw_shortcut_eval(x, y, conv.weight, conv.bias, _values(norm), grid, P, backend)
    if isinstance(norm, BorderBias):
        y[:, P:] += norm(grid).to(y.dtype)
    return y


def _composed(x, y, conv, norm, grid, P):
    """One kernel with the norm and the convolution called as the modules they are, on (B, C, H, W) maps."""
    maps = to_maps(activations.value(x[:, P:], "gelu"), grid)
    maps = maps.to(next((p.dtype for p in conv.parameters() if p.is_floating_point()), maps.dtype))
    border = isinstance(norm, BorderBias)  # comes after the convolution
    maps = maps if border else call("DWShortcut: batchnorms", norm, maps, _NORM)
    term = to_tokens(call("DWShortcut: convs", conv, maps, depthwise))
    term = term + norm(grid) if border else term
    return torch.cat((y[:, :P], y[:, P:] + term.to(y.dtype)), 1)


def _sum(x, y, convs, batchnorms, grid, P, backend, fused):
    """The kernels one after another, those with the batch's statistics at once for each process group."""
    trained = {}
    for conv, norm in zip(convs, batchnorms, strict=True):
        plain = fused or (is_plain(conv, depthwise) and is_plain(norm, _NORM))
        statistics = _fused_with_statistics(x, norm) if plain else None
        if statistics is None:
            y = _composed(x, y, conv, norm, grid, P)
        elif statistics:
            trained.setdefault(sync_group(norm), []).append((conv, norm))
        else:
            y = _constant(x, y, conv, norm, grid, P, backend)
    for group, pairs in trained.items():
        y = _train(x, y, pairs, group, grid, P, backend)
    return y


def dw_shortcut(x, block_output, convs, batchnorms, grid, num_prefix_tokens, backend=None, *, fused=False, op=NAME, dim=None):
    """block_output + [0 for the prefix tokens | sum_k conv_k(batchnorm_k(GELU(x_patch)))].

    The convolutions zero-pad what the batch norms give. Training: the statistics of GELU(x_patch), the same for all kernels, are
    computed once, and every norm's running statistics follow as :class:`torch.nn.BatchNorm2d`'s would. Norms in evaluation mode
    (also single ones) are constants. A convolution or norm that is not plainly the layer that this computes (another type, hooks,
    reflected padding, adapters) is called with its partner on (B, C, H, W) maps.

    Args:
        x: (B, P + H*W, C), the input of the block(s). block_output: what came out, same shape; x is read in its dtype.
        convs: depth-wise nn.Conv2d, odd kernels, same padding. batchnorms: one for each.
        grid, num_prefix_tokens: (H, W), P. backend: as in :func:`lifeops.token_dwconv`.
        fused: the caller knows that all of them are plain. op: who complains. dim: C, if it is known.

    Returns the sum with block_output's dtype, under autocast too: reading and writing is all this costs, a cast would cost more.

    Raises ValueError for shapes that do not fit and for a training batch of one value per channel.
    """
    grid = _check(op, x, block_output, convs, batchnorms, grid, num_prefix_tokens, dim)
    backend = config.requested_backend(NAME, backend)
    y, P = block_output, num_prefix_tokens
    with torchlib.without_autocast(x):
        return _sum(x.to(y.dtype), y, convs, batchnorms, grid, P, backend, fused)


# ------------------------------------------------------------------------------------------------ modules


class ShortcutModule(Fusible, NotScripted, nn.Module):
    """Holds ``convs`` and ``batchnorms`` of ``count`` shortcuts, those of one shortcut's parallel kernels side by side."""

    def __init__(self, dim: int, count: int, kernel_size: int | tuple[int, ...], **dd):
        super().__init__()
        sizes = kernel_sizes("DWShortcut", "kernel_size", kernel_size) * count
        self.count = count
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, **dd) for k in sizes)
        self.batchnorms = nn.ModuleList(nn.BatchNorm2d(dim, **dd) for _ in sizes)

    def kernels(self, i: int) -> tuple[list[nn.Module], list[nn.Module]]:
        """The convolutions and the batch norms of shortcut ``i``."""
        convs, norms = ([*self._modules[name]._modules.values()] for name in ("convs", "batchnorms"))  # asked at every call
        n = len(convs) // self.count
        if len(convs) != n * self.count or len(norms) != len(convs):
            got = f"{len(convs)} and {len(norms)}"
            raise ValueError(f"{type(self).__name__}: convs and batchnorms must be as many for each of {self.count} shortcuts, got {got}")
        return convs[i * n : (i + 1) * n], norms[i * n : (i + 1) * n]

    def fused_layers(self):
        kinds = ("convs", depthwise), ("batchnorms", _NORM)
        return [(f"{name}.{j}", rule) for name, rule in kinds for j in range(len(self.convs))]

    def add_shortcut(self, i: int, x, block_output, grid: tuple[int, int], num_prefix_tokens: int, **options) -> torch.Tensor:
        """``block_output`` with shortcut ``i`` of ``x`` added. ``options``: ``op`` and ``dim`` of :func:`dw_shortcut`."""
        return dw_shortcut(x, block_output, *self.kernels(i), grid, num_prefix_tokens, fused=is_fused(self), **options)

    def fold_batch_norms_(self, check: bool) -> None:
        """Merge each shortcut's kernels and norms into one of each, or only ``check`` that it can be done."""
        new = []
        for i in range(self.count):
            convs, norms = self.kernels(i)
            if isinstance(norms[0], (ChannelAffine, BorderBias)):
                new.append((convs[0], norms[0]))
                continue
            for j, norm in enumerate(norms, i * len(norms)):
                if type(norm) not in BATCH_NORMS:
                    raise ValueError(f"fuse_: batchnorms.{j} must be a BatchNorm2d or SyncBatchNorm, got {type(norm).__name__}")
                check_constant(f"batchnorms.{j}", norm)
                check_readable(f"batchnorms.{j}", norm, exactly(*BATCH_NORMS))
                if len(convs) > 1:
                    check_readable(f"convs.{j}", convs[j - i * len(norms)], depthwise)
            new.append(None if check else merged(convs, norms))
        if new and not check:
            self.convs, self.batchnorms = (nn.ModuleList(column) for column in zip(*new, strict=True))


class DWShortcut(ShortcutModule):
    """block_output + [0 for the prefix tokens | sum over the kernels of DW_K(BN_K(GELU(x_patch))) + b_K].

    x is what went into a Transformer block, or into several, and block_output what came out of the last. (K² + 3) C parameters per
    kernel. See :func:`dw_shortcut` for batch statistics, dtypes and errors.

    Args:
        dim: C. kernel_size: K, odd, or several: parallel convolutions with a batch norm each.
        num_prefix_tokens: P >= 0; their rows of block_output pass untouched.
        grid: (H, W) for every call, or None: then ``forward`` must be given it.
    """

    needs_grid = True

    def __init__(
        self, dim: int, kernel_size: int | tuple[int, ...] = 3, num_prefix_tokens: int = 1, *, grid: tuple[int, int] | None = None,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        dim, num_prefix_tokens = check_int("DWShortcut", "dim", dim, 1), check_int("DWShortcut", "num_prefix_tokens", num_prefix_tokens, 0)
        grid = geometry.fixed_grid("DWShortcut", grid, num_prefix_tokens)
        super().__init__(dim, 1, kernel_size, **check_factory("DWShortcut", device, dtype))
        self.dim, self.num_prefix_tokens = dim, num_prefix_tokens
        self.grid_holder = GridHolder(grid)

    def forward(self, x: torch.Tensor, block_output: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """x, block_output (B, P + H*W, C), grid (H, W) -> (B, P + H*W, C)."""
        grid = self.grid_holder.of("DWShortcut", grid)
        return self.add_shortcut(0, x, block_output, grid, self.num_prefix_tokens, op="DWShortcut", dim=self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_prefix_tokens={self.num_prefix_tokens}"


def check_every(op: str, every: int, depth: int) -> None:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1 or depth % every:
        raise ValueError(f"{op}: every must be a positive int that divides the {depth} blocks, got {got(every)}")
