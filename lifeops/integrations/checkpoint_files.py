"""Checkpoint files as training scripts leave them, read without running anything of theirs.

torch.load's restricted unpickler (``weights_only=True``) builds tensors and plain containers and refuses every other class. Beside
the model, training scripts save arguments, paths, NumPy scalars, settings, schedulers and so on; here whatever class a file names is
an inert stand-in under that name, so that no foreign code is looked up, let alone run. The real ones need not be installed.
"""

from __future__ import annotations

import os
import pickle as pickle_module
import pickletools
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2's names, which torch.save's protocol 2 uses
from collections import OrderedDict
from collections.abc import Iterator
from typing import BinaryIO

import torch

from lifeops.errors import CheckpointError

_LOCK = threading.Lock()  # the unpickler's list of classes is one for the process


# ------------------------------------------------------------------------------------------------ stand-ins


class Inert(type):
    """Type of the stand-ins for foreign classes and functions: called, constructed or given a state they stay what they are."""

    def __call__(cls, *args, **kwargs):
        return cls

    def __setstate__(cls, state):
        pass


class _Dict:
    """Stands in for what is filled with items by key: yacs' CfgNode, defaultdict, …"""

    def __new__(cls, *args):
        return OrderedDict()


class _List:
    """Stands in for what is filled with items in order: deque, …"""

    def __new__(cls, *args):
        return []


def _stand_in(name: str, kind: str | None) -> type:
    return {"dict": _Dict, "list": _List}.get(kind) or Inert(name, (), {"__new__": lambda cls, *args: cls})


class _Stack:
    """A pickle's stack of values, each known only by the class or function that it is or comes from, None for all others."""

    def __init__(self):
        self.values, self.memo, self.kinds = [], {}, {}
        self.mark = object()

    def to_mark(self) -> None:
        while self.values.pop() is not self.mark:
            pass

    def step(self, code: str, arg, opcode) -> None:
        values = self.values
        if code == "GLOBAL":
            module, name = arg.split(" ", 1)
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            values.append(f"{module}.{name}")
            self.kinds.setdefault(values[-1], None)
        elif code in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[arg] = values[-1]
        elif code in ("GET", "BINGET", "LONG_BINGET"):
            values.append(self.memo[arg])
        elif code in ("REDUCE", "NEWOBJ", "BUILD"):  # what is called, constructed or given a state stays below its argument
            values.pop()
        elif code in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            self.fill(code)
        else:
            self.move(opcode)

    def fill(self, code: str) -> None:
        if code.endswith("S"):
            self.to_mark()
        else:
            del self.values[-1 if code == "APPEND" else -2 :]
        if self.values[-1] is not None:
            self.kinds[self.values[-1]] = "list" if code.startswith("APPEND") else "dict"

    def move(self, opcode) -> None:
        if pickletools.markobject in opcode.stack_before:
            self.to_mark()
        elif opcode.stack_before:
            del self.values[-len(opcode.stack_before) :]
        for kind in opcode.stack_after:
            self.values.append(self.mark if kind is pickletools.markobject else None)


def foreign_globals(pickle: BinaryIO | bytes) -> dict[str, str | None]:
    """The classes and functions that a pickle names, as "module.name", and whether one is filled like a "dict" or a "list".

    The pickle is disassembled, not loaded. (``torch.serialization.get_unsafe_globals_in_checkpoint`` gives names alone, of new files.)
    """
    stack = _Stack()
    for opcode, arg, _ in pickletools.genops(pickle):
        if opcode.name == "PROTO" and 3 < arg <= pickle_module.HIGHEST_PROTOCOL:
            raise CheckpointError(f"a pickle of protocol {arg}; weights_only=True reads torch.save's default, 2")
        stack.step(opcode.name, arg, opcode)
    return stack.kinds


# ------------------------------------------------------------------------------------------------ files

_MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer instead of the file it stands for (git lfs pull fetches that)", b"\x1f\x8b": "gzip",
    b"\x89HDF": "HDF5", b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"%PDF": "a PDF", b"\x93NUMPY": "a NumPy array",
}  # fmt: skip
_ZIP, _PICKLES = b"PK\x03\x04", b"\x80"  # how torch files start; before torch 1.6 they were pickles one after another


def _found(head: bytes) -> str:
    """What a file that is no checkpoint starts like."""
    known = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if known or not head:
        return known or "an empty file"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page instead of the file (was it downloaded without signing in, or from its page's address?)"
    try:
        text = head.decode("utf-8", "strict" if len(head) < 64 else "ignore")
    except UnicodeDecodeError:
        text = ""
    return f"text: {text[:32]!r}" if text and text.isprintable() else f"bytes {head[:8].hex(' ')}"


def _is_safetensors(head: bytes) -> bool:
    """The length of a JSON header, at most 100 MB, then that header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def _data_pickle(archive: zipfile.ZipFile) -> bytes:
    """The pickle of a torch archive, all of whose checksums are right: torch.save writes and torch.load ignores them."""
    pickles = {name.rpartition("/")[2]: name for name in archive.namelist() if name.endswith(".pkl")}
    if "constants.pkl" in pickles or "data.pkl" not in pickles:
        raise CheckpointError("a TorchScript archive" if pickles else "a zip archive that torch.save did not write")
    for info in archive.infolist():
        if info.CRC == 0:  # none, by torch.serialization.set_crc32_options(False)
            del info.CRC
    damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"one that is damaged: the checksum of {damaged!r} is wrong")
    return archive.read(pickles["data.pkl"])


def _pickles(path: str) -> Iterator[dict]:
    """What the pickles of a torch file name."""
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) == _ZIP:
            with zipfile.ZipFile(file) as archive:
                yield foreign_globals(_data_pickle(archive))
            return
        file.seek(0)
        for _ in range(4):  # magic number, protocol, system, the object
            yield foreign_globals(file)


def _torch_load(path: str):
    kinds = {name: kind for found in _pickles(path) for name, kind in found.items()}
    known = {f"{f.__module__}.{f.__qualname__}" for f in torch.serialization.get_safe_globals() if not isinstance(f, tuple)}
    stand_ins = [(_stand_in(name, kind), name) for name, kind in kinds.items() if name not in known]
    allowed = torch.serialization.safe_globals([*stand_ins, (Inert, "type of the stand-ins")])
    with _LOCK, allowed, open(path, "rb") as file:  # of a path torch.load believes the ending .safetensors
        return torch.load(file, map_location="cpu", weights_only=True)


def _safetensors_load(path: str):
    from safetensors.torch import load_file

    return load_file(path)


def read(path: str):
    """What a torch or safetensors file (told by its bytes, not its name) holds, on the CPU; foreign objects are :class:`Inert`.

    Raises CheckpointError, saying what was found, for anything else; FileNotFoundError and PermissionError as open() does.
    """
    if os.path.isdir(path):
        raise CheckpointError("expected a torch or safetensors file, found a folder")
    with open(path, "rb") as file:
        head = file.read(64)
    load = _safetensors_load if _is_safetensors(head) else _torch_load if head.startswith((_ZIP, _PICKLES)) else None
    if load is None:
        raise CheckpointError(f"expected a torch or safetensors file, found {_found(head)}")
    try:
        return load(path)
    except ModuleNotFoundError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"expected a torch file, found {error}") from error
    except Exception as error:  # damaged bytes raise anything: KeyError, struct.error, SafetensorError, miniz' RuntimeError, …
        why = str(error.__context__ or error).partition("\n")[0].strip()
        kind = "safetensors" if load is _safetensors_load else "torch"
        found = f"{type(error).__name__}: {why[:200]}"
        raise CheckpointError(f"expected a {kind} file, found one that is damaged, cut short or not allowed ({found})") from error
