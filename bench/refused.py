"""Rows that cannot be, or that nobody can measure again: pages leave them out and name them, `python -m bench again` measures them anew.

Of what is compared: a share of the speed of light above 110 %, a training step that takes less than its backward, K 5 taking 1.3 times as
long as K 7 of the same size, quartiles 1.5 apart, and rows of a commit with changes that were not committed.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from bench import rows as store
from bench.baselines import does_same_work
from bench.tables import measured

RESULTS = Path(__file__).parent / "results"
SHARE = 1.10
SLOWER = 1.3  # K 5 over K 7
APART = 1.5  # the upper quartile over the lower
DIRTY = "measured with changes that were not committed"


def _compared(row: dict) -> bool:
    """The variants that a page's figures are about; the others' times give no verdict."""
    return row["variant"] == "lifeops" or does_same_work(row["variant"])


def _said(row: dict, why: str) -> str:
    return f"{row['variant']}{' cold' if row['cache'] == 'cold' else ''}: {why}"


def _alone(row: dict) -> list[str]:
    """What is wrong with one row by itself."""
    why = []
    if row["commit"].endswith("-dirty"):
        why.append(DIRTY)
    if not _compared(row):
        return why
    if row["share"] is not None and row["share"] > SHARE:
        why.append(_said(row, f"{row['share']:.0%} of the speed of light"))
    if row["q75_ms"] > APART * row["q25_ms"]:
        why.append(_said(row, f"half of the calls took {row['q25_ms']:.2f} to {row['q75_ms']:.2f} ms"))
    return why


def _same(row: dict, **other) -> tuple:
    """What stands for the same variant, measured likewise, of a problem that differs in ``other`` alone."""
    facts = {name: row[name] for name in (*store.SAME, "cache", "repeat", "variant")}
    return (*facts.values(), store.problem(row)._replace(**other))


def _beside(row: dict, times: dict[tuple, float]) -> list[str]:
    """What is wrong with it beside another one."""
    ms, why = row["median_ms"], []
    if row["mode"] == "fwdbwd" and (backward := times.get(_same(row, mode="bwd"), 0)) > ms:
        why.append(_said(row, f"forward and backward {ms:.2f} ms, backward alone {backward:.2f} ms"))
    if row["variant"] == "lifeops" and row["K"] == 5 and ms > SLOWER * (wider := times.get(_same(row, K=7), ms)):
        why.append(_said(row, f"K 5 {ms:.2f} ms, K 7 {wider:.2f} ms"))
    return why


def refused(rows: list[dict]) -> dict[tuple, list[str]]:
    """{what a new measurement replaces (:func:`bench.rows.key`): the reasons}."""
    rows = measured(rows)
    times = {_same(row): row["median_ms"] for row in rows}
    found: dict[tuple, list[str]] = {}
    for row in rows:
        for why in _alone(row) + (_beside(row, times) if _compared(row) else []):
            reasons = found.setdefault(store.key(row), [])
            reasons += [] if why in reasons else [why]
    return found


def accepted(rows: list[dict]) -> list[dict]:
    """The rows that a page may show."""
    out = refused(rows)
    return [row for row in rows if store.key(row) not in out]


def stored() -> dict[Path, list[dict]]:
    """The files of rows of ops, blocks and models, without what varies one size."""
    return {path: store.read(path) for path in sorted(RESULTS.glob("*.csv")) if not path.stem.startswith("scaling")}


def shown() -> list[dict]:
    """Those of their rows that pages may show."""
    return [row for rows in stored().values() for row in accepted(rows)]


def lines(rows: list[dict]) -> list[str]:
    """What was refused and why, one line each; problems that are only dirty in one line per system and mode."""
    named, dirty = [], []
    for key, why in refused(rows).items():
        p = key[-1]
        if why == [DIRTY]:
            dirty.append((f"{p.system} {p.mode}", DIRTY))
        else:
            named.append(f"{p.system} {p.mode} {p.name}: {'; '.join(why)}")
    counted = [(of, len(list(group))) for of, group in groupby(dirty)]
    return named + [f"{of[0]}, {n} problem{'s' * (n > 1)}: {of[1]}" for of, n in counted]
