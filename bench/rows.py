"""Rows: what is stored of a measurement, and how. One row per problem, variant, cache, allocator and repeat; CSV or JSON.

Files written before a column existed are read with that column empty; their ``cache`` is "warm" (as it came in the loop).
"""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import get_type_hints

import torch

from bench.problems import Problem
from lifeops.files import written

FACTS = ("machine", "torch", "triton", "commit", "threads", "allocator", "cache", "repeat")
TIMES = ("median_ms", "q25_ms", "q75_ms")
DERIVED = ("gbs", "tflops", "share", "bound", "ratio")
COSTS = ("bytes", "flops", "peak_bytes", "saved_bytes", "launches")
CEILINGS = ("clone_gbs", "gemm_tflops", "issue_ms")
FIELDS = (*FACTS, *Problem._fields, "variant", *TIMES, *DERIVED, *COSTS, *CEILINGS, "note")
WHOLE = {f for f, kind in get_type_hints(Problem).items() if kind is int} | {"threads", "repeat", *COSTS}
REAL = {*TIMES, "gbs", "tflops", "share", "ratio", *CEILINGS}
SAME = ("machine", "threads", "allocator")  # with the problem: what a new measurement replaces


def machine(device: str = "cpu") -> str:
    from lifeops.pointwise import vendor

    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or vendor()} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str:
    """HEAD, with "-dirty" where something else than what the benchmarks themselves write differs from it: rows stored a moment ago do
    not spoil those of the next command.
    """
    written = ("bench/results", "docs", "README.md")
    try:
        found = [
            subprocess.run(("git", *command), cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
            for command in (("describe", "--always"), ("diff", "--quiet", "HEAD", "--", ".", *(f":(exclude){path}" for path in written)))
        ]
    except OSError:  # no git
        return "unknown"
    head, changed = found
    return (head.stdout.strip() or "unknown") + ("-dirty" if changed.returncode == 1 else "")


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def problem(row: dict) -> Problem:
    return Problem(*(row[f] for f in Problem._fields))


def is_gpu(row: dict) -> bool:
    return row["machine"].startswith(("NVIDIA", "Tesla", "AMD Instinct"))


def _typed(row: dict) -> dict:
    full = dict.fromkeys(FIELDS, "") | {"cache": "warm"} | {k: v for k, v in row.items() if v is not None}
    for name in WHOLE | REAL:
        kind = int if name in WHOLE else float
        full[name] = None if full[name] == "" else kind(full[name])
    return full


def read(path: Path) -> list[dict]:
    """The rows of a CSV or JSON file; ValueError where it is neither or misses what every row has."""
    if path.suffix == ".json":
        found = json.loads(path.read_text())
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
    else:
        raise ValueError(f"bench: rows are stored as .csv or .json, got {path}")
    lacking = [f for f in ("machine", "system", "variant", "median_ms") if found and f not in found[0]]
    if lacking:
        raise ValueError(f"bench: {path} has no column {', '.join(lacking)}")
    return [_typed(row) for row in found]


def key(row: dict) -> tuple:
    """What a new measurement replaces."""
    return (*(row[f] for f in SAME), problem(row))


def replaced(old: Iterable[dict], new: list[dict]) -> list[dict]:
    """``old`` without what ``new`` measured again (same machine, threads, allocator and problem), then ``new``, in one order."""
    again = {key(row) for row in new}
    rows = [row for row in old if key(row) not in again] + new
    place = {order: n for n, order in enumerate(dict.fromkeys(_order(row) for row in rows))}
    return sorted(rows, key=lambda row: (place[_order(row)], row["cache"] != "warm"))


def _order(row: dict) -> tuple:
    """Rows of one table stay together, in the order tables first came."""
    return row["machine"], row["threads"], row["system"], row["mode"], row["allocator"]


def save(rows: list[dict], path: Path) -> None:
    """Put ``rows`` into a CSV or JSON file, in the place of earlier ones of the same problems."""
    replace(read(path) if path.exists() else [], rows, path)


def replace(old: list[dict], rows: list[dict], path: Path) -> None:
    """Write ``old`` to a CSV or JSON file, with ``rows`` in the place of those of the same problems."""
    rows = replaced(old, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as part:
        if path.suffix == ".json":
            part.write_text("[\n" + ",\n".join(json.dumps({f: row[f] for f in FIELDS}) for row in rows) + "\n]\n")
            return
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
