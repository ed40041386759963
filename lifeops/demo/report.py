"""The demo's tables (terminal, CSV, Markdown) and pictures."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rich.table
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from lifeops.attention_maps.rollout import rollout
from lifeops.demo import data
from lifeops.demo.attention import cls_attention, region_attention, window_attention
from lifeops.demo.measure import Cost
from lifeops.demo.train import Recipe, Run, System, trained
from lifeops.files import written
from lifeops.models.regionvit import RegionViT
from lifeops.models.swin_v2 import SwinTransformerV2

_LOOKS = {  # of models without a class token: what looks, and how that is said
    RegionViT: (region_attention, "; of RegionViT's region tokens, in its first stage"),
    SwinTransformerV2: (window_attention, "; of the patches of a window to each of them, in Swin V2's first block"),
}
_COLORS = "tab:gray", "tab:orange", "tab:green", "tab:blue"


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def print(self, console: Console) -> None:
        table = rich.table.Table(title=self.title, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        lines = [self.columns, ("---",) + ("---:",) * (len(self.columns) - 1), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def final_accuracies(runs: Sequence[Run], model: str, size: int) -> list[float]:
    """Test accuracy after the last step in percent, one per seed."""
    return [100 * r.accuracies[-1] for r in runs if r.model == model and r.size == size]


def accuracy_table(system: System, runs: Sequence[Run]) -> Table:
    rows = []
    for size in sorted({r.size for r in runs}):
        plain, ours = (mean_sd(final_accuracies(runs, model, size)) for model in system.trained)
        rows.append((str(size), f"{plain[0]:.1f} ± {plain[1]:.1f}", f"{ours[0]:.1f} ± {ours[1]:.1f}", f"{ours[0] - plain[0]:+.1f}"))
    seeds = len({r.seed for r in runs})
    title = f"Test accuracy in %, mean ± standard deviation over {seeds} seeds" if seeds > 1 else "Test accuracy in %, one seed only"
    return Table(title, ("training images", "plain", system.label, f"{system.label} - plain"), rows)


def cost_table(system: System, setting: str, costs: Mapping[str, Cost]) -> Table:
    base = costs["plain"]
    rows = [
        (
            system.labels[name],
            f"{cost.params:,}",
            f"{cost.macs / 1e6:,.4g}",
            f"{1e3 * cost.step_time:,.1f} ({cost.step_time / base.step_time:.2f}x)",
            f"{cost.peak / 2**20:,.1f} ({cost.peak / base.peak:.2f}x)",
        )
        for name, cost in costs.items()
    ]
    return Table(f"Cost of {setting}", ("model", "params", "MMACs/image", "ms", "peak MiB"), rows)


def write_markdown(path: Path, tables: Sequence[Table]) -> None:
    with written(path) as part:
        part.write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")


def write_csv(path: Path, system: System, runs: Sequence[Run], costs: Mapping[str, Mapping[str, Cost]]) -> None:
    """One number per row: setting, model, quantity, value, sd."""
    with written(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("setting", "model", "quantity", "value", "sd"))
        for size in sorted({r.size for r in runs}):
            for model in system.trained:
                mean, sd = mean_sd(final_accuracies(runs, model, size))
                writer.writerow((f"{size} training images", model, "accuracy %", f"{mean:.2f}", f"{sd:.2f}"))
        for setting, models in costs.items():
            for model, cost in models.items():
                writer.writerow((setting, model, "parameters", cost.params, ""))
                writer.writerow((setting, model, "MACs per image", cost.macs, ""))
                writer.writerow((setting, model, "seconds per training step", f"{cost.step_time:.6f}", ""))
                writer.writerow((setting, model, "peak bytes of a training step", cost.peak, ""))


def plot_curves(path: Path, system: System, runs: Sequence[Run]) -> None:
    """Test accuracy over training steps, one panel per training-set size; the band spans the seeds."""
    sizes = sorted({r.size for r in runs})
    figure = Figure(figsize=(3.2 * len(sizes), 3), layout="constrained")  # no pyplot: nothing global, no display needed
    axes = figure.subplots(1, len(sizes), sharey=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for model, color in zip(system.trained, _COLORS, strict=False):
            chosen = [r for r in runs if r.model == model and r.size == size]
            values = 100 * np.array([r.accuracies for r in chosen])
            axis.plot(chosen[0].at, values.mean(0), color=color, label=system.label if model == system.name else model, marker=".")
            axis.fill_between(chosen[0].at, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
        axis.set(title=f"{size} training images", xlabel="training step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][-1].legend(loc="lower right")
    with written(path) as part:
        figure.savefig(part, dpi=120, format="png")


def attention_maps(models: Mapping[str, nn.Module], x: Tensor) -> tuple[str, dict[str, Tensor]]:
    """What the maps are, and each model's (n, H, W) for ``x``, as multiples of a patch's even share: roll-outs through all blocks, or,
    where one of the models has none (keys of convolutions, attention by regions), a block's attention for all of them.
    """
    try:
        maps = {label: rollout(model.eval(), x, prefix="normalize").maps[:, 0] for label, model in models.items()}
        what = "What the class token draws on: attention roll-out through all blocks"
    except ValueError:
        looks = {label: _LOOKS.get(type(model), (cls_attention, "")) for label, model in models.items()}
        maps = {label: looks[label][0](model, x) for label, model in models.items()}
        maps = {label: found / found.sum((1, 2), keepdim=True) for label, found in maps.items()}
        what = "Attention of the class token, last block" + "".join(said for _, said in looks.values())
    return what, {label: found * found[0].numel() for label, found in maps.items()}


def plot_attention(path: Path, system: System, runs: Sequence[Run], recipe: Recipe, count: int = 6) -> None:
    """A few test digits and, below each, :func:`attention_maps` of the two models, each on its own scale of colours."""
    kept = {r.model: r for r in runs if r.weights is not None}
    x = data.load()[1].x[:count]
    labels = {name: system.label if name == system.name else name for name in system.trained}
    what, maps = attention_maps({label: trained(kept[name], recipe) for name, label in labels.items()}, x)
    figure = Figure(figsize=(1.3 * count + 0.8, 1.3 * (1 + len(maps)) + 0.9), layout="constrained")  # no pyplot: nothing global
    axes = figure.subplots(1 + len(maps), count, squeeze=False)
    for axis, image in zip(axes[0], x[:, 0], strict=True):
        axis.imshow(image, cmap="gray")
    for line, (label, images) in zip(axes[1:], maps.items(), strict=True):
        line[0].set_ylabel(label)
        for axis, image in zip(line, images, strict=True):
            heat = axis.imshow(image, cmap="viridis", vmin=0, vmax=float(images.max()))
        figure.colorbar(heat, ax=line.tolist(), label="times the\neven share")
    axes[0][0].set_ylabel("digit")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    see = "Bright patches weigh most; one with 1 weighs as much as on average. Compare them with the strokes, and the two bars' ranges."
    figure.suptitle(f"{what} ({kept[system.name].size} training images)\n{see}", fontsize=8)
    with written(path) as part:
        figure.savefig(part, dpi=120, format="png")
