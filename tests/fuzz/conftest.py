"""How many cases a property gets, and the table at the end: cases and mismatches per operator, function and module."""

import json
import os

import pytest
from hypothesis import HealthCheck, Phase, settings

from fuzz.harness import counted

CASES = int(os.environ.get("LIFEOPS_FUZZ_CASES", "0"))  # of one property; 0: the slice that `make test` runs, always the same cases
_options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
_options["phases"] = Phase.explicit, Phase.generate, Phase.shrink
settings.register_profile("slice", derandomize=True, max_examples=25, **_options)
settings.register_profile("fuzz", max_examples=max(1, CASES), **_options)
settings.load_profile("fuzz" if CASES else "slice")

failed = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and "fuzz" in item.nodeid:
        failed.setdefault(getattr(item, "callspec", item).id if hasattr(item, "callspec") else item.name, item.nodeid)
    return report


def pytest_sessionfinish():
    """What was counted, for run.py."""
    path = os.environ.get("LIFEOPS_FUZZ_LEDGER")
    if path:
        with open(path, "w") as file:
            json.dump({"cases": counted, "failed": [*failed.values()]}, file)
