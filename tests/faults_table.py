"""The section "Faults" of docs/reliability.md: `python tests/faults_table.py` writes it from what the tests say they inject."""

import re
from pathlib import Path

from faults import ROWS

import test_faults_backends
import test_faults_extension
import test_faults_files
import test_faults_processes

MODULES = [test_faults_extension, test_faults_backends, test_faults_files, test_faults_processes]  # in the section's order
PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
HEAD = """## Faults

Written by `python tests/faults_table.py` from the tests that inject them. Whatever happens ends in one line that says what and what to
do, in the fallback that computes the same numbers or in an error, and with whole files or none. Results are written beside their place
and renamed when they are on the disk.

| fault | what happens | test |
|---|---|---|
"""
SECTION = re.compile(r"^## Faults\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)


def section() -> str:
    order = [module.__name__ for module in MODULES]
    rows = sorted(ROWS, key=lambda row: order.index(row.test.partition(".")[0]))
    lines = [f"| {fault} | {happens} | {test.replace('.', '.py::', 1)} |" for fault, happens, test in rows]
    return HEAD + "\n".join(lines) + "\n"


def page(before: str) -> str:
    """``before`` with this section in the place of the one it has."""
    assert SECTION.search(before), f'{PAGE} has no section "Faults"'
    return SECTION.sub(lambda found: section() + ("\n" if found.end() < len(before) else ""), before)


if __name__ == "__main__":
    from lifeops.files import written

    with written(PAGE) as part:
        part.write_text(page(PAGE.read_text()))
