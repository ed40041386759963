"""Tests run in a copy of the tree, in a process forked from one that has imported torch already."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = "torch", "torch._dynamo", "hypothesis", "timm", "transformers"
MEMORY = 16 << 30  # bytes of address space for one run: a mistake in a size shall not take the machine's
OPTIONS = "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:pytest_cov"


def warm_up() -> None:
    """Imports what every run needs, but nothing of the tree."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in HEAVY:
        with contextlib.suppress(ImportError, RuntimeError):
            importlib.import_module(name)


def copied(folder: Path) -> Path:
    """A copy of the tree as it is, with its compiled kernels."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    built = [path.relative_to(ROOT) for path in (*(ROOT / "lifeops").glob("*.so"), ROOT / "lifeops" / "_build.json") if path.exists()]
    for name in (*filter(lambda name: (ROOT / name).is_file(), names), *built):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / "lifeops" / "kernels").symlink_to("../kernels")
    subprocess.run([sys.executable, "-m", "compileall", "-q", "lifeops", "kernels", "tests"], cwd=folder, check=True)
    return folder


class _Chosen:
    """Leaves the tests that were asked for, in that order, and notes how each ends."""

    def __init__(self, tests: list[str], notes):
        self.order, self.notes = {test: place for place, test in enumerate(tests)}, notes

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.nodeid in self.order), key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.notes.write(f"{report.outcome} {report.nodeid}\n")
            self.notes.flush()


def _child(copy: Path, tests: list[str], options: tuple, notes: Path) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.chdir(copy)
    here, tests_here = {str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "mutants"), ""}, str(ROOT / "tests")
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in here)]
    for name in [name for name, module in sys.modules.items() if (getattr(module, "__file__", None) or "").startswith(tests_here)]:
        del sys.modules[name]  # the copy has its own
    os.environ["PYTHONPATH"] = str(copy)
    sys.dont_write_bytecode = True
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    with notes.open("w") as stream:
        code = pytest.main([*OPTIONS, *options, f"--basetemp={copy}/tmp", *files], plugins=[_Chosen(tests, stream)])
    os._exit(int(code))


def run(copy: Path, tests: list[str], seconds: float, options: tuple = ()) -> tuple[str, dict[str, str]]:
    """How a run of ``tests`` ended ("passed", "failed", "too long") and how each test did. What it leaves running is ended."""
    notes = copy / "notes"
    notes.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        try:
            _child(copy, tests, options, notes)
        finally:
            os._exit(70)
    until, ended, status = time.monotonic() + seconds, 0, 0
    while not ended and time.monotonic() < until:
        time.sleep(0.05)
        ended, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
    lines = notes.read_text().splitlines() if notes.exists() else ()
    results = {}
    for outcome, _, test in (line.partition(" ") for line in lines):
        results[test] = "failed" if "failed" in (outcome, results.get(test)) else outcome
    return ("too long" if not ended else "passed" if status == 0 else "failed"), results
