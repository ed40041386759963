"""`python -m bench again`: measures what the pages refuse (bench/refused.py) anew, at this commit, on this machine, until it can be shown.

A file's refused rows of another machine are taken out once this one has measured their problems. ``--list`` measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from bench import rows as store
from bench.collect import Options, collect
from bench.refused import lines, refused, stored


def runs(rows: list[dict], seconds: float) -> Iterator[tuple[list, Options]]:
    """What to measure: the refused problems, one run for each number of threads and allocator, with the baselines that they had."""
    grouped: dict[tuple, list] = {}
    for _, threads, allocator, p in refused(rows):
        found = grouped.setdefault((threads, allocator), [])
        found += [] if p in found else [p]
    compiled = tuple({store.problem(row) for row in rows if row["variant"] == "compiled"})
    for (threads, allocator), problems in grouped.items():
        yield problems, Options((threads,), (allocator,), seconds=seconds, compiled=compiled)


def kept(rows: list[dict], new: list[dict]) -> list[dict]:
    """``rows`` without refused ones of other machines whose problems ``new`` has measured here."""
    done, out = {store.key(row)[1:] for row in new}, refused(rows)
    return [row for row in rows if store.key(row) not in out or store.key(row)[1:] not in done]


def measure(path: Path, console: Console, seconds: float) -> None:
    """One round over one file, which is saved as each system is done."""
    before = store.read(path)
    for problems, options in runs(before, seconds):
        console.print(f"{path.name}: {len(problems)} to measure, {options.threads[0]} threads, {options.allocators[0]} allocator")

        def save(found: list[dict]) -> None:
            store.replace(kept(store.read(path), found), found, path)

        collect(problems, options, console, save)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench again", description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", help="of rows; default: those in bench/results/, but for scaling")
    parser.add_argument("--list", action="store_true", help="name what is refused, measure nothing")
    parser.add_argument("--rounds", type=int, default=3, help="at most so often (default: 3): what is refused again is measured longer")
    parser.add_argument("--seconds", type=float, default=0.3, help="per problem and cache in the first round, doubled in each further one")
    args = parser.parse_args(argv)
    files, console = args.files or list(stored()), Console(width=None if sys.stdout.isatty() else 80)
    if not args.list and store.commit().endswith("-dirty"):
        raise SystemExit("bench again: commit first: rows of changes that are not committed are refused")
    for n in range(0 if args.list else args.rounds):
        for path in files:
            measure(path, console, args.seconds * 2**n)
    left = [line for path in files for line in lines(store.read(path))]
    for line in left:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"{len(left)} refused" if left else "nothing is refused")
    return int(bool(left))
