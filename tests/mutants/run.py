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
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from fuzz.page import put  # noqa: E402
from mutants import forked, known  # noqa: E402
from mutants.places import FOLDERS, ROOT, Mutant, drawn  # noqa: E402
from mutants.reach import Reach  # noqa: E402

RECORD = ROOT / "build" / "coverage"
RESULTS = ROOT / "build" / "mutants.jsonl"
ROUNDS = (20, 3), (80, 16), (400, 40)  # so many tests in all, from so many files
KILLED = "failed", "too long"
Process = get_context("fork").Process  # which have imported torch already


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _limit(tests, seconds) -> float:
    """Ten times what the tests took when they were recorded, and three minutes to import and collect."""
    return 180 + 10 * sum(seconds[test] for test in tests)


def _tried(copy: Path, mutant: Mutant, reach: Reach, tests: list[str]) -> dict:
    """What the tests say of it: {"outcome", "tests", "by"}."""
    done: list[str] = []
    before = (copy / mutant.path).read_text()
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
        (copy / mutant.path).write_text(before)
    return {"outcome": "survived" if done else "not reached", "tests": len(done), "by": ""}


def _rows(mutants, results, seed) -> list[str]:
    """The table of docs/reliability.md, and what survived."""
    alive = [mutant for mutant in mutants if results[mutant.key]["outcome"] not in KILLED]
    out = [f"| seed {seed} | mutants | killed | by a time limit | survived | of these equivalent |", "|---|---:|---:|---:|---:|---:|"]
    for name, prefix in (*((folder, folder + "/") for folder in FOLDERS), ("all", "")):
        some = [mutant for mutant in mutants if mutant.path.startswith(prefix)]
        left, late = [m for m in alive if m in some], sum(results[m.key]["outcome"] == "too long" for m in some)
        killed, equivalent = len(some) - len(left), sum(known.reason(m) is not None for m in left)
        out.append(f"| {name} | {len(some)} | {killed} ({killed / max(1, len(some)):.1%}) | {late} | {len(left)} | {equivalent} |")
    if alive:
        out += ["", "| survivor | why |", "|---|---|"]
    for mutant in alive:
        before, after = (text.strip() or "nothing" for text in (mutant.before, mutant.after))
        where, change = mutant.path.removeprefix("lifeops/"), f"`{before}` → `{after}`".replace("|", "\\|")
        why = known.reason(mutant) or results[mutant.key]["outcome"]
        out.append(f"| {where}: {change} | {why} |")
    return out


def _known() -> dict[str, dict]:
    """What earlier runs found, by key."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else ()
    return {key: found for key, found in map(json.loads, lines)}


def _note(mutant: Mutant, found: dict) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps((mutant.key, found | {"source": _digest(mutant.source)})) + "\n")


def _worker(copy: Path, todo: list[tuple], reach: Reach) -> None:
    """Tries each of ``todo`` in ``copy``."""
    for mutant, tests in todo:
        start, found = time.monotonic(), _tried(copy, mutant, reach, tests)
        _note(mutant, found)
        took, change = time.monotonic() - start, f"{mutant.path}:{mutant.line} {mutant.before} -> {mutant.after}"
        print(f"{took:.0f} s {found['outcome']} ({found['tests']} tests) {change} {found['by']}", flush=True)


def _run(mutants: list[Mutant], again: bool, jobs: int) -> dict[str, dict]:
    """How each ends, by its key. What an earlier run killed of the same file is known."""
    before = {} if again else _known()
    sure = {key for key, found in before.items() if found["outcome"] in KILLED}
    todo = [m for m in mutants if m.key not in sure or before[m.key]["source"] != _digest(m.source)]
    forked.warm_up()
    RESULTS.parent.mkdir(exist_ok=True)
    reach = Reach(RECORD / "data", sorted(RECORD.glob("tests*.xml")))
    work = [(m, reach.tests(m.path, (ROOT / m.path).read_text(), m.line)) for m in todo]
    print(f"{len(todo)} of {len(mutants)} to try", flush=True)
    with tempfile.TemporaryDirectory(prefix="lifeops-mutants-") as folder:
        copies = [forked.copied(Path(folder) / str(job)) for job in range(jobs)]
        workers = [Process(target=_worker, args=(copy, work[job::jobs], reach)) for job, copy in enumerate(copies)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        _check_killers(copies[0], todo, reach)
    return _known()


def _check_killers(copy: Path, mutants: list[Mutant], reach: Reach) -> None:
    """A test that fails without the mistake, too, has not found it."""
    results = _known()
    killers = sorted({results[m.key]["by"] for m in mutants} - {""})
    outcome, ends = forked.run(copy, killers, _limit(killers, reach.seconds), ("--maxfail=0",)) if killers else ("passed", {})
    if outcome == "too long":
        raise SystemExit(f"mutants: {len(killers)} tests of the library as it is did not end")
    wrong = {test for test in killers if ends.get(test) != "passed"}
    for mutant in mutants:
        if results[mutant.key]["by"] in wrong:
            _note(mutant, results[mutant.key] | {"outcome": "its test fails without it, too"})


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="mistakes")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
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
    table = _rows(mutants, _run(mutants, args.again, args.jobs), args.seed)
    print(*table, sep="\n")
    if args.page:
        put("mutants", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
