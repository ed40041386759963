"""Every tool on every system, and docs/tools.md from it: `python tests/tools_table.py` writes the page, test_tools.py runs each cell."""

from itertools import groupby
from pathlib import Path

import tool_checks_capture
import tool_checks_count
import tool_checks_explain
import tool_checks_offload
import tool_checks_own
import tool_checks_peft
import tool_checks_quantise
import tool_checks_shard
import tool_checks_torch
from tool_cells import TOOLS
from tool_systems import SYSTEMS

CHECKS = [  # in the page's order
    tool_checks_peft, tool_checks_quantise, tool_checks_torch, tool_checks_explain, tool_checks_offload, tool_checks_shard,
    tool_checks_capture, tool_checks_count, tool_checks_own,
]  # fmt: skip
TABLE = sorted(TOOLS, key=lambda tool: [check.__name__ for check in CHECKS].index(tool.check.__module__))
PAGE = Path(__file__).parent.parent / "docs" / "tools.md"
HEAD = """# Tools

Written by `python tests/tools_table.py` from the list that `tests/test_tools.py` runs: every cell below is a test.

A fused module runs fused only while each of its layers is exactly the layer that its kernel computes; else it calls them, one after
another (`lifeops.explain(model)` says which, and why). So a tool that exchanges, wraps, hooks, quantises, shards or offloads a layer
finds it called like any other. Each test builds the system and a twin of plain layers with the same names and weights, does the same
to both, and holds one to the other: the column *holds* says what is compared, gradients are those of the input and of every
parameter.

`LIFE`, `LocalViT` (with squeeze and excitation, and with ECA), `DW shortcut` and `LocalAttention` are the modules of `lifeops.nn`;
`timm, …` are timm's VisionTransformer after `lifeops.convert(model, …)`. `-`: the system has no such layer. Where a tool itself does
something else than one would expect, a script in `findings/` shows it on plain models.
"""


def _cell(tool, system, refusals: list[str]) -> str:
    if system not in tool.refused:
        return tool.outcome(system)
    sentence = tool.refused[system]
    if sentence not in refusals:
        refusals.append(sentence)
    return f"refused [{refusals.index(sentence) + 1}]"


def page() -> str:
    refusals: list[str] = []
    lines = [HEAD]
    for group, tools in groupby(TABLE, lambda tool: tool.group):
        lines += [f"## {group}", "", "| | " + " | ".join(SYSTEMS) + " | holds |", "|---" * (len(SYSTEMS) + 2) + "|"]
        for tool in tools:
            cells = [_cell(tool, system, refusals) for system in SYSTEMS]
            lines.append(f"| {tool.title} | " + " | ".join(cells) + f" | {tool.holds} |")
        lines.append("")
    lines += ["## Refusals", ""] + [f"{i}. “{sentence}”" for i, sentence in enumerate(refusals, 1)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
