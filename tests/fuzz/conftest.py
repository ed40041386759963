"""How many cases a property gets, and the table at the end: cases and mismatches per operator, function and module."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from fuzz import harness

HERE = Path(__file__).parent
CASES = int(os.environ.get("LIFEOPS_FUZZ_CASES", "0"))  # of one property; 0: the slice that `make test` runs, always the same cases
_options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
_options["phases"] = Phase.explicit, Phase.generate, Phase.shrink
settings.register_profile("slice", derandomize=True, max_examples=25, **_options)
settings.register_profile("fuzz", max_examples=max(1, CASES), **_options)
settings.load_profile("fuzz" if CASES else "slice")


@pytest.fixture(autouse=True)
def _in_time():
    if time.time() > harness.UNTIL:
        pytest.skip("the time is up")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and HERE in item.path.parents:
        harness.mismatch()
    return report


def pytest_sessionfinish():
    """What was counted, for run.py."""
    path = os.environ.get("LIFEOPS_FUZZ_LEDGER")
    if path:
        Path(path).write_text(json.dumps({"cases": harness.counted, "mismatches": harness.mismatches}))
