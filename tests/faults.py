"""Faults that tests inject, as rows of docs/reliability.md (written by tests/faults_table.py), and the processes they are injected into."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds until a process counts as hanging


class Row(NamedTuple):
    fault: str
    happens: str
    test: str


ROWS: list[Row] = []


def fault(what: str, happens: str):
    """Lists the decorated test as the one that injects ``what`` and sees ``happens``."""

    def listed(test):
        ROWS.append(Row(what, happens, f"{test.__module__}.{test.__name__}"))
        return test

    return listed


def each_fault(cases: dict[str, str], happens: str):
    """Parametrises a test by ``name``, the keys of ``cases``, whose values say what is injected; each is a row of its own."""

    def listed(test):
        ROWS.extend(Row(what, happens, f"{test.__module__}.{test.__name__}[{name}]") for name, what in cases.items())
        return pytest.mark.parametrize("name", cases)(test)

    return listed


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; processes started here would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def started(*command, cwd=None, env=None, **options) -> subprocess.Popen:
    """A Python process of one thread, its output piped."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=env, **pipes, **options)


def ended(*command, code: int = 0, **options) -> tuple[str, str]:
    """(stdout, stderr) of such a process, which must end with exit code ``code``."""
    process = started(*command, **options)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code, (process.returncode, out[-2000:], err[-4000:])
    return out, err
