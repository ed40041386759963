"""What is known of other people's models stands in lifeops/hosts, once: nothing else goes by the names of their classes."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lifeops"
ALLOWED = ("getattr(x, 'shape'", "getattr(t, 'dtype'")  # of tensors, for messages
FILES = {f"{folder}/{path.name}": path for folder in ("init", "integrations", "nn") for path in sorted((PACKAGE / folder).glob("*.py"))}
LOOKS, ASKS = ("getattr", "hasattr"), ("endswith", "startswith", "get")
NAMES = "__name__", "__qualname__", "co_name"


def class_names(tree: ast.AST) -> list[int]:
    """The lines that look at a class's or function's name; to say it in an f-string, to hold it against what hosts/ lists or, a function's,
    against what was told, is none.
    """
    hosts = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and "lifeops.hosts" in n.module for a in n.names}
    said = {id(n) for f in ast.walk(tree) if isinstance(f, ast.JoinedStr) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ASKS
        looks = asks or isinstance(node, (ast.Compare, ast.Subscript))
        names = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr in NAMES] if looks else []
        against = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & hosts
        told = not any(isinstance(n, ast.Constant) for n in ast.walk(node))
        found += [n.lineno for n in names if id(n) not in said and not against and not (told and n.attr == "co_name")]
    return sorted(set(found))


def attributes(tree: ast.AST) -> list[str]:
    """The names that are looked for in modules."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in LOOKS)
    return [ast.unparse(call) for call in calls if isinstance(call.args[1], ast.Constant)]


@pytest.mark.parametrize("name", FILES)
def test_no_class_is_known_by_name(name):
    assert not class_names(ast.parse(FILES[name].read_text()))


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("init/")])
def test_init_looks_for_no_attributes(name):
    found = attributes(ast.parse(FILES[name].read_text()))
    assert not [call for call in found if not call.startswith(ALLOWED)]


def test_what_is_looked_for_is_found():
    lines = "if type(m).__name__ == 'Block': pass", "type(m).__name__.endswith('Merging')", "KNOWN[type(m).__name__]", "f.co_name == 'run'"
    assert class_names(ast.parse("\n".join(lines))) == [1, 2, 3, 4]
    assert not class_names(ast.parse("f.co_name == told"))
    assert not class_names(ast.parse("f'{type(m).__name__} is not'\nname = type(m).__name__"))
    assert not class_names(ast.parse("from lifeops.hosts.token_convs import GELUS\ntype(m).__name__ in GELUS"))
    assert attributes(ast.parse("getattr(m, 'qkv', None), hasattr(m, name)")) == ["getattr(m, 'qkv', None)"]
