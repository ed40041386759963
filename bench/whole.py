"""Whole models beside the same with their authors' modules in them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from bench.case import Case, of_module
from bench.problems import Problem


def exchanged(model: nn.Module, authors: Callable[[nn.Module, str, nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of ``model`` with ``authors(parent, name, child)`` in the place of every child for which that is not None."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            eager = authors(parent, name, child)
            if eager is not None:
                setattr(parent, name, eager)
    return model


def with_weights(eager: nn.Module, ours: nn.Module) -> nn.Module:
    """``eager`` with the weights, dtype and mode of ``ours``."""
    eager.to(next(ours.parameters()).dtype).load_state_dict(ours.state_dict())
    return eager.train(ours.training)


def case(p: Problem, ours: nn.Module, eager: nn.Module, classes: int, plain: nn.Module | None = None) -> Case:
    """Images of 16 H x 16 H through both, and through a ``plain`` model that does other work."""
    dtype, side = getattr(torch, p.dtype), 16 * p.H

    def call(m, i):
        return m(i["x"])

    def draw():
        return {"x": torch.randn(p.B, 3, side, side).to(dtype), "dy": torch.randn(p.B, classes).to(dtype)}

    def oracle(m):
        return of_module(copy.deepcopy(m).double(), call, ())

    truth = oracle(eager)
    variants = {"lifeops": of_module(ours, call, (), truth=truth), "eager": of_module(eager, call, (), truth=truth)}
    if plain is not None:
        variants["plain"] = of_module(plain, call, (), truth=oracle(plain))
    return Case(p, draw, variants)
