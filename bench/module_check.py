"""`python -m bench module_check`: what it costs a fused module to see, at every call, that its layers are still plain.

Beside it, in the same run, a call of an empty module, and what a watched module has to look at. Promised: at most 3 µs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import timeit
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from bench import rows
from lifeops.files import written
from lifeops.nn import DWShortcut, LifeAttention, LocalAttention, LocalityFeedForward
from lifeops.nn.plain import is_fused

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "module_check.json"
PROMISED = 3.0  # µs
CALLS, ROUNDS = 5000, 15


def modules() -> dict[str, nn.Module]:
    attention = LifeAttention(192, 3)
    return {
        "LifeAttention": attention, "LifeQKV": attention.qkv, "LocalAttention": LocalAttention(192, 3),
        "LocalityFeedForward, hs+se": LocalityFeedForward(192), "LocalityFeedForward, relu6": LocalityFeedForward(192, act="relu6"),
        "DWShortcut": DWShortcut(192), "DWShortcut, three kernels": DWShortcut(192, (3, 5, 7)),
    }  # fmt: skip


def measured() -> list[dict]:
    """Median µs of a call over interleaved rounds, for each module, beside an empty module's."""
    empty, found = nn.Identity(), modules()
    calls = {name: (lambda m=m: is_fused(m)) for name, m in found.items()} | {"nn.Identity()(None)": lambda: empty(None)}
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(timeit.timeit(call, number=CALLS) / CALLS * 1e6)
    return [{"module": name, "us": round(statistics.median(t), 3), "layers": len(found[name].fused_layers()) if name in found else 0}
            for name, t in times.items()]  # fmt: skip


def table(found: list[dict]) -> Table:
    made = Table(title="module_check: is every layer inside still the one that the kernel computes?")
    for name in ("module", "layers", "µs a call", "calls of nn.Identity"):
        made.add_column(name, justify="left" if name == "module" else "right")
    empty = found[-1]["us"]
    for row in found:
        made.add_row(row["module"], str(row["layers"]), f"{row['us']:.2f}", f"{row['us'] / empty:.1f}")
    return made


_SECTION = """## What the look at the layers costs

Row `module_check`, {machine}, commit {commit}: at every call a fused module sees whether its layers are still plain; promised are
{promised:.0f} µs.

| module | layers | µs a call | calls of nn.Identity |
|---|---:|---:|---:|
"""


def lines(found: dict) -> list[str]:
    """The section of docs/performance/scaling.md."""
    empty = found["rows"][-1]["us"]
    body = [f"| {r['module']} | {r['layers']} | {r['us']:.2f} | {r['us'] / empty:.1f} |" for r in found["rows"]]
    return [_SECTION.format(machine=found["machine"], commit=found["commit"], promised=PROMISED) + "\n".join(body), ""]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench module_check", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    found = measured()
    Console().print(table(found))
    if args.out:
        with written(args.out) as part:
            part.write_text(json.dumps({"machine": rows.machine("cpu"), "commit": rows.commit(), "rows": found}, indent=1) + "\n")
    return int(max(row["us"] for row in found) > PROMISED)
