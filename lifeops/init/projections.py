"""The attention modules whose matrices ``structured_`` sets, as :mod:`lifeops.hosts.layouts` finds them in a model or a list of blocks.

Of :class:`lifeops.nn.LifeAttention` the heads of scale 1 alone can be set, see ``_life``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lifeops.hosts.layouts import LOOKED_FOR, Layout, attentions, called_attention, relative_biases, rotations
from lifeops.nn.life import LifeAttention

OP = "structured_"
_PLAIN = "softmax(q kᵀ / √d) of its projections alone; a list of blocks where it is can be given, or method='default'"


@dataclass
class Projections:
    """Views of one attention module's weights: ``q``, ``k``, ``v`` (h*d, C) and ``proj`` (C, h*d), of the first ``num_heads`` heads.

    ``deeper``: what reads q, k and v besides the attention itself (LIFE's next scale), and ``source``, the weight it reads from.
    """

    path: str
    module: nn.Module
    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    proj: Tensor
    num_heads: int
    head_dim: int
    source: Tensor | None = None
    deeper: Tensor | None = None

    @property
    def dim(self) -> int:
        return self.q.shape[1]

    @torch.no_grad()
    def write(self, Q: Tensor | None, K: Tensor | None, v: Tensor | None, proj: Tensor | None) -> None:
        """Q (h, C, d), K (h, d, C), v rows and proj in the module's dtype and device; None leaves one as it is."""
        before = None if self.source is None else self.source.norm()
        if Q is not None:
            self.q.copy_(Q.transpose(-1, -2).flatten(0, 1))
            self.k.copy_(K.flatten(0, 1))
        if v is not None:
            self.v.copy_(v)
            self.proj.copy_(proj)
        if before is not None:  # the deeper scales keep the magnitude they had
            self.deeper.mul_(before / self.source.norm())


def find(model, with_heads: bool = True) -> list[Projections]:
    """The attention modules of a model, or of a list of blocks, in the order they are registered.

    ``with_heads``: their attention will be set, so whatever stands between q, k and the softmax is refused.
    """
    if not isinstance(model, nn.Module):
        if not isinstance(model, (list, tuple)) or not model or not all(isinstance(m, nn.Module) for m in model):
            raise TypeError(f"{OP}: model_or_blocks must be a module or a list of modules, got {type(model).__name__}")
        model = nn.ModuleList(model)
    found = [(_life if isinstance(m, LifeAttention) else _whole)(path, m, layout) for path, m, layout in attentions(model)]
    if not found:
        what = f"found {called_attention(model)}; looked for {LOOKED_FOR}"
        raise ValueError(f"{OP}: no attention found in {type(model).__name__} whose q, k, v and output can be set: {what}")
    for p in found:
        _check(p, with_heads)
    rotary = with_heads and rotations(model)
    if rotary:
        raise ValueError(f"{OP}: the model rotates queries and keys ({rotary[0]}), so its attention is not {_PLAIN}")
    biases = with_heads and relative_biases(model)
    if biases:
        raise ValueError(f"{OP}: the model has a relative position bias ({biases[0]}), so its attention is not {_PLAIN}")
    return found


def _name(path: str, module: nn.Module) -> str:
    return f"{path or 'the module'} ({type(module).__name__})"


def _own(name: str, sources: dict[str, Tensor]) -> list[Tensor]:
    """The weights of ``sources``, which must be what the layers compute with."""
    wrong = [n for n, weight in sources.items() if not isinstance(weight, nn.Parameter)]
    if wrong:
        raise ValueError(f"{OP}: {name}: {wrong[0]} is no parameter (pruned, parametrised?), what is written to it would be lost")
    return [weight.data for weight in sources.values()]


def _whole(path: str, module: nn.Module, layout: Layout) -> Projections:
    sources, name = layout.sources(module), _name(path, module)
    if sources.get("in_proj_weight", 0) is None:
        raise ValueError(f"{OP}: {name} has keys or values of another width than its queries; looked for one in_proj_weight")
    if len(sources) == 3:
        raise ValueError(f"{OP}: {name} makes keys and values together, in {list(sources)[1]}; looked for one layer for all or three")
    *inputs, proj = _own(name, sources)
    heads = layout.heads(module)
    if heads is None:
        raise ValueError(f"{OP}: {name} does not say its heads; looked for num_heads, num_attention_heads or heads of it or its config")
    q, k, v = inputs if len(inputs) == 3 else inputs[0].chunk(3)
    return Projections(path, module, layout, q, k, v, proj, heads, q.shape[0] // heads)


def _life(path: str, m: LifeAttention, layout: Layout) -> Projections:
    """The heads that lie inside scale 1, whose q, k and v are linear in the input. Scales 2 and 3 are filtered mixtures of scale 1."""
    d1, d = m.qkv.scale1.out_features // 3, m.head_dim
    heads = d1 // d
    rows = heads * d
    own = {"qkv.scale1.weight": m.qkv.scale1.weight, "qkv.scale2.pointwise.weight": m.qkv.scale2.pointwise.weight}
    W, deeper, proj = _own(_name(path, m), {**own, "proj.weight": m.proj.weight})
    return Projections(
        path, m, layout, W[:rows], W[d1 : d1 + rows], W[2 * d1 : 2 * d1 + rows], proj[:, :rows], heads, d, source=W, deeper=deeper
    )


def _check(p: Projections, with_heads: bool) -> None:
    name = _name(p.path, p.module)
    if p.q.is_meta:
        raise ValueError(f"{OP}: {name} is on the meta device: give it memory first (to_empty)")
    if with_heads:
        between = p.layout.beyond(p.module)
        if between:
            raise ValueError(f"{OP}: {name} has {', '.join(between)}, so its attention is not {_PLAIN}")
    if isinstance(p.module, LifeAttention):
        _check_life(p, name)
    shapes = {"q": p.q, "k": p.k, "v": p.v, "the transposed projection": p.proj.T}
    if len({t.shape for t in shapes.values()}) > 1:
        found = ", ".join(f"{n} {tuple(t.shape)}" for n, t in shapes.items())
        why = "grouped keys" if p.q.shape != p.k.shape else "an output of another width"
        raise ValueError(f"{OP}: {name} must have q, k, v and the transposed projection of one shape, got {found}: {why}")
    if with_heads and p.q.shape[0] > p.dim:
        raise ValueError(f"{OP}: {name}: the heads' total width must not exceed the {p.dim} channels, got {p.q.shape[0]}")


def _check_life(p: Projections, name: str) -> None:
    if p.module.qkv.norm is not None:
        raise ValueError(
            f"{OP}: {name} has qkv_norm: one LayerNorm over all channels couples the scales, so no head's attention can be set exactly"
        )
    if p.num_heads == 0:
        raise ValueError(
            f"{OP}: {name}: no head lies inside scale 1 ({p.module.qkv.scale1.out_features // 3} channels, heads of {p.head_dim})."
            " Queries and keys of LIFE's other scales are depth-wise filtered mixtures and cannot be set exactly; use 3 heads or more"
        )
