"""docs/reliability.md at a glance: `python tests/reliability.py` writes the table at its top from those below it and from the tests."""

from __future__ import annotations

import re

import faults_table
from covered import UNKNOWN

from fuzz.page import PAGE, between, put
from test_bad_arguments import BAD_VALUES


def table(name: str) -> list[list[str]]:
    """The rows of what stands between the marks of that name, without its heading."""
    lines = [line for line in between(name).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _number(cell: str) -> int:
    return int(cell.replace(",", ""))


def _total(rows: list[list[str]], column: int) -> int:
    return sum(_number(row[column]) for row in rows)


def _section(title: str, text: str) -> str:
    return re.search(rf"^## {title}\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]


def _of_all(rows: list[list[str]], name: str) -> list[str]:
    """The row of that name; cells without a figure where there is none."""
    return next((row for row in rows if row[0] == name), ["?"] * 6)


def _explained(covered: list[list[str]]) -> str:
    """Whether every line that no test runs has its reason."""
    unknown = sum(_number(row[0]) for row in covered if row[-1] == UNKNOWN)
    if not covered:
        return "not measured as a whole yet"
    return f"{unknown} other ones of Python and C++ have no reason yet" if unknown else "each other one explained"


def rows(text: str) -> list[tuple[str, str, str]]:
    """(what, how much, what was wrong), from the page's own tables."""
    fuzzed, legs, machines = _of_all(table("figures"), "all"), table("sanitizers"), table("machines")
    torches, tritons = table("torch versions"), table("triton versions")
    pythons = {row[1].rpartition(".")[0] for row in torches}
    mended = [line for line in _section("Found and mended", text).splitlines() if line.startswith("|")][2:]
    trainings, calls = len(table("training")), table("memory")[-2][0]
    covered = _of_all(table("coverage"), "all Python")
    mutants = _of_all(table("mutants"), "all")
    return [
        ("cases fuzzed", fuzzed[1], f"{fuzzed[2]} mismatches"),
        ("faults injected", f"{len(faults_table.ROWS)} kinds", "each a test: one clear line, nothing lost"),
        ("bad inputs tried", f"{len(BAD_VALUES)}", "each a test: a ValueError or TypeError that names function and argument"),
        ("sanitizer legs", f"{len(legs)}, {_total(legs, 2)} fuzzed cases", f"{_total(legs, 3)} findings"),
        (
            "processors emulated",
            f"{len(machines)}, {_total(machines, 3)} tests, {_total(machines, 4)} fuzzed cases",
            f"{_total(machines, 6)} failures",
        ),
        (
            "versions",
            f"{len({row[0].partition('+')[0] for row in torches})} of torch, {len(pythons)} of Python, {len(tritons)} of Triton",
            f"{_total(torches, 6) + _total(tritons, 4)} failures",
        ),
        (
            "longest runs",
            f"1,000 steps, {trainings} comparisons of three seeds each; {calls} calls",
            "curves within what seeds do, memory flat",
        ),
        (
            "lines that tests run",
            f"{covered[2]} of {covered[1]} statements, {covered[4]} of {covered[3]} branches",
            _explained(table("coverage")),
        ),
        ("mutants killed", f"{mutants[2]} of {mutants[1]}", f"{mutants[4]} survived, {mutants[5]} of them equivalent"),
        ("mismatches found and mended", f"{len(mended)}", re.search(r"^Open: (.*)\.$", text, re.MULTILINE)[1] + " open"),
    ]


def lines(text: str) -> list[str]:
    return ["| | how much | what is wrong |", "|---|---:|---|", *(f"| {' | '.join(row)} |" for row in rows(text))]


if __name__ == "__main__":
    put("summary", lines(PAGE.read_text()))
