"""The GPU script's stages rehearsed without a GPU: packages, kernels compiled beforehand, tests, sanitizers, limits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_set, sanitized, warm
from bench.problems import STAGED, WINDOWS
from lifeops import registry
from test_bench_gpu import environment, rows_of

ROOT = Path(__file__).resolve().parent.parent
needs_cpu = pytest.mark.skipif(registry.unavailable("cpu") is not None, reason="no compiled kernels")


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
    env = environment(TRITON_CACHE_DIR=str(tmp_path / "cache"))
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
    env = environment(LIFEOPS_FAILURES=str(tmp_path / "failures.txt"))
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


def _script(tmp_path, *stages, **env):
    command = ["bash", str(SCRIPT), str(tmp_path / "out"), *stages]
    env = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, "WORK": str(tmp_path / "work"), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    return done.stdout, {path.stem: path.read_text() for path in (tmp_path / "out").glob("*.log")}


needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="installed without sources beside it")


@needs_sources
def test_triton_is_registered_where_the_build_fails(tmp_path):
    """The Python lies in a venv of its own where `make test` runs this; nothing is installed into it, and lifeops is not taken from it."""
    out, logs = _script(tmp_path, "machine", "memcheck", "build", CXX="false", LIFEOPS_BUILD="auto")
    # made before the first stage that needs it
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
    rows = rows_of(tmp_path / "out")
    assert {row["system"] for row in rows} == {*gpu_set.SEQUENCES, *WINDOWS, *STAGED}
    assert len([row for row in rows if row["variant"] == "lifeops_reference" and row["how"] == "eager"]) >= 30
    chosen = {row["system"] for row in rows if row["variant"] == "lifeops" and row["how"] == "eager"}
    assert chosen == {"life_attention", "localvit_ffn", "dw_shortcut_block", *STAGED}
    assert json.loads((tmp_path / "out" / "ops.progress").read_text().splitlines()[-1])[0] == "done"
