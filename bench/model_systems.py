"""Model-level problems: inference and training steps of ViT-T with the library's modules, as the authors run it, and plain."""

from __future__ import annotations

import copy

import torch

from bench import whole
from bench.case import Case
from bench.problems import Problem
from lifeops.models import deit, localvit
from lifeops.nn import DWShortcut, LifeAttention, LocalityFeedForward
from lifeops.nn.eager_dw_shortcut import EagerDWShortcut
from lifeops.nn.eager_life import EagerLifeAttention
from lifeops.nn.eager_localvit import EagerLocalityFeedForward
from lifeops.nn.shortcut_blocks import wrap

CLASSES = 100


def _authors(parent: torch.nn.Module, name: str, module: torch.nn.Module) -> torch.nn.Module | None:
    """The authors' counterpart of one of ours, with its weights; None for any other module."""
    P = getattr(module, "num_prefix_tokens", 0)
    if isinstance(module, LifeAttention):
        eager = EagerLifeAttention(module.proj.in_features, module.num_heads, P)
    elif isinstance(module, LocalityFeedForward):
        eager = EagerLocalityFeedForward(module.dim, module.hidden_dim / module.dim, module.dim, P)
        eager.grid_holder = module.grid_holder
    elif isinstance(module, DWShortcut):
        sizes = tuple(conv.kernel_size[0] for conv in module.convs)
        eager = EagerDWShortcut(module.convs[0].out_channels, sizes, P)
    else:
        return None
    return whole.with_weights(eager, module)


def as_authors(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of ``model`` with the authors' modules in the place of ours."""
    return whole.exchanged(model, _authors)


def models(system: str, host: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and its plain host."""
    plain = deit.VisionTransformer(**host)
    if system == "vit_life":
        return deit.VisionTransformer(attn=LifeAttention, **host), plain
    if system == "vit_localvit":
        return localvit(**host), plain
    ours = copy.deepcopy(plain)
    ours.blocks = wrap(ours.blocks, num_prefix_tokens=ours.num_prefix_tokens)
    return ours, plain


def model(p: Problem, compile: bool) -> Case:
    dtype = getattr(torch, p.dtype)
    host = {"img_size": 16 * p.H, "patch_size": 16, "num_classes": CLASSES, "depth": p.K or 12}
    ours, plain = (m.to(dtype).train(p.mode != "fwd") for m in models(p.system, host))
    found = whole.case(p, ours, as_authors(ours), CLASSES, plain)
    if p.system == "vit_dw_shortcut" and dtype != torch.float32:
        del found.variants["eager"]  # the authors' shortcut returns float32 tokens, which the next block does not take
    return found


BUILDERS = dict.fromkeys(("vit_life", "vit_localvit", "vit_dw_shortcut"), model)
