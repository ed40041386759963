"""The tables of the systems: what each is made of here, and how much faster that is than its authors' code.

A system is a page in docs/systems/; what the tables say of it stands at the page's top, and adding a system is adding a page. What is
named there is looked up: an op, module, model or test file that is gone is an error, and the speed is that of the stored rows.
"""

from __future__ import annotations

import functools
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import yaml

import lifeops
from bench import summary
from bench.refused import shown

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "systems"


class System(NamedTuple):
    """``rows``: the benchmarks of its module and its model. ``loads``: whether load_official reads its authors' files."""

    name: str
    source: str
    ops: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    loads: bool = False
    tests: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


def system_of(page: Path) -> System:
    """What stands at the top of a page."""
    _, top, _ = page.read_text().split("---\n", 2)
    return System(**yaml.safe_load(top))


def systems() -> dict[Path, System]:
    """Every system by its page, by name."""
    found = {page: system_of(page) for page in PAGES.glob("*.md") if page.name != "index.md"}
    return dict(sorted(found.items(), key=lambda item: item[1].name.lower()))


def _names(module, names: tuple[str, ...]) -> str:
    for name in names:
        attrgetter(name)(module)  # an AttributeError where it is gone
    return ", ".join(f"`{name}`" for name in names) or "-"


def _tests(names: tuple[str, ...]) -> str:
    for name in names:
        if not (ROOT / "tests" / f"{name}.py").exists():
            raise SystemExit(f"docs/systems: tests/{name}.py is gone")
    return ", ".join(f"`tests/{name}.py`" for name in names)


def _speed(line: summary.Line) -> str:
    """Forward and with backward, as on the page of the performance."""
    words = {"fwd": "forward", "fwdbwd": "step"}
    found = {words[mode]: values for mode in summary.MODES if (values := line.values(mode, ("eager",)))}
    return ", ".join(f"{summary.mean_range(values)} {word}" for word, values in found.items())


@functools.cache
def _measured() -> list[summary.Line]:
    return summary.lines(shown())


def _speeds(system: System) -> str:
    found = [(line.words, text) for line in _measured() if line.system in system.rows and (text := _speed(line))]
    return "; ".join(f"{words} {text}" for words, text in found) or "-"


def systems_table(page: Path) -> str:
    """One row per system."""
    columns = "system", "ops", "`lifeops.nn`", "`lifeops.models`", "authors' files", "times as fast as its authors' code, float32"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for path, s in systems().items():
        ops, modules, models = _names(lifeops, s.ops), _names(lifeops.nn, s.modules), _names(lifeops.models, s.models)
        cells = f"[{s.name}]({path.name})", ops, modules, models, "yes" if s.loads else "-", _speeds(s)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def system_facts(page: Path) -> str:
    """The facts on a system's own page."""
    s = system_of(page)
    facts = {
        "source": s.source, "ops": _names(lifeops, s.ops), "`lifeops.nn`": _names(lifeops.nn, s.modules),
        "`lifeops.models`": _names(lifeops.models, s.models),
        "authors' checkpoints": "`lifeops.load_official` reads them" if s.loads else "-",
        "times as fast as its authors' code, float32": _speeds(s), "tests": _tests(s.tests),
    }  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.items() if text != "-")])
