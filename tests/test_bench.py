"""The benchmarks' own honesty: the GPU script's stages rehearsed on the CPU, a wrong kernel gets no number, a slow one shows."""

import csv
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lifeops import registry

pytest.importorskip("rich")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import device, gpu  # noqa: E402
from bench.problems import Problem  # noqa: E402

PROBLEM = Problem("token_dwconv", "fwd", 2, 4, 5, 24, 3, "float32")
needs_cpu = pytest.mark.skipif(
    bool(registry.reasons_against(registry.ops["token_dwconv"], "cpu", registry.ops["token_dwconv"].problem(
        torch.zeros(1, 2, 1), torch.zeros(1, 1, 3, 3), None, None, 1, 1, 1, "keep", ""))), reason="no compiled kernels")  # fmt: skip


def _rows(path):
    with path.open(newline="") as file:
        return {(row["variant"], row["how"]): row for row in csv.DictReader(file)}


def _measured(tmp_path):
    gpu.measure(PROBLEM, device.clock("cpu", 0.05), gpu.Rows(tmp_path / "rows.csv", "cpu"))
    return _rows(tmp_path / "rows.csv")


@pytest.fixture(autouse=True)
def _fresh_choices():
    yield
    registry.forget_choices()


@needs_cpu
def test_every_variant_gets_a_row(tmp_path):
    rows = _measured(tmp_path)
    assert {name for name, _ in rows} >= {"lifeops_cpu", "eager", "cudnn", "clone"}
    for row in rows.values():
        assert 0 < float(row["q25_ms"]) <= float(row["median_ms"]) <= float(row["q75_ms"])
        assert int(row["peak_bytes"]) > 0
        assert row["note"] == ""


def _planted(monkeypatch, change):
    """Backend "cpu" of token_dwconv with ``change`` around it; what was chosen before is forgotten."""
    op = registry.ops["token_dwconv"]
    impl = op.impls["cpu"]
    monkeypatch.setitem(op.impls, "cpu", dataclasses.replace(impl, fn=change(impl.fn)))
    registry.forget_choices()


@needs_cpu
def test_a_wrong_kernel_gets_no_number(tmp_path, monkeypatch):
    _planted(monkeypatch, lambda fn: lambda *args: fn(*args) + 0.01)
    row = _measured(tmp_path)[("lifeops_cpu", "none")]
    assert row["median_ms"] == ""
    assert "AssertionError" in row["note"]


@needs_cpu
def test_a_slow_kernel_shows(tmp_path, monkeypatch):
    def slow(fn):
        def run(*args):
            time.sleep(0.02)
            return fn(*args)

        return run

    _planted(monkeypatch, slow)
    rows = _measured(tmp_path)
    assert float(rows["lifeops_cpu", "eager"]["median_ms"]) > 20 > float(rows["clone", "eager"]["median_ms"])


def test_stops_when_time_is_over(tmp_path):
    assert gpu.main(["ops", "--device", "cpu", "--tiny", "--seconds", "0", "--out", str(tmp_path)]) == 0
    assert _rows(tmp_path / "ops.csv") == {}


def test_the_script_is_sound_shell():
    subprocess.run(["bash", "-n", str(ROOT / "bench" / "gpu.sh")], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match=r"no CUDA device; `--device cpu --tiny` rehearses"):
        gpu.main(["ops", "--out", "nowhere"])


def test_captures_nothing_on_the_cpu():
    assert device.captured(lambda: None, "cpu") is None
