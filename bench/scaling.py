"""`python -m bench scaling`: cost against grid, batch, channels and threads, one of them varied at a time; rows are stored.

The rows are ordinary ones; a study is the list of their problems, so a picture or a table needs nothing else.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from bench import rows as store
from bench import tables
from bench.collect import Options, collect
from bench.problems import Problem

RESULTS = Path(__file__).parent / "results"
GRIDS = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
CHANNELS = (16, 32, 48, 64, 80, 96, 100, 120, 128, 160, 192, 200, 256, 264, 320, 384, 392, 448, 512, 640, 768, 776, 1024)
THREADS = (1, 2)
LONG_GRIDS = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48)


@dataclass(frozen=True)
class Study:
    """What is varied; ``work(p)`` is the size that a linear cost would follow."""

    name: str
    axis: str
    problems: tuple[Problem, ...]
    threads: tuple[int, ...] = (2,)

    def work(self, p: Problem) -> int:
        return {"grid": p.P + p.H * p.W, "batch": p.B, "channels": p.C, "threads": 1}[self.axis]


def _studies(base: Problem, grids, batches, channels) -> list[Study]:
    system, mode = base.system, base.mode
    return [
        Study(f"{system} {mode}", "grid", tuple(base._replace(H=n, W=n) for n in grids)),
        Study(f"{system} {mode}", "batch", tuple(base._replace(B=n) for n in batches)),
        Study(f"{system} {mode}", "channels", tuple(base._replace(C=n) for n in channels)),
        Study(f"{system} {mode}", "threads", (base, base._replace(B=1), base._replace(B=32)), THREADS),
    ]


def studies() -> list[Study]:
    dwconv = Problem("token_dwconv", "fwd", 4, 14, 14, 192, 3, "float32")
    qkv = Problem("life_qkv", "fwd", 4, 14, 14, 192, 0, "float32")
    attention = Problem("local_attention", "fwd", 1, 14, 14, 192, 3, "float32")
    found = []
    for mode in ("fwd", "fwdbwd"):
        found += _studies(dwconv._replace(mode=mode), GRIDS, BATCHES, CHANNELS)
    found += _studies(qkv, GRIDS[:-3], BATCHES[:-2], (192, 384, 576, 768, 960))
    found.append(Study("local_attention fwd", "grid", tuple(attention._replace(H=n, W=n) for n in LONG_GRIDS)))
    rollout = attention._replace(system="rollout", K=0)
    found.append(Study("rollout fwd", "grid", tuple(rollout._replace(H=n, W=n) for n in LONG_GRIDS)))
    return found


def todo(threads: int) -> list[Problem]:
    """Every problem of a study with that number of threads, once."""
    return list(dict.fromkeys(p for s in studies() if threads in s.threads for p in s.problems))


def points(study: Study, rows: list[dict], variant: str = "lifeops", threads: int = 2) -> list[tuple[Problem, dict]]:
    """The study's problems that were measured, with their rows (warm caches)."""
    found = {
        store.problem(r): r
        for r in tables.measured(rows)
        if (r["variant"], r["threads"], r["cache"], r["allocator"]) == (variant, threads, "warm", "warm")
    }
    return [(p, found[p]) for p in study.problems if p in found]


def exponent(study: Study, here: list[tuple[Problem, dict]]) -> list[float | None]:
    """Local slope in log-log between neighbours: 1 is linear in the work; None for the first."""
    out: list[float | None] = [None]
    for (p, a), (q, b) in pairwise(here):
        out.append(math.log(b["median_ms"] / a["median_ms"]) / math.log(study.work(q) / study.work(p)))
    return out


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench scaling", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.4, help="per problem")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling_cpu.csv")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    found: list[dict] = []
    for threads in sorted({t for s in studies() for t in s.threads}):
        o = replace(Options(seconds=args.seconds, cache="warm"), threads=(threads,))
        found += collect(todo(threads), o, console, lambda so_far: store.save(so_far, args.out))
    tables.report(found, console)
    return int(any(row["note"] for row in found))
