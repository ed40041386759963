"""Modules between a patch embedding and the blocks that leave patches out, or give them in another order: what is known of them, once.

Masked autoencoders give tokens, what is masked, and where each patch is: those of one model that keeps all patches are put in order.
Patch dropout gives fewer while it trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lifeops.hosts.host import Host

_MASKING = "random_masking"  # transformers' ViTMAE: the method of the embeddings, whose share is that of the configuration
_RATIO = "mask_ratio"
_DROPOUT = "prob"  # timm's patch_drop


def words(host: Host) -> list[str]:
    """What each of the host's modules does, and what converted models and roll-outs need of it."""
    return [_words(path, module) for path, module in zip(host.picks, host.pickers, strict=True)]


def _words(path: str, module: nn.Module) -> str:
    if not hasattr(module, _MASKING):
        return f"{path} ({type(module).__name__}) leaves out {getattr(module, _DROPOUT)} of them in training; lifeops needs all"
    ratio = getattr(module.config, _RATIO)
    told = f"{path} ({type(module).__name__}) shuffles them and leaves out {ratio} of them (config.{_RATIO})"
    return f"{told}; lifeops needs all, config.{_RATIO} = 0, and puts them in order"


def in_order(module: nn.Module, args: tuple, output, op: str = "convert"):
    """A hook on one of :attr:`Host.picks`: what it gives, all patches in the order of the grid. ValueError, in the words of ``op``, where
    some are left out.
    """
    if hasattr(module, _MASKING):
        return _unshuffled(op, module, *output)
    if module.training and getattr(module, _DROPOUT) > 0:
        raise ValueError(
            f"{op}: {type(module).__name__} leaves out patches in training ({_DROPOUT}={getattr(module, _DROPOUT)}); all are needed, on"
            f" their grid: turn patch dropout off, model.patch_drop.{_DROPOUT} = 0"
        )
    return output


def _unshuffled(op: str, module: nn.Module, tokens: Tensor, mask: Tensor, ids_restore: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens (B, P + N, C) of all N patches, of which patch n is token P + ids_restore[:, n], with patch n as token P + n."""
    B, N = ids_restore.shape
    P = module.cls_token.shape[1]
    kept = tokens.shape[1] - P
    if kept != N:
        raise ValueError(
            f"{op}: {type(module).__name__} gives {kept} of {N} patches, the others are masked; all are needed, on their grid: set"
            f" model.config.{_RATIO} = 0 (it is {getattr(module.config, _RATIO)})"
        )
    patches = tokens[:, P:].gather(1, ids_restore[..., None].expand(-1, -1, tokens.shape[2]))
    ordered = torch.arange(N, device=ids_restore.device).expand(B, -1)
    return torch.cat((tokens[:, :P], patches), 1), mask, ordered


@contextlib.contextmanager
def all_patches(host: Host) -> Iterator[None]:
    """Inside the ``with`` the blocks of the host, in evaluation mode, are given all patches in the order of the grid."""
    configs = [(m.config, getattr(m.config, _RATIO)) for m in host.pickers if hasattr(m, _MASKING)]
    handles = [m.register_forward_hook(in_order) for m in host.pickers]
    try:
        for config, _ in configs:
            setattr(config, _RATIO, 0.0)
        yield
    finally:
        for config, ratio in configs:
            setattr(config, _RATIO, ratio)
        for handle in handles:
            handle.remove()
