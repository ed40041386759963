"""Imports run downwards: a file knows what lies below it and nothing above; and no two files import each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lifeops"
LAYERS = (
    {"after_import", "arguments", "built", "config", "errors", "files", "geometry", "options", "pointwise", "registry", "told", "torchlib"},
    {"native_args", "native_attention", "ops"},
    {"autograd", "native", "native_windows", "testing"},  # what implements the ops, and tests them
    {"nn"},
    {"losses", "models"},
    {"attention_maps", "cost", "explain", "hosts", "init", "integrations", "model_cost"},
    {"cli", "demo"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
LATE = {  # imported where they are called; any other upward import is a fault
    ("models.named", "integrations"): "timm's models by name, with a system converted in",
}


def files():
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.stem not in ("__init__", "__main__")]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(p): p for p in files()}


def imported(path: Path, top_only: bool = False) -> set[str]:
    """The modules of the package that a file imports, by the names of their files."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lifeops":
            base = node.module.removeprefix("lifeops").lstrip(".")
            candidates = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            found |= {c if c in MODULES else base for c in candidates}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("lifeops.") for alias in node.names if alias.name.startswith("lifeops.")}
    return found & set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name):
    own, *_ = name.split(".")
    above = {m for m in imported(MODULES[name]) if RANK[m.split(".")[0]] > RANK[own] and (name, m.split(".")[0]) not in LATE}
    assert not above, f"lifeops.{name} imports {sorted(above)}, which lie above it"


def test_every_file_has_a_layer():
    assert {name.split(".")[0] for name in MODULES} <= set(RANK)
    assert all(higher in imported_layers(name) for name, higher in LATE), "an exception that nothing needs"


def imported_layers(name: str) -> set[str]:
    return {m.split(".")[0] for m in imported(MODULES[name])}


def test_no_circles():
    """Of imports at the top of files."""
    graph = {name: imported(path, top_only=True) - {name} for name, path in MODULES.items() if path.stem != "__init__"}
    done: set[str] = set()

    def visit(name, way):
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name in done or name not in graph:
            return
        for other in sorted(graph[name]):
            visit(other, (*way, name))
        done.add(name)

    for name in graph:
        visit(name, ())
