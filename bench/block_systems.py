"""Variants and checks of the block-level problems: LIFE's attention, LocalViT's feed-forward, a ViT block with the DW shortcut."""

from __future__ import annotations

import copy

import torch

import lifeops
from bench import baselines
from bench.case import Case, Variant, of_module
from bench.op_systems import _view, _wide, shortcuts, tokens
from bench.problems import Problem
from lifeops.models.deit import Attention, Block
from lifeops.nn import LifeAttention, LocalityFeedForward
from lifeops.nn.eager_life import EagerLifeAttention
from lifeops.nn.eager_localvit import EagerLocalityFeedForward


def _xs(p: Problem):
    return lambda: {"x": tokens(p), "dy": tokens(p)}


def _on_grid(p: Problem):
    return lambda m, i: m(_view(i["x"]), (p.H, p.W))


def life_attention(p: Problem, compile: bool) -> Case:
    heads, dtype, call = p.C // 64, getattr(torch, p.dtype), _on_grid(p)
    eager = EagerLifeAttention(p.C, heads, p.P).to(dtype)
    ours, plain = LifeAttention(p.C, heads, p.P).to(dtype), Attention(p.C, heads).to(dtype)
    ours.load_state_dict(eager.state_dict())
    oracle = _wide(eager, call)
    variants = {
        "lifeops": of_module(ours, call, truth=oracle),
        "eager": of_module(eager, call, truth=oracle),
        "plain": of_module(plain, lambda m, i: m(_view(i["x"])), truth=_wide(plain, lambda m, i: m(i["x"]))),
    }
    if compile:
        module = baselines.compiled(eager)
        variants["compiled"] = of_module(module, lambda m, i: m(i["x"], (p.H, p.W)), truth=oracle, compiled=True)
    return Case(p, _xs(p), variants)


def localvit_ffn(p: Problem, compile: bool) -> Case:
    dtype, call, training = getattr(torch, p.dtype), _on_grid(p), p.mode != "fwd"
    eager = EagerLocalityFeedForward(p.C, reduction=p.C, num_prefix_tokens=p.P).to(dtype).train(training)
    ours = LocalityFeedForward(p.C, reduction=p.C, num_prefix_tokens=p.P).to(dtype).train(training)
    ours.load_state_dict(eager.state_dict())
    plain = baselines.mlp(p.C).to(dtype)
    oracle = _wide(eager, call)
    if not training:
        lifeops.fuse_(ours)
    variants = {
        "lifeops": of_module(ours, call, truth=oracle),
        "eager": of_module(eager, call, truth=oracle),
        "mlp": of_module(plain, _residual, truth=_wide(plain, _residual)),
    }
    if compile:
        module = baselines.compiled(eager)
        variants["compiled"] = of_module(module, lambda m, i: m(i["x"], (p.H, p.W)), truth=oracle, compiled=True)
    return Case(p, _xs(p), variants)


def _residual(m, i):
    return i["x"] + m(_view(i["x"]))


def _joined(modules) -> torch.nn.Module:
    """A block and the shortcut around it as one module, for its parameters."""
    return torch.nn.ModuleList(modules)


def dw_shortcut_block(p: Problem, compile: bool) -> Case:
    """A ViT block with the shortcut, with the authors', and alone."""
    dtype, grid = getattr(torch, p.dtype), (p.H, p.W)
    block = Block(p.C, Attention(p.C, p.C // 64, qkv_bias=True), 4.0, 1e-6, torch.nn.Identity()).to(dtype).train(p.mode != "fwd")
    eager, ours, wide = shortcuts(p)

    def call(m, i):
        block, shortcut = m
        return shortcut(_view(i["x"]), block(_view(i["x"]), grid), grid)

    # own: torch's bfloat16 gradient of a LayerNorm's bias is off by a third here
    oracle = of_module(_joined((copy.deepcopy(block).double(), wide)), call, own=of_module(_joined((block, eager)), call))
    variants: dict[str, Variant] = {
        "lifeops": of_module(_joined((block, ours)), call, truth=oracle),
        "eager": of_module(_joined((block, eager)), call, truth=oracle),
        "block": of_module(block, _on_grid(p), truth=_wide(block, _on_grid(p))),
    }
    return Case(p, _xs(p), variants)


BUILDERS = {"life_attention": life_attention, "localvit_ffn": localvit_ffn, "dw_shortcut_block": dw_shortcut_block}
