"""Which tests reach a line, by what `make coverage` recorded, and which of them to try."""

from __future__ import annotations

import ast
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from itertools import chain, zip_longest
from pathlib import Path

from coverage import CoverageData

FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
FAR = "tests/test_far_strides.py"  # reserves more addresses than forked.MEMORY: here it fails without a mistake, too


def _first(function) -> int:
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


def lines_of(source: str, line: int) -> set[int] | None:
    """The lines that run when what stands at ``line`` has its effect: of a statement in a function, of the whole body for a function's
    head; None, the whole file, for what runs at import.
    """
    tree = ast.parse(source)
    holders = [f for f in ast.walk(tree) if isinstance(f, FUNCTIONS) and _first(f) <= line <= f.end_lineno]
    if not holders:
        return None
    function = max(holders, key=lambda f: f.lineno)
    if line < function.body[0].lineno:
        return set(range(function.body[0].lineno, function.end_lineno + 1))
    statements = [s for s in ast.walk(function) if isinstance(s, ast.stmt) and s is not function and s.lineno <= line <= s.end_lineno]
    if not statements:  # a comment's line
        return set(range(function.body[0].lineno, function.end_lineno + 1))
    inner = min(statements, key=lambda s: s.end_lineno - s.lineno)
    body = getattr(inner, "body", None)
    return set(range(inner.lineno, max(inner.lineno, body[0].lineno - 1) + 1 if body else inner.end_lineno + 1))


class Reach:
    """Read from the data file of a coverage run with a context for each test, and pytest's reports of the times."""

    def __init__(self, data: Path, reports: list[Path]):
        self.data, self.seconds, self._files = CoverageData(str(data)), {}, {}
        self.data.read()
        for case in chain.from_iterable(ElementTree.parse(path).iter("testcase") for path in reports):
            if not len(case) and case.get("file") != FAR:  # else it was skipped, or it failed
                self.seconds[f"{case.get('file')}::{case.get('name')}"] = float(case.get("time"))

    def _by_line(self, path: str) -> dict[int, set[str]]:
        if path not in self._files:
            found = self.data.contexts_by_lineno(path)
            self._files[path] = {line: {c.rpartition("|")[0] for c in contexts} & self.seconds.keys() for line, contexts in found.items()}
        return self._files[path]

    def tests(self, path: str, source: str, line: int) -> list[str]:
        """Those that reach it, one of each test function before the second of any, fast ones first. Without a record of its own (what runs
        in other processes): those that reach the file.
        """
        contexts, lines = self._by_line(path), lines_of(source, line)
        found = set().union(*(contexts.get(n, ()) for n in (contexts if lines is None else lines)))
        found = found or set().union(*contexts.values())
        functions = defaultdict(list)
        for test in sorted(found, key=lambda test: (self.seconds[test], test)):
            functions[test.partition("[")[0]].append(test)
        return [test for turn in zip_longest(*functions.values()) for test in turn if test is not None]

    def chosen(self, tests: list[str], count: int, files: int) -> list[str]:
        """The first ``count`` of ``tests`` in no more than ``files`` files."""
        names, out = set(), []
        for test in tests:
            name = test.partition("::")[0]
            if name in names or len(names) < files:
                names.add(name)
                out.append(test)
            if len(out) == count:
                break
        return out
