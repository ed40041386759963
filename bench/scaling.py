"""`python -m bench scaling`: cost against grid, batch, channels and threads, one of them varied at a time; rows are stored.

The rows are ordinary ones; a study is the list of their problems, so a picture or a table needs nothing else.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from bench import rows as store
from bench import tables
from bench.again import kept
from bench.collect import Options, collect
from bench.problems import Problem

RESULTS = Path(__file__).parent / "results"
GRIDS = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 104, 112, 128)
BATCHES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
CHANNELS = (16, 32, 48, 64, 72, 96, 128, 136, 160, 192, 200, 256, 264, 320, 384, 392, 512, 520, 640, 768, 776, 1024)
THREADS = (1, 2)
LONG_GRIDS = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)


@dataclass(frozen=True)
class Study:
    """What is varied; ``work(p)`` is the size that a linear cost would follow."""

    name: str
    axis: str
    problems: tuple[Problem, ...]
    threads: tuple[int, ...] = (2,)

    def work(self, p: Problem) -> int:
        tokens = p.P + p.H * p.W
        return {"grid": tokens, "tokens": tokens, "batch": p.B, "channels": p.C, "threads": 1}[self.axis]


def _studies(base: Problem, grids, batches, channels) -> list[Study]:
    name = f"{base.system} {base.mode}"
    return [
        Study(name, "grid", tuple(base._replace(H=n, W=n) for n in grids)),
        Study(name, "batch", tuple(base._replace(B=n) for n in batches)),
        Study(name, "channels", tuple(base._replace(C=n) for n in channels)),
        Study(name, "threads", tuple(base._replace(B=n) for n in batches[::3]), THREADS),
    ]


def studies() -> list[Study]:
    dwconv = Problem("token_dwconv", "fwd", 4, 14, 14, 192, 3, "float32")
    qkv = Problem("life_qkv", "fwd", 4, 14, 14, 192, 0, "float32")
    attention = Problem("local_attention", "fwd", 1, 14, 14, 192, 3, "float32")
    found = []
    for mode in ("fwd", "fwdbwd"):
        found += _studies(dwconv._replace(mode=mode), GRIDS, BATCHES, CHANNELS)
    found += _studies(qkv, GRIDS[:-6], BATCHES[:-4], (192, 384, 576, 768))
    found.append(Study("local_attention fwd", "grid", tuple(attention._replace(H=n, W=n) for n in LONG_GRIDS)))
    near = (*((13, 14, n) for n in (1, 5, 9, 10, 14, 18)), *((27, 28, n) for n in (1, 7, 11, 12, 16, 24)))  # N around 192 and 768
    found.append(Study("local_attention fwd", "tokens", tuple(attention._replace(H=h, W=w, P=n) for h, w, n in near)))
    rollout = attention._replace(system="rollout", K=0)
    found.append(Study("rollout fwd", "grid", tuple(rollout._replace(H=n, W=n) for n in LONG_GRIDS)))
    found.append(Study("rollout fwd", "threads", tuple(rollout._replace(H=n, W=n) for n in LONG_GRIDS[:6]), THREADS))
    return found


def todo(threads: int, systems: list[str], axes: list[str]) -> list[Problem]:
    """Every problem of those systems' studies with that number of threads, once."""
    mine = [s for s in studies() if threads in s.threads and s.problems[0].system in systems and s.axis in axes]
    return list(dict.fromkeys(p for s in mine for p in s.problems))


def points(study: Study, rows: list[dict], variant: str = "lifeops", threads: int = 2) -> list[tuple[Problem, dict]]:
    """The study's problems that were measured, with the row of the fastest repeat: a slow moment of the machine lasts longer than a
    problem, but hits other problems in the next process.
    """
    found: dict[Problem, dict] = {}
    for r in tables.measured(rows):
        if (r["variant"], r["threads"], r["cache"], r["allocator"]) == (variant, threads, "warm", "warm"):
            p = store.problem(r)
            if p not in found or r["median_ms"] < found[p]["median_ms"]:
                found[p] = r
    return [(p, found[p]) for p in study.problems if p in found]


def spread(row: dict, rows: list[dict]) -> float:
    """The slowest repeat over the fastest: a step smaller than this may be the machine's."""
    same = [
        r["median_ms"] for r in tables.measured(rows) if all(r[f] == row[f] for f in (*store.SAME, *Problem._fields, "variant", "cache"))
    ]
    return max(same) / min(same)


def continued(old: list[dict], new: list[dict]) -> list[dict]:
    """``new`` as further repeats of the same problems in ``old``, both."""
    again = {store.key(row) for row in new}
    before = [row for row in old if store.key(row) in again]
    first = 1 + max((row["repeat"] for row in before), default=-1)
    return before + [row | {"repeat": row["repeat"] + first} for row in new]


def exponent(study: Study, here: list[tuple[Problem, dict]]) -> list[float | None]:
    """Local slope in log-log between neighbours: 1 is linear in the work; None for the first."""
    out: list[float | None] = [None]
    for (p, a), (q, b) in pairwise(here):
        out.append(math.log(b["median_ms"] / a["median_ms"]) / math.log(study.work(q) / study.work(p)))
    return out


def _save(rows: list[dict], path: Path) -> None:
    """In the place of earlier ones, and of what pages refuse of the same problems on another machine."""
    store.replace(kept(store.read(path) if path.exists() else [], rows), rows, path)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench scaling", description=__doc__)
    systems = list(dict.fromkeys(s.problems[0].system for s in studies()))
    parser.add_argument("--system", choices=systems, action="append", help="default: all")
    axes = list(dict.fromkeys(s.axis for s in studies()))
    parser.add_argument("--axis", choices=axes, action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=0.15, help="per problem")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes; the fastest counts")
    parser.add_argument("--more", action="store_true", help="further repeats beside those in the file, not in their place")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling_cpu.csv")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 80)
    old = store.read(args.out) if args.more and args.out.exists() else []
    found: list[dict] = []
    for threads in THREADS:
        o = Options(threads=(threads,), cache="warm", repeats=args.repeats, seconds=args.seconds)
        wanted = todo(threads, args.system or systems, args.axis or axes)
        found += collect(wanted, o, console, lambda so_far: _save(continued(old, so_far), args.out))
    tables.report(found, console)
    return int(any(row["note"] for row in found))
