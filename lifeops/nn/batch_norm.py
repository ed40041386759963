"""What nn.BatchNorm2d and nn.SyncBatchNorm keep and share, for modules that compute the statistics themselves; and ``fuse_``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from lifeops.arguments import check_module
from lifeops.nn.plain import Rule, why_not
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.channel.batch_norm import affine_of
from lifeops.ops.channel.norm_function import Config, TokenBatchNorm
from lifeops.ops.token_dwconv.act_function import ChannelAct, activated

_FOLD = "fold_batch_norms_"

M = TypeVar("M", bound=nn.Module)


def on_batch(norm: nn.Module) -> bool:
    """The norm takes its statistics from the batch: in training mode, or without running ones. What ``fuse_`` leaves of one never does."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and (norm.training or norm.running_mean is None)


def check_patches(op: str, layers: Iterable[nn.Module], x: torch.Tensor, grid: tuple[int, int]) -> None:
    """Raise ValueError where a batch norm among ``layers`` would take its statistics from a grid without patches."""
    if 0 in grid and any(map(on_batch, layers)):
        raise ValueError(f"{op}: expected more than 1 value per channel when training, got {tuple(x.shape)}, no patches")


def sync_group(norm: nn.Module):
    """The process group a SyncBatchNorm shares its batch statistics in, or None."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or not torch.distributed.is_initialized():
        return None
    group = norm.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def _recomputing() -> bool:
    """Inside a backward pass: activation checkpointing runs the forward pass, whose statistics were kept before, again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def update_running(norm: nn.Module, mean: torch.Tensor, unbiased_var: torch.Tensor) -> None:
    """What nn.BatchNorm2d does after a training step; neither tensor has a gradient.

    Unlike nn.BatchNorm2d's, the statistics of a step count once where activation checkpointing runs the forward pass twice.
    """
    update_running_all([(norm, mean, unbiased_var)])


def update_running_all(steps: Sequence[tuple[nn.Module, torch.Tensor, torch.Tensor]]) -> None:
    """The same for several norms at once, a launch for all statistics of one momentum and one for the counts."""
    steps = [step for step in steps if step[0].training and step[0].track_running_stats]
    if not steps or _recomputing():
        return
    tracked, new = [norm.num_batches_tracked for norm, _, _ in steps], {}
    _at_once(torch._foreach_add_, [t for t in tracked if t is not None], 1)
    for (norm, *found), count in zip(steps, tracked, strict=True):
        running = norm.running_mean, norm.running_var
        if running[0] is None:
            continue
        momentum = norm.momentum
        if momentum is None:
            momentum = 0.0 if count is None else 1.0 / count.item()
        old, latest = new.setdefault(momentum, ([], []))
        old += running
        latest += [t.to(r.dtype) for t, r in zip(found, running, strict=True)]
    for momentum, (old, latest) in new.items():
        _at_once(torch._foreach_lerp_, old, latest, momentum)


def _at_once(function, tensors: list[torch.Tensor], *others) -> None:
    """``function`` on lists; where a tensor is there twice, as one norm's in two places, its steps come one after another."""
    if len({id(t) for t in tensors}) == len(tensors):
        return function(tensors, *others) if tensors else None
    for i, t in enumerate(tensors):
        function([t], *(o[i : i + 1] if isinstance(o, list) else o for o in others))


def constants(norm: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift) of a norm with running statistics, computed in ``dtype``: scale * x + shift."""
    return affine_of(norm.running_mean.to(dtype), norm.running_var.to(dtype), norm.weight, norm.bias, norm.eps)[:2]


def normalise(op: str, norm: nn.Module, x: torch.Tensor, patches: int, backend: str) -> torch.Tensor:
    """A plain ``norm``, or the ``nn.Identity`` that is left of one, on the last ``patches`` rows of x (B, P + patches, C).

    Running statistics follow as nn.BatchNorm2d's would. Raises ValueError for a training batch of one value per channel.
    """
    if isinstance(norm, nn.Identity):
        return x
    if not on_batch(norm):
        scale, shift = constants(norm, accumulate_dtype(x.dtype))
        return activated(x, ChannelAct(scale, shift), x.shape[1] - patches, backend)
    group = sync_group(norm)
    if x.shape[0] * patches < 2 and group is None:
        raise ValueError(f"{op}: expected more than 1 value per channel when training, got {x.shape[0]} x {patches} patches")
    y, mean, unbiased_var = TokenBatchNorm.apply(Config(patches, norm.eps, group, backend), x, norm.weight, norm.bias)
    update_running(norm, mean, unbiased_var)
    return y


@torch.no_grad()
def folded(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """``conv`` with the constant ``norm`` behind it folded in; computed in float64."""
    scale, shift = constants(norm, torch.float64)
    new = copy.deepcopy(conv)
    new.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    new.bias = nn.Parameter((shift if conv.bias is None else shift + conv.bias.double() * scale).to(conv.weight.dtype))
    return new


@torch.no_grad()
def folded_into(norm: nn.Module, layer: nn.Module) -> nn.Module:
    """``layer``, dense or a 1x1 convolution, with the constant ``norm`` in front of it folded in; computed in float64."""
    scale, shift = constants(norm, torch.float64)
    new, weight = copy.deepcopy(layer), layer.weight.double().flatten(1)
    new.weight.copy_((weight * scale).view_as(layer.weight))
    bias = weight @ shift
    new.bias = nn.Parameter((bias if layer.bias is None else bias + layer.bias.double()).to(layer.weight.dtype))
    return new


def check_constant(name: str, norm: nn.Module) -> None:
    """Raise unless the batch norm ``name`` can be folded."""
    if on_batch(norm):
        raise ValueError(f"fuse_: {name} takes its statistics from the batch: call .eval() first, with track_running_stats=True")


def check_readable(name: str, layer: nn.Module, rule: Rule) -> None:
    """Raise unless ``layer`` computes with the parameters that folding reads."""
    wrong = why_not(layer, rule)
    if wrong:
        raise ValueError(f"fuse_: {name} cannot be folded: {'; '.join(wrong)} (merge adapters, remove parametrizations and hooks first)")


def fuse_(module: M) -> M:
    """Fold the batch norms of lifeops' modules in ``module`` into their convolutions, in place, for inference; returns ``module``,
    as it is where it holds none.

    The same outputs to rounding: everything is folded in float64. The state dict changes.

    * :class:`lifeops.nn.LocalityFeedForward`: W' = W * gamma / sqrt(var + eps) per output channel, bias
      beta - mean * gamma / sqrt(var + eps). Batch norms become ``nn.Identity``.
    * :class:`lifeops.nn.ConvProjectionAttention`: the same of q, k and v.
    * :class:`lifeops.nn.LocalAgg` and the last norm of :func:`lifeops.models.edgevit`: into the dense layer behind, W' = W * gamma /
      sqrt(var + eps) per input channel.
    * :class:`lifeops.nn.DWShortcut` and the models of :func:`lifeops.models.dw_shortcut`: one convolution per shortcut, of the
      largest kernel size. Its batch norm comes before the zero padding, so that no constant bias can stand for it: it becomes
      a ``ChannelAffine`` (one kernel) or a ``BorderBias`` (several) of ``lifeops.nn.dw_shortcut_fold``.

    Raises ValueError in training mode, and where batch norms keep no running statistics.
    """
    check_module("fuse_", "module", module)
    found = [m for m in module.modules() if hasattr(m, _FOLD)]
    for check in (True, False):  # nothing is changed unless everything can be
        for m in found:
            getattr(m, _FOLD)(check)
    return module


class Fusible:
    """A module that :func:`fuse_` folds, under the name that timm's ``reparameterize_model`` calls on every child."""

    def fuse(self) -> nn.Module:
        """``lifeops.fuse_(self)``: in place, the same outputs; ValueError where a batch norm takes its statistics from the batch."""
        return fuse_(self)
