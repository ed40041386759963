"""The benchmarks' own honesty: a wrong kernel gets no number, a slow one shows."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import pytest
import torch

from lifeops import registry

pytest.importorskip("rich")
from conftest import declare_torchvision_ops

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import baselines, collect, columns, rows, systems, tables, worker  # noqa: E402
from bench.case import check, inputs_of  # noqa: E402
from bench.problems import LEVELS, NO_PREFIX, SYSTEMS, WINDOWS, Problem, modes_of  # noqa: E402

PROBLEM = Problem("token_dwconv", "fwd", 2, 4, 5, 24, 3, "float32")
needs_cpu = pytest.mark.skipif(
    bool(registry.reasons_against(registry.ops["token_dwconv"], "cpu", registry.ops["token_dwconv"].problem(
        torch.zeros(1, 2, 1), torch.zeros(1, 1, 3, 3), None, None, 1, 1, 1, "keep", ""))), reason="no compiled kernels")  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_choices():
    yield
    registry.forget_choices()


def _planted(monkeypatch, change):
    """Backend "cpu" of token_dwconv with ``change`` around it; what was chosen before is forgotten."""
    op = registry.ops["token_dwconv"]
    impl = op.impls["cpu"]
    monkeypatch.setitem(op.impls, "cpu", dataclasses.replace(impl, fn=change(impl.fn)))
    registry.forget_choices()


# ------------------------------------------------------------------------------------------------ python -m bench

SETTINGS = argparse.Namespace(seed=1, seconds=0.02, device="cpu", cache="warm", backend="auto", compiled=set())
FACTS = {"machine": "here", "torch": "2", "triton": "3", "commit": "abc", "threads": 1, "allocator": "warm", "repeat": 0}


def _row_of(p=PROBLEM, **settings):
    """{variant: row} of one problem, measured in this process."""
    entries = worker.measured(p, argparse.Namespace(**{**vars(SETTINGS), **settings}))
    return {row["variant"]: row for entry in entries for row in collect.rows_of(entry, FACTS)}


@needs_cpu
@pytest.mark.parametrize("mode", ["fwd", "dw", "bwd", "fwdbwd"])
def test_every_column_is_filled(mode):
    found = _row_of(PROBLEM._replace(mode=mode))
    assert {"lifeops", "clone"} < found.keys()
    for name, row in found.items():
        assert row.keys() == set(rows.FIELDS)
        assert 0 < row["q25_ms"] <= row["median_ms"] <= row["q75_ms"]
        assert row["gbs"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6, abs=0.006)
        assert row["share"] > 0
        assert row["peak_bytes"] > 0
        assert row["launches"] > 0
        assert (row["saved_bytes"] is None) == (name == "clone" or mode in ("fwd", "dw"))
    assert found["clone"]["ratio"] == pytest.approx(found["clone"]["median_ms"] / found["lifeops"]["median_ms"], rel=0.01)


@needs_cpu
def test_a_wrong_kernel_has_no_number_in_the_rows(monkeypatch):
    _planted(monkeypatch, lambda fn: lambda *args: fn(*args) + 0.01)
    found = _row_of()
    assert "is off by" in found["lifeops"]["note"]
    assert all(found["lifeops"][name] is None for name in (*rows.TIMES, *rows.DERIVED))
    assert found["eager"]["median_ms"] > 0
    assert found["eager"]["ratio"] is None
    assert tables.wrong(list(found.values()))


@needs_cpu
@pytest.mark.parametrize("mode", ["bwd", "fwdbwd"])
def test_a_wrong_gradient_has_no_number(monkeypatch, mode):
    op = registry.ops["token_dwconv_bwd_dw"]
    fn = op.impls["cpu"].fn
    monkeypatch.setitem(op.impls, "cpu", dataclasses.replace(op.impls["cpu"], fn=lambda *args: (fn(*args)[0] * 1.001, fn(*args)[1])))
    registry.forget_choices()
    assert "w is off by" in _row_of(PROBLEM._replace(mode=mode))["lifeops"]["note"]


def test_a_wrong_baseline_has_no_number(monkeypatch):
    right = baselines.eager_dwconv
    monkeypatch.setattr(baselines, "eager_dwconv", lambda x, w, p: right(x, w.flip(-1), p))
    found = _row_of()
    assert "is off by" in found["eager"]["note"]
    assert found["onednn"]["median_ms"] > 0


def test_a_result_that_is_wrong_on_the_second_set_of_inputs_only_is_caught(monkeypatch):
    right, calls = baselines.eager_dwconv, []

    def second_is_wrong(x, w, p):
        calls.append(1)
        return right(x, w, p) + (len(calls) == 2)

    monkeypatch.setattr(baselines, "eager_dwconv", second_is_wrong)
    assert "is off by" in _row_of()["eager"]["note"]


@pytest.mark.parametrize(("failures", "is_wrong"), [(1, False), (99, True)])
def test_a_gradient_beside_a_kink_is_drawn_anew_and_a_wrong_one_is_not(monkeypatch, failures, is_wrong):
    calls = []

    def at_a_kink(case, v, i, known):
        calls.append(i["x"])
        assert len(calls) > failures, "is off by a kink"

    monkeypatch.setattr(worker, "check", at_a_kink)
    case = systems.case(Problem("localvit_ffn", "fwdbwd", 1, 2, 2, 24, 0, "float32"))
    variants = len(case.variants)
    sets, wrong = worker.checked(case, 1, "cpu")
    assert bool(wrong) == is_wrong == (len(case.variants) < variants)
    assert len(sets) == worker.SETS
    assert not torch.equal(sets[0]["x"], calls[0])


@needs_cpu
def test_a_slow_and_wasteful_kernel_shows_in_every_column(monkeypatch):
    def wasteful(fn):
        def run(*args):
            time.sleep(0.02)
            torch.ones(1_000_000)
            return fn(*args)

        return run

    before = _row_of()["lifeops"]
    _planted(monkeypatch, wasteful)
    found = _row_of()
    after = found["lifeops"]
    assert after["median_ms"] > 20 > before["median_ms"]
    assert after["share"] < before["share"] / 5
    assert after["gbs"] < before["gbs"] or after["gbs"] == 0
    assert after["peak_bytes"] == 4_000_000 > before["peak_bytes"]
    assert found["eager"]["ratio"] < 1
    _, slower = tables.losing(list(found.values()))
    assert any("eager" in line for line in slower)


@needs_cpu
def test_costs_are_the_registrys():
    case = systems.case(PROBLEM)
    i = inputs_of(case, 0)
    args = i["x"], i["w"], None, None, PROBLEM.H, PROBLEM.W, PROBLEM.P, "keep", ""
    cost = registry.ops["token_dwconv"].cost(*args)
    facts = columns.facts(case, "lifeops", i)
    assert (facts.bytes, facts.flops) == cost
    assert facts == columns.facts(case, "eager", i)._replace(peak_bytes=facts.peak_bytes, launches=facts.launches)
    assert facts.launches == 1


@needs_cpu
def test_what_is_saved_is_the_input_and_not_the_weight():
    case = systems.case(PROBLEM._replace(mode="fwdbwd"))
    i = inputs_of(case, 0)
    assert columns.facts(case, "lifeops", i).saved_bytes == i["x"].numel() * 4


def _tiny(system: str, mode: str) -> Problem:
    K = 2 if system in ("token_dwconv_transpose", "pool_qkv") else 3 if system in ("token_dwconv", "local_attention", *WINDOWS) else 0
    side = 14 if system == "localvit_swin_tiny" else 4  # windows of 7 in every stage
    p = Problem(system, mode, 2, side, side, 192, K, "float32")
    return p._replace(P=0) if system in NO_PREFIX else p._replace(K=1) if system in LEVELS["model"] else p


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_variant_of_every_system_is_right(system):
    if system in ("coat_pos_enc", "pvt_mlp", "twins_pos_conv"):
        declare_torchvision_ops()
        pytest.importorskip("timm")
    for mode in modes_of(system):
        case = systems.case(_tiny(system, mode), backend="all")
        assert {"lifeops", "lifeops_reference"} < case.variants.keys()
        i, known = inputs_of(case, 0), {}
        for v in case.variants.values():
            check(case, v, i, known)


def test_a_timm_block_with_lifeops_inside_keeps_its_weights():
    declare_torchvision_ops()
    pytest.importorskip("timm")
    from bench import timm_systems

    for system in timm_systems.BLOCKS:
        block = timm_systems.block_of(system, 24)
        swapped = timm_systems.with_lifeops(system, block)
        assert block.state_dict().keys() == swapped.state_dict().keys()
        x = torch.randn(2, 20 + (system == "coat_pos_enc"), 24)
        with torch.no_grad():
            assert torch.allclose(block(x, (4, 5)), swapped(x, (4, 5)), atol=1e-6)


def test_packages_that_are_not_there_are_named_and_those_that_are_join(monkeypatch):
    """Stand-ins for the two packages, which need a GPU: the wiring and the oracles, not the packages."""
    import types

    from bench import optional

    def na2d(q, k, v, kernel_size):
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=optional.near(8, 9, "cpu"))
        return y.transpose(1, 2).unflatten(1, (8, 9))

    def causal_conv1d_fn(x, w):
        return sum(torch.nn.functional.pad(x, (k, 0))[..., : x.shape[2]] * w[:, -1 - k, None] for k in range(w.shape[1]))

    monkeypatch.setattr(optional, "installed", lambda name: False)
    assert [line.split()[0] for line in optional.missing()] == ["natten", "causal_conv1d", "timm"]
    assert optional.variants(PROBLEM, "cuda") == {}
    monkeypatch.setattr(optional, "installed", lambda name: True)
    monkeypatch.setitem(sys.modules, "natten", types.SimpleNamespace(na2d=na2d))
    monkeypatch.setitem(sys.modules, "causal_conv1d", types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn))
    assert optional.missing() == []
    attention = Problem("local_attention", "fwd", 2, 8, 9, 64, 3, "float32", 0)
    assert optional.near(8, 9, "cpu").sum(1).tolist() == [49] * 72
    for p, name in ((attention, "natten"), (PROBLEM, "causal_conv1d")):
        assert optional.variants(p, "cpu") == {}
        case = systems.case(p)
        check(case, optional.variants(p, "cuda")[name], inputs_of(case, 0), {})
