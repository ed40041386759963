"""The report on the terminal: one table per system, mode, allocator and cache, then what lost and what was wrong."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

from bench import rows as store
from bench.baselines import does_same_work
from bench.problems import Problem, targets
from bench.systems import better_plain

COLUMNS = ("problem, variant", "ms", "quartiles", "share", "bound", "MB", "ratio")
Key = tuple[Problem, str, str, str, int]


def measured(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["median_ms"] is not None]


def ratios(rows: list[dict]) -> dict[Key, dict[str, list[float]]]:
    """{(problem, machine, allocator, cache, threads): {"lifeops": [ms per repeat], baseline: [ratio to lifeops per repeat]}}."""
    grouped: dict = {}
    for row in measured(rows):
        key = store.problem(row), row["machine"], row["allocator"], row["cache"], row["threads"]
        grouped.setdefault((key, row["repeat"]), {})[row["variant"]] = row["median_ms"]
    out: dict = {}
    for (key, _), times in grouped.items():
        if "lifeops" not in times:
            continue
        cell = out.setdefault(key, {})
        for variant, ms in better_plain(times).items():
            cell.setdefault(variant, []).append(ms if variant == "lifeops" else ms / times["lifeops"])
    return out


def spread(values: list[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:.2f}" + (f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else "")


def missed(key: Key, cell: dict) -> list:
    """Promises of a problem, all for warm caches, that were not kept. A baseline that was not measured is none."""
    p, _, allocator, cache, _ = key
    promised = [] if cache != "warm" else targets(p, allocator)
    return [t for t in promised if t.baseline in cell and statistics.median(cell[t.baseline]) < t.at_least]


def where(key: Key) -> str:
    p, _, allocator, cache, threads = key
    return f"{p.system} {p.mode} {p.name}, {cache}, {allocator} allocator, {threads} thread{'s' * (threads != 1)}"


def faster(cell: dict[str, list[float]]) -> dict[str, list[float]]:
    """Baselines that do the same work in less time than lifeops."""
    return {b: v for b, v in cell.items() if b != "lifeops" and does_same_work(b) and statistics.median(v) < 1}


def wrong(rows: list[dict]) -> list[str]:
    return [f"{r['system']} {r['mode']} {store.problem(r).name} {r['variant']}: {r['note']}" for r in rows if r["note"]]


def losing(rows: list[dict]) -> tuple[list[str], list[str]]:
    """Lines for promises that were not kept, and for same-work baselines that are faster."""
    broken, slower = [], []
    for key, cell in ratios(rows).items():
        broken += [f"{where(key)}: {t.baseline} {spread(cell[t.baseline])}, promised {t.at_least:.2f}" for t in missed(key, cell)]
        slower += [f"{where(key)}: {b} {spread(v)}" for b, v in faster(cell).items()]
    return broken, slower


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"


def _ms(ms: float) -> str:
    """Three digits, as many as a measurement has."""
    return f"{ms:.{max(0, 2 - int(f'{ms:e}'.split('e')[1]))}f}"


def cells(row: dict) -> tuple[str, ...]:
    """One row's columns behind the variant."""
    if row["median_ms"] is None:
        return ("WRONG", "see below", *"-" * 4)
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    share = ("-", "-") if row["share"] is None else (f"{row['share']:.0%}", row["bound"])  # None: from before there was one
    return (_ms(row["median_ms"]), f"{_ms(row['q25_ms'])}-{_ms(row['q75_ms'])}", *share, _mb(row["peak_bytes"]), ratio)


def _table(title: str, members: list[dict]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for n, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if n else "left", no_wrap=True)
    last = None
    for row in members:
        p = store.problem(row)
        if p != last:
            table.add_row(p.name, *[""] * (len(COLUMNS) - 1), style="bold")
        table.add_row(f"  {row['variant']}", *cells(row), style="red" if row["median_ms"] is None else None)
        last = p
    return table


def report(rows: list[dict], console: Console) -> None:
    """All tables, the promises that were not kept and the cases that lose; within 80 columns. MB: at the peak; ratio: a variant's time
    over lifeops'.
    """
    grouped: dict = {}
    for row in rows:
        title = f"{row['system']} {row['mode']}, {row['cache']} cache, {row['allocator']} allocator, {row['threads']} threads"
        grouped.setdefault(title, []).append(row)
    for title, members in grouped.items():
        console.print(_table(title, members))
    broken, slower = losing(rows)
    for name, lines in (
        ("promises not kept", broken),
        ("baselines faster than lifeops", slower),
        ("WRONG RESULTS, no number", wrong(rows)),
    ):
        console.print(f"{len(lines)} {name}" + (":" if lines else ""))
        for line in lines:
            console.print("  " + line, highlight=False)


def verdict(rows: list[dict], seconds: float, quick: bool) -> str:
    """The last lines of a run: what they mean."""
    broken, slower = losing(rows)
    count = len({(store.key(row), row["cache"]) for row in rows})
    bad = len(wrong(rows))
    told = f"{count} cases in {seconds:.0f} s. ratio: a variant's time over lifeops', above 1 lifeops is faster.\n"
    told += f"{'FAILED' if bad else 'ok'}: {bad} wrong results; {len(broken)} promises not kept and {len(slower)} faster baselines,"
    told += " listed above."
    return told + ("\nA quick run is a look: a neighbour on the machine moves its ratios by a tenth." if quick else "")
