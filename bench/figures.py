"""Pictures of rows: ratios to lifeops per system, the share of the speed of light, and cost against size beside a linear one."""

from __future__ import annotations

import math
import statistics
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from bench import scaling, tables
from bench.baselines import does_same_work
from lifeops.files import written

COLOURS = dict(zip(("eager", "onednn", "compiled", "compiled_shifts", "naive", "plain", "clone"), (f"C{n}" for n in range(7)), strict=True))
BOUND_COLOURS = {"bytes": "tab:blue", "flops": "tab:orange", "issue": "tab:green"}


def save(figure: Figure, path: Path) -> Path:
    """The same bytes for the same picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as part:
        figure.savefig(part, dpi=90, format="png", metadata={"Software": None})
    return path


def ratio_figure(rows: list[dict], title: str) -> Figure | None:
    """One mark per problem and baseline, a line of systems and modes: right of 1 the baseline is slower than lifeops."""
    lines: dict[str, dict[str, list[float]]] = {}
    for (p, *_, cache, threads), cell in tables.ratios(rows).items():
        if cache == "warm" and threads == 2:
            line = lines.setdefault(f"{p.system} {p.mode}", {})
            for baseline, values in cell.items():
                if baseline not in ("lifeops", "clone") and not baseline.startswith("plain_"):
                    line.setdefault(baseline, []).append(statistics.median(values))
    if not lines:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    named = set()
    for y, line in enumerate(lines.values()):
        for baseline, values in line.items():
            label = None if baseline in named else baseline
            named.add(baseline)
            look = {"marker": "o" if does_same_work(baseline) else "x", "color": COLOURS.get(baseline, "gray"), "alpha": 0.7}
            axes.scatter(values, [y] * len(values), s=22, label=label, **look)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yticks=range(len(lines)), yticklabels=lines, xlabel="time over lifeops' (crosses: less work)", title=title)
    axes.invert_yaxis()
    axes.legend(fontsize="small")
    return figure


def share_figure(rows: list[dict], title: str) -> Figure | None:
    """lifeops' share of the speed of light per problem, coloured by what binds."""
    ours = [r for r in tables.measured(rows) if r["variant"] == "lifeops" and r["cache"] == "warm" and r["share"] and r["threads"] == 2]
    if not ours:
        return None
    lines = {name: list(group) for name, group in groupby(ours, key=lambda r: f"{r['system']} {r['mode']}")}
    figure = Figure(figsize=(9, 1.2 + 0.25 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    for bound, colour in BOUND_COLOURS.items():
        dots = [(r["share"], y) for y, group in enumerate(lines.values()) for r in group if r["bound"] == bound]
        if dots:
            axes.scatter(*zip(*dots, strict=True), s=20, alpha=0.6, color=colour, label=f"bound by {bound}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=range(len(lines)), yticklabels=lines, xlabel="share of the speed of light", title=title)
    axes.invert_yaxis()
    axes.legend(fontsize="small")
    return figure


def _cost_panel(axes, study: scaling.Study, rows: list[dict]) -> None:
    """Nanoseconds per unit of work: a linear cost is a flat line."""
    for variant, colour in (("lifeops", "tab:blue"), ("eager", "tab:gray"), ("naive", "tab:gray"), ("clone", "tab:green")):
        here = scaling.points(study, rows, variant)
        if len(here) > 1:
            size = [study.work(p) for p, _ in here]
            per = [1e6 * r["median_ms"] / w for (_, r), w in zip(here, size, strict=True)]
            low, high = ([1e6 * r[name] / w for (_, r), w in zip(here, size, strict=True)] for name in ("q25_ms", "q75_ms"))
            axes.plot(size, per, marker=".", color=colour, label=variant)
            axes.fill_between(size, low, high, color=colour, alpha=0.2, linewidth=0)
            if variant == "lifeops":
                axes.axhline(statistics.median(per), color=colour, linewidth=0.6, linestyle="--", label="linear")
    unit = {"grid": "tokens N", "tokens": "tokens N", "batch": "images B", "channels": "channels C"}[study.axis]
    axes.set(xscale="log", yscale="log", xlabel=unit, ylabel=f"ns per {unit.split()[0][:-1]}", title=f"{study.name}: {study.axis}")
    axes.legend(fontsize="x-small")


def scaling_figure(rows: list[dict]) -> Figure | None:
    """Cost per unit of work against size, one panel per study."""
    panels = [s for s in scaling.studies() if s.axis != "threads" and len(scaling.points(s, rows)) > 1]
    if not panels:
        return None
    across = 3
    figure = Figure(figsize=(4.4 * across, 3.4 * math.ceil(len(panels) / across)), layout="constrained")
    for n, study in enumerate(panels):
        _cost_panel(figure.add_subplot(math.ceil(len(panels) / across), across, n + 1), study, rows)
    return figure


def draw(rows: list[dict], folder: Path, name: str = "bench") -> list[Path]:
    """Write every picture that these rows allow; returns their paths."""
    made = []
    title = ", ".join(sorted({row["machine"] for row in rows}))
    for kind, figure in (("ratios", ratio_figure(rows, title)), ("share", share_figure(rows, title)), ("scaling", scaling_figure(rows))):
        if figure is not None and (kind == "scaling") == name.startswith("scaling"):
            made.append(save(figure, folder / f"{name}{'' if kind == 'scaling' else '_' + kind}.png"))
    return made


def draw_files(found: dict[str, list[dict]], folder: Path) -> list[Path]:
    """Those of several files' rows, by the files' names."""
    return [made for name, rows in found.items() for made in draw(rows, folder, name)]
