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
    """What each of the host's modules does, and what a converted model needs of it."""
    return [_words(path, host.trunk.get_submodule(path)) for path in host.picks]


def _words(path: str, module: nn.Module) -> str:
    if not hasattr(module, _MASKING):
        return f"{path} ({type(module).__name__}) leaves out {getattr(module, _DROPOUT)} of them in training; converted models need all"
    ratio = getattr(module.config, _RATIO)
    told = f"{path} ({type(module).__name__}) shuffles them and leaves out {ratio} of them (config.{_RATIO})"
    return f"{told}; converted models need all, config.{_RATIO} = 0, and put them in order"


def in_order(module: nn.Module, args: tuple, output):
    """A hook on one of :attr:`Host.picks`: what it gives, all patches in the order of the grid. ValueError where some are left out."""
    if hasattr(module, _MASKING):
        return _unshuffled(module, *output)
    if module.training and getattr(module, _DROPOUT) > 0:
        raise ValueError(
            f"convert: {type(module).__name__} leaves out patches in training ({_DROPOUT}={getattr(module, _DROPOUT)}); a converted model"
            f" needs them all on their grid: turn patch dropout off, model.patch_drop.{_DROPOUT} = 0"
        )
    return output


def _unshuffled(module: nn.Module, tokens: Tensor, mask: Tensor, ids_restore: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens (B, P + N, C) of all N patches, of which patch n is token P + ids_restore[:, n], with patch n as token P + n."""
    B, N = ids_restore.shape
    P = module.cls_token.shape[1]
    kept = tokens.shape[1] - P
    if kept != N:
        raise ValueError(
            f"convert: {type(module).__name__} gives {kept} of {N} patches, the others are masked; a converted model needs them all on"
            f" their grid: set model.config.{_RATIO} = 0 (it is {getattr(module.config, _RATIO)})"
        )
    patches = tokens[:, P:].gather(1, ids_restore[..., None].expand(-1, -1, tokens.shape[2]))
    ordered = torch.arange(N, device=ids_restore.device).expand(B, -1)
    return torch.cat((tokens[:, :P], patches), 1), mask, ordered


@contextlib.contextmanager
def all_patches(host: Host) -> Iterator[None]:
    """Inside the ``with`` the blocks of the host, in evaluation mode, are given all patches in the order of the grid."""
    modules = [host.trunk.get_submodule(path) for path in host.picks]
    configs = [(m.config, getattr(m.config, _RATIO)) for m in modules if hasattr(m, _MASKING)]
    handles = [m.register_forward_hook(in_order) for m in modules]
    try:
        for config, _ in configs:
            setattr(config, _RATIO, 0.0)
        yield
    finally:
        for config, ratio in configs:
            setattr(config, _RATIO, ratio)
        for handle in handles:
            handle.remove()
