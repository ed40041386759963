"""Tables of docs/reliability.md and other pages: commands write them, each between two marks that carry its name."""

from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"


def _parted(name: str, page: Path) -> tuple[str, str, str]:
    """The page before, between and behind the marks ``<!-- name -->`` and ``<!-- /name -->``, which stay with what is outside."""
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, found, rest = page.read_text().partition(first)
    inside, closed, tail = rest.partition(last)
    if not (found and closed):
        raise SystemExit(f"{page.name}: no {first.strip()} … {last}")
    return head + first, inside, last + tail


def between(name: str) -> str:
    """What stands between the two marks."""
    return _parted(name, PAGE)[1]


def put(name: str, lines, page: Path = PAGE) -> None:
    """``lines`` in place of those between the two marks."""
    head, _, tail = _parted(name, page)
    page.write_text("".join((head, *(line + "\n" for line in lines), tail)))
