"""Mistakes that can be made in the library: cosmic-ray's operators over lifeops/ops and lifeops/hosts, and a sample of them."""

from __future__ import annotations

import ast
import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = "lifeops/ops", "lifeops/hosts"
INPUTS = "samples.py"  # what tests draw, as do the parts of other files that speak of samples: another sample is no mistake
SAME = "Is_Eq", "Eq_Is", "IsNot_NotEq", "NotEq_IsNot"  # on None, classes and short strings they say the same


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    operator: str
    occurrence: int
    before: str
    after: str
    source: str  # of the whole file, with the mistake
    number: int  # among lines that read the same

    @property
    def key(self) -> str:
        """What stays as it is when other lines of the file change."""
        return f"{self.path}: {self.before} -> {self.after}" + (f" ({self.number})" if self.number > 1 else "")


def files() -> list[str]:
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.name != INPUTS)


def _spans(source: str):
    """What is never run, only asserted or only drawn by tests: annotations (``from __future__ import annotations`` keeps them as text),
    zip's ``strict``, how far tests' tolerances go (``reduces``), samples.
    """
    tree = ast.parse(source)
    kept_as_text = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    for node in ast.walk(tree):
        if kept_as_text:
            yield from (hint for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)) if hint is not None)
        if isinstance(node, ast.keyword) and node.arg in ("strict", "reduces"):
            yield node.value
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and (node.name.startswith(("Sample", "samples")) or _draws(node)):
            yield node


def _draws(node) -> bool:
    """Whether a function makes the arguments of a sample."""
    return isinstance(node, ast.FunctionDef) and any(getattr(a.annotation, "id", "") in ("Sample", "Maker") for a in node.args.args)


def _left_out(source: str) -> set[tuple[int, int]]:
    """The (line, column)s of those, and of the sections called samples."""
    lines, marks, inside = source.splitlines(), set(), False
    for span in _spans(source):
        for line in range(span.lineno, span.end_lineno + 1):
            first = span.col_offset if line == span.lineno else 0
            last = span.end_col_offset if line == span.end_lineno else len(lines[line - 1])
            marks.update((line, column) for column in range(first, last))
    for number, line in enumerate(lines, 1):
        if line.startswith("# ---"):
            inside = line.endswith("- samples")
        if inside:
            marks.update((number, column) for column in range(len(line)))
    return marks


def _places(path: str) -> dict[tuple, list[tuple[str, int]]]:
    """(line, column) of what can be exchanged -> what cosmic-ray puts there."""
    source = (ROOT / path).read_text()
    nodes, unread, found = list(ast_nodes(get_ast(source))), _left_out(source), defaultdict(list)
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments() or name.endswith(SAME):
            continue
        positions = (start for node in nodes for start, _ in operator().mutation_positions(node))
        for occurrence, start in enumerate(positions):
            if start not in unread:
                found[start].append((name, occurrence))
    return found


def _rank(*what) -> bytes:
    return hashlib.sha256(repr(what).encode()).digest()


def _mutant(path: str, line: int, number: int, operator: str, occurrence: int) -> Mutant | None:
    """The mutant, or None where Python cannot read it or makes the same of it."""
    old = (ROOT / path).read_text()
    new = MutationVisitor.mutate_code(old, get_operator(operator)(), occurrence)
    try:
        if new is None or compile(new, path, "exec") == compile(old, path, "exec"):
            return None
    except SyntaxError:
        return None
    before, after = old.splitlines(), new.splitlines()
    while before and after and before[0] == after[0]:
        del before[0], after[0]
    while before and after and before[-1] == after[-1]:
        del before[-1], after[-1]
    texts = (" ".join(map(str.strip, lines)) for lines in (before, after))
    return Mutant(path, line, operator.removeprefix("core/"), occurrence, *texts, new, number)


def drawn(count: int, seed: int) -> list[Mutant]:
    """``count`` places, each as likely as any other, and a mistake at each. When the library changes, other draws stay as they are."""
    places, options = [], {}
    for path in files():
        lines, seen = (ROOT / path).read_text().splitlines(), Counter()
        for (line, column), what in sorted(_places(path).items()):
            text = lines[line - 1]
            seen[text, column] += 1
            place = path, text, column, seen[text, column]
            places.append((_rank(seed, place), path, line, place))
            options[place] = sorted(what, key=lambda name, place=place: _rank(seed, place, name[0]))
    mutants = []
    for _, path, line, place in sorted(places):
        made = (_mutant(path, line, place[-1], *option) for option in options[place])
        if (mutant := next(filter(None, made), None)) is not None:
            mutants.append(mutant)
        if len(mutants) == count:
            break
    return mutants
