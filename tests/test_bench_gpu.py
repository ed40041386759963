"""The GPU script rehearsed without a GPU: what goes wrong on a first run costs what is wrong and nothing else."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lifeops import registry

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import device, gpu, gpu_set, sanitized, warm  # noqa: E402
from bench.problems import STAGED, WINDOWS, Problem  # noqa: E402

PROBLEM = Problem("token_dwconv", "fwd", 2, 4, 5, 24, 3, "float32")
NEXT = PROBLEM._replace(K=5)
needs_cpu = pytest.mark.skipif(registry.unavailable("cpu") is not None, reason="no compiled kernels")


def _rows(folder):
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
    rows = _found(_rows(tmp_path))
    assert {name for name, how in rows if how == "eager"} >= {"lifeops_reference", "eager", "onednn", "clone"}
    assert ("clone", "kernels") in rows, "so short that its kernels are timed alone"
    for row in (row for row in rows.values() if row["how"] != "none"):
        assert 0 < float(row["q25_ms"]) <= float(row["median_ms"]) <= float(row["q75_ms"])
        assert int(row["peak_bytes"]) > 0
        assert row["note"] == ""


def test_a_wrong_kernel_gets_no_number(tmp_path, monkeypatch):
    _planted(monkeypatch, lambda fn: lambda *args: fn(*args) + 0.01)
    _work(tmp_path, _jobs(PROBLEM))
    (row,) = (row for row in _rows(tmp_path) if row["variant"] == "lifeops_reference")
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
    rows = _found(_rows(tmp_path))
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
    notes = {(row["variant"], row["K"]): row["note"] for row in _rows(tmp_path) if row["how"] == "none"}
    assert all("TritonError: out of resource" in notes[name, K] for name in ("lifeops_reference", "eager") for K in "35")
    timed = {(row["variant"], row["K"]) for row in _rows(tmp_path) if row["how"] == "eager"}
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
    first = _rows(tmp_path)
    assert {row["mode"] for row in first} == {"dw", "fwd"}
    assert _work(tmp_path, _jobs(before, PROBLEM, NEXT)) == 0
    rows = _rows(tmp_path)
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


def _env(**more):
    """Of a process of its own: no worker of the pytest that starts it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.parametrize(("how", "code"), [("aborts", -6), ("hangs", 1)])
def test_a_crash_ends_one_variant(how, code, tmp_path):
    """As a segmentation fault would, or a kernel that waits for ever; a process of its own measures what is left."""
    (tmp_path / "crashes.py").write_text(CRASHES)
    command = [sys.executable, str(tmp_path / "crashes.py"), "ops", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, env=_env(HOW=how), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"the process ended with {code}: " in done.stdout
    rows = _rows(tmp_path)
    assert {(row["K"], row["note"]) for row in rows if row["variant"] == "crash"} == {("3", "the process ended in it")}
    assert {row["K"] for row in rows if row["variant"] == "clone" and row["how"] == "eager"} == {"3", "5"}


def test_a_process_that_does_nothing_is_not_started_again(tmp_path):
    assert gpu.supervise([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, "ops", 60) == 3


def test_stops_when_time_is_over(tmp_path):
    assert _work(tmp_path, _jobs(PROBLEM), seconds=-1.0) == 0
    assert _rows(tmp_path) == []


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
    found = _found(_rows(tmp_path))
    assert found["ours", "eager"]["median_ms"] == "1.0"
    assert found["ours", "graph"]["note"] == "RuntimeError: operation not permitted when stream is capturing"


# ------------------------------------------------------------------------------------------------ warm

WARM = """
import os
from bench import systems, warm
from bench.problems import Problem

problems = [Problem("token_pool", "fwdbwd", 9, 4, 4, 64, 3, "bfloat16"), Problem("rollout", "fwd", 9, 4, 4, 64, 0, "bfloat16"),
            Problem("dies", "fwd", 9, 4, 4, 64, 0, "bfloat16"), Problem("no such system", "fwd", 9, 4, 4, 64, 0, "bfloat16")]
systems.BUILDERS["dies"] = lambda p, compile: os.abort()
if __name__ == "__main__":
    print("failed", warm.run(problems, "cpu", 2, 170))
"""


def test_kernels_are_compiled_in_processes_into_one_cache(tmp_path):
    """For sm_90, by Triton's own launcher: a second run finds every one of them. A process that dies and an error cost one problem each."""
    pytest.importorskip("triton")
    (tmp_path / "warms.py").write_text(WARM)
    env = _env(TRITON_CACHE_DIR=str(tmp_path / "cache"))
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(tmp_path / "warms.py")]
    said = [subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert all(text.endswith("2 failed\nfailed 2\n") and "KeyError: 'no such system'" in text for text in said)
    compiled = [int(re.search(r"(\d+) kernels for 4 problems", text)[1]) for text in said]
    assert compiled == [len(list((tmp_path / "cache").glob("*/*.cubin"))), 0]
    assert compiled[0] >= 4


def test_what_launches_the_same_is_compiled_once():
    problems = list(gpu_set.problems(tiny=False))
    chosen = warm.worth(problems)
    assert len(chosen) < len(problems)
    assert {p.B for p in chosen} == {warm.IMAGES}
    assert {p.mode for p in chosen if p.system == "token_dwconv"} == {"fwdbwd"}
    assert {p.mode for p in chosen if p.system == "localvit_ffn"} == {"fwd", "fwdbwd"}, "what is fused for inference runs other kernels"
    assert {(p.system, p.H, p.C, p.K) for p in chosen} == {(p.system, p.H, p.C, p.K) for p in problems}


# ------------------------------------------------------------------------------------------------ tests and sanitizers

BREAKING = """
import pytest
from bench import at_once

at_once.broken = lambda: hasattr(at_once, "context")


@pytest.mark.parametrize("n", range(5))
def test_kernel(n):
    if n == 1:
        at_once.context = "broken"
    assert not hasattr(at_once, "context"), f"kernel {n} in a broken context"
"""


def test_a_failure_is_written_at_once_and_a_broken_worker_replaced(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_breaking.py").write_text(BREAKING)
    command = [sys.executable, "-m", "pytest", "-q", "-n1", "-p", "no:cacheprovider", "-p", "bench.at_once", "--rootdir", "."]
    env = _env(LIFEOPS_FAILURES=str(tmp_path / "failures.txt"))
    done = subprocess.run([*command, "test_breaking.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "4 passed" in done.stdout, done.stdout
    failures = (tmp_path / "failures.txt").read_text()
    assert "==== test_breaking.py::test_kernel[1] (call)" in failures
    assert "kernel 1 in a broken context" in failures
    assert "kernel 2" not in failures


def test_sanitized_calls_see_every_op_first():
    found = list(sanitized.calls("cpu"))
    keys = [(op.name, dtype) for op, _, dtype in found]
    assert len(set(keys[: len(set(keys))])) == len(set(keys))
    assert {dtype for _, dtype in keys} == {torch.bfloat16, torch.float32}


@needs_cpu
def test_sanitized_calls_run_on_inputs_that_were_copied(monkeypatch):
    seen = []
    move = sanitized._moved

    def moved(t, where):
        new = move(t, where)
        assert (new.shape, new.stride(), new.storage_offset()) == (t.shape, t.stride(), t.storage_offset())
        assert torch.equal(new, t)
        assert new.data_ptr() != t.data_ptr() or not t.numel()
        seen.append(new)
        return new

    monkeypatch.setattr(sanitized, "_moved", moved)
    monkeypatch.setattr(sanitized, "calls", lambda backend, calls=sanitized.calls: list(calls(backend))[:60])
    ran = sanitized.run("cpu", "cpu", 60)
    assert ran.keys() >= {"token_dwconv", "token_pool", "token_dwconv_strided"}
    assert any(not t.is_contiguous() for t in seen)
    assert sanitized.run("cpu", "cpu", -1) == {}


# ------------------------------------------------------------------------------------------------ the script

SCRIPT = ROOT / "bench" / "gpu.sh"


def _limits():
    return {name: int(s) for name, s in re.findall(r"^# (\w+) +(\d+)(?: |$)", SCRIPT.read_text(), re.M)}


def test_all_stages_take_nine_minutes_at_most():
    limits = _limits()
    stages = re.search(r"STAGES=\$\{\*:-(.*)\}", SCRIPT.read_text())[1].split()
    assert list(limits) == stages
    assert sum(limits.values()) <= 540
    text = SCRIPT.read_text().partition("set -u")[2]
    assert all(re.search(rf"\b{name} {limit}\b", text) for name, limit in limits.items()), "the header says what the code does"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match=r"no CUDA device; `--device cpu --tiny` rehearses"):
        gpu.main(["ops", "--out", "nowhere"])


def _script(tmp_path, *stages, **env):
    command = ["bash", str(SCRIPT), str(tmp_path / "out"), *stages]
    env = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, "WORK": str(tmp_path / "work"), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    return done.stdout, {path.stem: path.read_text() for path in (tmp_path / "out").glob("*.log")}


needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="installed without sources beside it")


@needs_sources
def test_triton_is_registered_where_the_build_fails(tmp_path):
    """The Python lies in a venv of its own where `make test` runs this; nothing is installed into it, and lifeops is not taken from it."""
    out, logs = _script(tmp_path, "machine", "package", "build", "memcheck", CXX="false", LIFEOPS_BUILD="auto")
    assert re.findall(r"^(\w+): exit (\d)", out, re.M)[:2] == [("machine", "0"), ("package", "0")]
    assert "memcheck: left out: no GPU" in out
    assert torch.__version__ in logs["machine"]
    assert f"missing: {tmp_path}/work" in logs["build"]
    assert re.search(r"^  triton +\d\d of \d\d ops$", logs["build"], re.M), logs["build"]


@needs_sources
def test_a_build_that_was_cut_off_is_not_used(tmp_path):
    """Half a library would end every later process."""
    _script(tmp_path, "package")
    for name in ("lifeops/__init__.py", "lifeops/_ops.so"):
        path = tmp_path / "work" / "built" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('half a build')")
    out, logs = _script(tmp_path, "ops", PYTHONPATH=str(tmp_path))
    assert "ops: exit 0" in out, logs["ops"]
    assert "half a build" not in logs["ops"]
    rows = _rows(tmp_path / "out")
    assert {row["system"] for row in rows} == {*gpu_set.SEQUENCES, *WINDOWS, *STAGED}
    assert len([row for row in rows if row["variant"] == "lifeops_reference" and row["how"] == "eager"]) >= 30
    chosen = {row["system"] for row in rows if row["variant"] == "lifeops" and row["how"] == "eager"}
    assert chosen == {"life_attention", "localvit_ffn", "dw_shortcut_block", *STAGED}
    assert json.loads((tmp_path / "out" / "ops.progress").read_text().splitlines()[-1])[0] == "done"
