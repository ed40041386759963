"""`python -m bench page`: writes docs/performance.md, the pages and pictures in docs/performance/, from the rows in bench/results/ alone.

Rows that cannot be (bench/refused.py) are left out and named; then it ends with 1, and `python -m bench again` measures them anew.
"""

from __future__ import annotations

import json
import statistics
from itertools import groupby
from pathlib import Path

from bench import module_check, scaling_page, summary
from bench import rows as store
from bench.problems import targets
from bench.refused import RESULTS, accepted, refused, shown, stored
from bench.refused import lines as refused_lines
from bench.tables import Key, faster, losing, measured, missed, ratios, spread, wrong
from lifeops.files import written

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
FOLDER = ROOT / "docs" / "performance"
FIRST = """# Performance

{facts}

![times as fast as what people write, for each op, block and model](performance/summary.png)

{message}

Every figure is another way's time over lifeops': above 1 lifeops is faster. Geometric mean over sizes (range); float32, inputs in the
caches, two threads. "Inference" and "training step" are against what people write: of an op the patches viewed as a map, PyTorch's op,
viewed back, cat, or its authors' code; of CoaT, PVT v2 and Twins timm's blocks; of other blocks and models the authors' code. The three
columns behind them are inference / training step against the bare library convolution on a ready map, torch.compile of what people write,
and the plain layer or model without its local part: 0.80 there means that locality costs a quarter more time, which no kernel can remove.
That is told only of runs in which the quartiles of both lay within {steady} of each other: a plain model was timed beside each system, in
the same run, and machines drift from one run to the next. "Closest case": where a baseline of the same work comes nearest, or is ahead
(below 1); 8 x 14 x 14 x 192 is a batch of 8 with 14 x 14 patches of 192 channels, K the kernel size.

{table}

What locality costs depends on the machine: on one thread of an AMD EPYC a training step of DeiT-Tiny, batch 2, costs less than here, as the
page of each system says ([LocalViT](systems/localvit.md#what-it-gains-and-costs), which even wins there, and why).

## Where it loses

The {worst} worst cases of this page, to what does the same work (`eager` is what people write, `onednn` the bare convolution on a ready
map):

{losing}

Those of other dtypes, cold caches and other allocators stand in [every row](performance/tables.md), too, which counts them all.

- [Every row](performance/tables.md): sizes, bfloat16, cold caches, gradients alone, memory, share of the machine's limit, promises kept.
- [How cost grows with size](performance/scaling.md), memory of the roll-out, what it costs to look at the layers.
- Measure it here: `python -m bench --quick` takes two minutes, `python -m bench op --system token_dwconv` one op; `python -m bench
  compare A B` sets stored rows side by side; `pytest bench --benchmark-only` is the same as a pytest-benchmark suite.

"""
REFUSED = """# Refused

Rows that cannot be (more than 110 % of the machine's limit, a training step faster than its backward, K 5 taking 1.3 times as long as K 7,
quartiles 1.5 apart) or that were measured with uncommitted changes are on no page until `make again` has measured them anew, those of
`scaling` until `python -m bench scaling` has.

"""
INTRO = """# Every row

Written by `python -m bench page` from the rows in `bench/results/`. A baseline's figure is how many times slower it is than lifeops
in the same run, variants interleaved call by call, in an order drawn anew each round, on the same rotated random inputs: the median
over fresh processes, with the spread in brackets where there were several. A result that differs from the float64 oracle on the timed
tensors gets no number.

- Regimes: `warm` caches hold the inputs, before `cold` calls a buffer larger than the last cache is read. The `warm` allocator
  keeps glibc from returning freed memory, so that page faults stay out of the loop; `default` is glibc as it comes.
- Modes: `fwd` is inference (batch norms folded or constant), `bwd` the gradients alone, `dw` the weight gradient alone, `fwdbwd` a
  training step.
- Columns: GB/s of compulsory traffic (inputs and parameters once, results once), TFLOP/s of the registry's FLOPs (MAC = 2), the
  share of the speed of light (the larger of the two times that a copy of the same bytes and a large matrix product, measured in the
  same run in a quiet moment, would take) and which of them binds; peak memory of a call, what is saved for backward, operator calls
  dispatched.
- Baselines of the same work: `eager` is what people write (view as a map, conv2d, view back, cat; modules: the authors' code;
  timm's own blocks as they are), `onednn` the bare convolution on a ready channels-last map, `compiled` torch.compile of `eager`,
  `compiled_shifts` of an unrolled shift-and-add, `naive` roll-out with the matrices written out.
- Of less work, the price of locality: `plain` the ordinary C -> 3C projection by the better of two library paths, the plain attention
  or the plain model, `products` life_qkv's three products without depth-wise steps (eager / products is the most that any way to
  write it can gain), `block` the Transformer block without the shortcut, `mlp` the LayerNorm and MLP that LocalViT's feed-forward
  replaces, `sdpa` attention without a local term, `product` the scores alone, `clone` a copy of the same bytes.
- "promise": whether the library's own target for that row was met: how many times as fast as a baseline it should be at least
  (`targets` in `bench/problems.py`).
"""
NO_GPU = "**No GPU has been measured.** Until one is, the evidence for the GPU kernels is static: `make budgets`."


def _mb(size) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


def _columns(row: dict) -> list[str]:
    """The columns beside the time; dashes in rows from before they existed."""
    if row["share"] is None:
        return ["-"] * 7
    calls = "-" if row["launches"] is None else str(row["launches"])
    speed = [f"{row['gbs']:.1f}", f"{row['tflops']:.3f}", f"{row['share']:.0%}", row["bound"]]
    return [*speed, _mb(row["peak_bytes"]), _mb(row["saved_bytes"]), calls]


def _line(key: Key, cell: dict, row: dict, baselines: list[str]) -> str:
    p, _, allocator, cache, _ = key
    broken = missed(key, cell)
    promised = [t for t in targets(p, allocator) if t.baseline in cell] if cache == "warm" else []
    verdict = "-" if not promised else "kept" if not broken else "; ".join(f"missed: {t.baseline} {t.at_least:.2f}" for t in broken)
    ours = f"{statistics.median(cell['lifeops']):.2f}"
    others = [spread(cell[b]) if b in cell else "-" for b in baselines]
    return "| " + " | ".join([p.name, ours, *_columns(row), *others, verdict]) + " |"


def _losers(members: list[tuple[Key, dict]]) -> list[str]:
    """Same-work baselines that are faster, named under the table."""
    out = []
    for (p, *_), cell in members:
        ahead = [f"{b} {statistics.median(v):.2f}" for b, v in faster(cell).items()]
        out += [f"{p.name}: {', '.join(ahead)}"] if ahead else []
    return ["Faster than lifeops: " + "; ".join(out) + "."] if out else ["No baseline of the same work is faster."]


def tables(rows: list[dict]) -> list[str]:
    lines: list[str] = []
    first = {}
    for r in measured(rows):
        if r["variant"] == "lifeops":
            first.setdefault((store.problem(r), r["machine"], r["allocator"], r["cache"], r["threads"]), r)
    by_table = lambda c: (c[0][0].system, c[0][0].mode, c[0][2], c[0][3], c[0][4])  # noqa: E731
    for (system, mode, allocator, cache, threads), group in groupby(ratios(rows).items(), key=by_table):
        members = list(group)
        baselines = list(dict.fromkeys(b for _, cell in members for b in cell if b != "lifeops" and not b.startswith("plain_")))
        header = ["problem", "lifeops ms", "GB/s", "TFLOP/s", "share", "bound", "peak MB", "saved MB", "calls", *baselines, "promise"]
        lines += [f"### {system}, {mode}, {cache} cache, {allocator} allocator, {threads} threads", ""]
        lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += [_line(key, cell, first[key], baselines) for key, cell in members]
        kept = sum(not missed(key, cell) for key, cell in members)
        lines += ["", *_losers(members), f"{kept} of {len(members)} rows keep their promise or have none.", ""]
    return lines


def _section(path: Path, rows: list[dict]) -> list[str]:
    first = rows[0]
    where = "" if store.is_gpu(first) else " Measured on a CPU; not measured on a GPU."
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines = [f"## {first['machine']}", "", f"torch {first['torch']}, commit {commits}, `{path.name}`.{where}", ""]
    lines += [f"![{kind}]({path.stem}_{kind}.png)" for kind in ("ratios", "share") if _has(kind, rows)]
    broken, slower = losing(rows)
    red = wrong(rows)
    said = f"Of all rows, whatever dtype, cache and allocator, {len(slower)} times a baseline of the same work is faster, and {len(red)}"
    said += f" results are wrong. {len(broken)} promises are not kept{':' if broken else '.'}"
    return [*lines, "", said, "", *(f"- {line}" for line in broken), *(f"- wrong, no number: {line}" for line in red), "", *tables(rows)]


def _has(kind: str, rows: list[dict]) -> bool:
    return kind == "ratios" or any(row["share"] for row in rows)


ROLLOUT_MEMORY = """torch {torch}, commit {commit}, `{name}`: growth of a fresh process to its peak, {N} tokens, {layers} layers,
{heads} heads, float32. `layers`: q and k exist already; `model`: images to maps, `forward` the fused model without a roll-out, `heads`
what hooks on its attention collect."""


def _rollout_memory(path: Path) -> list[str]:
    """What ``python -m bench.rollout --out`` measured."""
    facts = json.loads(path.read_text())
    dirty = " Measured with changes that were not committed." if facts["commit"].endswith("-dirty") else ""
    lines = [f"## Roll-out, peak memory: {facts['machine']}", "", ROLLOUT_MEMORY.format(**facts, name=path.name) + dirty, ""]
    lines += ["| level | way | peak MiB | of lifeops' |", "|---|---|---|---|"]
    for level, found in facts["peak_mib"].items():
        lines += [f"| {level} | {way} | {mib:.1f} | {mib / found['lifeops']:.1f} |" for way, mib in found.items()]
    return [*lines, ""]


def _facts(rows: list[dict]) -> str:
    """Where the first page's rows are from."""
    machines: dict[tuple[str, str], dict] = {}
    for row in rows:
        machines.setdefault((row["machine"], row["torch"]), {})[row["commit"]] = None
    told = "; ".join(f"{m}, torch {t}, commit {', '.join(commits)}" for (m, t), commits in machines.items())
    return f"Measured on {told}. Written by `python -m bench page`."


def _first(files: dict[Path, list[dict]]) -> str:
    kept = [row for rows in files.values() for row in accepted(rows)]
    found, count = summary.lines(kept), sum(len(refused(rows)) for rows in files.values())
    no_gpu = [] if any(store.is_gpu(row) for row in kept) else [NO_GPU]
    return FIRST.format(
        facts="\n\n".join([_facts(measured(kept)), *no_gpu]), message="\n".join(summary.message(found, count)),
        table="\n".join(summary.table(found)), steady=summary.STEADY, worst=summary.WORST, losing="\n".join(summary.losing(found)),
    )  # fmt: skip


def _every(files: dict[Path, list[dict]]) -> str:
    lines = [INTRO]
    for path, rows in files.items():
        kept = accepted(rows)
        for machine in dict.fromkeys(row["machine"] for row in kept):
            lines += _section(path, [row for row in kept if row["machine"] == machine])
    return "\n".join(lines).rstrip() + "\n"


def _growth() -> str:
    lines = ["# How cost grows, and other costs", ""]
    for path, rows in scaling_rows().items():
        if kept := accepted(rows):
            lines += scaling_page.section(path, kept)
        if left := refused(rows):
            lines += [f"Nothing is said of {len(left)} problems of `{path.name}`, whose rows are [refused](refused.md).", ""]
    for path in sorted(RESULTS.glob("rollout_memory*.json")):
        lines += _rollout_memory(path)
    if module_check.RESULTS.exists():
        lines += module_check.lines(json.loads(module_check.RESULTS.read_text()))
    return "\n".join(lines).rstrip() + "\n"


def _refused() -> str:
    left = [f"- `{path.name}`: {line}" for path, rows in {**stored(), **scaling_rows()}.items() for line in refused_lines(rows)]
    return REFUSED + "\n".join(left or ["None."]) + "\n"


def scaling_rows() -> dict[Path, list[dict]]:
    return {path: store.read(path) for path in sorted(RESULTS.glob("scaling*.csv"))}


def pages() -> dict[Path, str]:
    """What the pages should say."""
    files = stored()
    return {PAGE: _first(files), FOLDER / "tables.md": _every(files), FOLDER / "scaling.md": _growth(), FOLDER / "refused.md": _refused()}


def stale() -> list[Path]:
    """The pages that do not say what the rows do."""
    return [path for path, text in pages().items() if not path.exists() or path.read_text() != text]


def main(argv: list[str] | None = None) -> int:
    from bench import figures

    files = {**stored(), **scaling_rows()}
    figures.draw_files({path.stem: kept for path, rows in files.items() if (kept := accepted(rows))}, FOLDER)
    figures.save(summary.figure(summary.lines(shown())), FOLDER / "summary.png")
    for path, text in pages().items():
        with written(path) as part:
            part.write_text(text)
    left = [f"{path.name}: {line}" for path, rows in files.items() for line in refused_lines(rows)]
    for line in left:
        print(f"refused: {line}")
    return int(bool(left))


if __name__ == "__main__":
    raise SystemExit(main())
