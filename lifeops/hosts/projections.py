"""The layers of an attention that make q, k and v, and what it calls its heads and its output, in timm and transformers."""

from __future__ import annotations

from torch import Tensor, nn

PROJ = ("proj", "o_proj", "out_proj")
"""What the output projection is called."""
SEPARATE = ("q_proj", "k_proj", "v_proj")
BIASES = ("q_bias", "k_bias", "v_bias")  # added to a joint projection without one (BEiT)


def heads_of(attn: nn.Module) -> int | None:
    return next((getattr(attn, n) for n in ("num_heads", "num_attention_heads") if getattr(attn, n, None) is not None), None)


def projections(attn: nn.Module) -> list[tuple[str, nn.Module]]:
    """By name the layers that make q, k and v, one or three; empty if there are no such."""
    names = ("qkv",) if getattr(attn, "qkv", None) is not None else SEPARATE
    found = [(name, getattr(attn, name, None)) for name in names]
    return found if all(isinstance(layer, nn.Module) for _, layer in found) else []


def thirds(attn: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v (B, N, C) of the joint projection ``qkv`` of the tokens x (B, N, C)."""
    biases = (getattr(attn, name, None) for name in BIASES)
    return tuple(t if bias is None else t + bias.to(t.dtype) for t, bias in zip(attn.qkv(x).chunk(3, -1), biases, strict=True))


def projected(attn: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v (B, N, C) for the tokens x (B, N, C), before norms and positions."""
    layers = projections(attn)
    return thirds(attn, x) if len(layers) == 1 else tuple(layer(x) for _, layer in layers)
