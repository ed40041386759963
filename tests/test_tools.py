"""Tools that people put on models, on every system: each cell of docs/tools.md. One after another: ``-k "peft and LIFE"``."""

import re

import pytest
import tools_table
import torch
from tool_systems import SYSTEMS

CELLS = [(tool, system) for tool in tools_table.TABLE for system in SYSTEMS if system not in tool.absent]


@pytest.mark.filterwarnings("ignore")  # the tools' own
@pytest.mark.parametrize(("tool", "system"), CELLS, ids=lambda v: v if isinstance(v, str) else f"{v.group}-{v.title}")
def test_tool(tool, system):
    for package in ("timm", *tool.packages) if system.startswith("timm") else tool.packages:
        pytest.importorskip(package)
    if tool.group in ("FSDP1", "FSDP2", "DDP") and not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs gloo")
    if system in tool.refused:
        with pytest.raises(Exception, match=re.escape(tool.refused[system])):
            tool.check(system)
    else:
        tool.check(system)


def test_every_tool_is_on_the_page_as_it_is_tested():
    assert tools_table.PAGE.read_text() == tools_table.page(), "run python tests/tools_table.py"


def test_titles_are_told_apart():
    titles = [(tool.group, tool.title) for tool in tools_table.TABLE]
    assert len(titles) == len(set(titles))
