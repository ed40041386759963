"""`make fuzz`: every property of this folder with as many cases as are asked for, and a table of cases and mismatches."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from page import put
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
KINDS = {  # of what is counted, by how its name begins or ends
    "special values": "operators: NaN and infinities", "same bits": "operators: the same bits, threads and runs",
    "an image alone": "operators: an image alone and in its batch", ", NaN": "modules: NaN",
    "lifeops.": "public functions with gradients", "nn.": "modules with gradients, training and evaluation",
}  # fmt: skip
PARTS = "test_operators.py", "test_public.py", "test_modules.py", "test_family.py"
PROPERTIES = 103  # each gets as many cases; one takes about 20 ms


def _part(files, cases, seed, until, interpreted):
    """One process; (cases and mismatches by what was called, output)."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.json"
        env = {**os.environ, "LIFEOPS_FUZZ_CASES": str(cases), "LIFEOPS_FUZZ_UNTIL": str(until), "LIFEOPS_FUZZ_LEDGER": str(ledger)}
        env |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1", "LIFEOPS_TEST_BACKEND": "triton"} if interpreted else {})
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", f"--hypothesis-seed={seed}", *files]
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, check=False)
        if not ledger.exists():
            raise SystemExit(f"fuzz: pytest ended without a result:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        found = json.loads(ledger.read_text())
        return found["cases"], found["mismatches"], done.stdout


def _write_page(rows, seed):
    """The table of docs/reliability.md: cases and mismatches by kind. ``rows``: (what, interpreted, cases, mismatches)."""
    kinds = {}
    for what, interpreted, cases, wrong in rows:
        found = (kind for part, kind in KINDS.items() if what.startswith(part) or what.endswith(part))
        kind = next(found, "operators: values") + ", Triton in the interpreter" * interpreted
        before = kinds.get(kind, (0, 0))
        kinds[kind] = before[0] + cases, before[1] + wrong
    kinds["all"] = tuple(map(sum, zip(*kinds.values(), strict=True)))
    lines = (f"| {kind} | {cases} | {wrong} |" for kind, (cases, wrong) in kinds.items())
    put("figures", (f"| seed {seed} | cases | mismatches |", "|---|---:|---:|", *lines))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=24_000, help="about as many in all (24000: some 15 minutes on one core)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; another one finds other cases")
    parser.add_argument("--minutes", type=float, default=40, help="the time it may take: cases past that are left out")
    parser.add_argument("--triton", type=int, default=2, help="cases of each operator in Triton's interpreter, seconds each; 0: none")
    parser.add_argument("--page", action="store_true", help="write the figures into docs/reliability.md")
    args = parser.parse_args()
    until, each = time.time() + 60 * args.minutes, max(1, args.cases // PROPERTIES)
    parts = [(PARTS, each, False), *([(PARTS[:1], args.triton, True)] if args.triton else [])]
    table, console, rows = Table("called", "cases", "mismatches", title=f"seed {args.seed}"), Console(), []
    for files, cases, interpreted in parts:
        counted, mismatches, output = _part(files, cases, args.seed, until, interpreted)
        rows += [(what, interpreted, counted.get(what, 0), mismatches.get(what, 0)) for what in sorted({*counted, *mismatches})]
        if mismatches:
            console.print(output, markup=False, highlight=False)
    for what, interpreted, *numbers in rows:
        table.add_row(what + ", Triton in the interpreter" * interpreted, *map(str, numbers))
    total, wrong = sum(row[2] for row in rows), sum(row[3] for row in rows)
    table.add_section()
    table.add_row("all", str(total), str(wrong))
    console.print(table)
    if args.page:
        _write_page(rows, args.seed)
    if total < args.cases and time.time() > until:
        console.print(f"the time was up: {total} of about {args.cases} cases")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
