"""The GPU's rows rehearsed without a GPU: what goes wrong on a first run costs what is wrong and nothing else."""

import csv
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lifeops import registry

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import device, gpu, gpu_set  # noqa: E402
from bench.problems import STAGED, WINDOWS, Problem  # noqa: E402

PROBLEM = Problem("token_dwconv", "fwd", 2, 4, 5, 24, 3, "float32")
NEXT = PROBLEM._replace(K=5)


def rows_of(folder):
    with (folder / "ops.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _found(rows):
    return {(row["variant"], row["how"]): row for row in rows}


def _work(folder, jobs, seconds=60.0):
    progress = gpu.Progress(folder / "ops.progress")
    return gpu.work(jobs, device.clock("cpu", 0.02), gpu.Rows(folder / "ops.csv", "cpu"), progress, seconds)


def _jobs(*problems):
    return [(p, "", lambda p=p: gpu_set.variants(p, "cpu")) for p in problems]


@pytest.fixture(autouse=True)
def _fresh_choices():
    yield
    registry.forget_choices()


def _planted(monkeypatch, change, backend="reference"):
    """``backend`` of token_dwconv with ``change`` around it; what was chosen before is forgotten."""
    op = registry.ops["token_dwconv"]
    impl = op.impls[backend]
    monkeypatch.setitem(op.impls, backend, dataclasses.replace(impl, fn=change(impl.fn)))
    registry.forget_choices()


# ------------------------------------------------------------------------------------------------ rows


def test_every_variant_gets_a_row(tmp_path):
    assert _work(tmp_path, _jobs(PROBLEM)) == 0
    rows = _found(rows_of(tmp_path))
    assert {name for name, how in rows if how == "eager"} >= {"lifeops_reference", "eager", "onednn", "clone"}
    assert ("clone", "kernels") in rows, "so short that its kernels are timed alone"
    for row in (row for row in rows.values() if row["how"] != "none"):
        assert 0 < float(row["q25_ms"]) <= float(row["median_ms"]) <= float(row["q75_ms"])
        assert int(row["peak_bytes"]) > 0
        assert row["note"] == ""


def test_a_wrong_kernel_gets_no_number(tmp_path, monkeypatch):
    _planted(monkeypatch, lambda fn: lambda *args: fn(*args) + 0.01)
    _work(tmp_path, _jobs(PROBLEM))
    (row,) = (row for row in rows_of(tmp_path) if row["variant"] == "lifeops_reference")
    assert (row["how"], row["median_ms"]) == ("none", "")
    assert row["note"].startswith("AssertionError: token_dwconv fwd: y is off by")


def test_a_slow_kernel_shows(tmp_path, monkeypatch):
    def slow(fn):
        def run(*args):
            time.sleep(0.02)
            return fn(*args)

        return run

    _planted(monkeypatch, slow)
    _work(tmp_path, _jobs(PROBLEM))
    rows = _found(rows_of(tmp_path))
    assert float(rows["lifeops_reference", "eager"]["median_ms"]) > 20 > float(rows["clone", "eager"]["median_ms"])


class TritonError(Exception):
    """As Triton's own, no RuntimeError."""


def _raises(*_):
    raise TritonError("out of resource: shared memory")


def test_an_exception_costs_one_variant(tmp_path, monkeypatch):
    """Of a kernel, of a baseline, and of the step after the check."""
    _planted(monkeypatch, lambda fn: _raises)
    monkeypatch.setattr("bench.baselines.eager_dwconv", _raises)
    peak_bytes, calls = device.peak_bytes, []

    def fails_once(fn, where):
        calls.append(fn)
        return _raises() if len(calls) == 1 else peak_bytes(fn, where)

    monkeypatch.setattr(device, "peak_bytes", fails_once)
    assert _work(tmp_path, _jobs(PROBLEM, NEXT)) == 0
    notes = {(row["variant"], row["K"]): row["note"] for row in rows_of(tmp_path) if row["how"] == "none"}
    assert all("TritonError: out of resource" in notes[name, K] for name in ("lifeops_reference", "eager") for K in "35")
    timed = {(row["variant"], row["K"]) for row in rows_of(tmp_path) if row["how"] == "eager"}
    right = [*(["lifeops_cpu"] if registry.unavailable("cpu") is None else []), "onednn", "clone"]
    assert timed == {(name, K) for name in right for K in "35"} - {(right[0], "3")}


def test_a_broken_context_ends_the_process_and_the_next_one_goes_on(tmp_path, monkeypatch):
    """The variant that broke it is left out, those before and after it have their rows."""
    broken = []

    def breaks(fn):
        def run(*args):
            broken.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return run

    monkeypatch.setattr(device, "broken", lambda: bool(broken))
    before = PROBLEM._replace(mode="dw")
    with monkeypatch.context() as patch:
        _planted(patch, breaks)
        assert _work(tmp_path, _jobs(before, PROBLEM, NEXT)) == gpu.BROKEN
    broken.clear()
    registry.forget_choices()
    first = rows_of(tmp_path)
    assert {row["mode"] for row in first} == {"dw", "fwd"}
    assert _work(tmp_path, _jobs(before, PROBLEM, NEXT)) == 0
    rows = rows_of(tmp_path)
    assert rows[: len(first)] == first
    again = rows[len(first) :]
    assert {row["K"] for row in again if row["how"] == "eager"} == {"3", "5"}
    assert "dw" not in {row["mode"] for row in again}
    notes = [row["note"] for row in again if (row["variant"], row["K"]) == ("lifeops_reference", "3")]
    assert notes == ["the process ended in it"]


CRASHES = """
import os, sys, time
from bench import gpu, gpu_set
from bench.problems import Problem

problems = [Problem("token_dwconv", "fwd", 2, 4, 5, 24, K, "float32") for K in (3, 5)]
variants = gpu_set.variants

def crashing(p, device):
    runs, checks = variants(p, device)
    return {**runs, **({"crash": HOW} if p.K == 3 else {})}, checks

HOW, gpu.PATIENCE = {"aborts": (os.abort, 60.0), "hangs": (lambda: time.sleep(600), 8.0)}[os.environ["HOW"]]
gpu_set.problems, gpu_set.variants = lambda tiny: problems, crashing
argv = sys.argv[1:]
if "--worker" in argv:
    sys.exit(gpu.main(argv))
args = argv[argv.index("--out") + 1]
sys.exit(gpu.supervise([sys.executable, __file__, *argv], gpu.Path(args), "ops", 60))
"""


def environment(**more):
    """Of a process of its own: no worker of the pytest that starts it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.parametrize(("how", "code"), [("aborts", -6), ("hangs", 1)])
def test_a_crash_ends_one_variant(how, code, tmp_path):
    """As a segmentation fault would, or a kernel that waits for ever; a process of its own measures what is left."""
    (tmp_path / "crashes.py").write_text(CRASHES)
    command = [sys.executable, str(tmp_path / "crashes.py"), "ops", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment(HOW=how), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"the process ended with {code}: " in done.stdout
    rows = rows_of(tmp_path)
    assert {(row["K"], row["note"]) for row in rows if row["variant"] == "crash"} == {("3", "the process ended in it")}
    assert {row["K"] for row in rows if row["variant"] == "clone" and row["how"] == "eager"} == {"3", "5"}


def test_a_process_that_does_nothing_is_not_started_again(tmp_path):
    assert gpu.supervise([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, "ops", 60) == 3


def test_stops_when_time_is_over(tmp_path):
    assert _work(tmp_path, _jobs(PROBLEM), seconds=-1.0) == 0
    assert rows_of(tmp_path) == []


def test_one_problem_of_every_system_comes_first():
    systems = [p.system for p in gpu_set.problems(tiny=False)]
    everything = {*gpu_set.SEQUENCES, *WINDOWS, *STAGED}
    assert set(systems[: len(everything)]) == everything
    assert len(set(gpu_set.problems(tiny=False))) == len(systems)
    assert {p.mode for p in gpu_set.last(tiny=False)} == {"fwd"}


@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_models_run(mode):
    found = {p.system: gpu_set.model_runs(p, makers, "cpu") for p, makers in gpu_set.models(tiny=True) if p.mode == mode}
    assert found["model"].keys() == {"plain", "life", "localvit", "dw_plain", "dw_shortcut"}
    assert found["cvt_13"].keys() >= {"lifeops", "eager"}
    for run in (found["model"]["life"], found["edgevit_xs"]["lifeops"]):
        out = run()
        assert all(t is not None for t in (out if isinstance(out, tuple) else (out,)))


# ------------------------------------------------------------------------------------------------ timing


class Stream:
    """Stands in for CUDA's events and synchronisation, and writes down their order."""

    def __init__(self, monkeypatch):
        self.log = log = []

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                log.append("event")

            def elapsed_time(self, other):
                return 1.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))


class Buffer:
    """A flush buffer that knows only how to be read."""

    def __init__(self, log):
        self.log = log

    def sum(self):
        self.log.append("read")


def test_the_cache_is_flushed_by_reading(monkeypatch):
    """A written buffer would leave lines to be written back while the call is timed."""
    stream = Stream(monkeypatch)
    c = device.Clock("cuda", Buffer(stream.log), 0.01)
    assert device.once(lambda: stream.log.append("call"), c) == 1.0
    assert stream.log == ["read", "event", "call", "event", "synchronize"]


def test_kernel_times_are_of_one_call():
    x = torch.ones(1 << 18)
    once = device.kernel_times(lambda: x + 1, device.clock("cpu", 0.01))
    often = device.kernel_times(lambda: [x + 1 for _ in range(16)], device.clock("cpu", 0.01))
    assert 0 < once.q25 <= once.median <= once.q75
    assert often.median > 4 * once.median


def test_no_kernels_seen_is_an_error(monkeypatch):
    """As where the profiler may not look at the device."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="the profiler saw kernels in 0 of 12 calls"):
        device.kernel_times(lambda: torch.ones(3), device.Clock("cuda", None, 0.01))


def test_what_cannot_be_captured_has_a_note(tmp_path, monkeypatch):
    Stream(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")

    def refused(fn):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(device, "captured", refused)
    monkeypatch.setattr(device, "peak_bytes", lambda fn, where: 1)
    monkeypatch.setattr(device, "SHORT_MS", 0.0)
    rows = gpu.Rows(tmp_path / "ops.csv", "cuda")
    m = gpu.Measurement(PROBLEM, "p", device.Clock("cuda", None, 0.01), rows, gpu.Progress(tmp_path / "ops.progress"))
    m.timed({"ours": lambda: None})
    found = _found(rows_of(tmp_path))
    assert found["ours", "eager"]["median_ms"] == "1.0"
    assert found["ours", "graph"]["note"] == "RuntimeError: operation not permitted when stream is capturing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match=r"no CUDA device; `--device cpu --tiny` rehearses"):
        gpu.main(["ops", "--out", "nowhere"])
