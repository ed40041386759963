"""The generated parts of README.md: tables of systems, of ops by backends and dtypes, of the environment. `make readme` writes them.

``--check`` exits 1 where README.md is not what would be written; a test runs it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bench.systems_table import systems_table
from lifeops import config, registry
from lifeops.files import written

README = Path(__file__).parent.parent / "README.md"
NAMES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
BACKENDS = {"reference": "PyTorch", "cpu": "CPU C++", "triton": "Triton", "cuda": "CUDA C++"}


def op_table() -> str:
    """One row per op: what each backend implements. Read from the registry and the sources, not from this machine."""
    lines = ["| op | " + " | ".join(f"{name} (`{key}`)" for key, name in BACKENDS.items()) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
    for op in registry.ops.values():
        cells = [_dtypes(op, backend) if _implements(op.name, backend) else "-" for backend in BACKENDS]
        lines.append(f"| `{op.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _dtypes(op: registry.Op, backend: str) -> str:
    impl = op.impls.get(backend)  # a backend that is not on this machine
    known = [str(d).removeprefix("torch.") for d in (registry.FLOATS if impl is None else impl.dtypes)]
    return ", ".join(name for key, name in NAMES.items() if key in known)


def _implements(op: str, backend: str) -> bool:
    from lifeops import native

    if backend in ("cpu", "cuda") and op in native._IMPLEMENTATIONS:
        operator, _ = native._IMPLEMENTATIONS[op]
        return any(f'm.impl("{operator}"' in path.read_text() for path in (README.parent / "csrc" / backend).glob("*.c*"))
    registry.load(backend)
    return backend in registry.ops[op].impls


def environment_table() -> str:
    lines = ["| variable | values | what it does |", "|---|---|---|"]
    for s in config.SWITCHES:
        values = ", ".join(f"`{v}`" for v in s.values if v)
        lines.append(f"| `{s.name}` | {values} | {s.meaning[0].upper() + s.meaning[1:]} |")
    return "\n".join(lines)


PARTS = {"ops": op_table, "environment": environment_table, "systems": systems_table}


def generated(text: str) -> str:
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no <!-- {name} --> … <!-- /{name} --> part")
        text = pattern.sub(lambda m, make=make: m[1] + make() + "\n" + m[2], text)
    return text


def main(argv: list[str]) -> int:
    before = README.read_text()
    after = generated(before)
    if "--check" in argv:
        return int(before != after)
    with written(README) as part:
        part.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
