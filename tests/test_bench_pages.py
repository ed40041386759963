"""What the benchmark's pages show: rows that cannot be are refused and measured again, the first page's figures, the stored demos."""

import inspect
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402

import lifeops  # noqa: E402
from bench import again, ceilings, collect, demo, page, readme, refused, rows, summary, systems_table, tables  # noqa: E402
from bench.problems import Problem  # noqa: E402
from lifeops.integrations import official  # noqa: E402

PROBLEM = Problem("token_dwconv", "fwd", 8, 14, 14, 192, 3, "float32")
BLANK = dict.fromkeys(rows.FIELDS) | {"note": ""}


def _row(variant="lifeops", ms=1.0, p=PROBLEM, **more):
    facts = {"machine": "here (AVX2)", "commit": "abc", "torch": "2", "triton": "3", "threads": 2, "allocator": "warm", "cache": "warm"}
    times = {"median_ms": ms, "q25_ms": ms and 0.95 * ms, "q75_ms": ms and 1.05 * ms}
    costs = {"repeat": 0, "share": 0.5, "bound": "bytes", "peak_bytes": 10**6, "gbs": 1.0, "tflops": 1.0}
    return BLANK | facts | p._asdict() | times | costs | {"variant": variant} | more


CANNOT_BE = {
    "beyond the limit": ([_row(share=1.2)], "lifeops: 120% of the speed of light"),
    "a baseline beyond it": ([_row(), _row("onednn", share=1.11)], "onednn: 111% of the speed of light"),
    "wide": ([_row(q25_ms=1.0, q75_ms=1.6)], "lifeops: half of the calls took 1.00 to 1.60 ms"),
    "dirty": ([_row(commit="abc-dirty")], refused.DIRTY),
    "a step faster than its backward": (
        [_row(ms=2.0, p=PROBLEM._replace(mode="bwd")), _row(ms=1.9, p=PROBLEM._replace(mode="fwdbwd"))],
        "lifeops: forward and backward 1.90 ms, backward alone 2.00 ms",
    ),
    "K 5 beside K 7": ([_row(ms=2.0, p=PROBLEM._replace(K=5)), _row(ms=1.5, p=PROBLEM._replace(K=7))], "lifeops: K 5 2.00 ms, K 7 1.50 ms"),
}  # fmt: skip
CAN_BE = {
    "at the limit": [_row(share=1.09)],
    "what is not compared": [_row(), _row("clone", share=1.4, q75_ms=9.0), _row("sdpa", share=2.0)],
    "K 5 a little slower": [_row(ms=1.9, p=PROBLEM._replace(K=5)), _row(ms=1.5, p=PROBLEM._replace(K=7))],
    "K 5 of another machine": [_row(ms=2.0, p=PROBLEM._replace(K=5)), _row(ms=1.5, p=PROBLEM._replace(K=7), machine="there")],
    "a baseline's K 5": [_row("eager", 2.0, PROBLEM._replace(K=5)), _row("eager", 1.5, PROBLEM._replace(K=7))],
    "another cache's backward": [
        _row(ms=2.0, p=PROBLEM._replace(mode="bwd")), _row(ms=1.9, p=PROBLEM._replace(mode="fwdbwd"), cache="cold"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT_BE)
def test_rows_that_cannot_be_are_refused(name):
    found, why = CANNOT_BE[name]
    (reasons,) = refused.refused(found).values()
    assert reasons == [why]
    assert len(refused.accepted(found)) == len({rows.key(row) for row in found}) - 1
    (line,) = refused.lines(found)
    assert why in line


@pytest.mark.parametrize("name", CAN_BE)
def test_rows_that_can_be_are_not(name):
    assert not refused.refused(CAN_BE[name])
    assert refused.accepted(CAN_BE[name]) == CAN_BE[name]


def test_all_of_a_refused_problem_is_left_out():
    found = [_row(q75_ms=9.0), _row("eager"), _row("lifeops", cache="cold"), _row(p=PROBLEM._replace(C=384))]
    assert refused.accepted(found) == found[-1:]


def test_dirty_problems_are_counted():
    found = [_row(p=PROBLEM._replace(C=c), commit="abc-dirty") for c in (8, 16, 24)]
    assert refused.lines(found) == [f"token_dwconv fwd, 3 problems: {refused.DIRTY}"]


# ------------------------------------------------------------------------------------------------ measured again


def _measured_here(monkeypatch, new):
    """What is measured again, instead of a worker's answers."""
    asked = []

    def collected(problems, options, console, each):
        asked.append((problems, options))
        each([_row(p=p, threads=options.threads[0], **new) for p in problems])

    monkeypatch.setattr(again, "collect", collected)
    monkeypatch.setattr(again.store, "commit", lambda: "abc")
    return asked


def test_refused_problems_are_measured_again(tmp_path, monkeypatch, capsys):
    path, wide = tmp_path / "cpu.csv", PROBLEM._replace(C=384)
    compiled = _row("compiled", p=wide)
    rows.save([_row(), _row(p=wide, share=3.0), compiled, _row(p=wide, share=3.0, machine="there")], path)
    asked = _measured_here(monkeypatch, {"commit": "new"})
    assert again.main([str(path)]) == 0
    ((problems, options),) = asked
    assert problems == [wide]
    assert options.compiled == (wide,)
    assert sorted((row["C"], row["machine"], row["commit"]) for row in rows.read(path)) == [
        (192, "here (AVX2)", "abc"), (384, "here (AVX2)", "new"),
    ]  # fmt: skip
    assert "nothing is refused" in capsys.readouterr().out


def test_what_stays_refused_is_measured_longer_and_named(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu.csv"
    rows.save([_row(share=3.0)], path)
    asked = _measured_here(monkeypatch, {"share": 2.0})
    assert again.main([str(path), "--rounds", "2", "--seconds", "0.5"]) == 1
    assert [options.seconds for _, options in asked] == [0.5, 1.0]
    assert "200% of the speed of light" in capsys.readouterr().out


def test_listing_measures_nothing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu.csv"
    rows.save([_row(share=3.0)], path)
    asked = _measured_here(monkeypatch, {})
    assert again.main([str(path), "--list"]) == 1
    assert not asked
    assert "1 refused" in capsys.readouterr().out


def test_uncommitted_changes_are_not_measured(monkeypatch):
    monkeypatch.setattr(again.store, "commit", lambda: "abc-dirty")
    with pytest.raises(SystemExit, match="commit first"):
        again.main([])


def test_the_ceiling_is_that_of_the_faster_library():
    a, b = torch.randn(24, 8), torch.randn(8, 16)
    linear, convolution = (run() for run in ceilings._paths(a, b, "cpu"))
    torch.testing.assert_close(convolution[0, :, 0].T, linear)
    assert len([*ceilings._paths(a, b, "cuda")]) == 1


def test_what_benchmarks_write_spoils_no_commit(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    for name in ("bench/results/cpu.csv", "docs/page.md", "lifeops/op.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old\n")
    git("init"), git("add", "."), git("commit", "-m", "all")
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "bench" / "rows.py"))
    head = git("rev-parse", "--short", "HEAD")
    (tmp_path / "bench/results/cpu.csv").write_text("new\n")
    (tmp_path / "docs/page.md").write_text("new\n")
    assert rows.commit() == head
    (tmp_path / "lifeops/op.py").write_text("new\n")
    assert rows.commit() == f"{head}-dirty"


# ------------------------------------------------------------------------------------------------ the first page


def _three_sizes():
    out = []
    for c, ours, eager, library in ((8, 1.0, 2.0, 1.5), (16, 1.0, 4.0, 0.8), (24, 2.0, 4.0, 3.0)):
        p = PROBLEM._replace(C=c)
        out += [_row(ms=ours, p=p), _row("eager", eager, p), _row("onednn", library, p), _row("plain_linear", 0.5 * ours, p)]
    return out


def test_the_first_page_says_mean_range_and_worst_case():
    (line,) = summary.lines(_three_sizes())
    assert line.values("fwd", summary.AUTHORS) == [2.0, 4.0, 2.0]
    (text,) = summary.table([line])[2:]
    assert f"**{statistics.geometric_mean([2, 4, 2]):.2f}** (2.00 to 4.00)" in text
    assert f"{statistics.geometric_mean([1.5, 0.8, 1.5]):.2f} / -" in text
    assert "0.50 / -" in text
    assert "onednn 0.80, inference, 8 x 14 x 14 x 16, K 3" in text
    assert summary.losing([line]) == ["- token convolution: onednn 0.80, inference, 8 x 14 x 14 x 16, K 3"]
    assert "**It loses** in 1 of 3 cases" in summary.message([line], 2)[0]
    assert "**Nothing is said** of 2 problems" in summary.message([line], 2)[1]


@pytest.mark.parametrize("variant", ["lifeops", "plain_linear"])
def test_a_price_is_told_of_steady_runs_alone(variant):
    """Of one size neither; its speed stays."""
    found = [row | {"q25_ms": 1.0, "q75_ms": 1.4} if (row["variant"], row["C"]) == (variant, 16) else row for row in _three_sizes()]
    (line,) = summary.lines(found)
    assert [len(line.values("fwd", among)) for among in (summary.AUTHORS, summary.PLAIN)] == [3, 2]


def test_a_size_is_told_in_words():
    several = {"mvit_pool": "8 x 14 x 14 x 16, stride 3", "cvt_13": "batch 8", "life_qkv": "8 x 14 x 14 x 16"}
    for system, said in several.items():
        p = PROBLEM._replace(system=system, C=16, K=0 if system == "life_qkv" else 3)
        (line,) = summary.lines([_row(p=p), _row("eager", 3.0, p=p)])
        assert f"eager 3.00, inference, {said} |" in summary.table([line])[2]


def test_the_first_page_is_of_warm_float32_on_two_threads():
    others = [
        _row("eager", 9.0, cache="cold"), _row("eager", 9.0, threads=1), _row("eager", 9.0, p=PROBLEM._replace(dtype="bfloat16")),
        _row("eager", 9.0, p=PROBLEM._replace(mode="dw")),
    ]  # fmt: skip
    every = [row for other in others for row in (other, other | {"variant": "lifeops", "median_ms": 1.0})]
    assert not summary.lines(every)
    assert summary.table([]) == summary.table([])[:2]


def test_the_figure_has_words_and_an_arrow():
    made = summary.figure([*summary.lines(_three_sizes())])
    axes = made.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["token convolution"]
    assert any(text.get_text() == "faster" and text.arrow_patch is not None for text in axes.texts)
    with_other = [_row(p=PROBLEM, machine="there"), _row("eager", 3.0, machine="there")]
    labels = summary.figure(summary.lines(_three_sizes() + with_other)).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["token convolution (here)", "token convolution (there)"]


def test_words_are_of_systems():
    from bench.problems import SYSTEMS

    assert set(summary.WORDS) <= set(SYSTEMS)


def test_pages_name_what_they_refuse(monkeypatch):
    files = {Path("cpu.csv"): [*_three_sizes(), _row(p=PROBLEM._replace(C=32), share=2.0)]}
    monkeypatch.setattr(page, "stored", lambda: files)
    monkeypatch.setattr(page, "scaling_rows", lambda: {Path("scaling_cpu.csv"): [_row(commit="abc-dirty")]})
    first, every, growth, left = page.pages().values()
    assert "**Nothing is said** of 1 problem" in first
    assert "- `cpu.csv`: token_dwconv fwd b8_14x14_c32_k3_float32: lifeops: 200% of the speed of light" in left
    assert f"- `scaling_cpu.csv`: token_dwconv fwd, 1 problem: {refused.DIRTY}" in left
    assert "Nothing is said of 1 problems of `scaling_cpu.csv`" in growth
    assert "_c32_" not in every
    assert "_c24_" in every


def test_a_page_without_refusals_says_so(monkeypatch):
    monkeypatch.setattr(page, "stored", lambda: {Path("cpu.csv"): _three_sizes()})
    monkeypatch.setattr(page, "scaling_rows", dict)
    assert page.pages()[page.FOLDER / "refused.md"].endswith("\nNone.\n")


# ------------------------------------------------------------------------------------------------ the terminal


def test_tables_fit_eighty_columns(tmp_path):
    long = Problem("token_dwconv_transpose", "fwdbwd", 16, 56, 56, 384, 4, "bfloat16", 2)
    found = [_row(ms=1234.5678, p=long), _row("compiled_shifts", 0.012345, p=long, ratio=123.45, share=None)]
    with (tmp_path / "out").open("w") as file:
        tables.report(found, Console(file=file, width=80))
    lines = (tmp_path / "out").read_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert any("1235" in line for line in lines)
    assert any("0.0123" in line for line in lines)


def test_a_finished_case_is_one_line():
    long = Problem("token_dwconv_transpose", "fwdbwd", 16, 56, 56, 384, 4, "bfloat16", 2)
    for p, extra in ((PROBLEM, "1.00 ms, eager x2.00"), (long, "")):
        text = collect.line([_row(p=p, ratio=1.0), _row("eager", 2.0, p=p, ratio=2.0)])
        assert len(text) <= 70
        assert text.startswith(f"{p.system} {p.mode} {p.name}")
        assert text.endswith(extra)
    assert collect.line([_row(ms=None, note="is off")]).endswith("WRONG")


def test_the_last_lines_say_what_they_mean():
    right = tables.verdict([_row(), _row("eager", 0.9)], 12, quick=True)
    assert "1 cases in 12 s. ratio: a variant's time over lifeops', above 1 lifeops is faster." in right
    assert "ok: 0 wrong results; 1 promises not kept and 1 faster baselines, listed above." in right
    assert "A quick run is a look" in right
    assert "FAILED: 1 wrong results" in tables.verdict([_row(ms=None, note="is off")], 1, quick=False)


# ------------------------------------------------------------------------------------------------ the demo


@pytest.fixture
def results(tmp_path, monkeypatch):
    for name in ("RESULTS", "PICTURES"):
        monkeypatch.setattr(demo, name, tmp_path)
    return tmp_path


TABLE = """setting,model,quantity,value,sd
50 training images,plain,accuracy %,50.00,2.00
50 training images,{0},accuracy %,60.00,3.00
"a training step of DeiT-Tiny, 224 x 224",plain,seconds per training step,0.2,
"a training step of DeiT-Tiny, 224 x 224",plain,peak bytes of a training step,100,
"a training step of DeiT-Tiny, 224 x 224",eager,seconds per training step,0.5,
"a training step of DeiT-Tiny, 224 x 224",eager,peak bytes of a training step,300,
"a training step of DeiT-Tiny, 224 x 224",{0},seconds per training step,0.3,
"a training step of DeiT-Tiny, 224 x 224",{0},peak bytes of a training step,110,
"a training step of the demo's model, batch 32",plain,seconds per training step,0.2,
"a training step of the demo's model, batch 32",plain,peak bytes of a training step,100,
"a training step of the demo's model, batch 32",eager,seconds per training step,0.5,
"a training step of the demo's model, batch 32",eager,peak bytes of a training step,300,
"a training step of the demo's model, batch 32",{0},seconds per training step,0.4,
"a training step of the demo's model, batch 32",{0},peak bytes of a training step,110,
"""


def _stored(results, *systems):
    for system in systems:
        (results / "table.csv").write_text(TABLE.format(system))
        demo.save(demo.facts(system, 3, demo.table_rows(results / "table.csv"), "abc"))


def test_a_demo_is_stored_with_its_commit_and_shown(results):
    _stored(results, *demo.FIRST)
    found = demo.read(results / "life.json")
    assert (found.commit, found.seeds, found.accuracy[50]["life"]) == ("abc", 3, (60.0, 3.0))
    assert found.cost("seconds per training step", "DeiT-Tiny") == pytest.approx(1.5)
    accuracy = demo.accuracy_table(results, "life")
    assert "| 50 | 50.0 ± 2.0 | 60.0 ± 3.0 |" in accuracy
    assert "commit abc" in accuracy
    assert "| DeiT-Tiny, 224 x 224: lifeops | 1.50 | 1.10 |" in demo.cost_table(results, "life")
    assert "as the authors wrote it | 2.50 | 3.00 |" in demo.cost_table(results, "life")
    choice = demo.choice_table(results)
    assert "| plain ViT | 50.0 ± 2.0 | 1 | 1 | - |" in choice
    assert "| LocalViT | 60.0 ± 3.0 | 2.00 | 1.10 | all but the MLP's |" in choice  # the demo's own model
    assert "LIFE 1.50, LocalViT 1.50, DW shortcut 1.50" in choice  # DeiT-Tiny
    assert len(demo.figure(demo.stored()).axes[0].get_lines()) == 4


def test_the_fine_tuning_example_is_stored_the_same_way(results):
    (results / "finetune.csv").write_text(
        "images,seed,model,step,accuracy\n50,0,as it is,0,10\n50,0,as it is,20,40\n50,1,as it is,20,50\n50,0,dw,20,60\n50,1,dw,20,60\n"
    )
    assert demo.curve_rows(results / "finetune.csv") == [
        ["50 training images", "as it is", "accuracy %", 45.0, 7.07], ["50 training images", "dw", "accuracy %", 60.0, 0.0],
    ]  # fmt: skip


def test_the_command_runs_stores_and_draws(results, monkeypatch):
    def ran(argv):
        folder = Path(argv[argv.index("--out") + 1]) / argv[argv.index("--system") + 1]
        folder.mkdir()
        (folder / "table.csv").write_text(TABLE.format("life"))
        (folder / "curves.png").write_bytes(b"picture")
        return 0

    drawn = []
    monkeypatch.setattr(demo.run, "main", ran)
    monkeypatch.setattr(demo, "draw", lambda: drawn.append(1))
    assert demo.main(["life", "--seeds", "2"]) == 0
    assert json.loads((results / "life.json").read_text())["seeds"] == 2
    assert (results / "life.png").read_bytes() == b"picture"
    assert drawn
    with pytest.raises(SystemExit, match=r"systems must be of life, .*, got nonsense"):
        demo.main(["nonsense"])
    monkeypatch.setattr(demo.run, "main", lambda argv: 3)
    with pytest.raises(SystemExit, match="3"):
        demo.main(["life"])


# ------------------------------------------------------------------------------------------------ generated parts


def test_a_stale_page_is_named_and_written(tmp_path, monkeypatch, capsys):
    text = "before\n<!-- environment -->\nold\n<!-- /environment -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.main(["--check"]) == 1
    assert (tmp_path / "README.md").read_text() == text
    assert "README.md" in capsys.readouterr().out
    assert readme.main([]) == 0
    assert "LIFEOPS_BACKEND" in (tmp_path / "README.md").read_text()
    assert readme.main(["--check"]) == 0


def test_a_system_is_a_page(tmp_path, monkeypatch):
    (tmp_path / "b.md").write_text("---\nname: B\nsource: arXiv\nmodules: [DWShortcut]\ntests: [test_docs]\n---\n# B\n")
    (tmp_path / "a.md").write_text("---\nname: a\nsource: arXiv\nops: [no_such_op]\n---\n")
    monkeypatch.setattr(systems_table, "PAGES", tmp_path)
    assert [s.name for s in systems_table.systems().values()] == ["a", "B"]
    assert "| tests | `tests/test_docs.py` |" in systems_table.system_facts(tmp_path / "b.md")
    with pytest.raises(AttributeError, match="no_such_op"):
        systems_table.systems_table(tmp_path / "index.md")
    (tmp_path / "a.md").write_text("---\nname: a\nsource: arXiv\ntests: [no_such_test]\n---\n")
    with pytest.raises(SystemExit, match=r"tests/no_such_test\.py is gone"):
        systems_table.system_facts(tmp_path / "a.md")


def test_checkpoint_families_ask_for_arguments_that_exist():
    arguments = inspect.signature(lifeops.load_official).parameters
    for family in official.families():
        assert set(family.asks) <= arguments.keys()
        assert f"| {family.name} | `{family.key}` |" in readme.families(readme.ROOT)
