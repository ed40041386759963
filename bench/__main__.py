"""`python -m bench`: how fast the ops are on this machine beside what people would use instead. See --help."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import systems
from bench.measure import WARM_ALLOCATOR
from bench.problems import DTYPES, SYSTEMS, Problem, modes_of, problems, targets


def machine() -> str:
    from lifeops.pointwise import vendor

    try:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or vendor()} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def run_process(todo: list[Problem], threads: int, allocator: str, seconds: float, advance):
    """One fresh process over all problems; yields (problem, {variant: [median, q25, q75]} or an error)."""
    env = {**os.environ, **(WARM_ALLOCATOR if allocator == "warm" else {}), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench.worker", "--threads", str(threads), "--seconds", str(seconds)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    worker.stdin.write(json.dumps(todo))
    worker.stdin.close()
    for line in worker.stdout:
        row = json.loads(line)
        advance()
        yield Problem(*row["problem"]), row.get("times"), row.get("error")
    if worker.wait():
        raise SystemExit(f"bench: a worker process ended with code {worker.returncode}")


def collect(todo, args, console):
    """Rows of every repeat in the allocator regimes asked for, and the errors."""
    regimes = ("warm", "default") if args.allocator == "both" else (args.allocator,)
    facts = {"machine": machine(), "torch": torch.__version__, "commit": commit(), "threads": args.threads}
    rows, errors = [], []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("timing", total=len(todo) * len(regimes) * args.repeats)
        for allocator in regimes:
            for repeat in range(args.repeats):
                for p, times, error in run_process(todo, args.threads, allocator, args.seconds, lambda: progress.advance(bar)):
                    if error:
                        errors.append((p, error))
                        continue
                    for variant, (median, q25, q75) in times.items():
                        size = {"median_ms": round(median, 4), "q25_ms": round(q25, 4), "q75_ms": round(q75, 4)}
                        rows.append({**facts, "allocator": allocator, "repeat": repeat, **p._asdict(), "variant": variant, **size})
    return rows, errors


def ratios(rows):
    """{(problem, allocator): {"lifeops": [ms per repeat], baseline: [ratio to lifeops per repeat]}}."""
    grouped: dict = {}
    for row in rows:
        key = Problem(*(row[f] for f in Problem._fields)), row["allocator"], row["repeat"]
        grouped.setdefault(key, {})[row["variant"]] = row["median_ms"]
    out: dict = {}
    for (p, allocator, _), times in grouped.items():
        times = systems.better_plain(times)
        cell = out.setdefault((p, allocator), {})
        for variant, ms in times.items():
            cell.setdefault(variant, []).append(ms if variant == "lifeops" else ms / times["lifeops"])
    return out


def _spread(values) -> str:
    middle = sorted(values)[len(values) // 2]
    return f"{middle:.2f}" + (f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else "")


def report(rows, console) -> list[str]:
    """Print one table per system and mode; return the promises that were not kept."""
    losing, table, last = [], None, None
    cells = ratios(rows)
    for (p, allocator), cell in cells.items():
        if (p.system, p.mode, allocator) != last:
            if table is not None:
                console.print(table)
            last = (p.system, p.mode, allocator)
            baselines = [v for v in cell if v != "lifeops" and not v.startswith("plain_")]
            table = Table(title=f"{p.system} {p.mode}, {allocator} allocator: times slower than lifeops", title_justify="left")
            for column in ("problem", "lifeops ms", "GB/s", *baselines, "promise"):
                table.add_column(column, justify="left" if column == "problem" else "right", no_wrap=True)
        missed = [t for t in targets(p, allocator) if sorted(cell[t.baseline])[len(cell[t.baseline]) // 2] < t.at_least]
        promise = "-" if not targets(p, allocator) else ("missed" if missed else "kept")
        where = f"{p.system} {p.mode} {p.name} {allocator}"
        losing += [f"{where}: {t.baseline} {_spread(cell[t.baseline])}, promised {t.at_least:.2f}" for t in missed]
        speed = f"{p.bytes / min(cell['lifeops']) / 1e6:.1f}" if p.bytes else "-"
        table.add_row(p.name, _spread(cell["lifeops"]), speed, *(_spread(cell[b]) for b in baselines), promise)
    if table is not None:
        console.print(table)
    return losing


def main(argv: list[str] | None = None) -> int:
    if (argv or sys.argv[1:])[:1] == ["tune"]:
        from bench import tune

        return tune.main()
    tune_help = "`python -m bench tune` writes the table of CPU GEMM paths."
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, epilog=tune_help)
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="default: all")
    parser.add_argument("--mode", help="comma-separated: fwd, dw, fwdbwd; default: all of a system's")
    parser.add_argument("--dtype", help=f"comma-separated; default: {','.join(DTYPES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allocator", choices=("warm", "default", "both"), default="warm", help="glibc keeps freed memory, or as it comes")
    parser.add_argument("--repeats", type=int, default=1, help="fresh processes per regime")
    parser.add_argument("--seconds", type=float, default=0.6, help="per problem")
    parser.add_argument("--quick", action="store_true", help="a subset of the sizes")
    parser.add_argument("--out", type=Path, help="CSV file for the rows (appended)")
    args = parser.parse_args(argv)
    modes = args.mode.split(",") if args.mode else None
    dtypes = tuple(args.dtype.split(",")) if args.dtype else DTYPES
    todo = [p for s in args.system or SYSTEMS for p in problems(s, modes and _known(s, modes), quick=args.quick, dtypes=dtypes)]
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"{machine()}, torch {torch.__version__}, commit {commit()}, {args.threads} threads; not measured on a GPU")
    start = time.perf_counter()
    rows, errors = collect(todo, args, console)
    losing = report(rows, console)
    for p, error in errors:
        console.print(f"WRONG RESULT, no number: {p.system} {p.mode} {p.name}: {error}")
    console.print(f"{len(losing)} promises not kept" + (":" if losing else ""))
    for line in losing:
        console.print("  " + line, highlight=False)
    console.print(f"{time.perf_counter() - start:.0f} s")
    if args.out and rows:
        save(rows, args.out)
    return 1 if errors else 0


def _known(system: str, modes: list[str]) -> list[str]:
    have = modes_of(system)
    return [m for m in modes if m in have] or [have[0]]


def save(rows, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    raise SystemExit(main())
