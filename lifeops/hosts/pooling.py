"""Heads that pool the tokens by attention: how their queries, keys and values are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from lifeops.hosts.heads import Heads, given_bias


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


class Pooling(NamedTuple):
    """``has``: the attributes it goes by; ``point``: the module that is given the joined heads or, ``gives``, gives them projected.

    ``mask``: the argument that may come beside the tokens; ``masked``: the module that is given it as ``attn_mask``, "" for the head.
    """

    has: tuple[str, ...]
    own: Callable[[nn.Module, Tensor], Heads]
    point: str
    gives: bool = False
    mask: str | None = None
    masked: str = ""

    def read(self, module: nn.Module, x: Tensor, mask: Tensor | None) -> Heads:
        """What it pools ``x`` (B, N, C) with; ``mask``: (B or 1, h or 1, n or 1, N)."""
        heads = self.own(module, x)
        if mask is None:
            return heads
        return heads._replace(bias=(given_bias(mask),))

    def projected(self, module: nn.Module, values: Tensor) -> Tensor:
        """The heads' joined outputs as ``point`` shows them."""
        return module.attention.out_proj(values) if self.gives else values


POOLINGS = (
    Pooling(("latent", "kv", "q_norm", "k_norm", "num_heads", "proj"), _read_latent, "proj", mask="attn_mask"),  # timm
    Pooling(("probe", "attention"), _read_probe, "attention", True, "attention_mask", "attention"),  # SigLIP
    Pooling(("cls_token", "k_proj", "v_proj", "output_proj", "num_heads"), _read_class_query, "output_proj"),  # AIMv2
)
LOOKED_FOR = "an attention pooling (timm's AttentionPoolLatent, SigLIP's or AIMv2's head)"


def poolings(model: nn.Module) -> Iterator[tuple[str, nn.Module, Pooling]]:
    """Every pooling head, and where it is."""
    for path, module in model.named_modules():
        kind = next((k for k in POOLINGS if all(getattr(module, name, None) is not None for name in k.has)), None)
        if kind is not None and (kind.own is not _read_probe or isinstance(module.attention, nn.MultiheadAttention)):
            yield path, module, kind


def averages(module: nn.Module) -> bool:
    """Whether the head gives the mean over its queries rather than its first."""
    return getattr(module, "pool", None) == "avg"
