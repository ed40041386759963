"""LocalViT in PVT, TNT, T2T-ViT and Swin, and LIFE in Swin V2: the models of published sizes, whole, beside the authors' computation."""

from __future__ import annotations

import torch
from torch import nn

import lifeops
from bench import whole
from bench.case import Case
from bench.problems import Problem
from lifeops.models import life_swinv2, localvit
from lifeops.models.blocks import TokenAttention
from lifeops.models.deit import Mlp
from lifeops.models.pvt import SpatialReductionAttention
from lifeops.models.swin import WindowAttention
from lifeops.models.swin_v2 import CosineWindowAttention
from lifeops.models.t2t import TokenPerformer
from lifeops.models.tnt import SplitAttention
from lifeops.nn import LocalityFeedForward
from lifeops.nn import eager_hosts as eager
from lifeops.nn.eager_localvit import EagerLocalityFeedForward
from lifeops.nn.feed_forward import FeedForward

CLASSES = 1000
_ATTENTIONS = {
    TokenAttention: eager.EagerAttention, SpatialReductionAttention: eager.EagerSpatialReductionAttention,
    SplitAttention: eager.EagerSplitAttention, WindowAttention: eager.EagerWindowAttention,
    CosineWindowAttention: eager.EagerCosineWindowAttention, TokenPerformer: eager.EagerTokenPerformer,
}  # fmt: skip


def _feed_forward(ours: LocalityFeedForward) -> nn.Module:
    """The authors', whose squeeze is there only where ours has one."""
    width = ours.conv[6].fc[0].out_features if ours.attention else 1
    made = EagerLocalityFeedForward(ours.dim, ours.hidden_dim / ours.dim, ours.hidden_dim // width, ours.num_prefix_tokens)
    if not ours.attention:
        del made.conv[6]
    return whole.with_weights(made, ours)


def _authors(parent: nn.Module, name: str, child: nn.Module) -> nn.Module | None:
    """The authors' counterpart of one of ours, with its weights; None for any other module."""
    if isinstance(child, LocalityFeedForward):
        return _feed_forward(child)
    if isinstance(child, FeedForward):
        return whole.with_weights(Mlp(child.fc1.in_features, child.fc1.out_features), child)
    made = _ATTENTIONS.get(type(child))
    return None if made is None else made(child)


def as_authors(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with the authors' modules in the place of ours."""
    return whole.exchanged(model, _authors)


def model(p: Problem, compile: bool) -> Case:
    if p.system == "life_swinv2_tiny":
        ours = life_swinv2("tiny", img_size=16 * p.H, num_classes=CLASSES)
        for block in (block for stage in ours.layers for block in stage.blocks):
            for norm in (block.norm1, block.norm2):  # which start as zeros
                nn.init.ones_(norm.weight)
    else:
        ours = localvit(p.system.removeprefix("localvit_"), img_size=16 * p.H, num_classes=CLASSES)
    ours = ours.to(getattr(torch, p.dtype)).train(p.mode != "fwd")
    for m in ours.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0  # the same numbers in both
    theirs = as_authors(ours)
    if not ours.training and p.system != "life_swinv2_tiny":
        lifeops.fuse_(ours)
    return whole.case(p, ours, theirs, CLASSES)


BUILDERS = dict.fromkeys(("localvit_pvt_tiny", "localvit_tnt_t", "localvit_t2t_7", "localvit_swin_tiny", "life_swinv2_tiny"), model)
