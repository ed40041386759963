"""`make versions`: one compiled wheel on several releases of torch, builds from source on several Pythons, several releases of Triton.

Each release gets a virtual environment below build/versions, removed when its tests have run (torch with CUDA takes 7 GB); a release
that the package index does not serve, or that cannot be imported, is a row that says so. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from junit import Counts, counts

from fuzz.page import between, put

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "versions"
TORCH = "2.13.0"  # of the Makefile: what the wheel is built with, and what Pythons and Tritons run with
TOOLS = "pytest", "pytest-xdist", "hypothesis", "timm", "safetensors"
# Operators on every sample, dtype and instruction set; gradients; the bridge to torch; models; compiled and exported programs.
SLICE = "test_ops.py", "test_autograd.py", "test_torchlib.py", "test_convert.py", "test_build.py", "test_capture.py", "fuzz"
SELECTED = (  # of the last but one what takes seconds: the rest is torch's compilers' time, or says the same of any torch
    "not (test_capture or test_build) or abi or fork or older_torch or follows_use_backend or asked_for"
    " or (options and (export_training or no_grad))"
)
INTERPRETED = (
    ("-o", "python_functions=check_*", "test_triton_interpreter.py"),
    ("test_triton_ops.py",),
)
BUDGETS = {  # `make budgets` compiles the others, on the Triton that is installed
    "bench.budgets": "forward-3,forward-5,dw-3,forward-3-train,forward-3-eval,strided-3-2,dws-3-2,pool-max-3-2,poolbwd-max-3-2",
    "bench.attention_budgets": "fwd-198-64,fwd-198-64-mask,dq-198-64,dkv-198-64",
    "bench.rollout_budgets": "bf16-64-mean,fp32-64-max-r16",
}
HEADS = {
    "torch": ("torch", "Python", "Triton", "installed as", "passed", "skipped", "failed", "fuzzed cases", "mismatches"),
    "triton": ("Triton", "torch", "numpy", "interpreted: passed", "failed", "compiled kernels", "past their budget or spilling"),
}
ABOUT = """
import importlib.metadata as m, json, lifeops, torch, warnings
from lifeops import registry
found = lambda name: next((d.version for d in m.distributions() if d.name == name), "none")
print(json.dumps({"torch": torch.__version__, "triton": found("triton"), "numpy": found("numpy"), "file": lifeops.__file__,
                  "cpu": registry.unavailable("cpu")}))
"""


def run(command, folder=ROOT, **env) -> subprocess.CompletedProcess:
    path = f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"  # ninja and cmake of the environment
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path, "OMP_NUM_THREADS": "1"} | env
    return subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True, check=False)


def must(command, folder=ROOT, **env) -> str:
    done = run(command, folder, **env)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:200])
    return done.stdout


def interpreter(version: str) -> str:
    """A Python of this version that runs: on PATH, or one of pyenv's."""
    kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}*/bin/python3"))
    for python in filter(None, (shutil.which(f"python{version}"), *map(str, kept))):
        if run((python, "-c", "")).returncode == 0:
            return python
    raise RuntimeError(f"no Python {version} was found on PATH or in ~/.pyenv/versions")


class Environment:
    """A virtual environment that is removed at the end of the ``with``, unless it is to be kept and used again."""

    kept = False

    def __init__(self, name: str, python: str = sys.executable):
        self.folder = BUILD / name
        self.python = self.folder / "bin" / "python"
        if not (self.kept and (self.folder / "pyvenv.cfg").exists()):
            shutil.rmtree(self.folder, ignore_errors=True)
            must((python, "-m", "venv", self.folder))
            self.pip("-U", "pip")

    def pip(self, *what, verb: str = "install") -> None:
        command = self.python, "-m", "pip", "--disable-pip-version-check", "-q", "--no-cache-dir", verb, *what
        must(command, LIFEOPS_BUILD="cpu", PIP_REQUIRE_VIRTUALENV="1")

    def torch(self, version: str) -> tuple[str, ...]:
        """Install it; the options that keep it."""
        pin = self.folder / "constraints.txt"
        pin.write_text(f"torch=={version}\n")
        self.pip(f"torch=={version}", "numpy", "setuptools>=77")
        return "-c", pin

    def about(self) -> dict:
        """Versions as installed; an error if lifeops runs from the source tree or without its kernels."""
        facts = json.loads(must((self.python, "-c", ABOUT), HERE).splitlines()[-1])
        if not Path(facts["file"]).is_relative_to(self.folder) or facts["cpu"] is not None:
            raise RuntimeError(f"lifeops came from {facts['file']}, its kernels: {facts['cpu']}")
        return facts

    def pytest(self, *arguments, **env) -> Counts:
        """(passed, skipped, failed), the names of what failed printed."""
        report = self.folder / "report.xml"
        command = self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no", f"--junitxml={report}"
        done = run((*command, *arguments), HERE, **env)
        if not report.exists():
            raise RuntimeError(f"pytest ended without a result: {(done.stderr or done.stdout)[-300:]}")
        found = counts(report)
        if found.failed:
            log = BUILD / f"{self.folder.name}.log"
            log.write_text(done.stdout)
            lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            print(*lines, f"all of it: {log}", sep="\n", flush=True)
        return found

    def slice(self, cases: int) -> tuple:
        """(passed, skipped, failed, fuzzed cases, mismatches)."""
        ledger = self.folder / "cases.json"
        env = {"LIFEOPS_FUZZ_CASES": str(cases), "LIFEOPS_FUZZ_LEDGER": str(ledger)}
        counts = self.pytest("--hypothesis-seed=0", "-k", SELECTED, *SLICE, **env)
        found = json.loads(ledger.read_text())
        return *counts, sum(found["cases"].values()), sum(found["mismatches"].values())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.kept:
            shutil.rmtree(self.folder, ignore_errors=True)


def source(env: Environment) -> Path:
    """A copy of what is built: nothing of earlier builds lies in it."""
    folder = env.folder / "source"
    shutil.rmtree(folder, ignore_errors=True)
    built = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in ("csrc", "kernels", "lifeops"):
        shutil.copytree(ROOT / name, folder / name, ignore=built, symlinks=True)
    (folder / "lifeops" / "kernels").unlink(missing_ok=True)
    for name in ("build_backend.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def wheel(torch: str) -> Path:
    """The one that all torch releases run, built with ``torch``."""
    with Environment("wheel-builder") as env:
        env.torch(torch)
        env.pip("setuptools>=77", "pybind11", "ninja", "wheel")
        shutil.rmtree(BUILD / "wheel", ignore_errors=True)
        env.pip("--no-deps", "--no-build-isolation", "-w", BUILD / "wheel", source(env), verb="wheel")
    return next((BUILD / "wheel").glob("*.whl"))


def on_torch(version: str, package: Path, cases: int) -> tuple:
    """The wheel beside one release of torch."""
    with Environment(f"torch-{version}") as env:
        pinned = env.torch(version)
        env.pip(*pinned, *TOOLS, package)
        env.pip("--no-deps", "--force-reinstall", package)
        facts = env.about()
        return facts["torch"], python_version(env.python), facts["triton"], "the wheel", *env.slice(cases)


def on_python(version: str, torch: str, cases: int) -> tuple:
    """A build from source, in pip's own build environment."""
    with Environment(f"python-{version}", interpreter(version)) as env:
        pinned = env.torch(torch)
        env.pip(*pinned, *TOOLS)
        env.pip(*pinned, source(env))
        facts = env.about()
        return facts["torch"], python_version(env.python), facts["triton"], "`pip install .`", *env.slice(cases)


def on_triton(version: str, package: Path, torch: str, numpy: str, arch: list[str]) -> tuple:
    """Kernels in Triton's interpreter, and what its compiler makes of them."""
    with Environment(f"triton-{version}") as env:
        pinned = env.torch(torch)
        env.pip(*pinned, *TOOLS, package)
        env.pip("--no-deps", f"triton=={version}")
        if numpy:
            env.pip(f"numpy=={numpy}")
        facts = env.about()
        counts = [env.pytest(*what, TRITON_INTERPRET="1") for what in INTERPRETED]
        shutil.copytree(ROOT / "bench", env.folder / "tables" / "bench", ignore=shutil.ignore_patterns("results"))
        kernels = [cost for table in BUDGETS for cost in compiled(env, table, arch)]
        past = sum(not cost for cost in kernels)
        return version, facts["torch"], facts["numpy"], sum(c[0] for c in counts), sum(c[2] for c in counts), len(kernels), past


def compiled(env: Environment, table: str, arch: list[str]) -> list[bool]:
    """For kernels of one of bench's tables: whether each is within its budget."""
    command = env.python, "-m", table, "--only", BUDGETS[table], "--arch", *arch
    done = run(command, env.folder / "tables", TRITON_CACHE_DIR=str(env.folder / "cache"))
    rows = [line for line in done.stdout.splitlines()[1:] if line.strip()]
    if not rows:
        raise RuntimeError(f"{table}: {done.stderr.strip().splitlines()[-1][:200]}")
    print(*(row for row in rows if "over budget" in row), sep="\n", end="", flush=True)
    return ["over budget" not in row for row in rows]


def python_version(python) -> str:
    return must((python, "-c", "import platform; print(platform.python_version())")).strip()


def numbers(row) -> list:
    """What rows are sorted by: numbers in versions as numbers."""
    return [[int(n) for n in re.findall(r"\d+", str(cell))] for cell in row[:2]] + [row[3]]


def table(name: str, rows, before: str = "") -> str:
    """Markdown; rows of ``before``, a table of the same form, stay unless there is a new one of the same release."""
    kept = {}
    old = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in before.strip().splitlines()[2:]]
    for row in [*old, *rows]:
        key = row[:4] if name == "torch" else row[:1]
        kept[tuple(map(str, key))] = row
    rows = HEADS[name], ["---"] * len(HEADS[name]), *sorted(kept.values(), key=numbers)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def write_page(name: str, rows) -> None:
    mark = f"{name} versions"
    put(mark, table(name, rows, between(mark)).splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(prog="make versions", description=__doc__)
    parser.add_argument("--torch", nargs="*", default=[], help="releases that run one wheel, e.g. 2.10.0 2.14.1")
    parser.add_argument("--python", nargs="*", default=[], help="build from source there, e.g. 3.10 3.13; 3.10=2.10.0 names a torch, too")
    parser.add_argument("--triton", nargs="*", default=[], help="releases, e.g. 3.6.0; 3.6.0=2.3.5 names a numpy, too")
    parser.add_argument("--built-with", default=TORCH, help="the torch that the wheel is built with")
    parser.add_argument("--wheel", type=Path, help="this wheel instead of a new one")
    parser.add_argument("--arch", nargs="*", default=["90"], help="architectures that Triton compiles for")
    parser.add_argument("--cases", type=int, default=2, help="fuzzed cases of every property")
    parser.add_argument("--keep", action="store_true", help="keep the environments for the next run, which goes on with them")
    parser.add_argument("--page", action="store_true", help="write the rows into docs/reliability.md")
    args = parser.parse_args()
    Environment.kept = args.keep
    package = args.wheel or (wheel(args.built_with) if args.torch or args.triton else None)
    jobs = [("torch", version, lambda v: on_torch(v, package, args.cases)) for version in args.torch]
    jobs += [("torch", version, lambda v: on_python(*pair(v, TORCH), args.cases)) for version in args.python]
    jobs += [("triton", version, lambda v: on_triton(*both(v, package), args.arch)) for version in args.triton]
    rows, wrong = {"torch": [], "triton": []}, 0
    for kind, version, job in jobs:
        start = time.monotonic()
        try:
            row = job(version)
        except RuntimeError as error:
            print(f"{kind} {version}: not run: {error}", flush=True)
            wrong += 1
            continue
        rows[kind].append(row)
        wrong += any(map(int, (*row[6:7], *row[8:]) if kind == "torch" else (row[4], row[6])))
        print(table(kind, [row]), f"\n{time.monotonic() - start:.0f} s", flush=True)
        if args.page:
            write_page(kind, [row])
    return bool(wrong)


def pair(text: str, default: str) -> tuple[str, str]:
    """"3.10=2.10.0" in two, "3.10" with the default."""
    first, _, second = text.partition("=")
    return first, second or default


def both(text: str, package: Path) -> tuple:
    version, numpy = pair(text, "")
    return version, package, TORCH, numpy


if __name__ == "__main__":
    sys.exit(main())
