"""What a check of a tool is: a function of a system's name that fails where the tool gives wrong numbers on it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tool_systems import SYSTEMS

TOOLS: list["Tool"] = []


class Tool(NamedTuple):
    """``refused``: system: the sentence that it is refused with. ``absent``: systems that have no such layer. ``holds``: what is
    compared with the twin of plain layers, for the page. ``packages``: those to import, or be skipped without.
    """

    group: str
    title: str
    holds: str
    check: Callable
    packages: tuple[str, ...]
    refused: Mapping[str, str]
    absent: tuple[str, ...]

    def outcome(self, system: str) -> str:
        if system in self.absent:
            return "-"
        return f"refused: {self.refused[system]}" if system in self.refused else "works"


def tool(group, title, holds, packages=(), refused=None, absent=()):
    """Register a check: ``check(system)``."""
    unknown = {*(refused or {}), *absent} - SYSTEMS.keys()
    assert not unknown, unknown

    def register(check):
        TOOLS.append(Tool(group, title, holds, check, tuple(packages), refused or {}, tuple(absent)))
        return check

    return register
