"""`make installs`: every way to install, each in a fresh environment, and what it says where it cannot. Needs nothing but Python.

What is compiled is not optimised, which is quicker (``--optimised``: as users have it).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from versions import ROOT, TORCH

from fuzz.page import put

BUILD = ROOT / "build" / "installs"
PAGE = ROOT / "docs" / "installing.md"
UNOPTIMISED = '#!/bin/sh\nfor a do shift; case "$a" in -O?) a=-O0 ;; esac; set -- "$@" "$a"; done\nexec g++ "$@"\n'
CHECK = """
import importlib.metadata, importlib.util, warnings, torch, lifeops
from lifeops import registry
warnings.simplefilter("ignore")
brought = {"triton", "numpy"} & {d.name.lower() for d in importlib.metadata.distributions()}
assert not brought or torch.version.cuda or importlib.util.find_spec("rich"), brought  # rich: by the extra
x, w = torch.ones(1, 7, 8), torch.ones(8, 1, 3, 3)
backend = None if registry.unavailable("cpu") else "cpu"
y = lifeops.token_dwconv(x, w, grid=(2, 3), num_prefix_tokens=1, backend=backend)
assert y[0, 1].eq(4).all() and y[0, 2].eq(6).all()
print(lifeops.__file__)
print(f"{backend or 'reference'} runs")
"""


class Place:
    """A virtual environment, a copy of what git tracks, and the commands that are typed there. Its PATH has no more than a compiler."""

    def __init__(self, folder: Path, compiler: str, with_compiler: bool):
        self.folder, self.typed, self.said = folder, [], ""
        venv.create(folder / "env", with_pip=True, symlinks=True)
        self.python, self.source, commands = folder / "env" / "bin" / "python", folder / "source", folder / "bin"
        subprocess.run(["git", "checkout-index", "-a", f"--prefix={self.source}/"], cwd=ROOT, check=True)
        commands.mkdir()
        for name in ("sh", "cat", "rm", *("g++", "gcc", "c++", "as", "ld") * with_compiler):
            (commands / name).symlink_to(shutil.which(name))
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("LIFEOPS_", "PYTHON", "VIRTUAL_ENV"))}
        pin = folder / "constraints.txt"
        pin.write_text(f"torch=={TORCH}\n")
        self.env |= {"PATH": f"{self.python.parent}{os.pathsep}{commands}", "VIRTUAL_ENV": str(folder / "env")}
        self.env |= {"PIP_CONSTRAINT": str(pin), "CXX": compiler}

    def type(self, command: str, **env: str) -> bool:
        """Whether a command, typed in the sources with the environment activated, succeeds."""
        self.typed.append(" ".join([*(f"{name}={value}" for name, value in env.items() if name != "CXX"), command]))
        options = {"cwd": self.source, "env": self.env | env, "capture_output": True, "text": True, "check": False}
        done = subprocess.run(["/bin/bash", "-c", command], **options)
        self.said = done.stdout + done.stderr
        return done.returncode == 0

    def need(self, command: str) -> None:
        """Set-up that has to succeed."""
        if not self.type(command):
            raise RuntimeError(f"{command}: {self.said[-800:]}")

    def outcome(self) -> str:
        """What runs in another folder, or the sentence that the build ended with."""
        sentences = re.findall(r"^\s*(lifeops: .*)$", self.said, re.M)
        done = subprocess.run([self.python, "-c", CHECK], cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.splitlines()[-1]
        if not sentences or "Traceback" in self.said:
            raise RuntimeError(f"{self.typed[-1]}: no sentence: {self.said[-1500:]} {done.stderr[-300:]}")
        return f"stops: {sentences[-1]}"


class Way(NamedTuple):
    """Where, what is typed, and what the outcome starts with."""

    where: str
    go: Callable[[Place], object]
    expected: str


def typing(*commands: str, **env: str) -> Callable[[Place], None]:
    """All but the last have to succeed."""

    def go(place: Place) -> None:
        for command in commands[:-1]:
            place.need(command)
        place.type(commands[-1], **env)

    return go


NO_TORCH = "stops: lifeops: the kernels are compiled with torch 2.10 or newer, none is installed here"
WITH, ALONE = "with torch", "an empty environment"
TORCH_AND = f"pip install torch=={TORCH}"
DIRECTLY = "pip install --no-build-isolation ."
OLD = "stops: lifeops: setuptools 76.0.0 is too old"
WAYS = {
    "empty": Way(ALONE, typing("pip install ."), NO_TORCH),
    "uv-empty": Way(ALONE, typing("pip install uv", "uv pip install ."), NO_TORCH),
    "no-setuptools": Way(
        ALONE, typing("pip uninstall -y setuptools", DIRECTLY), "stops: lifeops: building needs setuptools"
    ),
    "old-setuptools": Way(
        ALONE, typing("pip install setuptools==76.0.0", DIRECTLY), OLD
    ),
    "none": Way(ALONE, typing("pip install .", LIFEOPS_BUILD="none"), "reference runs"),
    "isolated": Way(WITH, typing(TORCH_AND, "pip install ."), "cpu runs"),
    "no-ninja": Way(WITH, typing(TORCH_AND, DIRECTLY), "stops: lifeops: building needs ninja"),
    "ninja": Way(WITH, typing(f"{TORCH_AND} ninja", DIRECTLY), "cpu runs"),
    "editable": Way(WITH, typing(f"{TORCH_AND} ninja", "pip install --no-build-isolation -e ."), "cpu runs"),
    "extra": Way(WITH, typing(TORCH_AND, 'pip install ".[demo]"'), "cpu runs"),
    "uv": Way(WITH, typing(f"{TORCH_AND} uv ninja", "uv pip install --no-build-isolation ."), "cpu runs"),
    "uv-isolated": Way(WITH, typing(f"{TORCH_AND} uv", "uv pip install ."), NO_TORCH),
    "sdist": Way(WITH, typing(f"{TORCH_AND} build", "python -m build --sdist", "pip install dist/*.tar.gz"), "cpu runs"),
    "wheel": Way(WITH, typing(f"{TORCH_AND} build ninja pybind11", "python -m build --no-isolation", "pip install dist/*.whl"), "cpu runs"),
    "build": Way(WITH, typing(f"{TORCH_AND} build", "python -m build"), NO_TORCH),
    "no-compiler": Way("with torch, no compiler", typing(TORCH_AND, "pip install .", CXX="no-c++"), "stops: lifeops: no C++ compiler"),
}


def row(name: str, way: Way, compiler: str, log: Path) -> tuple[str, str, str]:
    """Where, what is typed, what comes of it. RuntimeError where that is something else than expected."""
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        place = Place(folder, compiler, with_compiler="no compiler" not in way.where)
        way.go(place)
        found = place.outcome()
        log.write_text(place.said)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not found.startswith(way.expected):
        raise RuntimeError(f"{way.expected!r} was expected, found {found!r}, {log}")
    return way.where, "; ".join(f"`{command}`" for command in place.typed), found


def main() -> int:
    parser = argparse.ArgumentParser(prog="make installs", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--optimised", action="store_true", help="compile as users do")
    parser.add_argument("--page", action="store_true", help="write the table into docs/installing.md; needs every way")
    args = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    compiler = BUILD / "c++"
    compiler.write_text(UNOPTIMISED)
    compiler.chmod(0o755)
    rows, wrong = [], 0
    for name in args.only:
        start = time.monotonic()
        try:
            rows.append(row(name, WAYS[name], "g++" if args.optimised else str(compiler), BUILD / f"{name}.log"))
            print(f"{name}: {' | '.join(rows[-1])} ({time.monotonic() - start:.0f} s)", flush=True)
        except RuntimeError as error:
            wrong += 1
            print(f"{name}: WRONG: {error}", flush=True)
    if args.page and not wrong and len(rows) == len(WAYS):
        lines = ["| where | typed | what comes of it |", "|---|---|---|", *(f"| {' | '.join(cells)} |" for cells in rows)]
        put("ways to install", lines, PAGE)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
