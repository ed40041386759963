"""The layers of an attention that make q, k and v, and what it does with what its heads give, in timm and transformers."""

from __future__ import annotations

from torch import Tensor, nn

PROJ = ("proj", "o_proj", "out_proj")
"""What the output projection is called."""
_JOINING = (*PROJ, "attn_out_proj", "projection", "projection_layer")  # and beside an MLP, in Swin and SAM of transformers, in BEiT
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


# ------------------------------------------------------------------------------------------------ behind the heads


def joining(attn: nn.Module) -> nn.Module | None:
    """The layer that joins the heads."""
    return next((m for m in (getattr(attn, name, None) for name in _JOINING) if isinstance(m, nn.Module)), None)


def merge_point(attn: nn.Module) -> nn.Module | None:
    """The module that is given the heads' joined outputs. None if there is none, or if a hook on it would change what runs."""
    if hasattr(attn, "fused_layers"):
        return None
    norm = getattr(attn, "norm", None)
    return norm if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) else joining(attn)


def gated(attn: nn.Module, heads: Tensor, x: Tensor) -> Tensor:
    """What the merge point is given: the heads' joined outputs of the tokens x, times their gate where there is one before it."""
    gate = getattr(attn, "gate", None)
    if isinstance(gate, nn.Module) and merge_point(attn) is not getattr(attn, "norm", None):
        return heads * gate(x).sigmoid()
    return heads


def of_heads(attn: nn.Module, tokens: Tensor, channels: int) -> Tensor:
    """The heads' part of what the merge point was given: where it also projects an MLP, it comes first."""
    return tokens[..., :channels] if hasattr(attn, "in_split") else tokens
