"""The benchmark command around the timing: problems and options, stored rows, comparison, scaling, the page."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import cli, columns, compare, measure, page, rows, scaling, tables  # noqa: E402
from bench.problems import DTYPES, SYSTEMS, Problem, level_of, modes_of, named, problems  # noqa: E402

PROBLEM = Problem("token_dwconv", "fwd", 8, 14, 14, 192, 3, "float32")
BLANK = dict.fromkeys(rows.FIELDS) | {"note": ""}


def _row(variant, ms, p=PROBLEM, spread=0.1, **more):
    times = {"median_ms": ms, "q25_ms": ms and ms * (1 - spread), "q75_ms": ms and ms * (1 + spread)}
    facts = {"machine": "here", "commit": "abc", "torch": "2", "threads": 2, "allocator": "warm", "cache": "warm", "repeat": 0}
    facts |= {"triton": "3", "bound": ""}
    return BLANK | facts | p._asdict() | times | {"variant": variant} | more


def _options(*argv):
    args = cli.parser().parse_args(argv)
    todo = cli.chosen(args)
    return todo, cli.options(args, todo)


def test_options_choose_problems(monkeypatch):
    monkeypatch.setattr(cli.optional, "installed", lambda name: True)
    todo, o = _options("block", "--quick", "--mode", "train", "--dtype", "float32", "--threads", "1,2", "--allocator", "both")
    assert {p.mode for p in todo} == {"fwdbwd"}
    assert {p.system for p in todo} == {s for s in SYSTEMS if level_of(s) == "block"} > {"coat_pos_enc", "pvt_mlp", "twins_pos_conv"}
    assert (o.threads, o.allocators) == ((1, 2), ("warm", "default"))
    (p,), _ = _options("op", "--system", "token_dwconv", "--mode", "infer", "--dtype", "float16", "--problem", "b2_5x7_c24_k3")
    assert p == Problem("token_dwconv", "fwd", 2, 5, 7, 24, 3, "float16")


def test_without_timm_its_blocks_are_left_out(monkeypatch):
    monkeypatch.setattr(cli.optional, "installed", lambda name: False)
    todo, _ = _options("block", "--quick")
    assert {p.system for p in todo} == {s for s in SYSTEMS if level_of(s) == "block"} - {"coat_pos_enc", "pvt_mlp", "twins_pos_conv"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--system", "conv"), "--system must be of token_dwconv, .*, got conv"),
        (("--mode", "forward"), "--mode must be of .*, got forward"),
        (("--problem", "14x14"), "named like b16_14x14_c192_k3_float32, got '14x14'"),
        (("model", "--mode", "dw"), "nothing to measure"),
        (("--cache", "hot"), "--cache must be of auto, warm, cold, got hot"),
        (("--backend", "tpu"), "--backend must be of .*, got tpu"),
    ],
)
def test_options_that_do_not_fit(argv, message):
    with pytest.raises(SystemExit, match=message):
        _options(*argv)


def test_a_problem_has_a_name_that_says_it():
    for system in SYSTEMS:
        for p in problems(system):
            assert named(p.name, system, p.mode, p.dtype) == p
    with pytest.raises(ValueError, match="system must be one of"):
        problems("conv")


def test_quick_has_every_system_and_mode():
    for system in SYSTEMS:
        quick = {p.mode for p in problems(system, quick=True)}
        assert quick >= set(modes_of(system)) - {"bwd"}
        assert {p.dtype for p in problems(system)} <= set(DTYPES)


def test_inputs_are_rotated_a_cold_call_is_timed_alone_and_the_order_changes():
    calls = []
    runs = {"a": [lambda: calls.append("a0"), lambda: calls.append("a1")], "b": [lambda: calls.append("b0"), lambda: calls.append("b1")]}
    measure.interleaved(runs, 0.0, "cold", least=20, most=20)
    rounds = list(zip(calls[8::2], calls[9::2], strict=True))  # behind two untimed calls of each
    assert [sorted(r) for r in rounds] == [["a0", "b0"], ["a1", "b1"]] * 10
    assert {r[0][0] for r in rounds} == {"a", "b"}
    calls.clear()
    measure.interleaved(runs, 0.0, "warm", least=2, most=2)
    assert calls[8::2] == calls[9::2]
    assert sorted(calls[8::2]) == ["a0", "a1", "b0", "b1"]


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_rows_come_back_as_they_were(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    made = [_row("lifeops", 1.5, launches=3, share=0.25), _row("eager", None, note="token_dwconv is off by 1"), _row("clone", 0.25)]
    rows.save(made, path)
    assert rows.read(path) == made


def test_a_new_measurement_replaces_the_same_problem(tmp_path):
    path, other = tmp_path / "rows.csv", PROBLEM._replace(C=384)
    rows.save([_row("lifeops", 1.0), _row("onednn", 1.0), _row("lifeops", 2.0, other), _row("lifeops", 3.0, allocator="default")], path)
    rows.save([_row("lifeops", 9.0, repeat=0), _row("lifeops", 8.0, repeat=1)], path)
    found = [(r["variant"], r["C"], r["allocator"], r["median_ms"]) for r in rows.read(path)]
    assert sorted(found) == sorted(
        [("lifeops", 384, "warm", 2.0), ("lifeops", 192, "warm", 9.0), ("lifeops", 192, "warm", 8.0), ("lifeops", 192, "default", 3.0)]
    )


def test_rows_from_before_the_columns_are_read(tmp_path):
    path = tmp_path / "old.csv"
    fields = [f for f in rows.FIELDS if f not in ("triton", "cache", "note", *rows.DERIVED, *rows.COSTS, *rows.CEILINGS)]
    old = _row("lifeops", 1.0)
    path.write_text(",".join(fields) + "\n" + ",".join(str(old[f]) for f in fields) + "\n")
    (row,) = rows.read(path)
    assert (row["cache"], row["share"], row["launches"], row["median_ms"]) == ("warm", None, None, 1.0)


def test_files_that_are_no_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no column machine, system"):
        rows.read(path)
    with pytest.raises(ValueError, match=r"stored as \.csv or \.json"):
        rows.read(tmp_path / "rows.txt")


def test_the_share_is_of_the_ceiling_that_binds():
    row = {"median_ms": 4.0, "bytes": 10**7, "flops": 10**9, "clone_gbs": 10.0, "gemm_tflops": 0.5, "issue_ms": None}
    assert columns.derived(row) == {"gbs": 2.5, "tflops": 0.25, "share": 0.5, "bound": "flops"}
    assert columns.derived(row | {"flops": 0})["bound"] == "bytes"
    assert columns.derived(row | {"issue_ms": 3.0}) == {"gbs": 2.5, "tflops": 0.25, "share": 0.75, "bound": "issue"}


def test_the_models_authors_modules_are_in_their_places():
    from bench.model_systems import as_authors, models
    from lifeops.nn.eager_dw_shortcut import EagerDWShortcut
    from lifeops.nn.eager_life import EagerLifeAttention
    from lifeops.nn.eager_localvit import EagerLocalityFeedForward

    host = {"img_size": 32, "patch_size": 16, "num_classes": 3, "depth": 2}
    eager = {"vit_life": EagerLifeAttention, "vit_localvit": EagerLocalityFeedForward, "vit_dw_shortcut": EagerDWShortcut}
    for system, kind in eager.items():
        assert sum(isinstance(m, kind) for m in as_authors(models(system, host)[0]).modules()) == 2


# ------------------------------------------------------------------------------------------------ compare


def test_compare_marks_what_the_quartiles_do_not_explain(tmp_path, capsys):
    other = PROBLEM._replace(C=384)
    a = [_row("lifeops", 1.0), _row("eager", 1.0), _row("clone", 1.0), _row("lifeops", 1.0, other)]
    b = [_row("lifeops", 1.5), _row("eager", 1.15), _row("clone", 0.5), _row("onednn", 1.0)]
    for name, found in (("a.csv", a), ("b.json", b)):
        rows.save(found, tmp_path / name)
    marks = {k[-1]: c.mark for k, c in compare.compare(a, b).items()}
    assert marks == {"lifeops": "slower", "eager": "", "clone": "faster"}
    assert compare.main([str(tmp_path / "a.csv"), str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    assert "1.50" in printed
    assert "3 compared, 1 slower, 1 faster; 2 in one file only" in printed


def test_compare_without_a_common_problem(tmp_path):
    rows.save([_row("lifeops", 1.0)], tmp_path / "a.csv")
    rows.save([_row("lifeops", 1.0, PROBLEM._replace(C=384))], tmp_path / "b.csv")
    with pytest.raises(SystemExit, match="no problem in common"):
        compare.main([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    with pytest.raises(SystemExit, match="No such file"):
        compare.main([str(tmp_path / "a.csv"), str(tmp_path / "c.csv")])


# ------------------------------------------------------------------------------------------------ reports


def test_losing_cases_are_listed_under_the_table():
    found = [_row("lifeops", 2.0), _row("eager", 2.4), _row("onednn", 1.8), _row("clone", 0.5), _row("compiled", None, note="is off by 3")]
    broken, slower = tables.losing(found)
    assert [line.split(": ")[1] for line in broken] == ["eager 1.20, promised 1.50"]
    assert [line.split(": ")[1] for line in slower] == ["onednn 0.90"]  # not the clone: it does less
    text = "\n".join(page.tables(found))
    assert "Faster than lifeops: b8_14x14_c192_k3_float32: onednn 0.90." in text
    assert "missed: eager 1.50" in text
    assert "compiled" not in text
    assert any("is off by 3" in line for line in page._section(Path("cpu.csv"), found))


def test_the_page_says_what_no_gpu_has_measured():
    texts = {path: path.read_text() for path in page.pages()}
    assert "**No GPU has been measured.**" in texts[page.PAGE]
    assert "Measured on a CPU; not measured on a GPU." in texts[page.FOLDER / "tables.md"]
    for path, text in texts.items():
        for picture in (line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")):
            assert (path.parent / picture).stat().st_size > 1000


def test_scaling_follows_the_work():
    study = scaling.studies()[0]
    assert study.axis == "grid"
    found = [_row("lifeops", (p.P + p.H * p.W) / 100, p) for p in study.problems] + [_row("lifeops", 99.0, study.problems[0], repeat=1)]
    here = scaling.points(study, found)
    assert [p for p, _ in here] == list(study.problems)
    assert here[0][1]["median_ms"] == 0.65  # the faster repeat
    slopes = scaling.exponent(study, here)
    assert slopes[0] is None
    assert slopes[1:] == pytest.approx([1.0] * (len(here) - 1))


def test_further_repeats_join_the_earlier_ones():
    old = [_row("lifeops", 2.0), _row("lifeops", 3.0, repeat=1), _row("lifeops", 7.0, PROBLEM._replace(C=384))]
    found = scaling.continued(old, [_row("lifeops", 1.5), _row("lifeops", 6.0, repeat=1)])
    assert [(r["repeat"], r["median_ms"]) for r in found] == [(0, 2.0), (1, 3.0), (2, 1.5), (3, 6.0)]
    assert scaling.spread(found[0], found) == 4.0


def test_one_command_end_to_end(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "rows.csv"
    sizes = ["--system", "token_dwconv", "--mode", "fwd", "--dtype", "float32", "--problem", "b1_3x3_c8_k3", "--threads", "1"]
    assert cli.main([*sizes, "--seconds", "0.01", "--out", str(out), "--figures", str(tmp_path / "figures")]) == 0
    found = rows.read(out)
    assert {r["cache"] for r in found} == {"warm", "cold"}
    assert {r["variant"] for r in found} >= {"lifeops", "eager", "onednn", "clone"}
    printed = capsys.readouterr().out
    assert "0 WRONG RESULTS, no number" in printed
    assert "not measured on a GPU" in printed
    assert "natten" in printed or "causal_conv1d" in printed
