"""LIFE's attention in the place of a host's: what that does beside projecting q, k and v is kept, and so is how it is called."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor, nn

from lifeops.hosts.heads import additive, module_bias, normed, table_bias
from lifeops.hosts.host import pair
from lifeops.hosts.projections import core, joined
from lifeops.nn.life import LifeAttention

NORMS = ("q_norm", "k_norm", "norm")
"""What an attention may apply to its heads' q and k, and to their joined outputs."""
POSITIONS = ("rel_pos", "relative_position_bias")
"""Modules that give what an attention adds to its scores."""
_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"


def _mask(*biases: Tensor | None) -> Tensor | None:
    """Masks and biases as one that is added; a bool one stays what it is where it is alone."""
    found = [b for b in biases if b is not None]
    if len(found) < 2:
        return found[0] if found else None
    dtype = next(b.dtype for b in found if b.dtype != torch.bool)
    return sum(additive(b, dtype) for b in found)


def norm_width(norm: nn.Module | None) -> int | None:
    """Over how many channels, all dimensions together; None where it does not say it."""
    shape = getattr(norm, "normalized_shape", getattr(getattr(norm, "weight", None), "shape", None))
    return None if shape is None else math.prod(shape)


def _modules(attn: nn.Module) -> dict[str, nn.Module]:
    """The norms and positions that ``attn`` applies."""
    found = {name: getattr(core(attn), name, None) for name in (*NORMS, *POSITIONS)}
    return {name: m for name, m in found.items() if isinstance(m, nn.Module) and not isinstance(m, nn.Identity)}


_TAKES = frozenset(inspect.signature(LifeAttention.forward).parameters)


def class_for(attn: nn.Module, library: str, windows: bool) -> type[LifeAttention]:
    """The class that stands for ``attn``: LIFE's own where it is called with nothing else and holds nothing else."""
    if library == "transformers":
        return WindowLifeAttention if windows else ModelLifeAttention
    holds = _modules(attn) or getattr(attn, _TABLE, None) is not None
    takes = frozenset(inspect.signature(attn.forward).parameters)
    return LifeAttention if takes <= _TAKES and not holds else HostLifeAttention


@torch.no_grad()
def keep(new: LifeAttention, attn: nn.Module) -> LifeAttention:
    """Give ``new`` the weights of the output projection of ``attn``, and what that has beside projections."""
    _, proj = joined(attn)
    for ours, theirs in zip(new.proj.parameters(), proj.parameters(), strict=True):
        ours.copy_(theirs).requires_grad_(theirs.requires_grad)
    for name, module in _modules(attn).items():
        new.add_module(name, module)
        new.by_scale &= name not in NORMS[:2] or norm_width(module) in (None, new.head_dim)
    if getattr(attn, _TABLE, None) is not None:
        new.register_parameter(_TABLE, getattr(attn, _TABLE))
        new.register_buffer(_INDEX, getattr(attn, _INDEX), persistent=False)
    new.rotate_half = getattr(attn, "rotate_half", False)
    if isinstance(new, ModelLifeAttention):
        new.config, new.rotate_half = getattr(core(attn), "config", None), True
        new.gives_tuple = inspect.signature(type(attn).forward).return_annotation not in (Tensor, "torch.Tensor")
    return new.train(attn.training)


class HostLifeAttention(LifeAttention):
    """:class:`LifeAttention` called as timm's attention layers are, with the norms and the relative positions of one of them.

    The positions come with the call (``rope``, ``shared_rel_pos``, ``shared_rel_pos_bias``) or are the layer's own: a module ``rel_pos``
    with ``get_bias()``, or the table and the index of BEiT.
    """

    def _placed(self, q, k, rope):
        q, k = (normed(getattr(self, name, None), t) for name, t in (("q_norm", q), ("k_norm", k)))
        return super()._placed(q, k, rope)

    def _project(self, parts):
        return self.proj(self.norm(torch.cat(parts, -1))) if hasattr(self, "norm") else super()._project(parts)

    def _own_bias(self) -> Tensor | None:
        """(1 or none, h, N, N), added to the scores."""
        if hasattr(self, "rel_pos"):
            return self.rel_pos.get_bias()
        if not hasattr(self, _TABLE):
            return None
        return table_bias(getattr(self, _TABLE), getattr(self, _INDEX))(slice(None))

    def forward(
        self, x: Tensor, grid: tuple[int, int] | None = None, attn_mask: Tensor | None = None, is_causal: bool = False,
        rope: Tensor | None = None, shared_rel_pos: Tensor | None = None, shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As :meth:`LifeAttention.forward`. ``shared_rel_pos`` holds where there is no ``rel_pos``; ``shared_rel_pos_bias`` is added."""
        shared = None if hasattr(self, "rel_pos") else shared_rel_pos
        return super().forward(x, grid, _mask(attn_mask, self._own_bias(), shared, shared_rel_pos_bias), is_causal, rope)


class ModelLifeAttention(HostLifeAttention):
    """The same, called as the attention layers of transformers are: it gives (output, None) where they give two."""

    gives_tuple = True
    window = None  # (h, w) of the windows whose tokens it is called with

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_embeddings=None, **kwargs):
        """hidden_states (B, P + H*W, C); ``position_embeddings``: (cos, sin) of the patches, H*W x d each, or of all tokens.

        Raises ValueError for ``output_attentions``: no matrix is made.
        """
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError("LifeAttention: output_attentions is not known here: no attention matrix is made (see lifeops.rollout)")
        rope = None if position_embeddings is None else torch.cat(position_embeddings[::-1], -1)
        shared, own = kwargs.get("relative_position_bias"), module_bias(self, kwargs, hidden_states.shape[1])
        mask, is_causal = _mask(attention_mask, own, shared), bool(kwargs.get("is_causal", False))
        y = super().forward(hidden_states, self.window, mask, is_causal, rope)
        return (y, None) if self.gives_tuple else y


class WindowLifeAttention(ModelLifeAttention):
    """The same for tokens (B*W, h*w, C) of W windows (h, w) each, as ``block``, which calls it, cuts them."""

    block = (None,)  # not a part: it holds this module

    @property
    def window(self) -> tuple[int, int] | None:
        return pair(self.block[0].window_size)

    def qkv_heads(self, x: Tensor, grid: tuple[int, int] | None = None):
        return super().qkv_heads(x, self.window)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """``attention_mask`` (W, h*w, h*w): of each window of an image; shifted windows have one."""
        if attention_mask is not None:
            attention_mask = attention_mask.repeat(hidden_states.shape[0] // attention_mask.shape[0], 1, 1)[:, None]
        return super().forward(hidden_states, attention_mask, **kwargs)
