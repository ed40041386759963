"""Finding the attention modules of a model, whoever wrote it, and where each keeps its q, k, v and output matrices.

Recognised by what a module has, in this order:

    qkv (Linear, rows q | k | v), proj, num_heads        timm, lifeops.models, LocalViT's and DW-shortcut hosts on them
    qkv, projection, num_heads                           transformers' BLIP
    to_qkv, to_out (Linear or Sequential), heads          vit-pytorch
    qkv (LifeQKV), proj                                   lifeops.nn.LifeAttention: the heads of scale 1 (see ``_life``)
    q_proj, k_proj, v_proj, o_proj | out_proj | proj      transformers, timm's split attention
    attention.{query, key, value}, output.dense           transformers 4
    in_proj_weight, out_proj                              torch.nn.MultiheadAttention
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lifeops.nn.life import LifeAttention

OP = "structured_"
LOOKED_FOR = (
    "modules with qkv and proj (timm, lifeops), to_qkv and to_out, q_proj, k_proj, v_proj and o_proj or out_proj (transformers),"
    " attention.query, key, value and output.dense, or torch.nn.MultiheadAttention"
)
_BETWEEN = ("gate", "rope", "proj_l", "bias_k", "relative_position_bias_table")
"""What other parts between the projections and the softmax are called."""
_BIASES = ("rel_pos", "relative_position")
"""In names of parameters, at any depth; they start as zeros in some models, and the attention as a plain one."""


@dataclass
class Projections:
    """Views of one attention module's weights: ``q``, ``k``, ``v`` (h*d, C) and ``proj`` (C, h*d), of the first ``num_heads`` heads.

    ``deeper``: what reads q, k and v besides the attention itself (LIFE's next scale), and ``source``, the weight it reads from.
    """

    path: str
    module: nn.Module
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
    found = [_recognise(path, module) for path, module in _candidates("", model, set())]
    if not found:
        raise ValueError(f"{OP}: no attention found in {type(model).__name__}; looked for {LOOKED_FOR}")
    for p in found:
        _check(p, with_heads)
    rotary = [name for name, m in model.named_modules() if name.rpartition(".")[2].startswith("rope")]
    if with_heads and rotary:
        raise ValueError(f"{OP}: the model rotates queries and keys ({rotary[0]}), so its attention is not that of its projections alone")
    biases = [name for name, _ in model.named_parameters() if any(bias in name for bias in _BIASES)]
    if with_heads and biases:
        raise ValueError(f"{OP}: the model has a relative position bias ({biases[0]}): its attention is not that of its projections alone")
    return found


def _candidates(path: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Outermost modules that look like attention, each once."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if _kind(module) is not None:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _candidates(f"{path}.{name}" if path else name, child, seen)


def _linear(module, name) -> bool:
    return isinstance(getattr(module, name, None), nn.Linear)


def _kind(m: nn.Module):
    """The function that reads ``m``'s weights, or None."""
    if isinstance(m, LifeAttention):
        return _life
    if isinstance(m, nn.MultiheadAttention):
        return _torch
    if _linear(m, "qkv") and (_linear(m, "proj") or _linear(m, "projection")):
        return _fused
    if _linear(m, "to_qkv") or (_linear(m, "to_q") and _linear(m, "to_kv")):
        return _to_qkv
    if all(_linear(m, n) for n in ("q_proj", "k_proj", "v_proj")) and any(_linear(m, n) for n in ("o_proj", "out_proj", "proj")):
        return _split
    inner = getattr(m, "attention", None)
    if all(_linear(inner, n) for n in ("query", "key", "value")) and _linear(getattr(m, "output", None), "dense"):
        return _transformers4
    return None


def _recognise(path: str, module: nn.Module) -> Projections:
    return _kind(module)(path, module)


def _heads(path: str, module: nn.Module) -> int:
    for holder in (module, getattr(module, "attention", None), getattr(module, "config", None)):
        for name in ("num_heads", "num_attention_heads", "heads"):
            if isinstance(getattr(holder, name, None), int):
                return getattr(holder, name)
    raise ValueError(f"{OP}: {path} ({type(module).__name__}) does not say num_heads, num_attention_heads or heads")


def _whole(path, module, q, k, v, proj) -> Projections:
    heads = _heads(path, module)
    return Projections(path, module, q.data, k.data, v.data, proj.data, heads, q.shape[0] // heads)


def _fused(path, m):
    return _whole(path, m, *m.qkv.weight.chunk(3), (m.proj if _linear(m, "proj") else m.projection).weight)


def _to_qkv(path, m):
    mixed = [name for name in ("mix_heads_pre_attn", "mix_heads_post_attn") if hasattr(m, name)]
    if mixed or not _linear(m, "to_qkv"):
        raise ValueError(f"{OP}: {path} ({type(m).__name__}) has {', '.join(mixed) or 'to_q and to_kv'}: its heads are not plain attention")
    out = m.to_out[0] if isinstance(m.to_out, nn.Sequential) else m.to_out
    if not isinstance(out, nn.Linear):
        raise ValueError(f"{OP}: {path}.to_out must be a Linear, got {type(out).__name__}")
    return _whole(path, m, *m.to_qkv.weight.chunk(3), out.weight)


def _split(path, m):
    out = next(getattr(m, n) for n in ("o_proj", "out_proj", "proj") if _linear(m, n))
    return _whole(path, m, m.q_proj.weight, m.k_proj.weight, m.v_proj.weight, out.weight)


def _transformers4(path, m):
    return _whole(path, m, m.attention.query.weight, m.attention.key.weight, m.attention.value.weight, m.output.dense.weight)


def _torch(path, m):
    if m.in_proj_weight is None:
        raise ValueError(f"{OP}: {path} (MultiheadAttention) has keys or values of another width than its queries")
    return _whole(path, m, *m.in_proj_weight.chunk(3), m.out_proj.weight)


def _life(path, m):
    """The heads that lie inside scale 1, whose q, k and v are linear in the input. Scales 2 and 3 are filtered mixtures of scale 1."""
    d1, d = m.qkv.scale1.out_features // 3, m.head_dim
    heads = d1 // d
    rows = heads * d
    W = m.qkv.scale1.weight.data
    return Projections(
        path, m, W[:rows], W[d1 : d1 + rows], W[2 * d1 : 2 * d1 + rows], m.proj.weight.data[:, :rows], heads, d,
        source=W, deeper=m.qkv.scale2.pointwise.weight.data,
    )  # fmt: skip


def _check(p: Projections, with_heads: bool) -> None:
    name = f"{p.path or 'the module'} ({type(p.module).__name__})"
    if p.q.is_meta:
        raise ValueError(f"{OP}: {name} is on the meta device: give it memory first (to_empty)")
    if isinstance(p.module, LifeAttention):
        _check_life(p, name)
    if p.q.shape != p.k.shape or p.q.shape != p.v.shape or p.q.shape != p.proj.T.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (p.q, p.k, p.v, p.proj.T))
        raise ValueError(f"{OP}: {name}: q, k, v and the transposed projection must have one shape, got {shapes} (grouped keys?)")
    if with_heads:
        between = [n for n in ("q_norm", "k_norm", "norm") if not isinstance(getattr(p.module, n, nn.Identity()), nn.Identity)]
        between += [n for n in _BETWEEN if getattr(p.module, n, None) is not None]
        between += sorted({n for n, _ in p.module.named_parameters() if any(bias in n for bias in _BIASES)} - {*between})
        if between:
            raise ValueError(f"{OP}: {name} has {', '.join(between)}, so its attention is not softmax(q kᵀ / √d) of its projections alone")
        if p.q.shape[0] > p.dim:
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
