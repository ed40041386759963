"""Python on a processor that is not this one, by qemu's user-mode emulation: folders that look like a virtual environment.

Their ``bin/python`` is a script that runs the interpreter under qemu; it is ``sys.executable`` there, so the processes that Python
starts of itself are emulated too. Others (compilers, ninja) run as they are: an emulated process may start a native one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "machines"
DEBIAN = {  # what is looked for, and the Debian package that has it
    "qemu-x86_64": "qemu-user", "qemu-aarch64": "qemu-user", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "apt-get": "apt",
    "dpkg": "dpkg",
}  # fmt: skip
APT = """APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
Dir::State "{0}/state";
Dir::State::status "{0}/status";
Dir::Cache "{0}/cache";
"""
ARM_DEBIAN = "python3", "libpython3-dev", "libgomp1", "libstdc++6"  # and what they depend on: unpacked into a folder, nothing is installed
ARM_PYPI = "numpy", "pybind11", "setuptools>=77", "pytest", "hypothesis", "scikit-learn", "matplotlib", "rich"
TORCH = "torch==2.10.0"  # the last one whose wheel for aarch64 on PyPI is without CUDA


def need(*programs: str) -> None:
    """SystemExit that names the Debian packages to install, unless all of ``programs`` are there."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        packages = " ".join(sorted({DEBIAN[program] for program in missing}))
        raise SystemExit(f"machines: {', '.join(missing)} not found; as root: apt-get install --no-install-recommends {packages}")


def run(command, **options) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"machines: {' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def environment() -> dict:
    """This one, without lifeops' switches and the kernels that OpenBLAS is told to take, which another processor may not have."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OPENBLAS_", "LIFEOPS_"))}


def _venv(folder: Path, qemu: str, interpreter: Path, version: str) -> Path:
    """``bin/python`` of a virtual environment whose interpreter runs by ``qemu``, a command."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    (folder / "pyvenv.cfg").write_text(f"home = {interpreter.parent}\ninclude-system-site-packages = false\nversion = {version}\n")
    python.write_text(f'#!/bin/sh\nexec {qemu} -0 "$0" {interpreter} "$@"\n')
    python.chmod(0o755)
    return python


def x86(cpu: str) -> Path:
    """This very Python with its packages, on an x86-64 processor that qemu calls ``cpu``."""
    need("qemu-x86_64")
    folder, (major, minor, micro) = FOLDER / cpu.lower(), sys.version_info[:3]
    here = Path(sys._base_executable).resolve()
    python = _venv(folder, f"qemu-x86_64 -cpu {cpu}", here, f"{major}.{minor}.{micro}")
    packages = folder / "lib" / f"python{major}.{minor}" / "site-packages"
    packages.parent.mkdir(parents=True, exist_ok=True)
    packages.unlink(missing_ok=True)
    packages.symlink_to(sysconfig.get_path("purelib"))
    return python


def _arm_system() -> Path:
    """Debian's Python for aarch64 and all that it needs, unpacked, with apt's lists and state in a folder of their own: no root needed."""
    system, apt = FOLDER / "arm64", FOLDER / "apt"
    if (system / "ready").exists():
        return system
    need("apt-get", "dpkg")
    for part in ("state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "apt.conf").write_text(APT.format(apt))
    env = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
    run(["apt-get", "-q", "update"], env=env)
    run(["apt-get", "-q", "-y", "--no-install-recommends", "--download-only", "install", *ARM_DEBIAN], env=env)
    system.mkdir(exist_ok=True)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run(["dpkg", "-x", package, system])
    shutil.rmtree(apt)
    (system / "ready").touch()
    return system


def arm(cpu: str, torch: str) -> Path:
    """Debian's Python with ``torch`` on an aarch64 processor that qemu calls ``cpu``; processors share what is installed."""
    need("qemu-aarch64", "aarch64-linux-gnu-g++")
    system = _arm_system()
    interpreter = (system / "usr" / "bin" / "python3").resolve()
    python = _venv(FOLDER / "aarch64", f"qemu-aarch64 -cpu {cpu} -L {system}", interpreter, interpreter.name.removeprefix("python"))
    (python.parent.parent / "lib" / interpreter.name / "site-packages").mkdir(parents=True, exist_ok=True)
    ready = python.parent.parent / f"{torch}.ready"
    if not ready.exists():
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python", python]
        run([*pip, "install", "--no-compile", "--only-binary", ":all:", torch, *ARM_PYPI], env=environment() | {"PYTHONPATH": ""})
        ready.touch()
    return python


def build(python: Path) -> Path:
    """The folder of a package that setup.py builds as run by the emulated ``python``, with a cross compiler."""
    folder, system = python.parent.parent, FOLDER / "arm64"
    compiler = folder / "bin" / "c++"  # Python's headers are at home under another root
    compiler.write_text(f'#!/bin/sh\nexec aarch64-linux-gnu-g++ "$@" -idirafter {system}/usr/include\n')
    compiler.chmod(0o755)
    places = "--build-base", folder, "--build-lib", folder / "package", "--build-temp", folder / "objects"
    env = environment() | {"CXX": str(compiler), "LIFEOPS_BUILD": "cpu", "PYTHONPATH": ""}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # ninja's
    run([python, "setup.py", "-q", "build", *places], cwd=ROOT, env=env)
    return folder / "package"
