"""Heads that pool the tokens by attention: the weights they give to each token, read from the pass and checked against what they pooled."""

from __future__ import annotations

from torch import Tensor, nn

from lifeops import torchlib
from lifeops.hosts.attention import arguments
from lifeops.hosts.heads import Heads
from lifeops.hosts.pooling import LOOKED_FOR, Pooling, averages, poolings
from lifeops.integrations.attention_check import attended_by, off, some_images
from lifeops.ops.channel.act import accumulate_dtype


class PoolHead:
    """One pooling head; ``hooks`` note one run."""

    def __init__(self, path: str, module: nn.Module, kind: Pooling):
        self.path, self.module, self.kind = path, module, kind
        self.x: Tensor | None = None
        self.mask: Tensor | None = None
        self.pooled: Tensor | None = None

    def hooks(self) -> list:
        point = getattr(self.module, self.kind.point)
        masked = self.module.get_submodule(self.kind.masked)
        if self.kind.gives:
            noted = point.register_forward_hook(lambda module, args, output: setattr(self, "pooled", output[0]))
        else:
            noted = point.register_forward_pre_hook(lambda module, args: setattr(self, "pooled", args[0]))
        mask = masked.register_forward_pre_hook(self._masked, with_kwargs=True)
        return [self.module.register_forward_pre_hook(self._enter, with_kwargs=True), mask, noted]

    def _enter(self, module, args, kwargs) -> None:
        beside = [name for name, a in arguments(module, args, kwargs).items() if isinstance(a, Tensor) and name != self.kind.mask]
        if beside or not args or args[0].dim() != 3:
            found = f"with {', '.join(beside)} beside" if beside else "otherwise than with"
            raise ValueError(f"rollout: {self.path} was called {found} tokens (B, N, C), which is not known of a pooling head")
        self.x = args[0]

    def _masked(self, module, args, kwargs) -> None:
        self.mask = arguments(module, args, kwargs).get("attn_mask")

    def _heads(self, images: slice | list[int]) -> Heads:
        mask, x = self.mask, self.x
        if mask is not None and mask.dim() == 3:  # as nn.MultiheadAttention takes it
            mask = mask.unflatten(0, (len(x), -1))
        if mask is not None and len(mask) == len(x):
            mask = mask[images]
        return self.kind.read(self.module, x[images], mask)

    def weights(self, verify: bool) -> Tensor:
        """(B, 1, N') of the N' tokens it was given: the mean over its heads, over its queries where it averages them."""
        if self.x is None:
            raise ValueError(f"rollout: {self.path}, the pooling head, has not run")
        if verify:
            self._check()
        heads = self._heads(slice(None))
        with torchlib.without_autocast(self.x):
            weights = heads.weights(heads.scores(slice(None))).mean(1).to(accumulate_dtype(self.x.dtype))
        return weights.mean(1, keepdim=True) if averages(self.module) else weights[:, :1]

    def _check(self) -> None:
        images = some_images(len(self.x))
        rows = attended_by(self._heads(images), images)
        if self.pooled is None:
            raise ValueError(f"rollout: {self.path} is {type(self.module).__name__}, whose {self.kind.point} has not run")
        real = self.pooled if self.pooled.dim() == 3 else self.pooled[:, None]
        if not images:
            return
        found = off(rows.of(real), self.kind.projected(self.module, rows.values.to(self.x.dtype)))
        if found > rows.tolerance:
            what = f"{self.path} is {type(self.module).__name__}, which does not pool by softmax(scale q kᵀ) v of its tokens"
            raise ValueError(f"rollout: {what}: it is off by {found:.2g} of its largest entry")


def pool_heads(model: nn.Module) -> list[PoolHead]:
    return [PoolHead(*found) for found in poolings(model)]


def one_pool_head(model: nn.Module) -> PoolHead:
    """ValueError if the model has none, or several."""
    found = pool_heads(model)
    if len(found) != 1:
        raise ValueError(f"rollout: {type(model).__name__} has {len(found)} pooling heads for targets='pool'; looked for {LOOKED_FOR}")
    return found[0]


def over_tokens(weights: Tensor, prefix: int, patches: int, path: str) -> Tensor:
    """Weights of the patches alone or of all tokens to those of all tokens."""
    if weights.shape[-1] == patches:
        return nn.functional.pad(weights, (prefix, 0))
    if weights.shape[-1] != prefix + patches:
        raise ValueError(f"rollout: {path} pools {weights.shape[-1]} tokens, looked for {patches} or {prefix + patches}")
    return weights
