"""Files that the command line writes: whole or not at all, in folders that can be written to, no two under one name."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path


def make_folder(path: Path, option: str = "--out") -> Path:
    """``path`` as a folder, made if need be. OSError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{option} must be a folder that can be written to, got {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise OSError(f"{option} must be a folder that can be written to, got {path}: no permission")
    return path


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Where to write what ``path`` shall hold: a file beside it that ends in ".part", renamed when all is written."""
    part = path.with_name(f".{uuid.uuid4().hex[:12]}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def distinct(names: Sequence[str]) -> list[str]:
    """``names`` with "-2", "-3", … after those that an earlier one is equal to, but for case; no new name is one of ``names``."""
    first, given, found = set(), {name.casefold() for name in names}, []
    for name in names:
        new, n = name, 1
        while new.casefold() in first or (n > 1 and new.casefold() in given):
            n += 1
            new = f"{name}-{n}"
        first.add(new.casefold())
        found.append(new)
    return found
