"""The README's snippets run, and its generated tables are up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import declare_torchvision_ops

README = Path(__file__).parent.parent / "README.md"


def test_snippets_run():
    namespace = {}
    snippets = re.findall(r"(<!-- needs: (\w+) -->\n)?```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 12
    for _, package, code in snippets:
        if package:
            declare_torchvision_ops()
            pytest.importorskip(package)
        exec(compile(code, "README.md", "exec"), namespace)


def test_generated_tables_are_up_to_date():
    assert subprocess.run([sys.executable, "-m", "bench.readme", "--check"], cwd=README.parent, check=False).returncode == 0


def test_the_performance_page_is_what_the_rows_say():
    code = "from bench import page; assert page.PAGE.read_text() == page.page(), 'run python -m bench.page'"
    subprocess.run([sys.executable, "-c", code], cwd=README.parent, check=True)
