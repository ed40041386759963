"""The first page of the performance documentation: one table and one figure of what the stored rows say, float32, warm, two threads."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from matplotlib.figure import Figure

from bench import rows as store
from bench.baselines import does_same_work
from bench.problems import LEVELS, SYSTEMS, Problem, level_of
from bench.tables import Key, ratios

MODES = {"fwd": "inference", "fwdbwd": "training step"}
AUTHORS = ("eager", "naive")  # what people write
LIBRARY = ("onednn", "cudnn")
COMPILED = ("compiled", "compiled_shifts")
PLAIN = ("plain", "block", "mlp", "products", "product", "sdpa")  # of less work: without the local part
STEADY = 1.25  # the upper quartile over the lower, of what a price is told of: it is a matter of percents
WORST = 10  # cases named that lose
WORDS = {
    "token_dwconv": "token convolution", "life_qkv": "LIFE: q, k, v", "local_attention": "attention with a local term",
    "dw_shortcut": "DW shortcut alone", "rollout": "attention roll-out", "token_dwconv_strided": "strided convolution",
    "token_dwconv_multiplied": "channel multiplier", "token_dwconv_transpose": "transposed convolution", "token_pool": "token pooling",
    "pool_qkv": "pooled q, k, v", "mvit_pool": "MViT: pooling", "region_down": "RegionViT: downsampling",
    "life_attention": "LIFE: attention", "localvit_ffn": "LocalViT: feed-forward", "dw_shortcut_block": "block with DW shortcut",
    "coat_pos_enc": "CoaT's position encoding", "pvt_mlp": "PVT v2's feed-forward", "twins_pos_conv": "Twins' position encoding",
    "cvt_projections": "CvT: projections", "cvt_attention": "CvT: attention", "edgevit_local_agg": "EdgeViT: local aggregation",
    "vit_life": "DeiT-Tiny with LIFE", "vit_localvit": "LocalViT-T", "vit_dw_shortcut": "DeiT-Tiny with shortcuts", "cvt_13": "CvT-13",
    "token_pyramid": "feature pyramid", "token_smoothing": "smoothing", "token_slimming": "token slimming",
    "relative_localization": "relative localisation", "shared_conv": "Bootstrapping ViTs' agent", "conv_ffn": "PVTv2: feed-forward",
    "patch_embed": "PVTv2: patch embedding", "sit_tiny": "SiT-Ti", "localvit_pvt_tiny": "LocalViT in PVT-T",
    "localvit_tnt_t": "LocalViT in TNT-T", "localvit_t2t_7": "LocalViT in T2T-7", "localvit_swin_tiny": "LocalViT in Swin-T",
    "life_swinv2_tiny": "LIFE in Swin V2-T", "edgevit_xs": "EdgeViT-XS", "mvitv2_tiny": "MViTv2-T", "regionvit_tiny": "RegionViT-Ti",
}  # fmt: skip


class Line(NamedTuple):
    """One system on one machine. ``cells``: {mode: [(problem, {baseline: times lifeops' time})]}."""

    system: str
    machine: str
    cells: dict[str, list[tuple[Problem, dict[str, float]]]]

    @property
    def words(self) -> str:
        return WORDS.get(self.system, self.system)

    def values(self, mode: str, among: Iterable[str]) -> list[float]:
        """Of each problem the fastest baseline ``among``, over lifeops."""
        of = ([cell[b] for b in among if b in cell] for _, cell in self.cells.get(mode, ()))
        return [min(found) for found in of if found]


def lines(rows: list[dict]) -> list[Line]:
    """In the order of the levels: ops, blocks, models."""
    found: dict[tuple[str, str], dict] = {}
    for (p, machine, *_), cell in _first_page(_without_unsteady(rows)):
        middle = {name: statistics.median(values) for name, values in cell.items()}
        found.setdefault((p.system, machine), {}).setdefault(p.mode, []).append((p, middle))
    order = {system: n for n, system in enumerate(SYSTEMS)}
    return [Line(*key, cells) for key, cells in sorted(found.items(), key=lambda item: (order[item[0][0]], item[0][1]))]


def _without_unsteady(rows: list[dict]) -> list[dict]:
    """Rows without the plain baselines of runs in which they or lifeops did not keep their time."""
    run = lambda row: (*store.key(row), row["cache"], row["repeat"])  # noqa: E731
    compared = [row for row in rows if row["variant"] == "lifeops" or row["variant"].startswith(PLAIN)]
    unsteady = {run(row) for row in compared if row["median_ms"] is not None and row["q75_ms"] > STEADY * row["q25_ms"]}
    return [row for row in rows if not (row["variant"].startswith(PLAIN) and run(row) in unsteady)]


def _first_page(rows: list[dict]) -> Iterable[tuple[Key, dict]]:
    for key, cell in ratios(rows).items():
        p, _, allocator, cache, threads = key
        if (p.dtype, allocator, cache, threads) == ("float32", "warm", "warm", 2) and p.mode in MODES:
            yield key, cell


def mean(values: list[float]) -> float:
    return statistics.geometric_mean(values)


def mean_range(values: list[float], mark: str = "") -> str:
    if not values:
        return "-"
    return f"{mark}{mean(values):.2f}{mark}" + (f" ({_from_to(values)})" if len(values) > 1 else "")


def _means(line: Line, among: tuple[str, ...]) -> str:
    found = [line.values(mode, among) for mode in MODES]
    return " / ".join(f"{mean(values):.2f}" if values else "-" for values in found) if any(found) else "-"


def _cases(line: Line) -> list[tuple[float, str]]:
    """Every baseline of the same work: its time over lifeops', and words for it."""
    return [
        (ratio, f"{name} {ratio:.2f}, {MODES[mode]}, {_size(p)}")
        for mode, cells in line.cells.items()
        for p, cell in cells
        for name, ratio in cell.items()
        if does_same_work(name)
    ]


def _size(p: Problem) -> str:
    """Of a model its batch alone; K is a kernel where it is no stride or depth."""
    if level_of(p.system) == "model":
        return f"batch {p.B}"
    kernel = f", K {p.K}" if p.K and p.system not in ("pool_qkv", "mvit_pool") else f", stride {p.K}" if p.K else ""
    return f"{p.B} x {p.H} x {p.W} x {p.C}{kernel}"


def _worst(line: Line) -> str:
    """The case in which a baseline of the same work comes closest, or is ahead."""
    return min(_cases(line), default=(0, "-"))[1]


def losing(found: list[Line]) -> list[str]:
    """The cases furthest behind a baseline of the same work, worst first."""
    behind = sorted((ratio, f"- {line.words}: {said}") for line in found for ratio, said in _cases(line) if ratio < 1)
    return [said for _, said in behind[:WORST]]


def table(found: list[Line]) -> list[str]:
    """Markdown: op by mode."""
    columns = "", "inference", "training step", "bare library op", "torch.compile", "without the local part", "closest case", "machine"
    out = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in found:
        eager = [mean_range(line.values(mode, AUTHORS), "**") for mode in MODES]
        others = [_means(line, among) for among in (LIBRARY, COMPILED, PLAIN)]
        out.append(f"| {line.words} | {' | '.join([*eager, *others, _worst(line), _short(line.machine)])} |")
    return out


def sentence(found: list[Line]) -> str:
    """The README's: the convolution itself."""
    line = next(line for line in found if line.system == "token_dwconv")
    told = []
    for mode in MODES:
        values = line.values(mode, AUTHORS)
        told.append(f"{mean(values):.1f} times ({min(values):.1f} to {max(values):.1f})")
    return (
        f"On two cores of an {_short(line.machine).split()[0]} CPU in float32 it is {told[0]} as fast as the view-conv-cat path, with its"
        f" gradients {told[1]}: [performance](docs/performance.md), losing cases included."
    )


def _from_to(values: Iterable[float]) -> str:
    values = list(values)
    return f"{min(values):.2f} to {max(values):.2f}"


def _single(lines: list[list[float]]) -> str:
    return _from_to(itertools.chain(*lines))


def _short(machine: str) -> str:
    return machine.split("(")[0].strip()


def message(found: list[Line], refused: int) -> list[str]:
    """What the table says, in sentences."""
    out = []
    doing = "inference", "training"
    authors = "their authors' code or timm's"
    words = ("Ops", "PyTorch's ops on the patches viewed as a map, or their authors' code"), ("Blocks", authors), ("Whole models", authors)
    for level, (what, other) in zip(LEVELS, words, strict=True):
        of = [line for line in found if level_of(line.system) == level]
        every = [[v for line in of if (v := line.values(mode, AUTHORS))] for mode in MODES]
        if all(every):
            told = [
                f"{_from_to(map(mean, values))} times as fast in {word} (single sizes {_single(values)})"
                for values, word in zip(every, doing, strict=True)
            ]
            out.append(f"- **{what}**: {', '.join(told)}, against {other}.")
    cells = [cell for line in found for of in line.cells.values() for _, cell in of]
    behind = [cell for cell in cells if any(does_same_work(b) and ratio < 1 for b, ratio in cell.items())]
    out.append(f"- **It loses** in {len(behind)} of {len(cells)} cases of this page to something that does the same work, listed below.")
    return [*out, f"- **Nothing is said** of {refused} problems whose rows are [refused](performance/refused.md)."] if refused else out


def figure(found: list[Line]) -> Figure:
    """A pair of bars for each system, their ends the geometric mean, their whiskers the range."""
    found = [line for line in found if any(line.values(mode, AUTHORS) for mode in MODES)]
    made = Figure(figsize=(9, 1.4 + 0.42 * len(found)), layout="constrained")
    axes = made.add_subplot()
    for shift, (mode, word), colour in zip((-0.19, 0.19), MODES.items(), ("tab:blue", "tab:orange"), strict=True):
        for y, line in enumerate(found):
            if values := line.values(mode, AUTHORS):
                label = word if y == next(n for n, li in enumerate(found) if li.values(mode, AUTHORS)) else None
                axes.barh(y + shift, mean(values) - 1, 0.36, left=1, color=colour, label=label)
                axes.plot((min(values), max(values)), (y + shift,) * 2, color="black", linewidth=1)
    several = len({line.machine for line in found}) > 1
    names = [f"{line.words} ({_short(line.machine).split()[0].removesuffix('(R)')})" if several else line.words for line in found]
    axes.axvline(1, color="black", linewidth=1)
    axes.set(yticks=range(len(found)), yticklabels=names, xscale="log", xticks=(0.8, 1, 1.5, 2, 3, 4, 6, 8), ylim=(len(found) - 0.4, -1.4))
    axes.set_xticklabels(["0.8", "1", "1.5", "2", "3", "4", "6", "8"])
    axes.minorticks_off()
    axes.annotate("faster", (3.2, -0.9), (1.05, -0.9), va="center", arrowprops={"arrowstyle": "->", "linewidth": 2}, fontsize=12)
    axes.set(xlabel="times as fast as what people write (bars: geometric mean, lines: range over sizes)")
    axes.legend(loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    return made
