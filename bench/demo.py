"""`python -m bench demo`: runs `lifeops demo`, stores what it found in bench/results/demo/, and writes the pages' tables and docs/demo.png.

A stored file is the demo's table with the commit, the machine and torch; "finetune" is examples/finetune_digits.py. ``--draw`` runs
nothing and writes tables and picture again.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from bench import rows
from lifeops.demo import run
from lifeops.demo.impulse import SYSTEM as IMPULSE
from lifeops.demo.train import SYSTEMS, Recipe
from lifeops.files import written

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "demo"
PICTURE = ROOT / "docs" / "demo.png"
PICTURES = ROOT / "docs" / "systems"  # the demo's own, of each system
FIRST = {  # what the README compares, and which of a pretrained model's weights a conversion keeps
    "life": "all but q, k, v", "localvit": "all but the MLP's", "dw_shortcut": "all, renamed",
}  # fmt: skip
KNOWN = {**SYSTEMS, IMPULSE.name: IMPULSE}
FINETUNE = "finetune"
SMALL, TINY = "the demo's model", "DeiT-Tiny"  # whose training steps are timed
SECONDS, PEAK = "seconds per training step", "peak bytes of a training step"
_SIZE = " training images"
MODEL = f"a ViT of width {Recipe.embed_dim}, depth {Recipe.depth}, on {8 // Recipe.patch_size} x {8 // Recipe.patch_size} patches"


class Found(NamedTuple):
    """One system's demo. ``accuracy``: {images: {model: (mean, sd)}}; ``costs``: {setting: {model: {quantity: value}}}."""

    system: str
    commit: str
    machine: str
    torch: str
    seeds: int
    accuracy: dict[int, dict[str, tuple[float, float]]]
    costs: dict[str, dict[str, dict[str, float]]]

    def cost(self, quantity: str, setting: str) -> float:
        """The system's over the plain model's, of the setting named."""
        of = next(models for name, models in self.costs.items() if setting in name)
        return of[self.system][quantity] / of["plain"][quantity]


def read(path: Path) -> Found:
    """A stored file."""
    facts = json.loads(path.read_text())
    accuracy, costs = {}, {}
    for setting, model, quantity, value, sd in facts["rows"]:
        if setting.endswith(_SIZE):
            accuracy.setdefault(int(setting.removesuffix(_SIZE)), {})[model] = value, sd
        else:
            costs.setdefault(setting, {}).setdefault(model, {})[quantity] = value
    return Found(*(facts[name] for name in Found._fields[:5]), accuracy, costs)


def stored() -> dict[str, Found]:
    """Every stored demo by its system, in the order of the demo's own list."""
    return {name: read(path) for name in (*KNOWN, FINETUNE) if (path := RESULTS / f"{name}.json").exists()}


def table_rows(table: Path) -> list[list]:
    """The rows of a demo's table.csv."""
    with table.open(newline="") as file:
        return [[r["setting"], r["model"], r["quantity"], float(r["value"]), float(r["sd"] or 0)] for r in csv.DictReader(file)]


def curve_rows(curves: Path) -> list[list]:
    """The same of finetune.csv: accuracy behind the last step of each number of labelled images and model."""
    with curves.open(newline="") as file:
        points = list(csv.DictReader(file))
    last, found = max(int(point["step"]) for point in points), {}
    for point in points:
        if int(point["step"]) == last:
            found.setdefault((point["images"], point["model"]), []).append(float(point["accuracy"]))
    return [[size + _SIZE, model, "accuracy %", *_mean_sd(values)] for (size, model), values in found.items()]


def _mean_sd(values: list[float]) -> tuple[float, float]:
    return round(statistics.fmean(values), 2), round(statistics.stdev(values), 2) if len(values) > 1 else 0.0


def facts(system: str, seeds: int, found: list[list], commit: str) -> dict:
    """What is stored of a run."""
    where = {"machine": rows.machine(), "torch": torch.__version__}
    return {"system": system, "commit": commit, **where, "seeds": seeds, "rows": found}


def save(found: dict) -> Path:
    """Store it, one row a line."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{found['system']}.json"
    head = json.dumps({name: value for name, value in found.items() if name != "rows"})[:-1]
    with written(path) as part:
        part.write_text(head + ', "rows": [\n' + ",\n".join(map(json.dumps, found["rows"])) + "\n]}\n")
    return path


def accuracy_table(page: Path, system: str) -> str:
    """Test accuracy of one system's models, a line for each size of the training set, and where it was measured."""
    found = read(RESULTS / f"{system}.json")
    models = list(next(iter(found.accuracy.values())))
    images = "labelled images" if system == FINETUNE else "training images"
    lines = [f"| {images} | {' | '.join(map(_label, models))} |", "|---" + "|---:" * len(models) + "|"]
    for size, of in found.accuracy.items():
        lines.append(f"| {size} | " + " | ".join(_mean_with_sd(of[m]) for m in models) + " |")
    return "\n".join([*lines, "", f"Test accuracy in %, {_where([found])}"])


def finetune_table(page: Path) -> str:
    """The same of examples/finetune_digits.py."""
    return accuracy_table(page, FINETUNE)


def cost_table(page: Path, system: str) -> str:
    """A training step of one system's models over the plain model's."""
    found = read(RESULTS / f"{system}.json")
    lines = ["| a training step, over the plain model's | time | peak memory |", "|---|---:|---:|"]
    for setting, models in found.costs.items():
        for model, of in models.items():
            if model != "plain":
                whose = "lifeops" if model == system else "as the authors wrote it"
                times = (of[name] / models["plain"][name] for name in (SECONDS, PEAK))
                cells = " | ".join(f"{ratio:.2f}" for ratio in times)
                lines.append(f"| {setting.removeprefix('a training step of ')}: {whose} | {cells} |")
    return "\n".join(lines)


def choice_table(page: Path) -> str:
    """The README's comparison of the systems that a model can be converted to."""
    found = [read(RESULTS / f"{name}.json") for name in FIRST]
    sizes = list(found[0].accuracy)
    columns = [f"{size} images" for size in sizes]
    columns += ["training step: time", "memory", "pretrained weights kept"]
    lines = [f"| | {' | '.join(columns)} |", "|---" + "|---:" * len(columns[:-1]) + "|---|"]
    plain = [" to ".join(dict.fromkeys(_mean_with_sd(of.accuracy[size]["plain"]) for of in found)) for size in sizes]
    lines.append("| plain ViT | " + " | ".join([*plain, "1", "1", "-"]) + " |")
    for of in found:
        costs = [f"{of.cost(name, SMALL):.2f}" for name in (SECONDS, PEAK)]
        cells = [_mean_with_sd(of.accuracy[size][of.system]) for size in sizes]
        lines.append(f"| {_label(of.system)} | " + " | ".join([*cells, *costs, FIRST[of.system]]) + " |")
    tiny = ", ".join(f"{_label(of.system)} {of.cost(SECONDS, TINY):.2f}" for of in found)
    told = (
        f"Test accuracy in % of {MODEL}, from scratch, {_where(found)}\nTraining step: this model's, batch 32, one thread, over the plain"
        f" one's. DeiT-Tiny's, 224 px, batch 2: {tiny}; other CPUs: [performance](docs/performance.md). Run: `python -m bench demo`."
    )
    return "\n".join([*lines, "", told])


def _label(model: str) -> str:
    return KNOWN[model].label if model in SYSTEMS else model


def _mean_with_sd(found: tuple[float, float]) -> str:
    return f"{found[0]:.1f} ± {found[1]:.1f}"


def _where(found: list[Found]) -> str:
    commits, machines, seeds = ({of[n] for of in found} for n in (1, 2, 4))
    told = ", ".join(map(str, sorted(machines)))
    return f"mean ± sd over {max(seeds)} seeds, 597 test images of scikit-learn's digits; commit {', '.join(sorted(commits))}, {told}."


def figure(found: dict[str, Found]) -> Figure:
    """Accuracy against the number of training images, a line for each system: what local structure gains where images are few."""
    made = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = made.add_subplot()
    sizes = list(found["life"].accuracy)
    plain = [sum(found[name].accuracy[size]["plain"][0] for name in FIRST) / len(FIRST) for size in sizes]
    lines = {"plain ViT": plain} | {_label(name): [found[name].accuracy[size][name][0] for size in sizes] for name in FIRST}
    for (name, values), colour in zip(lines.items(), ("tab:gray", "tab:orange", "tab:blue", "tab:green"), strict=True):
        axes.plot(sizes, values, marker="o", color=colour, linewidth=2.2)
        shift = {"LIFE": -9, "DW shortcut": 9}.get(name, 0)  # their lines cross
        axes.annotate(name, (sizes[0], values[0]), (-8, shift), textcoords="offset points", color=colour, ha="right", va="center")
    axes.set(xscale="log", xticks=sizes, xticklabels=map(str, sizes), xlim=(sizes[0] / 1.9, sizes[-1] * 1.1))
    axes.set(xlabel="training images, of scikit-learn's digits (8 x 8 pixels)", ylabel="test accuracy, %")
    axes.set_title(f"{MODEL[0].upper()}{MODEL[1:]}, from scratch, mean over seeds")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return made


def draw() -> None:
    """docs/demo.png, and the tables of every page."""
    from bench import readme

    with written(PICTURE) as part:
        figure(stored()).savefig(part, dpi=110, format="png", metadata={"Software": None})
    readme.main([])


def measured(system: str, seeds: int, folder: Path) -> list[list]:
    """Run one demo; its rows. SystemExit where it fails."""
    if system == FINETUNE:
        subprocess.run([sys.executable, ROOT / "examples" / "finetune_digits.py", "--seeds", str(seeds), "--out", folder], check=True)
        with written(ROOT / "docs" / "finetune_digits.png") as part:
            part.write_bytes((folder / "finetune.png").read_bytes())
        return curve_rows(folder / "finetune.csv")
    if code := run.main(["--system", system, "--seeds", str(seeds), "--out", str(folder)]):
        raise SystemExit(code)
    folder /= KNOWN[system].name
    with written(PICTURES / f"{system}.png") as part:
        part.write_bytes((folder / ("heads.png" if system == IMPULSE.name else "curves.png")).read_bytes())
    return table_rows(folder / "table.csv")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench demo", description=__doc__)
    known = *KNOWN, FINETUNE
    parser.add_argument("systems", nargs="*", help=f"of {', '.join(known)}; default: {' '.join(FIRST)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draw", action="store_true", help="run nothing: the tables and the picture of what is stored")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.systems if name not in known]:
        raise SystemExit(f"bench demo: systems must be of {', '.join(known)}, got {', '.join(unknown)}")
    for system in () if args.draw else args.systems or FIRST:
        commit = rows.commit()  # of what runs, not of what may be committed meanwhile
        with tempfile.TemporaryDirectory() as folder:
            print(f"stored {save(facts(system, args.seeds, measured(system, args.seeds, Path(folder)), commit))}")
    draw()
    return 0
