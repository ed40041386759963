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

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PARTS = "test_operators.py", "test_public.py", "test_modules.py"
PROPERTIES = 74  # a case of each takes about 20 ms


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=24_000, help="about as many in all (24000: some 15 minutes on one core)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; another one finds other cases")
    parser.add_argument("--minutes", type=float, default=40, help="the time it may take: cases past that are left out")
    parser.add_argument("--triton", type=int, default=4, help="cases of each operator in Triton's interpreter, seconds each; 0: none")
    args = parser.parse_args()
    until, each = time.time() + 60 * args.minutes, max(1, args.cases // PROPERTIES)
    parts = [(PARTS, each, False), *([(PARTS[:1], args.triton, True)] if args.triton else [])]
    table, console, total, wrong = Table("called", "cases", "mismatches", title=f"seed {args.seed}"), Console(), 0, 0
    for files, cases, interpreted in parts:
        counted, mismatches, output = _part(files, cases, args.seed, until, interpreted)
        for what in sorted({*counted, *mismatches}):
            table.add_row(what + ", Triton in the interpreter" * interpreted, str(counted.get(what, 0)), str(mismatches.get(what, 0)))
        total, wrong = total + sum(counted.values()), wrong + sum(mismatches.values())
        if mismatches:
            console.print(output, markup=False, highlight=False)
    table.add_section()
    table.add_row("all", str(total), str(wrong))
    console.print(table)
    if total < args.cases and time.time() > until:
        console.print(f"the time was up: {total} of about {args.cases} cases")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
