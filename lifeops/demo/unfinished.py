"""What an interrupted demo has trained already: one file per model, taken up by the next demo with the same settings and output folder.

A run is the same whether or not it was stored, to the last bit: losses and accuracies are kept as they are, weights as tensors.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
from pathlib import Path

import torch

from lifeops.demo.train import Recipe, Run
from lifeops.errors import CheckpointError
from lifeops.files import make_folder, save
from lifeops.integrations.checkpoint_files import read


class Unfinished:
    """The training runs in ``folder`` that were made with these settings and versions; others, and damaged ones, are made again."""

    def __init__(self, folder: Path, recipe: Recipe):
        from lifeops import __version__

        self.folder = make_folder(folder)
        versions = {"lifeops": __version__, "torch": str(torch.__version__), "machine": platform.machine()}
        self.made_with = {**dataclasses.asdict(recipe), **versions}

    def _path(self, model: str, size: int, seed: int) -> Path:
        return self.folder / f"{model.replace(' ', '-')}_{size}_{seed}.pt"

    def load(self, model: str, size: int, seed: int, with_weights: bool) -> Run | None:
        """The run of ``model`` if it is there, and has the weights where they are wanted."""
        try:
            found = read(str(self._path(model, size, seed)))
        except (FileNotFoundError, CheckpointError):
            return None
        if found.get("made_with") != self.made_with or (with_weights and found["run"]["weights"] is None):
            return None
        run = Run(**found["run"])
        if run.weights is not None:
            run.weights = {name: value.numpy() for name, value in run.weights.items()}
        return run

    def keep(self, run: Run) -> None:
        weights = run.weights and {name: torch.from_numpy(value) for name, value in run.weights.items()}
        content = {**vars(run), "weights": weights}
        save({"made_with": self.made_with, "run": content}, self._path(run.model, run.size, run.seed))

    def clear(self) -> None:
        """The demo has ended: its tables hold what was stored here."""
        shutil.rmtree(self.folder, ignore_errors=True)
