"""Which linear layers of an attention make its q, k, v and output, and what else it holds: found in any model, whoever wrote it.

    qkv, proj | o_proj | out_proj | projection           timm, lifeops, transformers' BLIP
    to_qkv, to_out                                       vit-pytorch
    q_proj, k_proj, v_proj, proj | o_proj | out_proj …   transformers, timm's split attention
    attention.{query, key, value}, output.dense          transformers 4
    in_proj_weight, out_proj                             torch.nn.MultiheadAttention
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.hosts.attention import KINDS
from lifeops.hosts.projections import BIASES, PROJ, SEPARATE, heads_of, thirds

LOOKED_FOR = (
    "linear layers qkv, or q_proj, k_proj and v_proj, with proj, o_proj, out_proj or projection (timm, lifeops, transformers), to_qkv and"
    " to_out (vit-pytorch), attention.query, key, value and output.dense (transformers 4), or torch.nn.MultiheadAttention"
)
_TO_OUT = ("to_out", "to_out.0")
_LAYOUTS = (
    (("qkv",), PROJ), (("to_qkv",), _TO_OUT), (("to_q", "to_kv"), _TO_OUT), (SEPARATE, PROJ),
    (("attention.query", "attention.key", "attention.value"), ("output.dense",)),
)  # fmt: skip
_IDLE = (nn.Dropout, nn.Identity, nn.Softmax)
_ROTARY = ("Rotary", "Rope", "RoPE")
_RELATIVE = ("rel_pos", "relative_position")


class Layout(NamedTuple):
    """``layers``: the paths of the linear layers that make q, k and v, one for all or three; none in :class:`nn.MultiheadAttention`.
    ``out``: that of the output projection.
    """

    layers: tuple[str, ...]
    out: str

    def sources(self, module: nn.Module) -> dict[str, Tensor | None]:
        """The weights by their names in ``module``, the output projection's last."""
        inputs = {f"{name}.weight": module.get_submodule(name).weight for name in self.layers} or {"in_proj_weight": module.in_proj_weight}
        return {**inputs, f"{self.out}.weight": module.get_submodule(self.out).weight}

    def qkv(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v (B, N, h*d) of the tokens x (B, N, C)."""
        if not self.layers:
            return F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        if self.layers == ("qkv",):
            return thirds(module, x)
        made = tuple(module.get_submodule(name)(x) for name in self.layers)
        return made[0].chunk(3, -1) if len(made) == 1 else made

    def beyond(self, module: nn.Module) -> list[str]:
        """The parts of ``module`` that may do something, other than these layers and their biases."""
        parts, found = (*self.layers, self.out, *BIASES, "in_proj_weight", "in_proj_bias"), {}
        acting = [path for path, m in module.named_modules() if path and not isinstance(m, _IDLE) and not list(m.children())]
        for path in (*acting, *(name for name, _ in module.named_parameters())):
            names = path.split(".")
            starts = [".".join(names[: i + 1]) for i in range(len(names))]
            if not any(start in parts for start in starts):
                found[next(s for s in starts if not any(part.startswith(f"{s}.") for part in parts))] = None
        return list(found)

    def heads(self, module: nn.Module) -> int | None:
        """h, as the module says it, the one that holds the layers, or its configuration."""
        holders = (module, getattr(module, "attention", None), getattr(module, "config", None))
        found = (n for holder in holders for n in (heads_of(holder), getattr(holder, "heads", None)))
        return next((n for n in found if isinstance(n, int)), None)


def _linear(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(module.get_submodule(path), nn.Linear)
    except AttributeError:
        return False


def layout_of(module: nn.Module) -> Layout | None:
    """None if ``module`` does not keep its matrices in one of these ways."""
    if isinstance(module, nn.MultiheadAttention):
        return Layout((), "out_proj")
    for layers, outs in _LAYOUTS:
        out = next((name for name in outs if _linear(module, name)), None)
        if out and all(_linear(module, name) for name in layers):
            return Layout(layers, out)
    return None


def attentions(model: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module, Layout]]:
    """The outermost modules with such a layout, each once, in the order they are registered."""
    seen = set() if seen is None else seen
    if id(model) in seen:
        return
    seen.add(id(model))
    layout = Layout(("qkv",), "proj") if hasattr(model, "qkv_heads") else layout_of(model)  # LIFE
    if layout is not None:
        yield path, model, layout
        return
    for name, child in model.named_children():
        yield from attentions(child, f"{path}.{name}" if path else name, seen)


def rotations(model: nn.Module) -> list[str]:
    """The paths of the modules that turn queries and keys."""
    named = ((path, path.rpartition(".")[2], type(m).__name__) for path, m in model.named_modules())
    return [path for path, name, cls in named if name.startswith("rope") or any(part in cls for part in _ROTARY)]


def relative_biases(model: nn.Module) -> list[str]:
    """The names of the parameters that add to scores by relative position, at any depth: as zeros they would not show in a pass."""
    return [name for name, _ in model.named_parameters() if any(part in name for part in _RELATIVE)]


def called_attention(model: nn.Module) -> str:
    """What of ``model`` is called attention or known as one, for messages: the outermost modules, the first of each class."""
    classes, inside = {}, set()
    for path, m in model.named_modules():
        names = (path.rpartition(".")[2].lower(), type(m).__name__.lower())
        named = any(part in name for name in names for part in ("attention", "attn")) and not type(m).__module__.startswith("torch.nn.")
        if path and m not in inside and (named or any(kind.matches(m) for kind in KINDS)):
            classes.setdefault(type(m).__name__, path)
            inside.update(m.modules())
    found = [f"{cls} ({path})" for cls, path in classes.items()]
    more = f" and {len(found) - 3} other kinds" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more or "nothing called attention"
