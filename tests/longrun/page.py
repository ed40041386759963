"""What long runs found: results as a file (bench/results/longrun.json), a picture of the losses, and the tables of docs/reliability.md."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lifeops.demo.train import Run
from lifeops.files import written
from longrun.memory import Mark, growth
from longrun.training import ARMS, DTYPES, KERNELS, Cell

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "longrun.json"
PICTURE = ROOT / "docs" / "longrun.png"
WINDOW = 25  # steps whose mean loss is one point of a curve
START = 10  # steps in which roundings have not grown yet
LARGEST_RATIO = 1.5  # roundings that have grown to all that can be make it 1; of three seeds it is known to about a third
LARGEST_START = {"float32": 1e-5, "bfloat16": 5e-3}  # relative difference of losses there


# ------------------------------------------------------------------------------------------------ the statistic


class Verdict(NamedTuple):
    """Two arms: ``start``, the largest relative difference of a loss in the first steps; ``ratio``, the mean distance of two curves of one
    seed over that of two seeds' curves of one arm; ``shift``, their mean signed distance over it. Curves are log10 of the loss, averaged
    over ``WINDOW`` steps.
    """

    system: str
    dtype: str
    arms: tuple[str, str]
    start: float
    ratio: float
    shift: float

    @property
    def kept(self) -> bool:
        """Two curves of one seed are no further apart than two seeds', neither above nor below by more than half of that."""
        return self.start <= LARGEST_START[self.dtype] and self.ratio <= LARGEST_RATIO and abs(self.shift) <= 0.5


def curves(losses: Iterable[Iterable[float]], window: int = WINDOW) -> Tensor:
    """Losses of several seeds to (seeds, points)."""
    values = torch.tensor([[*run] for run in losses], dtype=torch.float64)
    return values.unfold(1, window, window).mean(2).log10()


def judge(cell: tuple[str, str, tuple[str, str]], ours: list[list[float]], theirs: list[list[float]], window: int = WINDOW) -> Verdict:
    """``cell``: system, dtype and arms; ``ours`` and ``theirs``: the losses of the same seeds."""
    a, b = (torch.tensor([run[:START] for run in losses], dtype=torch.float64) for losses in (ours, theirs))
    start = ((a - b).abs() / b.abs()).max().item()
    ours, theirs = curves(ours, window), curves(theirs, window)
    pairs = [*itertools.combinations(range(len(theirs)), 2)]
    seeds = statistics.mean((arm[i] - arm[j]).abs().mean().item() for arm in (ours, theirs) for i, j in pairs)
    apart = ours - theirs
    return Verdict(*cell, start, apart.abs().mean().item() / seeds, apart.mean().item() / seeds)


def _losses(runs: Mapping[Cell, Run], system: str, dtype: str, arm: str) -> list[list[float]]:
    return [run.losses for cell, run in runs.items() if cell[:3] == (system, dtype, arm)]


def verdicts(runs: Mapping[Cell, Run], window: int = WINDOW) -> list[Verdict]:
    """Of each system and dtype, for any two arms that were trained; the last pair, both torch's, shows what rounding alone does."""
    found = []
    for system, dtype in dict.fromkeys(cell[:2] for cell in runs):
        losses = {arm: _losses(runs, system, dtype, arm) for arm in ARMS}
        pairs = (pair for pair in itertools.combinations(ARMS, 2) if all(losses[arm] for arm in pair))
        found += [judge((system, dtype, pair), *(losses[arm] for arm in pair), window) for pair in pairs]
    return found


# ------------------------------------------------------------------------------------------------ what is kept


def keep(part: str, content: object) -> None:
    """Put ``content`` under the name ``part`` into the file of results."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    stored[part] = content
    with written(RESULTS) as file:
        file.write_text(json.dumps(stored, indent=1) + "\n")


def training_rows(runs: Mapping[Cell, Run]) -> list[dict]:
    """A row for every run: its curve as plain mean losses, and the accuracy at the end in percent."""
    return [
        {**cell._asdict(), "accuracy": round(100 * run.accuracies[-1], 2), "first": [float(f"{v:.7g}") for v in run.losses[:START]],
         "losses": [float(f"{10 ** v:.4g}") for v in curves([run.losses])[0].tolist()]}
        for cell, run in runs.items()
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ tables and the picture


def _accuracy(runs: Mapping[Cell, Run], *cell: str) -> str:
    """Of the arm ``cell``: mean and standard deviation over the seeds, in percent."""
    found = [100 * run.accuracies[-1] for of, run in runs.items() if of[:3] == cell]
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"


def training_table(runs: Mapping[Cell, Run]) -> str:
    lines = ["| system | autocast | compared | first steps | apart | shift | accuracies |", "|---|---|---|---:|---:|---:|---|"]
    for v in verdicts(runs):
        reached = "; ".join(_accuracy(runs, v.system, v.dtype, arm) for arm in v.arms)
        cells = v.system, v.dtype, " and ".join(map(_told, v.arms)), f"{v.start:.0e}", f"{v.ratio:.2f}", f"{v.shift:+.2f}", reached
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _told(arm: str) -> str:
    return "lifeops" if arm == KERNELS else arm


def memory_table(marks: list[Mark]) -> str:
    """Marks across the run, and what a call adds behind the warm-up."""
    shown = marks[:: len(marks) // 5] if len(marks) > 5 else marks
    lines = ["| calls | process, MB | malloc, MB | Python's blocks | tensors |", "|---:|---:|---:|---:|---:|"]
    for m in dict.fromkeys((*shown, marks[-1])):
        lines.append(f"| {m.calls:,} | {m.resident / 1e6:.1f} | {m.heap / 1e6:.1f} | {m.blocks:,} | {m.tensors} |")
    slope = growth(marks)
    added = f"{slope['resident']:.0f} B", f"{slope['heap']:.0f} B", f"{slope['blocks']:.4f}", f"{slope['tensors']:.0f}"
    lines.append(f"| added by a call | {' | '.join(added)} |")
    return "\n".join(lines)


def huge_table(rows: list[dict]) -> str:
    lines = ["| computed | elements | seconds |", "|---|---:|---:|"]
    lines += [f"| {row['what']} | {row['elements']:,} | {row['seconds']} |" for row in rows]
    return "\n".join([*lines, f"| most memory | | {max(row['peak_gb'] for row in rows)} GB |"])


def draw(runs: Mapping[Cell, Run], path: Path = PICTURE) -> None:
    """Losses over steps: a panel for each system and dtype, a colour for each arm, a line for each seed."""
    from matplotlib.figure import Figure

    systems = [*dict.fromkeys(cell.system for cell in runs)]
    figure = Figure(figsize=(3.1 * len(systems), 4.6), layout="constrained")
    panels = figure.subplots(len(DTYPES), len(systems), sharex=True, sharey="col", squeeze=False)
    for line, dtype in zip(panels, DTYPES, strict=True):
        for axes, system in zip(line, systems, strict=True):
            for arm, colour in zip(ARMS, ("tab:orange", "tab:blue", "tab:gray"), strict=True):
                for i, losses in enumerate(_losses(runs, system, dtype, arm)):
                    values = 10 ** curves([losses])[0]
                    steps = [WINDOW * (n + 0.5) for n in range(len(values))]
                    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.8, label=None if i else _told(arm))
            axes.set(yscale="log", title=f"{system}, {dtype}")
            axes.title.set_fontsize(9)
        line[0].set_ylabel("training loss")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    panels[0][0].legend(fontsize=7)
    with written(path) as part:
        figure.savefig(part, dpi=80, format="png", metadata={"Software": None})
