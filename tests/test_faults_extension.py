"""The compiled extension missing, damaged, stale or foreign: named in one line, never loaded, and the reference gives the numbers."""

import json
import os
import platform
import runpy
import shutil
import struct
from pathlib import Path

import pytest
from faults import ROOT, each_fault, ended, fault

import lifeops
from lifeops import built, native, registry

PACKAGE = Path(lifeops.__file__).parent
compiled = pytest.mark.skipif(registry.unavailable("cpu") is not None, reason="no compiled CPU kernels")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the compiled modules and of the notes that setup.py makes of them, in the place of the package's own."""
    for path in PACKAGE.glob("_*.so"):
        shutil.copy(path, tmp_path)
    files = {path.name: built.checksum(path) for path in tmp_path.glob("_*.so")}
    (tmp_path / "_build.json").write_text(json.dumps({"left_out": {}, "how": "pip install .", "files": files}))
    monkeypatch.setattr(built, "FOLDER", tmp_path)
    monkeypatch.setattr(built, "NOTES", tmp_path / "_build.json")
    return tmp_path


def library(folder) -> Path:
    return next(folder.glob("_ops*.so"))


def change(path: Path, edit) -> None:
    content = bytearray(path.read_bytes())
    path.write_bytes(edit(content) or content)


def without_notes(folder):
    (folder / "_build.json").unlink()


def cut(content):
    return content[: len(content) * 97 // 100]


def zeros(content):
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)


def one_bit(content):
    content[len(content) // 3] ^= 1


def foreign(content):
    number = next(number for number, name in built._MACHINES.items() if name == OTHER)
    content[18:20] = struct.pack("<H", number)


def renamed_symbol(content):
    """As of a torch that lacks a function: the loader finds it undefined."""
    assert b"torch_get_num_threads\0" in content
    return content.replace(b"torch_get_num_threads\0", b"torch_got_num_threads\0")


OTHER = "x86_64" if platform.machine() == "aarch64" else "aarch64"
CUT, CHECKSUM = "it is cut short, ", "its checksum is not the one noted when it was built"
FAULTS = {  # what it is or has, what is done to the folder, what is said of it
    "missing": ("is missing", lambda f: library(f).unlink(), "this installation has no compiled kernels"),
    "cut": ("is cut short", lambda f: change(library(f), cut), CUT),
    "cut_without_notes": (
        "is cut short, and what the build noted is lost", lambda f: (without_notes(f), change(library(f), cut)), CUT
    ),
    "empty": ("is empty", lambda f: library(f).write_bytes(b""), "it is empty"),
    "text": ("is another kind of file", lambda f: library(f).write_text("version"), "it does not start as a library does but with 76"),
    "zeros": ("ends in zeros, as after a power failure", lambda f: change(library(f), zeros), CHECKSUM),
    "one_bit": ("has one wrong bit", lambda f: change(library(f), one_bit), CHECKSUM),
    "foreign": ("was built for another processor", lambda f: change(library(f), foreign), f"it was built for {OTHER}, this machine is "),
    "symbol": (
        "was built for a torch that has a function which this one lacks",
        lambda f: (without_notes(f), change(library(f), renamed_symbol)), "undefined symbol: torch_got_num_threads",
    ),
}  # fmt: skip


@compiled
@each_fault(
    {name: f"the compiled library {what}" for name, (what, *_) in FAULTS.items()},
    "not loaded; one FallbackWarning says why and how to mend it; the reference runs",
)
def test_library(name, folder):
    _, inject, message = FAULTS[name]
    inject(folder)
    reason = native._load()
    assert message in reason
    assert "\n" not in reason
    assert name in ("missing", "symbol") or "; rebuild it with `pip install" in reason


def test_no_library_in_a_source_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(built, "FOLDER", tmp_path / "lifeops")
    (tmp_path / "setup.py").touch()
    reason = native._load()
    assert reason.startswith(f"no compiled kernels in {tmp_path / 'lifeops'}: this is the source tree; if lifeops is installed elsewhere, ")


@compiled
def test_schemas_that_differ_or_lack(monkeypatch):
    name, schema = next(iter(native.SCHEMAS.items()))
    for op, found in ((name, schema), ("nowhere", "nothing")):
        monkeypatch.setattr(native, "SCHEMAS", {op: "another"})
        assert native._stale(Path("a/_ops.so")) == f"_ops.so is stale: expected 'another', found {found!r}; {built.REBUILD}"


def test_what_is_registered_of_a_library(monkeypatch):
    """Of one that does not load why, or what its notes say of a backend; else the operators that it has on each device."""
    missing, kernels = {}, []
    monkeypatch.setattr(registry, "set_unavailable", missing.__setitem__)
    monkeypatch.setattr(registry, "register", lambda name, device, fn, **how: kernels.append((name, device)))
    monkeypatch.setattr(native, "build_notes", lambda: {"cuda": "no nvcc"})
    monkeypatch.setattr(native, "_load", lambda: "it is cut short")
    native._register()
    assert (missing, kernels) == ({"cpu": "it is cut short", "cuda": "no nvcc"}, [])
    monkeypatch.setattr(native, "_load", lambda: None)
    monkeypatch.setattr(native, "_has", lambda device, op="token_dwconv": device == "cpu" and op in ("token_dwconv", "rollout_step"))
    for name in ("_fwd", "_grad_weight", "_channel"):
        monkeypatch.setattr(native, name, None)
    missing.clear(), native._register()
    assert missing == {"cuda": "no nvcc"}
    assert {name for name, device in kernels if device == "cpu"} >= {"token_dwconv", "rollout_step"}
    assert not {name for name, _ in kernels} & {"channel_act", "life_qkv", "dw_shortcut"}


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\x7fELF" + bytes(36), "it is cut short, 40 bytes; rebuild"), (b"\x7fELF\x01\x01" + bytes(90), None)],
    ids=["less than a header", "32 bits"],
)
def test_headers_of_libraries(content, said, tmp_path, monkeypatch):
    """Another format than 64-bit little-endian is the loader's to judge."""
    monkeypatch.setattr(built, "NOTES", tmp_path / "none")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    (tmp_path / "_ops.so").write_bytes(content)
    found = built.damage(tmp_path / "_ops.so")
    assert found is None if said is None else said in found


@compiled
def test_a_whole_library_is_not_refused(folder):
    assert [built.damage(path) for path in folder.glob("_*.so")] == [None, None]


END_TO_END = """
import warnings, torch, lifeops
from lifeops import config, registry, torchlib
from lifeops.cli import info
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        y = lifeops.token_dwconv(torch.ones(1, 5, 4), torch.ones(4, 1, 3, 3), grid=(2, 2), num_prefix_tokens=1)
assert y[0, 1:].eq(4).all() and y[0, 0].eq(1).all()
assert torchlib.last_backend["token_dwconv"] == "reference"
(line,) = [str(w.message) for w in seen]
print(line)
config.settings = config.settings._replace(strict=True)
registry.forget_choices()
try:
    lifeops.token_dwconv(torch.ones(1, 5, 4), torch.ones(4, 1, 3, 3), grid=(2, 2), num_prefix_tokens=1)
except lifeops.NotSupported as error:
    print(error)
print(info.text())
"""


@compiled
@fault("both modules are cut in half", "one FallbackWarning, right numbers; an error with LIFEOPS_STRICT=1; `lifeops info` says why")
def test_a_process_with_a_cut_library(tmp_path):
    """A library that is cut where its code is kills the process that loads it, with SIGBUS."""
    shutil.copytree(PACKAGE, tmp_path / "lifeops", ignore=shutil.ignore_patterns("__pycache__", "_build.json"))
    for path in (tmp_path / "lifeops").glob("_*.so"):
        change(path, lambda content: content[: len(content) // 2])
    out, err = ended("-c", END_TO_END, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    first, second, *info = out.splitlines()
    assert first.startswith("lifeops: token_dwconv runs on the slower 'reference' backend. cpu: _ops.")
    assert "it is cut short" in first
    assert "LIFEOPS_STRICT=1 forbids to fall back to reference" in second
    assert sum("is damaged or not for this machine: it is cut short" in line for line in info) >= 2
    assert not err


NOTES = {"cut short": '{"left_out": {"cuda"', "a list": "[]", "other values": '{"left_out": [], "how": 3}', "no text": b"\xff\xfe\x00"}


@fault("`_build.json` is damaged", "the kernels run; of missing backends it is said that it is")
@pytest.mark.parametrize("name", NOTES)
def test_notes(name, folder):
    content = NOTES[name]
    (folder / "_build.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert set(native.build_notes()) == {"cpu", "cuda"}
    for line in native.build_notes().values():
        assert line.startswith(f"{folder / '_build.json'} cannot be read (")
        assert line.endswith("; install lifeops again")
    assert [built.damage(path) for path in folder.glob("_*.so")] == [None] * len(list(folder.glob("_*.so")))
    assert not built.changed_sources()


@fault("`_build.json` is missing", "the kernels run; missing backends are said to be left out by the build")
def test_no_notes(folder):
    without_notes(folder)
    assert native.build_notes() == {}
    assert not built.changed_sources()


@fault("csrc/ has changed since the library was built", "one warning; it runs where its schemas fit, else the reference")
def test_changed_sources(tmp_path, monkeypatch):
    package, source = tmp_path / "lifeops", tmp_path / "csrc" / "a.cpp"
    for path in (package, source.parent):
        path.mkdir()
    source.write_text("int a;")
    notes = {"left_out": {}, "how": "pip install .", "sources": built.sources_digest(tmp_path / "csrc")}
    (package / "_build.json").write_text(json.dumps(notes))
    library = package / "_ops.so"
    library.write_bytes(b"")
    for name, value in {"FOLDER": package, "NOTES": package / "_build.json", "damage": lambda path: None}.items():
        monkeypatch.setattr(built, name, value)
    monkeypatch.setattr(native.torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(native, "_stale", lambda path: None)
    assert native._load() is None  # no warning: pytest would show it, and the next line would be no change
    source.write_text("int b;")
    with pytest.warns(UserWarning, match=r"csrc/ has changed since _ops\.so was built; rebuild it with `pip install") as seen:
        assert native._load() is None
    assert len(seen) == 1


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="installed without sources beside it")
def test_setup_notes_what_is_read(folder, monkeypatch):
    """setup.py's notes are those that lifeops/built.py reads."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setitem(os.environ, "LIFEOPS_BUILD", "none")
    monkeypatch.chdir(ROOT)
    keep = runpy.run_path(str(ROOT / "setup.py"))["keep"]
    package = folder / "lifeops"
    package.mkdir()
    for path in folder.glob("_*.so"):
        shutil.move(path, package)
    monkeypatch.setattr(built, "NOTES", package / "_build.json")
    keep({"cuda": "no nvcc"}, folder, compiled=True)
    assert {path.name: built.checksum(path) for path in package.glob("_*.so")} == built.notes()["files"]
    assert built.notes()["sources"] == built.sources_digest(ROOT / "csrc")
    assert native.build_notes()["cuda"].startswith("no nvcc; to build it: pip install")
    for path in package.glob("_ops*.so"):
        change(path, one_bit)
        assert "checksum" in built.damage(path)
    keep({"cpu": "left out"}, folder)
    assert "files" not in built.notes()
