"""Heads that pool the tokens by attention: the weights they give to each token, read from the pass and checked against what they pooled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.hosts.heads import Heads
from lifeops.integrations.attention_check import attended_by, off, some_images
from lifeops.ops.channel.act import accumulate_dtype


def _split(t: Tensor, num_heads: int) -> Tensor:
    return t.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _read_latent(module: nn.Module, x: Tensor) -> Heads:
    x = x if module.pos_embed is None else x + module.pos_embed.to(x.dtype)
    q = _split(module.q(module.latent.expand(len(x), -1, -1)), module.num_heads)
    k, v = (_split(t, module.num_heads) for t in module.kv(x).chunk(2, -1))
    return Heads(module.q_norm(q), module.k_norm(k), v, module.scale)


def _read_probe(module: nn.Module, x: Tensor) -> Heads:
    inner = module.attention
    biases = (None,) * 3 if inner.in_proj_bias is None else inner.in_proj_bias.chunk(3)
    given = (module.probe.expand(len(x), -1, -1).to(x.dtype), x, x)
    heads = zip(given, inner.in_proj_weight.chunk(3), biases, strict=True)
    return Heads(*(_split(nn.functional.linear(*each), inner.num_heads) for each in heads), None)


def _read_class_query(module: nn.Module, x: Tensor) -> Heads:
    given = (module.cls_token.expand(len(x), -1, -1), module.k_proj(x), module.v_proj(x))
    return Heads(*(_split(t, module.num_heads) for t in given), None)


class Kind(NamedTuple):
    """``has``: the attributes it goes by; ``point``: the module that is given the joined heads or, ``gives``, gives them projected."""

    has: tuple[str, ...]
    read: Callable[[nn.Module, Tensor], Heads]
    point: str
    gives: bool = False


KINDS = (
    Kind(("latent", "kv", "q_norm", "k_norm", "num_heads", "proj"), _read_latent, "proj"),  # timm's AttentionPoolLatent
    Kind(("probe", "attention"), _read_probe, "attention", gives=True),  # SigLIP
    Kind(("cls_token", "k_proj", "v_proj", "output_proj", "num_heads"), _read_class_query, "output_proj"),  # AIMv2
)


class PoolHead:
    """One pooling head; ``hooks`` note one run."""

    def __init__(self, path: str, module: nn.Module, kind: Kind):
        self.path, self.module, self.kind = path, module, kind
        self.x: Tensor | None = None
        self.pooled: Tensor | None = None

    def hooks(self) -> list:
        def enter(module, args, kwargs):
            beside = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, Tensor)]
            if beside or not args or args[0].dim() != 3:
                raise ValueError(f"rollout: {self.path} was not called with tokens (B, N, C) alone, which is not known of a pooling head")
            self.x = args[0]

        point = getattr(self.module, self.kind.point)
        if self.kind.gives:
            noted = point.register_forward_hook(lambda module, args, output: setattr(self, "pooled", output[0]))
        else:
            noted = point.register_forward_pre_hook(lambda module, args: setattr(self, "pooled", args[0]))
        return [self.module.register_forward_pre_hook(enter, with_kwargs=True), noted]

    def weights(self, verify: bool) -> Tensor:
        """(B, 1, N') of the N' tokens it was given: the mean over its heads, over its queries where it averages them."""
        if self.x is None:
            raise ValueError(f"rollout: {self.path}, the pooling head, has not run")
        if verify:
            self._check()
        heads = self.kind.read(self.module, self.x)
        with torchlib.without_autocast(self.x):
            weights = heads.weights(heads.scores(slice(None))).mean(1).to(accumulate_dtype(self.x.dtype))
        return weights.mean(1, keepdim=True) if getattr(self.module, "pool", None) == "avg" else weights[:, :1]

    def _check(self) -> None:
        images = some_images(len(self.x))
        rows = attended_by(self.kind.read(self.module, self.x[images]), images)
        if self.pooled is None:
            raise ValueError(f"rollout: {self.path} is {type(self.module).__name__}, whose {self.kind.point} has not run")
        real = self.pooled if self.pooled.dim() == 3 else self.pooled[:, None]
        projected = self.module.attention.out_proj(rows.values.to(self.x.dtype)) if self.kind.gives else rows.values
        if not images:
            return
        found = off(rows.of(real), projected)
        if found > rows.tolerance:
            what = f"{self.path} is {type(self.module).__name__}, which does not pool by softmax(scale q kᵀ) v of its tokens"
            raise ValueError(f"rollout: {what}: it is off by {found:.2g} of its largest entry")


def pool_head(model: nn.Module) -> PoolHead:
    """The model's pooling head. ValueError if it has none, or several."""
    found = []
    for path, module in model.named_modules():
        kind = next((k for k in KINDS if all(getattr(module, name, None) is not None for name in k.has)), None)
        if kind is not None and (kind.read is not _read_probe or isinstance(module.attention, nn.MultiheadAttention)):
            found.append(PoolHead(path, module, kind))
    if len(found) != 1:
        looked_for = "an attention pooling (timm's AttentionPoolLatent, SigLIP's or AIMv2's head)"
        raise ValueError(f"rollout: {type(model).__name__} has {len(found)} pooling heads for targets='pool'; looked for {looked_for}")
    return found[0]


def over_tokens(weights: Tensor, prefix: int, patches: int, path: str) -> Tensor:
    """Weights of the patches alone or of all tokens to those of all tokens."""
    if weights.shape[-1] == patches:
        return torch.nn.functional.pad(weights, (prefix, 0))
    if weights.shape[-1] != prefix + patches:
        raise ValueError(f"rollout: {path} pools {weights.shape[-1]} tokens, looked for {patches} or {prefix + patches}")
    return weights
