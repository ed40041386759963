"""Writes docs/performance.md from the rows in bench/results/ and from nothing else: `python -m bench.page`."""

from __future__ import annotations

import csv
import statistics
from itertools import groupby
from pathlib import Path
from typing import get_type_hints

from bench.__main__ import _spread, ratios
from bench.problems import Problem, targets

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
INTRO = """# Performance

Written by `python -m bench.page` from the rows in `bench/results/`. Each figure is how many times slower a baseline is than
lifeops in the same run, variants interleaved call by call: the median over fresh processes, with the spread in brackets where
there were several. `warm` keeps glibc from returning freed memory, so that page faults stay out of the loop; `default` is glibc
as it comes. Baselines: `eager` is the path people write (view as a map, conv2d, view back, cat; for LIFE the authors' module),
`onednn` the bare convolution on a ready channels-last map, `plain` the ordinary C -> 3C projection by the better of two library
paths, `compiled` torch.compile of `eager`, `block` the Transformer block without the shortcut around it, `mlp` the LayerNorm and
MLP that LocalViT's feed-forward replaces, `sdpa` torch's attention without a local term, `clone` a copy of the same bytes. `fwd`
is inference: batch norms folded or constant. "promise" says whether the library's own target for that row was met.

**No GPU has been measured.** Until one is, the evidence for the GPU kernels is static: `make budgets`.
"""


def read(path: Path) -> list[dict]:
    whole = {f for f, kind in get_type_hints(Problem).items() if kind is int}
    with path.open(newline="") as file:
        return [{k: int(v) if k in whole else float(v) if k.endswith("_ms") else v for k, v in row.items()} for row in csv.DictReader(file)]


def _row(p: Problem, allocator: str, cell: dict, baselines: list[str]) -> str:
    promised = targets(p, allocator)
    missed = [t for t in promised if statistics.median(cell[t.baseline]) < t.at_least]
    verdict = "-" if not promised else "kept" if not missed else "; ".join(f"missed: {t.baseline} {t.at_least:.2f}" for t in missed)
    ours = f"{statistics.median(cell['lifeops']):.2f}"
    return "| " + " | ".join([p.name, ours, *(_spread(cell[b]) for b in baselines), verdict]) + " |"


def tables(rows: list[dict]) -> list[str]:
    lines = []
    cells = list(ratios(rows).items())
    for (system, mode, allocator), group in groupby(cells, key=lambda c: (c[0][0].system, c[0][0].mode, c[0][1])):
        members = list(group)
        baselines = [b for b in members[0][1] if b != "lifeops" and not b.startswith("plain_")]
        header = ["problem", "lifeops ms", *baselines, "promise"]
        lines += [f"### {system}, {mode}, {allocator} allocator", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += [_row(p, allocator, cell, baselines) for (p, _), cell in members]
        kept = sum("missed" not in line for line in lines[-len(members) :])
        lines += ["", f"{kept} of {len(members)} rows keep their promise or have none.", ""]
    return lines


def page() -> str:
    lines = [INTRO]
    for path in sorted((ROOT / "bench" / "results").glob("*.csv")):
        rows = read(path)
        first = rows[0]
        facts = f"torch {first['torch']}, {first['threads']} threads, commit {first['commit']}, `{path.name}`"
        lines += [f"## {first['machine']}", "", facts, ""]
        lines += tables(rows)
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
