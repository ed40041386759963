"""Folders and disks that take nothing, full ones, and processes killed or interrupted while they write: whole files or none, one line."""

import argparse
import importlib.util
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import ROOT, TIMEOUT, each_fault, ended, fault, started

from lifeops import cli, files
from lifeops.cli.main import told_plainly
from lifeops.files import make_folder, save, written
from lifeops.models.deit import VisionTransformer

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 4}
UNWRITABLE = "/sys/lifeops"  # also root can make no folder there


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A folder with a picture and a checkpoint, the current one."""
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    torch.save({"model": VisionTransformer(**SIZES).state_dict()}, tmp_path / "model.pth")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ROLLOUT = ["rollout", "a.png", "--model", "lifeops", "--checkpoint", "model.pth", "--out", "out"]
OUTPUT = ["a.npy", "a_cls-token.png"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ disks that are full

WRITERS = {
    "checkpoint": lambda path: save({"a": torch.arange(10000)}, path),
    "array": lambda path: _with(path, lambda part: np.save(part.open("wb"), np.arange(10000))),
    "text": lambda path: _with(path, lambda part: part.write_text("x" * 80000)),
    "picture": lambda path: _with(path, _picture),
}


def _with(path, write):
    with written(path) as part:
        write(part)


def _picture(part):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figure.subplots().imshow(np.random.default_rng(0).random((200, 200)))
    figure.savefig(part, format="png")


@each_fault(
    {name: f"the disk is full after any number of bytes of a result ({name})" for name in WRITERS},
    "OSError that names the file; the old file stays as it was, nothing else is left",
)
def test_a_full_disk(name, tmp_path):
    """A limit on the size of files: the same errors of the same calls, at a chosen byte."""
    target = tmp_path / "result"
    target.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1, 100, 700, 4096, 16384):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            with pytest.raises(OSError, match=f"^{target} cannot be written: "):
                WRITERS[name](target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(tmp_path) == ["result"]
        assert target.read_text() == "old"
    WRITERS[name](target)
    assert names(tmp_path) == ["result"]
    assert target.stat().st_size > 16384


LIMITED = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), -1))\n"
RUNS = {
    "lifeops rollout": "from lifeops.cli import main\nsys.exit(main())",
    "python -m bench --out": "from bench.cli import main\nsys.exit(main())",
}
BENCH = ["token_dwconv", "--mode", "fwd", "--dtype", "float32", "--problem", "b1_3x3_c8_k3", "--threads", "1", "--seconds", "0.01"]


@each_fault(
    {name: f"the disk is full as `{name}` writes its results" for name in RUNS}, "one line that names the file, exit code 2, no half file"
)
def test_a_command_on_a_full_disk(name, inputs):
    (inputs / "out").mkdir()
    bench = "bench" in name
    arguments = ["--system", *BENCH, "--out", "out/rows.csv"] if bench else ROLLOUT
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    env["COVERAGE_PROCESS_CONFIG"] = ""  # `make coverage` could not write its record there
    _, err = ended("-c", LIMITED + RUNS[name], 100, *arguments, code=2, env=env)
    (line,) = err.splitlines()
    assert line.startswith(f"{name.removesuffix(' --out')}: error: out/{'rows.csv' if bench else 'a.npy'} cannot be written: ")
    assert names(inputs / "out") == []


FULL = "import os, sys\nos.dup2({}, 1)\nfrom lifeops.cli.main import ended_plainly, main\n"


@fault("standard output is a full disk, or its reader has gone", "one line and exit code 2; no line and 141; never a traceback")
@pytest.mark.parametrize("buffered", [True, False])
def test_standard_output(buffered):
    """Where it is buffered, what little is printed is written, and fails, at the end, and again as Python ends."""
    env = {"PYTHONUNBUFFERED": "" if buffered else "1"}
    with Path("/dev/full").open("w") as full:
        process = started("-m", "lifeops", "info", env=env)
        process.stdout.close()
        _, err = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, err) == (141, "")
        for prog, command in (("lifeops info", "main(['info'])"), ("x", "ended_plainly('x', lambda: print('a line'))")):
            code = f"{FULL.format(full.fileno())}sys.exit({command})"
            _, err = ended("-c", code, code=2, env=env, pass_fds=[full.fileno()])
            assert err == f"{prog}: error: [Errno 28] No space left on device\n"


# ------------------------------------------------------------------------------------------------ folders that take nothing

READ_ONLY = {
    "lifeops rollout": lambda: cli.main([*ROLLOUT[:-1], UNWRITABLE]),
    "lifeops demo": lambda: cli.main(["demo", "--out", UNWRITABLE]),
    "python -m bench": lambda: _bench_main(["--quick", "--out", f"{UNWRITABLE}/rows.csv"]),
}


def _bench_main(arguments):
    pytest.importorskip("rich")
    sys.path.insert(0, str(ROOT))
    from bench.cli import main

    return main(arguments)


@each_fault(
    {name: f"`{name}` is told a folder that cannot be written to" for name in READ_ONLY}, "one line, exit code 2, nothing computed before"
)
def test_a_folder_that_takes_nothing(name, inputs, capsys):
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        READ_ONLY[name]()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: error: --out must be a folder that can be written to, got {UNWRITABLE}")
    assert time.monotonic() - start < 60


@fault("home and every cache (HOME, XDG, matplotlib's, Triton's) cannot be written to", "the commands work; their files are whole")
def test_read_only_home(inputs):
    caches = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "TRITON_HOME")
    _, err = ended("-m", "lifeops", *ROLLOUT, env=dict.fromkeys(caches, UNWRITABLE))
    assert names(inputs / "out") == OUTPUT
    assert "Traceback" not in err


# ------------------------------------------------------------------------------------------------ killed and interrupted

STUCK = """
import sys, time, numpy as np

def save(file, maps):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(600)

np.save = save
from lifeops.cli import main
sys.exit(main())
"""


@each_fault(
    {"SIGKILL": "`lifeops rollout` is killed as it writes", "SIGINT": "Ctrl-C as `lifeops rollout` writes"},
    "no half file under a result's name; the next run clears away what the killed one left; Ctrl-C: one line, exit code 130",
)
def test_rollout_does_not_end(name, inputs):
    process = started("-c", STUCK, *ROLLOUT)
    assert process.stdout.readline() == "writing\n"
    (part,) = names(inputs / "out")
    assert part.endswith(".part")
    make_folder(inputs / "out")
    assert names(inputs / "out") == [part], "somebody else's, who is at work"
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=TIMEOUT)
    if name == "SIGINT":
        assert (process.returncode, err) == (130, "lifeops rollout: interrupted\n")
        assert names(inputs / "out") == []
    else:
        assert (process.returncode, err) == (-signal.SIGKILL, "")
        assert names(inputs / "out") == [part]
    assert cli.main(ROLLOUT) == 0
    assert names(inputs / "out") == OUTPUT
    assert np.load(inputs / "out" / "a.npy").shape == (1, 2, 2)


def test_other_files_that_end_in_part_stay(tmp_path):
    for name in ("a.part", ".part", ".0123456789ab.part.txt", ".0123456789AB.part"):
        (tmp_path / name).touch()
    before = names(tmp_path)
    (tmp_path / ".0123456789ab.part").touch()
    make_folder(tmp_path)
    assert names(tmp_path) == before


def test_files_where_nothing_can_be_locked(tmp_path, monkeypatch):
    """As on Windows: files are whole or not there all the same."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("files_without_locks", files.__file__)
    unlocked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unlocked)
    unlocked.save({"a": torch.arange(3)}, tmp_path / "a.pt")
    assert torch.equal(torch.load(tmp_path / "a.pt")["a"], torch.arange(3))
    with pytest.raises(OSError, match=r"none/a\.pt cannot be written: No such file"):
        unlocked.save({}, tmp_path / "none" / "a.pt")
    (tmp_path / ".0123456789ab.part").touch()
    unlocked.make_folder(tmp_path)
    assert names(tmp_path) == ["a.pt"]


def test_warnings_of_errors_keep_their_cause(tmp_path, capsys):
    parser = argparse.ArgumentParser(prog="x")
    with pytest.raises(SystemExit), told_plainly(parser), written(tmp_path / "no" / "file"):
        pass
    assert capsys.readouterr().err == f"x: error: {tmp_path / 'no' / 'file'} cannot be written: No such file or directory\n"
