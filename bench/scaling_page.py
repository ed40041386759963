"""The page's section on how cost grows with size: the picture, a table per study, and what explains each kink."""

from __future__ import annotations

from pathlib import Path

from bench import rows as store
from bench.scaling import THREADS, Study, exponent, points, spread, studies

INTRO = """One size is varied at a time, float32; warm caches, warm allocator, {threads} threads, the fastest of {repeats} fresh processes.
"ns per" unit would be constant where the cost is linear; "slope" is the exponent from the size above in log-log, 1 if linear;
"repeats" the slowest process over the fastest: this machine is shared, and a step smaller than that is no kink.
"""


def _rows_of(study: Study, rows: list[dict]) -> list[str]:
    here = points(study, rows)
    others = {name: dict(points(study, rows, name)) for name in ("eager", "naive", "clone")}
    unit = {"grid": "token", "tokens": "token", "batch": "image", "channels": "channel"}[study.axis]
    others = {name: found for name, found in others.items() if found}
    header = [study.axis, "MB moved", "lifeops ms", f"ns per {unit}", "slope", "repeats", *(f"{name} ns per {unit}" for name in others)]
    lines = [f"### {study.name}, {study.axis}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for (p, row), slope in zip(here, exponent(study, here), strict=True):
        work = study.work(p)
        size = f"{p.H}x{p.W}" if study.axis == "grid" else str(work)
        per = [f"{1e6 * found[p]['median_ms'] / work:.0f}" if p in found else "-" for found in others.values()]
        grows = "-" if slope is None else f"{slope:.2f}"
        ours = f"{row['median_ms']:.3f}", f"{1e6 * row['median_ms'] / work:.0f}"
        cells = [size, f"{row['bytes'] / 1e6:.2f}", *ours, grows, f"{spread(row, rows):.2f}", *per]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _threads(rows: list[dict]) -> list[str]:
    """Speed-up over one thread."""
    lines = ["### threads", "", "| problem | " + " | ".join(f"{t} threads ms" for t in THREADS) + " | speed-up |", "|---" * 4 + "|"]
    for study in (s for s in studies() if s.axis == "threads"):
        found = [dict(points(study, rows, threads=t)) for t in THREADS]
        for p in study.problems:
            if all(p in f for f in found):
                one, two = (f[p]["median_ms"] for f in found)
                lines.append(f"| {study.name} {p.name} | {one:.3f} | {two:.3f} | {one / two:.2f} |")
    return [*lines, ""]


def section(path: Path, rows: list[dict]) -> list[str]:
    first = rows[0]
    where = "" if store.is_gpu(first) else " Measured on a CPU; not measured on a GPU."
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines = [f"## Scaling: {first['machine']}", "", f"torch {first['torch']}, commit {commits}, `{path.name}`.{where}", ""]
    lines += [
        INTRO.format(threads=max(THREADS), repeats=1 + max(row["repeat"] for row in rows)),
        f"![scaling]({path.stem}.png)",
        "",
    ]
    note = path.with_suffix(".md")
    lines += [note.read_text()] if note.exists() else []
    for study in studies():
        if study.axis != "threads" and points(study, rows):
            lines += _rows_of(study, rows)
    return lines + _threads(rows)
