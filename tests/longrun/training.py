"""Trains every system on scikit-learn's digits with lifeops' kernels, with the reference and as its authors write it in plain PyTorch.

The runs of one seed begin with the same weights and see the same images in the same order, so that nothing but rounding tells them apart.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from lifeops.config import use_backend
from lifeops.demo import data
from lifeops.demo.train import SYSTEMS, Recipe, Run, build, fit, training_loss
from lifeops.demo.unfinished import Unfinished
from lifeops.init.structured import structured_

RECIPE = Recipe(patch_size=2, batch_size=16, num_heads=6, lr=2e-3, weight_decay=0.05, steps=1000, evaluations=1)
IMAGES = 1000  # to train on, other ones for each seed
STRUCTURED = "dw_shortcut, structured"  # the same, whose attention starts as shifts: in the short version
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of autocast; parameters are float32
KERNELS = "cpu"
ARMS = KERNELS, "reference", "plain PyTorch"


class Cell(NamedTuple):
    """One training run: what is trained, how, and from which seed."""

    system: str
    dtype: str
    arm: str
    seed: int


def cells(seeds: int = 3) -> Iterator[Cell]:
    return itertools.starmap(Cell, itertools.product(SYSTEMS, DTYPES, ARMS, range(seeds)))


def model_of(cell: Cell, recipe: Recipe) -> torch.nn.Module:
    """The cell's model with the weights that every arm of its seed begins with."""
    structured, name = cell.system == STRUCTURED, cell.system.partition(",")[0]
    model = build(name, recipe, cell.seed)
    if structured:
        structured_(model, "impulse", generator=torch.Generator().manual_seed(cell.seed))
    if cell.arm in (KERNELS, "reference"):
        return model
    plain = build(SYSTEMS[name].eager, recipe, cell.seed)
    names = plain.state_dict()  # strictly, but for the second name under which RegionViT's authors store a weight
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if name in names})
    return plain


def train(cell: Cell, recipe: Recipe = RECIPE) -> Run:
    """The loss of every step, and the share of the test images that are told right at the end."""
    backend = contextlib.nullcontext() if cell.arm == "plain PyTorch" else use_backend(cell.arm)
    pool, test = data.load()
    images, _ = data.draw(pool, IMAGES, cell.seed)
    model, run = model_of(cell, recipe), Run(key(cell), IMAGES, cell.seed)
    dtype = DTYPES[cell.dtype]

    def loss_of(model, batch):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return training_loss(model, batch)

    with backend:
        fit(model, images, recipe, cell.seed, run, test, loss_of)
    return run


def key(cell: Cell) -> str:
    return f"{cell.system} {cell.dtype} {cell.arm}"


def train_all(folder: Path, recipe: Recipe = RECIPE, seeds: int = 3, told=print) -> dict[Cell, Run]:
    """Every cell, one after the other; those that an interrupted run has left in ``folder`` are not trained again."""
    kept, found, every = Unfinished(folder, recipe), {}, [*cells(seeds=seeds)]
    for i, cell in enumerate(every):
        run = kept.load(key(cell), IMAGES, cell.seed, with_weights=False)
        if run is None:
            run = train(cell, recipe)
            kept.keep(run)
        found[cell] = run
        told(f"{i + 1}/{len(every)} {key(cell)}, seed {cell.seed}: loss {run.losses[-1]:.4f}, accuracy {run.accuracies[-1]:.3f}")
    return found
