"""`python -m bench compare A B`: two files of rows (CSV or JSON), problem by problem and variant by variant.

B / A is the ratio of the medians, with the least and the greatest that the quartiles allow. A change is marked where the two
quartile ranges do not overlap: "slower" where all of B's middle half is above A's, "faster" where it is below.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench import rows as store
from bench.tables import measured


class Change(NamedTuple):
    """Times of B over A: of the medians, and the least and greatest within the quartiles."""

    ratio: float
    least: float
    greatest: float

    @property
    def mark(self) -> str:
        return "slower" if self.least > 1 else "faster" if self.greatest < 1 else ""


def key(row: dict) -> tuple:
    return (*store.problem(row), row["allocator"], row["cache"], row["threads"], row["variant"])


def times(rows: list[dict]) -> dict[tuple, tuple[float, float, float]]:
    """(median, lower, upper quartile) over the repeats: the median of medians, the outermost quartiles."""
    grouped: dict = {}
    for row in measured(rows):
        grouped.setdefault(key(row), []).append(tuple(row[name] for name in store.TIMES))
    middle = {k: tuple(zip(*v, strict=True)) for k, v in grouped.items()}
    return {k: (statistics.median(m), min(low), max(high)) for k, (m, low, high) in middle.items()}


def compare(a: list[dict], b: list[dict]) -> dict[tuple, Change]:
    """What both files measured."""
    before, after = times(a), times(b)
    found = {}
    for k, (median, low, high) in before.items():
        if k in after:
            m, lo, hi = after[k]
            found[k] = Change(m / median, lo / high, hi / low)
    return found


def table(changes: dict[tuple, Change], title: str) -> Table:
    out = Table(title=title, title_justify="left")
    for name in ("system", "mode", "problem", "regime", "variant", "B / A", "spread", ""):
        out.add_column(name, justify="right" if name in ("B / A", "spread") else "left", no_wrap=True)
    for k, c in changes.items():
        p = store.Problem(*k[:9])
        allocator, cache, threads, variant = k[9:]
        colour = {"slower": "red", "faster": "green"}.get(c.mark)
        regime = f"{cache}, {allocator}, {threads}"
        out.add_row(p.system, p.mode, p.name, regime, variant, f"{c.ratio:.2f}", f"{c.least:.2f}-{c.greatest:.2f}", c.mark, style=colour)
    return out


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, help="rows before")
    parser.add_argument("b", type=Path, help="rows after")
    args = parser.parse_args(argv)
    try:
        a, b = store.read(args.a), store.read(args.b)
    except (OSError, ValueError) as error:
        raise SystemExit(f"bench compare: {error}") from None
    changes = compare(a, b)
    if not changes:
        raise SystemExit(f"bench compare: {args.a} and {args.b} have no problem in common")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(changes, f"A: {args.a}, B: {args.b}"))
    marks = [c.mark for c in changes.values()]
    lone = len(times(a).keys() ^ times(b).keys())
    console.print(f"{len(marks)} compared, {marks.count('slower')} slower, {marks.count('faster')} faster; {lone} in one file only")
    machines = {row["machine"] for row in (*a, *b)}
    if len(machines) > 1:
        console.print(f"different machines: {', '.join(sorted(machines))}")
    return 0
