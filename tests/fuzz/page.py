"""docs/reliability.md: tables that commands write, each between two marks that carry its name."""

from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"


def put(name: str, lines) -> None:
    """``lines`` in place of those between ``<!-- name -->`` and ``<!-- /name -->``."""
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, found, rest = PAGE.read_text().partition(first)
    _, closed, tail = rest.partition(last)
    if not (found and closed):
        raise SystemExit(f"{PAGE.name}: no {first.strip()} … {last}")
    PAGE.write_text("".join((head, first, *(line + "\n" for line in lines), last, tail)))
