"""What setup.py noted beside the compiled modules (``_build.json``), and whether a module still is the file that was built.

A shared library that is cut short, or that a crash has left with zeros, kills the process that loads it, or computes something else.
So its checksum is compared before it is loaded; without notes its ELF header still tells a cut or foreign file.
"""

from __future__ import annotations

import hashlib
import json
import platform
import zlib
from pathlib import Path

FOLDER = Path(__file__).parent
NOTES = FOLDER / "_build.json"
REBUILD = "rebuild it with `pip install --no-build-isolation .`"
_MACHINES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 21: "ppc64le", 22: "s390x", 243: "riscv64", 258: "loongarch64"}  # by ELF
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


def notes() -> dict:
    """What the build noted; without ``_build.json`` nothing. ValueError where it cannot be read."""
    try:
        found = json.loads(NOTES.read_text(encoding="utf-8"))
        if not isinstance(found["how"], str) or not all(isinstance(found[name], dict) for name in ("left_out", "files") if name in found):
            raise TypeError("other kinds of values than setup.py writes")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{NOTES} cannot be read ({type(error).__name__}: {error}); install lifeops again") from error
    return found


def _foreign(path: Path, head: bytes, size: int) -> str | None:
    """What the header of a 64-bit little-endian ELF file tells against it; other formats are the loader's to judge."""
    if head[:4] != b"\x7fELF":
        return f"it does not start as a library does but with {head[:4].hex(' ')}" if head else "it is empty"
    if len(head) < 64:
        return f"it is cut short, {size} bytes"
    if head[4:6] != b"\x02\x01":
        return None
    machine, here = int.from_bytes(head[18:20], "little"), platform.machine().lower()
    made_for = _MACHINES.get(machine, f"ELF machine {machine}")
    if made_for != _ALIASES.get(here, here):
        return f"it was built for {made_for}, this machine is {here}"
    table, entry, count = (int.from_bytes(head[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    if table + entry * count > size:
        return f"it is cut short, {size} of {table + entry * count} bytes"
    return None


def checksum(path: Path) -> str:
    return f"{zlib.crc32(path.read_bytes()):08x}"


def damage(path: Path) -> str | None:
    """Why a compiled module must not be loaded, in one line; None if nothing speaks against it. OSError where it cannot be read."""
    with path.open("rb") as file:
        head = file.read(64)
    why = _foreign(path, head, path.stat().st_size) if platform.system() == "Linux" else None
    if why is None:
        try:
            expected = notes().get("files", {}).get(path.name)
        except ValueError:
            return None
        if expected is None or checksum(path) == expected:
            return None
        why = "its checksum is not the one noted when it was built"
    return f"{path.name} is damaged or not for this machine: {why}; {REBUILD}"


def sources_digest(csrc: Path) -> str:
    """As setup.py computes it when it builds."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(csrc.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def changed_sources() -> bool:
    """Whether this is a source tree whose csrc/ has changed since its modules were built."""
    csrc = FOLDER.parent / "csrc"
    try:
        built = notes().get("sources")
    except ValueError:
        return False
    return built is not None and csrc.is_dir() and sources_digest(csrc) != built
