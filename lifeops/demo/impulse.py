"""`lifeops demo --system impulse`: one small DeiT from several initialisations of its attention: default, mimetic and impulse.

"position x18" is the default with nothing but the impulse method's scale of the position embedding: it tells how much of a gain comes
from there. The settings are the plain demo's with 6 heads instead of 3, because impulses need heads narrower than the number of
patches (8 < 4 x 4). They are the default initialisation's: rate 6e-3 was better for it than 3e-3 on validation images. Nothing was
tuned for the others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lifeops.demo import report
from lifeops.demo.train import INITIALISATIONS, Recipe, Run, System, build
from lifeops.demo.unfinished import Unfinished
from lifeops.files import make_folder, written
from lifeops.init import projections
from lifeops.init.offsets import shift_targets
from lifeops.init.report import initial_attention
from lifeops.init.structured import structured_

NUM_HEADS = 6


class Initialisations(System):
    """The system the demo trains: one model, several starts."""

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(INITIALISATIONS)


SYSTEM = Initialisations("impulse", "impulse", "")


def recipe_of(recipe: Recipe) -> Recipe:
    return replace(recipe, num_heads=NUM_HEADS)


def run(args, console, recipe: Recipe, train_all, jobs: int) -> None:
    recipe, folder = recipe_of(recipe), make_folder(args.out / SYSTEM.name)
    console.print(_initial_report(recipe), highlight=False, soft_wrap=True)
    unfinished = Unfinished(folder / "unfinished", recipe)
    runs = train_all(console, SYSTEM, args.sizes, args.seeds, recipe, jobs, unfinished)
    table = accuracy_table(runs)
    table.print(console)
    report.write_csv(folder / "table.csv", SYSTEM, runs, {})
    report.write_markdown(folder / "table.md", [table])
    report.plot_curves(folder / "curves.png", SYSTEM, runs)
    plot_heads(folder / "heads.png", recipe)
    unfinished.clear()
    console.print(f"The table, curves and each head's initial attention are in {folder}{os.sep}", soft_wrap=True)


def _initial_report(recipe: Recipe) -> str:
    model = build("plain", recipe)
    found = structured_(model, "impulse", generator=torch.Generator().manual_seed(0))
    return f"Attention on the position embedding alone, before training: {found}"


def accuracy_table(runs: Sequence[Run]) -> report.Table:
    rows = []
    for size in sorted({r.size for r in runs}):
        means = [report.mean_sd(report.final_accuracies(runs, name, size)) for name in INITIALISATIONS]
        rows.append((str(size), *(f"{mean:.1f} ± {sd:.1f}" for mean, sd in means)))
    seeds = len({r.seed for r in runs})
    title = f"Test accuracy in %, mean ± standard deviation over {seeds} seeds" if seeds > 1 else "Test accuracy in %, one seed only"
    return report.Table(title, ("images", *INITIALISATIONS), rows)


def displacement_map(attention: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """(N, N) attention to its mean over the patches that have a neighbour at (dy, dx), for |dy|, |dx| <= radius: an impulse is one 1."""
    side = 2 * radius + 1
    found = torch.zeros(side, side)
    for i in range(side * side):
        rows, targets = shift_targets(grid, (i // side - radius, i % side - radius))
        found[i // side, i % side] = attention[rows, targets].mean() if len(rows) else float("nan")
    return found


def _initial_maps(recipe: Recipe) -> dict[str, Tensor]:
    """Method to the first block's (h, N, N) attention on the position embedding alone."""
    maps = {}
    for method in ("default", "mimetic", "impulse"):
        model = build(method, recipe)
        patches = model.pos_embed.detach()[0, model.num_prefix_tokens :]
        maps[method] = initial_attention(projections.find(model)[0], patches)
    return maps


def plot_heads(path: Path, recipe: Recipe, radius: int = 2) -> None:
    """Initial attention of the first block's heads: by displacement for every method, and the impulses' (N, N) matrices below."""
    from matplotlib.figure import Figure

    from lifeops.init.offsets import head_offsets

    maps = _initial_maps(recipe)
    grid = build("plain", recipe).patch_embed.grid_size
    figure = Figure(figsize=(1.5 * NUM_HEADS, 6.6), layout="constrained")
    axes = figure.subplots(len(maps) + 1, NUM_HEADS, squeeze=False)
    for line, (method, heads) in zip(axes, maps.items(), strict=False):
        line[0].set_ylabel(method)
        for axis, attention in zip(line, heads, strict=True):
            drawn = axis.imshow(displacement_map(attention, grid, radius).numpy(), vmin=0, vmax=1, extent=(-2.5, 2.5, 2.5, -2.5))
            axis.set(xticks=range(-radius, radius + 1), yticks=range(-radius, radius + 1))
            axis.tick_params(labelsize=6)
    for i, (axis, attention) in enumerate(zip(axes[-1], maps["impulse"], strict=True)):
        axis.imshow(attention.numpy(), vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], xlabel="key patch")
        axes[0][i].set_title(f"head {i}", fontsize=9)
        axes[-2][i].set_title(f"impulse at {head_offsets(NUM_HEADS)[i]}", fontsize=8)
    axes[-1][0].set_ylabel("impulse:\nquery patch")
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="attention")
    figure.suptitle("Initial attention on the position embedding alone, by displacement (down, right) of the key", fontsize=9)
    with written(path) as part:
        figure.savefig(part, dpi=120, format="png")
