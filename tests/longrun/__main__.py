"""`make longrun`: the long runs, and what they found as a file, a picture and the figures of docs/reliability.md."""

from __future__ import annotations

import argparse
import platform
import resource
import sys
import time

import torch

from bench.rows import machine
from fuzz.page import put
from lifeops.demo.unfinished import Unfinished
from longrun import huge, memory, page, training

UNFINISHED = page.ROOT / "build" / "longrun"


def _training(args) -> list[str]:
    recipe = training.Recipe(**{**vars(training.RECIPE), "steps": args.steps})
    runs = training.train_all(UNFINISHED, recipe, told=lambda line: print(line, flush=True))
    table = page.training_table(runs)
    print(table)
    if args.page:
        page.keep("training", page.training_rows(runs))
        page.draw(runs)
        put("training", table.splitlines())
    Unfinished(UNFINISHED, recipe).clear()
    return [f"{v.system}, {v.dtype}, {' and '.join(v.arms)}: further apart than two seeds" for v in page.verdicts(runs) if not v.kept]


def _memory(args) -> list[str]:
    marks = memory.measure(args.calls)
    table = page.memory_table(marks)
    print(table)
    if args.page:
        page.keep("memory", [m._asdict() for m in marks])
        put("memory", table.splitlines())
    return memory.grown(marks)


def _huge(args) -> list[str]:
    rows = []
    for name in (*huge.OPERATORS, huge.LARGE):
        start, need = time.monotonic(), huge.NEEDS << 30
        if huge.available() < need:
            raise SystemExit(f"longrun: {name}: {huge.NEEDS} GB of memory are needed, {huge.available() >> 30} are there")
        elements = huge.large_image() if name == huge.LARGE else huge.many_images(name)
        rows.append({"what": name, "elements": elements, "seconds": round(time.monotonic() - start), "peak_gb": round(_peak(), 1)})
        print(*rows[-1].values(), flush=True)
    if args.page:
        page.keep("huge", rows)
        put("huge", page.huge_table(rows).splitlines())
    return []


def _peak() -> float:
    """Of this process's memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


PARTS = {"training": _training, "memory": _memory, "huge": _huge}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make longrun", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; by default all of them")
    parser.add_argument("--steps", type=int, default=training.RECIPE.steps, help="of training (1000: some 20 minutes on one core)")
    parser.add_argument("--calls", type=int, default=100_000, help="of other shapes (100000: some three minutes)")
    parser.add_argument("--page", action="store_true", help="write bench/results/longrun.json, docs/longrun.png and docs/reliability.md")
    args = parser.parse_args()
    if unknown := {*args.parts} - {*PARTS}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    if args.page:
        page.keep("machine", {"machine": machine(), "torch": str(torch.__version__), "python": platform.python_version()})
    wrong = [line for name in args.parts or PARTS for line in PARTS[name](args)]
    print(*wrong or ["all is as promised"], sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
