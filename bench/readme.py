"""The generated parts of README.md and docs/: systems, ops by backends and dtypes, the environment, the demo. `make readme` writes them.

A part lies between ``<!-- NAME ARGUMENTS -->`` and ``<!-- /NAME -->``, on any page. ``--check`` exits 1 where a page is not what would be
written, and names it; a test runs it.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import lifeops
from bench import demo, summary
from bench.refused import shown
from bench.systems_table import system_facts, systems_table
from lifeops import config, registry
from lifeops.cost.model_cost import model_cost
from lifeops.demo.train import SYSTEMS
from lifeops.files import written
from lifeops.integrations import official
from lifeops.models.named import image_size, named, systems_of

ROOT = Path(__file__).parent.parent
NAMES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
LABELS = {name: system.label for name, system in SYSTEMS.items()}
BACKENDS = {"reference": "PyTorch", "cpu": "CPU C++", "triton": "Triton", "cuda": "CUDA C++"}


def op_table(page: Path) -> str:
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
        return any(f'm.impl("{operator}"' in path.read_text() for path in (ROOT / "csrc" / backend).glob("*.c*"))
    registry.load(backend)
    return backend in registry.ops[op].impls


def environment_table(page: Path) -> str:
    lines = ["| variable | values | what it does |", "|---|---|---|"]
    for s in config.SWITCHES:
        values = ", ".join(f"`{v}`" for v in s.values if v)
        lines.append(f"| `{s.name}` | {values} | {s.meaning[0].upper() + s.meaning[1:]} |")
    return "\n".join(lines)


def flops_table(page: Path, model: str) -> str:
    """Of one model's systems, per image."""
    columns = "parameters M", "GMACs", "trained", "saved MiB"
    lines = [f"| `lifeops flops {model}` | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    for system in systems_of(model):
        cost = model_cost(lambda s=system: named(model, s, num_classes=1000), image_size(model, None), 1)
        cells = f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e9:.3f}", f"{cost.train_macs / 1e9:.3f}", f"{cost.saved / 2**20:.1f}"
        lines.append(f"| {LABELS.get(system, system)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def families(page: Path) -> str:
    """The checkpoints that load_official knows, and which of its arguments they may need."""
    lines = ["| model | told by | arguments that say what its tensors may not tell |", "|---|---|---|"]
    for family in official.families():
        lines.append(f"| {family.name} | `{family.key}` | {', '.join(f'`{name}`' for name in family.asks) or '-'} |")
    return "\n".join(lines)


def names(page: Path, module: str) -> str:
    """What mkdocstrings shows of a public module: everything."""
    return "\n\n".join(f"::: lifeops.{module}.{name}" for name in getattr(lifeops, module).__all__)


def examples(page: Path) -> str:
    """The scripts, by the first line of what they say of themselves."""
    lines = ["| script | what it shows |", "|---|---|"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text()
        if "__main__" in source:  # others are parts of scripts
            lines.append(f"| `{path.name}` | {ast.get_docstring(ast.parse(source)).splitlines()[0]} |")
    return "\n".join(lines)


def speed(page: Path) -> str:
    """What the README says of the convolution's speed."""
    return summary.sentence(summary.lines(shown()))


PARTS = {
    "ops": op_table, "environment": environment_table, "systems": systems_table, "system": system_facts, "choice": demo.choice_table,
    "demo": demo.accuracy_table, "demo-cost": demo.cost_table,
    "finetune": demo.finetune_table, "flops": flops_table, "speed": speed, "names": names, "families": families, "examples": examples,
}  # fmt: skip
"""Functions of the page's path and the arguments in the mark."""
_PART = re.compile(rf"(<!-- ({'|'.join(PARTS)})((?: [\w-]+)*) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def pages() -> list[Path]:
    """The README and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def generated(page: Path) -> str:
    """The page's text as it should be."""
    return _PART.sub(lambda m: m[1] + PARTS[m[2]](page, *m[3].split()) + "\n" + m[4], page.read_text())


def main(argv: list[str]) -> int:
    stale = {page: text for page in pages() if (text := generated(page)) != page.read_text()}
    for page, text in stale.items():
        print(page.relative_to(ROOT))
        if "--check" not in argv:
            with written(page) as part:
                part.write_text(text)
    return int("--check" in argv and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
