"""`make mutants`: a sample of mistakes in lifeops/ops and lifeops/hosts, one at a time in a copy of the tree; which ones no test notices.

`make coverage` says which tests reach a mistake. Some fast ones are run, then more of them; the first that fails ends it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from fuzz.page import put  # noqa: E402
from mutants import forked, known  # noqa: E402
from mutants.places import FOLDERS, ROOT, Mutant, drawn  # noqa: E402
from mutants.reach import Reach  # noqa: E402

RECORD = ROOT / "build" / "coverage"
RESULTS = ROOT / "build" / "mutants.json"
ROUNDS = (20, 3), (80, 16)  # so many tests in all, from so many files
KILLED = "failed", "too long"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _limit(tests, seconds) -> float:
    """Ten times what the tests took when they were recorded, and a minute and a half to import and collect."""
    return 90 + 10 * sum(seconds[test] for test in tests)


def _fail_as_it_is(copy: Path, tests: list[str], seconds) -> set[str]:
    """Those of ``tests`` that do not pass in an unchanged copy."""
    outcome, results = forked.run(copy, tests, _limit(tests, seconds), ("--maxfail=0",))
    if outcome == "too long":
        raise SystemExit(f"mutants: the {len(tests)} tests of the library as it is did not end")
    return {test for test in tests if results.get(test) not in ("passed", "skipped")}


def _tried(copy: Path, mutant: Mutant, reach: Reach, tests: list[str]) -> dict:
    """What the tests say of it: {"outcome", "tests", "by"}."""
    done: list[str] = []
    (copy / mutant.path).write_text(mutant.source)
    try:
        for count, files in ROUNDS:
            more = [test for test in reach.chosen(tests, count, files) if test not in done]
            if not more:
                continue
            outcome, results = forked.run(copy, more, _limit(more, reach.seconds))
            done += more
            if outcome in KILLED:
                by = next((test for test, result in results.items() if result == "failed"), "")
                return {"outcome": outcome, "tests": len(done), "by": by}
    finally:
        (copy / mutant.path).write_text((ROOT / mutant.path).read_text())
    return {"outcome": "survived" if done else "not reached", "tests": len(done), "by": ""}


def _rows(mutants, results, seed) -> list[str]:
    """The table of docs/reliability.md, and what survived."""
    alive = [mutant for mutant in mutants if results[mutant.key]["outcome"] not in KILLED]
    out = [f"| seed {seed} | mutants | killed | by a time limit | survived | of these equivalent |", "|---|---:|---:|---:|---:|---:|"]
    for name, prefix in (*((folder, folder + "/") for folder in FOLDERS), ("all", "")):
        some = [mutant for mutant in mutants if mutant.path.startswith(prefix)]
        left, late = [m for m in alive if m in some], sum(results[m.key]["outcome"] == "too long" for m in some)
        killed, equivalent = len(some) - len(left), sum(m.key in known.EQUIVALENT for m in left)
        out.append(f"| {name} | {len(some)} | {killed} ({killed / max(1, len(some)):.1%}) | {late} | {len(left)} | {equivalent} |")
    if alive:
        out += ["", "| survivor | why |", "|---|---|"]
    for mutant in alive:
        where, change = mutant.path.removeprefix("lifeops/"), f"`{mutant.before}` → `{mutant.after}`".replace("|", "\\|")
        out.append(f"| {where}: {change} | {known.EQUIVALENT.get(mutant.key, results[mutant.key]['outcome'])} |")
    return out


def _run(mutants: list[Mutant], again: bool) -> dict[str, dict]:
    """How each ends, by its key. What an earlier run killed of the same file is known."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() and not again else {}
    known_ends = {m.key: before[m.key] for m in mutants if m.key in before and before[m.key]["outcome"] in KILLED}
    results = {m.key: known_ends[m.key] for m in mutants if known_ends.get(m.key, {}).get("source") == _digest(m.source)}
    forked.warm_up()
    reach = Reach(RECORD / "data", sorted(RECORD.glob("tests*.xml")))
    todo = [(m, reach.tests(m.path, (ROOT / m.path).read_text(), m.line)) for m in mutants if m.key not in results]
    with tempfile.TemporaryDirectory(prefix="lifeops-mutants-") as folder:
        copy = forked.copied(Path(folder))
        used = sorted({test for _, tests in todo for size in ROUNDS for test in reach.chosen(tests, *size)})
        wrong = _fail_as_it_is(copy, used, reach.seconds)
        print(f"{len(results)} known from before; {len(used)} tests are used, {len(wrong)} more do not pass in a copy as it is", flush=True)
        for number, (mutant, tests) in enumerate(todo, 1):
            start = time.monotonic()
            found = _tried(copy, mutant, reach, [test for test in tests if test not in wrong])
            results[mutant.key] = found | {"source": _digest(mutant.source)}
            RESULTS.write_text(json.dumps(before | results, indent=0))
            took, change = time.monotonic() - start, f"{mutant.path}:{mutant.line} {mutant.before} -> {mutant.after}"
            print(f"{number}/{len(todo)} {took:.0f} s {found['outcome']} ({found['tests']} tests) {change} {found['by']}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="mistakes")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--again", action="store_true", help="also those that an earlier run has killed")
    parser.add_argument("--list", action="store_true", help="only say what is drawn")
    parser.add_argument("--page", action="store_true", help="write the tables into docs/reliability.md")
    args = parser.parse_args()
    mutants = drawn(args.count, args.seed)
    if args.list:
        print(*(f"{m.path}:{m.line} {m.operator}\n  - {m.before}\n  + {m.after}" for m in mutants), sep="\n")
        return 0
    if not (RECORD / "data").exists():
        raise SystemExit("mutants: no record of which tests reach what: run `make coverage` first")
    table = _rows(mutants, _run(mutants, args.again), args.seed)
    print(*table, sep="\n")
    if args.page:
        put("mutants", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
