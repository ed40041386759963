"""The layers of an attention that make q, k and v, and what it does with what its heads give, in timm and transformers."""

from __future__ import annotations

from torch import Tensor, nn

PROJ = ("proj", "o_proj", "out_proj", "projection", "projection_layer")
"""What the output projection is called."""
_JOINING = (*PROJ, "attn_out_proj")  # and beside an MLP
INNER, OUTPUT = "attention", "output"
"""transformers: q, k and v may lie in a module inside, the output projection ``dense`` in another."""
SEPARATE = ("q_proj", "k_proj", "v_proj")
NAMED = ("query", "key", "value")
BIASES = ("q_bias", "k_bias", "v_bias")  # added to a joint projection without one (BEiT)


def core(attn: nn.Module) -> nn.Module:
    """Who projects q, k and v: ``attn`` or the module inside."""
    inner = getattr(attn, INNER, None)
    return inner if isinstance(getattr(inner, NAMED[0], None), nn.Module) else attn


def heads_of(attn: nn.Module) -> int | None:
    attn = core(attn)
    return next((getattr(attn, n) for n in ("num_heads", "num_attention_heads") if getattr(attn, n, None) is not None), None)


def joined(attn: nn.Module) -> tuple[str, nn.Module] | None:
    """The output projection and its path in ``attn``; None if there is none."""
    dense = getattr(getattr(attn, OUTPUT, None), "dense", None)
    if core(attn) is not attn:
        return None if dense is None else (f"{OUTPUT}.dense", dense)
    return next(((name, getattr(attn, name)) for name in PROJ if hasattr(attn, name)), None)


def projections(attn: nn.Module) -> list[tuple[str, nn.Module]]:
    """By path the layers that make q, k and v, one or three; empty if there are no such."""
    where, inside = core(attn), f"{INNER}." * (core(attn) is not attn)
    names = ("qkv",) if getattr(where, "qkv", None) is not None else SEPARATE if hasattr(where, SEPARATE[0]) else NAMED
    found = [(f"{inside}{name}", getattr(where, name, None)) for name in names]
    return found if all(isinstance(layer, nn.Module) for _, layer in found) else []


def on_grid(layer: nn.Module, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """``layer`` of x, told the grid where it asks for one: LIFE's in the place of a linear one."""
    return layer(x, grid) if getattr(layer, "needs_grid", False) else layer(x)


def thirds(attn: nn.Module, x: Tensor, grid: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
    """q, k and v (B, N, C) of the joint projection ``qkv`` of the tokens x (B, N, C)."""
    biases = (getattr(attn, name, None) for name in BIASES)
    parts = on_grid(attn.qkv, x, grid).chunk(3, -1)
    return tuple(t if bias is None else t + bias.to(t.dtype) for t, bias in zip(parts, biases, strict=True))


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
