"""What :func:`lifeops.rollout` needs of one forward pass of a host beside its layers: the patch grid, the last tokens, the pooling."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lifeops.arguments import check_floating, got, is_dense
from lifeops.attention_maps.pool_heads import PoolHead
from lifeops.hosts.classifier import classifiers, final_norm, pooled_norm
from lifeops.hosts.find import find_host
from lifeops.hosts.host import Host
from lifeops.hosts.packed import Packed, packed_of
from lifeops.hosts.patch_order import in_order
from lifeops.integrations.pass_watch import POOLED, Watch
from lifeops.integrations.token_place import tokens_of
from lifeops.nn.embedded_grid import embedded_grid
from lifeops.nn.inputs import check_like


class HostPass:
    """``prefix``: how many tokens the first layer reads before the patches. ``pools``: the pooling heads that are watched."""

    def __init__(self, model: nn.Module, host: Host, images: Tensor | Packed, prefix: int, pools: list[PoolHead]):
        self.model, self.host, self.prefix, self.pools = model, host, prefix, pools
        self.packed = images if isinstance(images, Packed) else None
        self.batch = len(images.patches if isinstance(images, Packed) else images)
        self.embedded: tuple[int, int] | None = None if self.packed is None else (1, self.packed.patches.shape[1])
        self.features: Tensor | None = None
        self.watch: Watch | None = None

    def follow_pools(self, watch: Watch | None) -> Watch | None:
        """What the pass is to be watched by: where it is not anyhow, only if the default depends on what its output is made of."""
        self.watch = Watch({}, set()) if watch is None and self.pools else watch
        return self.watch

    def reads(self, pool: PoolHead, output) -> bool:
        """Whether the model's ``output`` depends on what ``pool`` gave."""
        return pool.x is not None and any(POOLED in self.watch.marks(t) for t in tree_leaves(output) if isinstance(t, Tensor))

    @property
    def has_cls(self) -> bool:
        return (self.host.has_cls and self.prefix > 0) or self.host.late_cls

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the patches of the forward pass; packed ones, of several grids, lie in one row."""
        if self.embedded is None:
            name = type(self.host.teller).__name__
            raise ValueError(f"rollout: {name}, the patch embedding of {type(self.host.trunk).__name__}, has not run")
        return self.embedded

    def token_logits(self, prefix: int) -> Tensor:
        """(B, H*W, K): the model's classifiers on its last tokens behind ``prefix``, their mean where there are two (DeiT)."""
        x, norm = self.features, pooled_norm(self.host)
        x = x.flatten(1, 2) if x.dim() == 4 else x[:, prefix:]
        x = x if norm is None else norm(x)
        heads = classifiers(self.model, self.host)
        wrong = [h for h in heads if h.in_features != x.shape[-1]]
        if not heads or wrong:
            why = "it has no linear classifier"
            why = f"its classifier reads {wrong[0].in_features} features, a token has {x.shape[-1]}" if wrong else why
            raise ValueError(f"rollout: {type(self.model).__name__} cannot classify its tokens one by one: {why}; give token_logits=…")
        return torch.stack([head(x) for head in heads]).mean(0)

    @contextlib.contextmanager
    def watched(self, features: bool) -> Iterator[None]:
        """Notes the grid of the forward pass and, if asked for, the last tokens; patches that the model shuffles are put in order."""
        handles = [self.host.embed.register_forward_pre_hook(_check_embedded)]
        handles += [] if self.packed is not None else [self.host.teller.register_forward_hook(self._embedded)]
        handles += [module.register_forward_hook(functools.partial(in_order, op="rollout")) for module in self.host.pickers]
        for pool in self.pools:
            handles += [*pool.hooks(), pool.module.register_forward_hook(self._pooled)]
        if features:
            handles.append(self._norm().register_forward_hook(lambda module, args, output: setattr(self, "features", output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _embedded(self, module, args, output) -> None:
        self.embedded = embedded_grid(module, args, output)

    def _pooled(self, module, args, output) -> None:
        self.watch.mark(tokens_of(output), {POOLED})

    def _norm(self) -> nn.Module:
        norm = final_norm(self.host)
        if norm is None:
            found = f"{type(self.host.trunk).__name__} has no final norm whose tokens could be classified"
            raise ValueError(f"rollout: {found}; give token_logits=…")
        return norm


def pass_of(model: nn.Module, images, num_prefix_tokens: int | None, pools: list[PoolHead]) -> HostPass:
    """Raises ValueError if ``model`` is no known host, or without images."""
    packed = packed_of("rollout", images)
    images = images.get("pixel_values") if isinstance(images, Mapping) else images
    if packed is None and (not is_dense(images) or images.dim() != 4):
        expected = "dense (B, channels, height, width), a mapping with such pixel_values, or packed patches"
        raise ValueError(f"rollout: images must be {expected}, got {got(images)}")
    host = find_host("rollout", model, blocks=False)
    prefix = (host.prefix or 0) if num_prefix_tokens is None else num_prefix_tokens
    return HostPass(model, host, images if packed is None else packed, prefix, pools)


def _check_embedded(embed: nn.Module, args: tuple) -> None:
    """What reaches the patch embedding: a model may have made floats of its images before."""
    x = args[0] if args else None
    if isinstance(x, Tensor):
        check_floating("rollout", "images", x)
        check_like("rollout", "images", x, getattr(embed, "proj", None))
