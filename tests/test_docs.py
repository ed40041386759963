"""README.md and docs/: every code block runs, generated parts are up to date, links and quoted messages exist, the site builds strictly."""

import ast
import functools
import importlib.util
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import lifeops
from conftest import declare_torchvision_ops

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))}
_BLOCK = re.compile(r"(?:<!-- needs: ([\w ]+) -->\n)?```python\n(.*?)```", re.DOTALL)
BLOCKS = {name: found for name, page in PAGES.items() if (found := _BLOCK.findall(page.read_text()))}


@pytest.mark.parametrize("name", BLOCKS)
def test_code_blocks_run(name, monkeypatch):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # as torchrun would
    for variable, value in alone.items():
        monkeypatch.setenv(variable, value)
    namespace = {"__name__": "page"}
    for packages, code in BLOCKS[name]:
        if packages:
            declare_torchvision_ops()
        for package in packages.split():
            pytest.importorskip(package)
        exec(compile(code, name, "exec"), namespace)


def test_every_page_that_shows_how_has_code():
    shows = {"README.md", "docs/op.md", *(n for n in PAGES if n.startswith(("docs/systems/", "docs/recipes/")) and "index" not in n)}
    assert shows <= BLOCKS.keys()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 900


def test_commands_exist():
    """Of every shell block: make's targets, the sub-commands, the modules and the scripts."""
    from lifeops.cli.main import COMMANDS

    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, page in PAGES.items():
        for line in "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)).splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{name}: {line}"
            elif words[:1] == ["lifeops"] or words[:3] == ["python", "-m", "lifeops"]:
                assert words[words.index("lifeops") + 1] in COMMANDS, f"{name}: {line}"
            elif words[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(words[2]), f"{name}: {line}"
            elif words[:1] == ["python"]:
                assert (ROOT / words[1]).exists(), f"{name}: {line}"
            else:
                assert not words or words[0] in ("pip", "torchrun", "pytest"), f"{name}: {line}"


def test_links_lead_somewhere():
    for name, page in PAGES.items():
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose):
            assert (page.parent / link).exists(), f"{name}: {link}"


def test_generated_parts_are_up_to_date():
    done = subprocess.run([sys.executable, "-m", "bench.readme", "--check"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_performance_pages_are_what_the_rows_say():
    code = "from bench import page; assert not page.stale(), 'run python -m bench page'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_pictures_are_what_their_script_draws():
    for name, draw in runpy.run_path(str(DOCS / "picture.py"))["PICTURES"].items():
        assert (DOCS / name).read_text() == draw(), f"run python docs/picture.py: {name}"


@functools.cache
def _said() -> str:
    """Every string of the sources, parts of one message side by side."""
    trees = [ast.parse(path.read_text()) for path in (*(ROOT / "lifeops").rglob("*.py"), ROOT / "setup.py")]
    strings = [n for tree in trees for n in ast.walk(tree) if isinstance(n, (ast.Constant, ast.JoinedStr))]
    parts = ([n] if isinstance(n, ast.Constant) else n.values for n in strings)
    return "\n".join("…".join(p.value for p in part if isinstance(p, ast.Constant) and isinstance(p.value, str)) for part in parts)


def test_quoted_messages_are_said():
    lines = re.findall(r"^\| `(.+?)`.* \|.*\|.*\|$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        for part in (p.strip(" (…") for p in line.split("…")):
            assert len(part) < 6 or part in _said(), f"nothing says {part!r}: {line}"


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in (DOCS / "reference").glob("*.md")), re.MULTILINE))
    public = {"lifeops.autograd"}  # as a whole: what stands behind the ops
    for name in {*lifeops.__all__} - {"autograd"}:
        found = getattr(lifeops, name)
        public |= {f"lifeops.{name}.{of}" for of in getattr(found, "__all__", ())} if inspect.ismodule(found) else {f"lifeops.{name}"}
    assert listed == public


def test_the_site_builds_strictly(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers", "mkdocs_awesome_nav"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fetched = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="https?://', re.IGNORECASE)
    for page in (tmp_path / "site").rglob("*.html"):
        assert not fetched.search(page.read_text()), page
