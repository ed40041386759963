"""`python -m lifeops info`: versions, backends and why one is missing, instruction set, archs in the build, switches."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

from lifeops import built, config, pointwise, registry
from lifeops.cli.main import Parser


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _native():
    """The pybind11 module, or why it is not there."""
    damage = next(filter(None, map(built.damage, sorted(built.FOLDER.glob("_info*.so")))), None)
    if damage is not None:
        return None, damage
    try:
        from lifeops import _info
    except ImportError as error:
        return None, str(error)
    if Path(_info.__file__).parent != built.FOLDER:  # an editable installation answers for its package's missing modules too
        return None, f"{built.FOLDER} has none; the one found belongs to {Path(_info.__file__).parent}"
    return _info, ""


def _freshness(digest: str) -> str:
    csrc = built.FOLDER.parent / "csrc"
    if not csrc.is_dir():
        return "installed without sources beside it"
    if built.sources_digest(csrc) == digest:
        return "matches csrc/"
    return f"STALE: csrc/ has changed since; {built.REBUILD}"


def _shadowed() -> str | None:
    """The source folder in front of an installed package, as when one runs from the repository root."""
    if not (built.FOLDER.parent / "setup.py").exists():
        return None
    for distribution in importlib.metadata.distributions(name="lifeops"):  # an egg-info of the source folder is one of them
        installed = Path(distribution.locate_file("lifeops"))
        if (installed / "__init__.py").is_file() and installed.resolve() != built.FOLDER.resolve():
            return f"this is {built.FOLDER}, which shadows the installation in {installed}: run from another folder"
    return None


def versions() -> dict[str, str]:
    from lifeops import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "lifeops": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "gpu": gpu,
        "cpu": f"{pointwise.vendor()}, torch capability {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    }


def _instruction_set(has: str, facts: dict) -> str:
    """What the kernels take on a CPU that ``has`` this, and why it is less."""
    order = next(s.values for s in config.SWITCHES if s.name == "LIFEOPS_CPU_ISA")[1:]
    limit = config.settings.cpu_isa
    taken = has if limit == "auto" else min(has, limit, key=order.index)
    text = f"{taken} ({facts['baseline']} vectors)" if taken == order[0] and "baseline" in facts else taken
    return text if taken == has else f"{text}, by LIFEOPS_CPU_ISA; this CPU has {has}"


def build() -> dict[str, str]:
    module, why = _native()
    if module is None:
        return {"extension": f"missing: {why}"}
    facts = dict(module.build())
    return {
        "extension": _freshness(facts["sources"]),
        "built backends": facts["backends"],
        "CUDA archs": facts["cuda_archs"] or "none",
        "compiler": facts["compiler"],
        "CPU instruction set": _instruction_set(module.isa(), facts),
    }


def backends() -> dict[str, str]:
    """One line per backend: available, or why not."""
    lines = {}
    for name in config.BACKENDS:
        reason = registry.unavailable(name)
        count = sum(name in op.impls for op in registry.ops.values())
        lines[name] = f"not available: {reason}" if reason else f"{count} of {len(registry.ops)} ops"
    return lines


def switches() -> dict[str, str]:
    def line(s: config.Switch) -> str:
        return f"{os.environ.get(s.name, '(not set)')} — {s.meaning}; one of {', '.join(filter(None, s.values))}"

    return {s.name: line(s) for s in config.SWITCHES}


def text() -> str:
    sections = {"versions": versions(), "build": build(), "backends": backends(), "environment": switches()}
    lines = []
    for title, rows in sections.items():
        width = max(len(key) for key in rows)
        lines += [title, *(f"  {key:<{width}}  {value}" for key, value in rows.items())]
    shadow = _shadowed()
    return "\n".join(lines + ([f"warning: {shadow}"] if shadow else []))


def make_parser() -> argparse.ArgumentParser:
    return Parser(
        prog="lifeops info",
        description="Versions of lifeops, Python, torch, Triton and NumPy, and the devices; what was built, from which sources, with which"
        " compiler, and the CPU's instruction set; each backend's ops, or why it is missing; the environment variables that lifeops reads,"
        " with their values.",
    )


def main(argv: list[str] | None = None) -> int:
    make_parser().parse_args(argv)
    print(text())
    return 0
