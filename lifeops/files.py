"""Files that the command line writes: whole or not at all, in folders that can be written to, no two under one name."""

from __future__ import annotations

import contextlib
import io
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and what killed processes left stays
    fcntl = None


def make_folder(path: Path, option: str = "--out") -> Path:
    """``path`` as a folder, made if need be, and without what killed processes left half-written in it. OSError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{option} must be a folder that can be written to, got {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise OSError(f"{option} must be a folder that can be written to, got {path}: no permission")
    for part in filter(_PART.fullmatch, (entry.name for entry in path.iterdir())):
        with contextlib.suppress(OSError), _held(path / part, os.O_RDWR):  # who still writes it holds it
            (path / part).unlink()
    return path


_PART = re.compile(r"\.[0-9a-f]{12}\.part")


@contextlib.contextmanager
def _held(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of ``path``, locked until the process ends however it ends. OSError where another one has it."""
    descriptor = os.open(path, flags, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Where to write what ``path`` shall hold: a file beside it that ends in ".part", renamed when all is written and on the disk.
    OSError that names ``path`` where it cannot be.
    """
    part = path.with_name(f".{uuid.uuid4().hex[:12]}.part")
    try:
        with _held(part, os.O_RDWR | os.O_CREAT | os.O_EXCL) as descriptor:
            yield part
            os.fsync(descriptor)
            os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def save(content, path: Path) -> None:
    """``torch.save``, whole or not at all. OSError where ``path`` cannot be written."""
    buffer = io.BytesIO()  # torch's own writer says "unexpected pos 704 vs 598" where the disk is full
    torch.save(content, buffer)
    with written(path) as part:
        part.write_bytes(buffer.getbuffer())


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
