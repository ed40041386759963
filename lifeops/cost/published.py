"""Published sizes of the systems' models beside what their authors' definitions count to: ``data/published.json``.

``published`` is what a paper, README or listing prints, in millions of parameters and in GMACs with the norms that fvcore counts.
``counted`` is exact: parameters, GMACs of convolutions and products to four digits (``gmacs``), and with fvcore's norms
(``gmacs_with_norms``).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

_DATA = Path(__file__).parents[1] / "data" / "published.json"


class Row(NamedTuple):
    """One model; numbers that nobody gives are None. ``models`` are the names lifeops builds it by, empty if it cannot."""

    name: str
    models: tuple[str, ...]
    system: str
    img_size: int
    patch_size: int
    num_classes: int
    params_m: float | None
    gmacs: float | None
    counted_params: int | None
    counted_gmacs: float | None
    counted_gmacs_with_norms: float | None
    source: str
    note: str


@functools.cache
def rows() -> tuple[Row, ...]:
    data = json.loads(_DATA.read_text(encoding="utf-8"))
    return tuple(Row(**{**row, "models": tuple(row["models"]), "source": data["sources"][row["source"]]}) for row in data["rows"])


def find(model: str, system: str, num_classes: int, img_size: tuple[int, int] | None, patch_size: int | None) -> Row | None:
    """The row of a model lifeops builds by this name with images and patches of this size (None: its own); of several that with the
    same number of classes, else the first.
    """
    found = [r for r in rows() if model in r.models and r.system == system]
    found = [r for r in found if img_size in (None, (r.img_size, r.img_size)) and patch_size in (None, r.patch_size)]
    return next((r for r in found if r.num_classes == num_classes), found[0] if found else None)
