"""`make coverage`: which lines of lifeops/ and kernels/ the tests run, which of csrc/cpu, and whether each other one is explained.

tests/uncovered.py gives the reasons. The record in build/coverage says of every line which tests reach it: `make mutants` reads it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from sanitized import HERE, ROOT, build, widest
from uncovered import REASONS

from fuzz.page import put

FOLDER = ROOT / "build" / "coverage"
FLAGS = "-O1 -g1 -fno-tree-vectorize -fno-inline-functions --coverage"
UNKNOWN = "not explained yet"
CPU_TESTS = (  # of the compiled kernels: one instruction set through everything, and what leads to the others
    ["test_ops.py", "test_nan.py", "-k", "{isa}"],
    ["test_ops.py", "test_edges.py", "test_errors.py", "test_build.py", "-k", "float32 or residual or refuses or message"],
    ["fuzz/test_operators.py", "-k", "not (image or attention or life_qkv)"],
    ["test_token_conv.py", "test_local_attention.py", "test_attention_edges.py"],
)


PACKAGES = {"pytest_cov": "pytest-cov", "gcovr": "gcovr"}  # by their modules


def need() -> None:
    """SystemExit that says what to install, unless all is there that the record is made with, a quarter of an hour later."""
    packages = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if packages:
        raise SystemExit(f"coverage: {', '.join(packages)} not found: {sys.executable} -m pip install {' '.join(packages)}")
    programs = (shlex.split(os.environ.get(name, program))[0] for name, program in (("CXX", "g++"), ("GCOV", "gcov")))
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise SystemExit(f"coverage: {', '.join(missing)} not found; as root: apt-get install --no-install-recommends g++")


def _pytest(arguments, env, cwd=ROOT) -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=cwd, env=os.environ | env, check=False)
    if done.returncode:
        raise SystemExit("coverage: a test failed: see above")


def record(arguments) -> None:
    """All tests, with the processes they start; a context for each test."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in (*FOLDER.glob("data*"), *FOLDER.glob("tests*.xml")):
        old.unlink()
    cov = ["--cov", "--cov-branch", "--cov-context=test", "--cov-report=", f"--junitxml={FOLDER}/tests.xml", "-o", "junit_family=xunit1"]
    _pytest([*cov, *arguments], {"COVERAGE_FILE": str(FOLDER / "data"), "OMP_NUM_THREADS": "1"})


def python_report() -> dict[str, dict]:
    """{path: coverage's summary and missing lines} of the record."""
    out = FOLDER / "python.json"
    command = [sys.executable, "-m", "coverage", "json", "-q", "-o", str(out)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"COVERAGE_FILE": str(FOLDER / "data")}, check=True)
    return json.loads(out.read_text())["files"]


def record_cpu() -> None:
    """The kernels' tests with one instruction set of csrc/cpu built for gcov."""
    isa = widest()
    package = build(isa, "coverage", FLAGS)
    for old in FOLDER.rglob("*.gcda"):
        old.unlink()
    env = {"PYTHONPATH": str(package), "LIFEOPS_CPU_ISA": isa, "LIFEOPS_FUZZ_ISAS": isa, "LIFEOPS_STRICT": "1", "OMP_NUM_THREADS": "1"}
    for tests in CPU_TESTS:
        _pytest(["-p", "no:cacheprovider", *(word.format(isa=isa) for word in tests)], env, HERE)
    # threads count without locks: now and then one count is lost
    options = ["--root", ".", "--filter", "csrc/", "--gcov-ignore-parse-errors=negative_hits.warn_once_per_file"]
    places = ["--json", str(FOLDER / "cpu.json"), str(FOLDER / isa / "objects")]
    subprocess.run([sys.executable, "-m", "gcovr", *options, *places], cwd=ROOT, check=True)


def cpu_report() -> dict[str, dict[int, int]]:
    """{path: {line: how often, in the template instance that ran it most}}"""
    out: dict[str, dict[int, int]] = {}
    for file in json.loads((FOLDER / "cpu.json").read_text())["files"]:
        lines = out.setdefault(file["file"], {})
        for line in file["lines"]:
            lines[line["line_number"]] = max(line["count"], lines.get(line["line_number"], 0))
    return out


def unexplained(missing: dict[str, list[int]]) -> tuple[Counter, list[str]]:
    """How many of the lines that no test runs each reason explains, and what is left: lines without one, reasons whose lines are run."""
    counts, left, used = Counter(), [], set()
    for path, numbers in sorted(missing.items()):
        lines = (ROOT / path).read_text().splitlines()
        known = [(why, begins) for why, places in REASONS.items() for begins in places.get(path, ())]
        for number in numbers:
            text = lines[number - 1].strip()
            text += lines[number].strip() if text.endswith("(") else ""  # a message on a line of its own
            why, begins = next(((why, begins) for why, begins in known if text.startswith(begins)), (None, None))
            if why is None:
                left.append(f"{path}:{number}: no test runs it: {text}")
            counts[why] += 1
            used.add((path, begins))
    del counts[None]
    named = {(path, begins) for places in REASONS.values() for path, texts in places.items() for begins in texts}
    return counts, left + [f"{path}: explained, but a test runs it, or it is gone: {begins}" for path, begins in sorted(named - used)]


def _share(part, whole) -> str:
    """Rounded down: 100.0% is all."""
    return f"{1000 * part // whole / 10}%" if whole else "-"


def page(python: dict, cpu: dict, counts: Counter) -> list[str]:
    folders = defaultdict(Counter)
    for path, report in python.items():
        parts = Path(path).parts
        folders["/".join(parts[:2]) if len(parts) > 2 else f"{parts[0]}/*.py"].update(
            {key: report["summary"][key] for key in ("num_statements", "covered_lines", "num_branches", "covered_branches")}
        )
    folders["all Python"] = sum(folders.values(), Counter())
    out = ["| folder | statements | run | branches | taken |", "|---|---:|---:|---:|---:|"]
    for name, n in folders.items():
        lines, branches = _share(n["covered_lines"], n["num_statements"]), _share(n["covered_branches"], n["num_branches"])
        out.append(f"| {name} | {n['num_statements']} | {lines} | {n['num_branches']} | {branches} |")
    for path, lines in sorted(cpu.items()):
        out.append(f"| {path} | {len(lines)} | {_share(sum(map(bool, lines.values())), len(lines))} | | |")
    out += ["", "| lines that no test runs here | why |", "|---:|---|"]
    return out + [f"| {count} | {why} |" for why, count in counts.most_common()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make coverage", description=__doc__)
    parser.add_argument("--report", action="store_true", help="only of the last record")
    parser.add_argument("--page", action="store_true", help="write the tables into docs/reliability.md")
    args, tests = parser.parse_known_args()
    if not args.report:
        need()
        record(tests)
        record_cpu()
    python, cpu = python_report(), cpu_report()
    missing = {path: report["missing_lines"] for path, report in python.items()}
    missing |= {path: [line for line, count in lines.items() if not count] for path, lines in cpu.items()}
    counts, left = unexplained(missing)
    unknown = sum("no test runs it" in line for line in left)
    table = page(python, cpu, counts + Counter({UNKNOWN: unknown}))
    print(*table, "", *left, sep="\n")
    if args.page:
        put("coverage", table)
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())
