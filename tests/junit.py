"""What a run of pytest counted, from the report that it wrote with --junitxml."""

from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree


class Counts(NamedTuple):
    passed: int
    skipped: int
    failed: int


def counts(report: Path) -> Counts:
    kinds = [{child.tag for child in case} for case in ElementTree.parse(report).getroot().iter("testcase")]
    failed, skipped = sum(bool(kind & {"failure", "error"}) for kind in kinds), sum("skipped" in kind for kind in kinds)
    return Counts(len(kinds) - failed - skipped, skipped, failed)
