"""Runs the problems in fresh processes, one per allocator, thread count and repeat, and makes rows of what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import columns, rows
from bench.measure import WARM_ALLOCATOR
from bench.problems import Problem


@dataclass(frozen=True)
class Options:
    """How the problems are measured. ``seconds`` is per problem and cache; ``compiled`` are those with torch.compile as a baseline."""

    threads: tuple[int, ...] = (2,)
    allocators: tuple[str, ...] = ("warm",)
    cache: str = "auto"
    backend: str = "auto"
    device: str = "cpu"
    repeats: int = 1
    seconds: float = 0.6
    compiled: tuple[Problem, ...] = ()


def process(todo: list[Problem], o: Options, threads: int, allocator: str, repeat: int) -> Iterator[list[dict]]:
    """One fresh process over all problems; yields what the worker found of each, and gives it the next one when asked for more."""
    env = {**os.environ, **(WARM_ALLOCATOR if allocator == "warm" else {}), "OMP_NUM_THREADS": str(threads)}
    settings = {"threads": threads, "seconds": o.seconds, "seed": repeat + 1, "device": o.device, "cache": o.cache, "backend": o.backend}
    command = [sys.executable, "-m", "bench.worker", *(f"--{k}={v}" for k, v in settings.items())]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
    try:
        for p in todo:
            worker.stdin.write(json.dumps((p, p in o.compiled)) + "\n")
            worker.stdin.flush()
            if not (line := worker.stdout.readline()):
                break
            yield json.loads(line)
        worker.stdin.close()
        if worker.wait():
            raise SystemExit(f"bench: a worker process ended with code {worker.returncode}")
    finally:  # in a session of its own it does not hear the terminal's Ctrl-C
        worker.kill()
        worker.wait()


def rows_of(entry: dict, facts: dict) -> list[dict]:
    """One row per variant; a wrong one says why and has no number."""
    p = Problem(*entry["problem"])
    common = dict.fromkeys(rows.FIELDS) | facts | p._asdict() | {"cache": entry["cache"], "note": ""}
    common |= {k: entry[k] and round(entry[k], 4) for k in rows.CEILINGS}
    ours = entry["variants"].get("lifeops")
    made = []
    for variant, v in entry["variants"].items():
        row = common | {"variant": variant, **{c: v[c] for c in rows.COSTS}}
        row |= {name: round(v[name.removesuffix("_ms")], 5) for name in rows.TIMES}
        row |= columns.derived(row)
        row["ratio"] = round(v["median"] / ours["median"], 4) if ours else None
        made.append(row)
    return made + [common | {"variant": variant, "note": note} for variant, note in entry["wrong"].items()]


def line(rows: list[dict]) -> str:
    """What a finished case is told by where there is no progress bar: at most 80 columns."""
    ours = next((row for row in rows if row["variant"] == "lifeops" and row["median_ms"] is not None), None)
    p = Problem(*(rows[0][name] for name in Problem._fields))
    text = f"{p.system} {p.mode} {p.name}"
    if ours is None:
        return f"{text} WRONG"[:70]
    eager = [row["ratio"] for row in rows if row["variant"] in ("eager", "naive") and row["ratio"] is not None]
    told = f"{text} {ours['median_ms']:.2f} ms"
    return (told + (f", eager x{eager[0]:.2f}" if eager and len(told) < 56 else ""))[:70]


def collect(todo: list[Problem], o: Options, console: Console, each: Callable[[list[dict]], None] = lambda rows: None) -> list[dict]:
    """Rows of every process. ``each`` gets all so far whenever a problem is done, while the worker waits."""
    facts = {"machine": rows.machine(o.device), "torch": torch.__version__, "triton": rows.triton_version(), "commit": rows.commit()}
    runs = [(t, a, r) for t in o.threads for a in o.allocators for r in range(o.repeats)]
    found, shown = [], (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total, done = len(todo) * len(runs), 0
    with Progress(*shown, console=console, transient=True, refresh_per_second=1, disable=not console.is_terminal) as progress:
        bar = progress.add_task("timing", total=total)
        for threads, allocator, repeat in runs:
            for entries in process(todo, o, threads, allocator, repeat):
                done += 1
                new = [row for e in entries for row in rows_of(e, facts | {"threads": threads, "allocator": allocator, "repeat": repeat})]
                found += new
                progress.update(bar, completed=done, description=f"{new[0]['system']} {new[0]['mode']}")
                if not console.is_terminal:
                    console.print(f"{done:>4}/{total:<4} {line(new)}", highlight=False, soft_wrap=True)
                each(found)
    return found
