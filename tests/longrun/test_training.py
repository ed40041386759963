"""Twenty steps of the long training, what its statistic finds, and what is made of the results. The whole of it: `make longrun`."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("sklearn")
from lifeops import registry
from lifeops.demo.train import Run
from longrun import page, training
from longrun.training import ARMS, KERNELS, Cell

FEW = dataclasses.replace(training.RECIPE, steps=20)
WINDOW = 5


def _train(system, dtype, arms=ARMS, seeds=2):
    found = (Cell(system, dtype, arm, seed) for arm in arms for seed in range(seeds))
    return {cell: training.train(cell, FEW) for cell in found}


@pytest.mark.parametrize("dtype", training.DTYPES)
@pytest.mark.parametrize("system", [*training.SYSTEMS, training.STRUCTURED])
def test_kernels_train_like_the_reference(system, dtype):
    found = page.verdicts(_train(system, dtype, ARMS if dtype == "float32" else ARMS[:2]), WINDOW)
    assert found
    assert all(v.kept for v in found), found


def test_a_wrong_gradient_is_seen(monkeypatch):
    """The gradient of a shortcut's tokens without what goes through the convolution."""
    registry.load(KERNELS)
    op = registry.ops["dw_shortcut_bwd"]
    right = op.impls[KERNELS]
    wrong = dataclasses.replace(right, fn=lambda dy, *args: (dy.clone(), *right.fn(dy, *args)[1:]))
    monkeypatch.setitem(op.impls, KERNELS, wrong)
    registry.forget_choices()
    found = page.verdicts(_train("dw_shortcut", "float32", ARMS[:2]), WINDOW)
    registry.forget_choices()
    assert [v.kept for v in found] == [False]


def _curves(seed, spread=1.0, level=1.0):
    """Losses of three seeds that fall alike."""
    generator = torch.Generator().manual_seed(seed)
    level = level * 10 ** (spread * torch.randn(3, 1, generator=generator, dtype=torch.float64) / 4)
    return (level * torch.linspace(0, -2, 100, dtype=torch.float64).exp()).tolist()


def _judge(ours, theirs):
    return page.judge(("life", "float32", ARMS[:2]), ours, theirs, WINDOW)


def test_the_statistic():
    theirs = _curves(0)
    assert _judge(theirs, theirs)[3:] == (0, 0, 0)
    assert _judge(theirs, theirs).kept
    late = [run[: page.START] + [1.02 * loss for loss in run[page.START :]] for run in theirs]  # two percent more, after a right start
    assert _judge(late, theirs).kept
    worse = [run[: page.START] + [3 * loss for loss in run[page.START :]] for run in theirs]
    assert not _judge(worse, theirs).kept
    assert not _judge([[1.001 * loss for loss in run] for run in theirs], theirs).kept  # other numbers from the start
    assert _judge(_curves(1), theirs).ratio > 0.3  # as other seeds are


def test_results(tmp_path, monkeypatch):
    """The file, the picture and the table, from made-up runs."""
    made_up = (Run("", 0, cell.seed, losses=_curves(cell.seed)[0], at=[100], accuracies=[0.9]) for cell in training.cells())
    runs = dict(zip(training.cells(), made_up, strict=True))
    monkeypatch.setattr(page, "RESULTS", tmp_path / "longrun.json")
    page.keep("training", page.training_rows(runs)), page.keep("other", 1)
    stored = json.loads(page.RESULTS.read_text())
    assert stored["other"] == 1
    assert [(r["system"], r["seed"], r["accuracy"], len(r["losses"])) for r in stored["training"][:1]] == [("life", 0, 90.0, 4)]
    page.draw(runs, tmp_path / "longrun.png")
    assert (tmp_path / "longrun.png").stat().st_size > 10_000
    assert len(page.training_table(runs).splitlines()) == 2 + len(training.SYSTEMS) * 2 * 3


def test_an_interrupted_run_is_gone_on_with(tmp_path, monkeypatch):
    told, trained = [], []
    recipe = dataclasses.replace(FEW, steps=1)
    monkeypatch.setattr(training, "cells", lambda seeds: (Cell("life", "float32", KERNELS, seed) for seed in range(seeds)))
    monkeypatch.setattr(training, "train", lambda cell, recipe, train=training.train: trained.append(cell) or train(cell, recipe))
    first = training.train_all(tmp_path, recipe, seeds=1, told=told.append)
    both = training.train_all(tmp_path, recipe, seeds=2, told=told.append)
    assert [cell.seed for cell in trained] == [0, 1]
    assert [run.losses for cell, run in both.items() if cell.seed == 0] == [run.losses for run in first.values()]
    assert len(told) == 3
