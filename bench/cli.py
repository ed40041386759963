"""`python -m bench`: how fast the ops are on this machine beside what people would use instead. See --help."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from bench import module_check, optional, rows, tables
from bench.collect import Options, collect
from bench.problems import DTYPES, LEVELS, MODES, SYSTEMS, TIMM, Problem, compiles, level_of, modes_of, named, problems
from lifeops.cli.main import ended_plainly, told_plainly
from lifeops.files import make_folder

COMMANDS = ("accelerate", "again", "compare", "demo", "module_check", "page", "scaling", "tune")
MORE = """commands:
  python -m bench accelerate     the modules that lifeops.accelerate takes, beside the originals
  python -m bench again          what the pages refuse, measured anew; --list names it
  python -m bench compare A B    two files of rows, problem by problem, with what changed by more than the quartiles
  python -m bench demo           `lifeops demo`, its numbers stored and put into the pages and their picture
  python -m bench scaling        cost against grid, batch, channels and threads
  python -m bench module_check   what it costs a fused module to see that its layers are plain
  python -m bench page           docs/performance.md and its figures, from bench/results/
  python -m bench tune           the table of CPU GEMM paths
"""


def words(text: str, known: tuple[str, ...], what: str) -> list[str]:
    """A comma-separated option, checked."""
    found = text.split(",")
    unknown = [word for word in found if word not in known]
    if unknown:
        raise SystemExit(f"bench: {what} must be of {', '.join(known)}, got {', '.join(unknown)}")
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, epilog=MORE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("level", nargs="?", choices=tuple(LEVELS), help="only the systems of this level")
    p.add_argument("--system", help=f"comma-separated: {', '.join(SYSTEMS)}; default: all")
    p.add_argument("--mode", help="comma-separated: fwd (infer), bwd, dw, fwdbwd (train); default: all of a system's")
    p.add_argument("--dtype", help=f"comma-separated; default: {','.join(DTYPES)}")
    p.add_argument("--problem", help="comma-separated names like b16_14x14_c192_k3 instead of the committed sizes")
    p.add_argument("--backend", default="auto", help='auto: what lifeops chooses; "all", or names: those beside it')
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", default="2", help="comma-separated numbers (default: 2)")
    p.add_argument("--cache", default="auto", help="warm, cold, or both with a comma; auto: warm, and cold for ops")
    p.add_argument("--allocator", choices=("warm", "default", "both"), default="warm", help="glibc keeps freed memory, or as it comes")
    p.add_argument("--repeats", type=int, default=1, help="fresh processes per regime")
    p.add_argument("--seconds", type=float, help="per problem and cache (default: 0.3, quick 0.15)")
    p.add_argument("--quick", action="store_true", help="a subset, about two minutes on two cores; its last lines say what came of it")
    p.add_argument("--out", type=Path, action="append", default=[], help="CSV or JSON file; rows of the same problems are replaced")
    p.add_argument("--figures", type=Path, help="folder for pictures of these rows")
    return p


def chosen(args) -> list[Problem]:
    """The problems asked for."""
    systems = words(args.system, SYSTEMS, "--system") if args.system else SYSTEMS
    systems = [s for s in systems if args.level in (None, level_of(s)) and (s not in TIMM or optional.installed("timm"))]
    modes = [MODES[m] for m in words(args.mode, tuple(MODES), "--mode")] if args.mode else None
    dtypes = tuple(words(args.dtype, ("float64", "float32", "float16", "bfloat16"), "--dtype")) if args.dtype else DTYPES
    if not args.problem:
        found = [p for s in systems for p in problems(s, modes, quick=args.quick, dtypes=dtypes)]
    else:
        try:
            names = args.problem.split(",")
            found = [named(n, s, m, d) for s in systems for m in modes_of(s) if not modes or m in modes for n in names for d in dtypes]
        except ValueError as error:
            raise SystemExit(str(error)) from None
    if not found:
        raise SystemExit("bench: nothing to measure: no system of that level has that mode and dtype")
    return list(dict.fromkeys(found))


def options(args, todo: list[Problem]) -> Options:
    words(args.cache, ("auto", "warm", "cold"), "--cache")
    words(args.backend, ("auto", "all", "reference", "cpu", "cuda", "triton"), "--backend")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench: no CUDA device")
    return Options(
        tuple(int(t) for t in args.threads.split(",")), ("warm", "default") if args.allocator == "both" else (args.allocator,),
        args.cache, args.backend, args.device, args.repeats, args.seconds or (0.15 if args.quick else 0.3),
        tuple(p for p in todo if compiles(p, args.quick)),
    )  # fmt: skip


def header(console: Console, device: str) -> None:
    console.print(f"{rows.machine(device)}, torch {torch.__version__}, triton {rows.triton_version()}, commit {rows.commit()}")
    if device != "cuda":
        console.print("not measured on a GPU")
    for line in optional.missing():
        console.print(line)


def measure(args) -> int:
    console = Console(width=None if sys.stdout.isatty() else 80)
    todo = chosen(args)
    o = options(args, todo)
    for path in args.out:  # before an hour of measuring, not behind it
        make_folder(path.parent)
        if path.exists():
            rows.read(path)
    header(console, args.device)
    start = time.perf_counter()
    found = collect(todo, o, console, lambda so_far: [rows.save(so_far, path) for path in args.out])
    tables.report(found, console)
    if not args.system and args.level in (None, "block") and args.device == "cpu":
        console.print(module_check.table(module_check.measured()))
    if args.figures:
        from bench import figures

        for path in figures.draw(found, args.figures):
            console.print(f"wrote {path}")
    console.print(tables.verdict(found, time.perf_counter() - start, args.quick), highlight=False)
    return int(any(row["note"] for row in found))


def run(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        import importlib

        return importlib.import_module(f"bench.{argv[0]}").main(argv[1:])
    p = parser()
    args = p.parse_args(argv)
    with told_plainly(p):
        return measure(args)


def main(argv: list[str] | None = None) -> int:
    return ended_plainly("python -m bench", lambda: run(sys.argv[1:] if argv is None else argv))
