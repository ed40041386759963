"""A pytest plugin, ``-p bench.at_once``: every failure is appended to the file LIFEOPS_FAILURES as it happens, and a pytest-xdist worker
whose CUDA context is broken ends after its test, for xdist to start another one in its place.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.device import broken

FAILURES = "LIFEOPS_FAILURES"
_failed = False


def _is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _failed
    _failed = _failed or report.failed
    if report.failed and FAILURES in os.environ and not _is_worker():
        with Path(os.environ[FAILURES]).open("a") as file:
            file.write(f"==== {report.nodeid} ({report.when})\n{report.longreprtext}\n")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """The reports of the test have been sent. What would run here next would fail for no fault of its own."""
    global _failed
    if _failed and _is_worker() and broken():
        os._exit(77)
    _failed = False
