"""What is distributed and what a build says: the source distribution, wheels with and without kernels, one sentence where neither can be.

`make installs` goes every way to install, with pip and uv, in fresh environments; these are its steps without the network.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import lifeops

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="installed without sources beside it")
LINK = "lifeops/kernels"  # to ../kernels: in distributions it is the folder itself
UNOPTIMISED = '#!/bin/sh\nfor a do shift; case "$a" in -O?) a=-O0 ;; esac; set -- "$@" "$a"; done\nexec g++ "$@"\n'


def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def hook(python, folder: Path, call: str, **env) -> subprocess.CompletedProcess:
    """One call of the build backend in ``folder``, as pip makes it in an environment of its own."""
    code = f"import sys; sys.path.insert(0, '.'); import build_backend; print(build_backend.{call})"
    return subprocess.run([str(python), "-c", code], cwd=folder, env=cleaned(**env), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution of what git tracks, made as `python -m build` makes it: without torch."""
    tree = tmp_path_factory.mktemp("tree")
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name, follow_symlinks=False)
    done = hook(sys.executable, tree, "build_sdist('dist')", PYTHONPATH=str(hiding(tmp_path_factory.mktemp("hidden"), "torch")))
    assert done.returncode == 0, done.stderr
    return next((tree / "dist").iterdir())


@pytest.fixture
def source(sdist, tmp_path):
    """A folder that holds the source distribution and nothing else."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    return next((tmp_path / "source").iterdir())


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The Python of an environment that sees this one's packages but none of its commands, and not this lifeops."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    here = Path(torch.__file__).parent.parent
    for path in here.iterdir():
        if not path.name.startswith(("lifeops", "__editable__", "pybind11")):
            (packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


def hiding(folder: Path, package: str) -> Path:
    """A folder for PYTHONPATH where ``package`` cannot be imported."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(f'raise ModuleNotFoundError("No module named {package!r}", name="{package}")\n')
    return folder


def cleaned(**more) -> dict:
    """The environment's variables without those that choose a lifeops, and ``more``."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LIFEOPS_", "PYTHONPATH"))} | more


def test_the_source_distribution_is_what_git_tracks(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in names if name.startswith("lifeops.egg-info/") or name in ("PKG-INFO", "setup.cfg")}
    assert names - made == tracked() - {LINK}
    assert sdist.name == f"lifeops-{lifeops.__version__}.tar.gz"


def test_a_wheel_without_kernels_is_asked_for_and_fits_everywhere(source, fresh):
    done = hook(fresh, source, "build_wheel('.')", LIFEOPS_BUILD="none", PYTHONPATH=str(hiding(source / "hidden", "torch")))
    assert done.returncode == 0, done.stderr
    assert "cpu kernels LEFT OUT: left out by LIFEOPS_BUILD=none at build time" in done.stderr
    with zipfile.ZipFile(source / f"lifeops-{lifeops.__version__}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert set(json.loads(wheel.read("lifeops/_build.json"))["left_out"]) == {"cpu", "cuda"}
    package = {re.sub("^kernels/", f"{LINK}/", name) for name in tracked() if name.startswith(("lifeops/", "kernels/"))}
    assert names == package - {LINK} | {"lifeops/_build.json"}


CHECK = """
import lifeops, torch
from lifeops import registry
print(lifeops.__file__, registry.unavailable("cpu"))
y = lifeops.token_dwconv(torch.ones(1, 7, 8), torch.ones(8, 1, 3, 3), grid=(2, 3), num_prefix_tokens=1, backend="cpu")
assert y[0, 1].eq(4).all() and y[0, 2].eq(6).all()
"""


@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("ninja"), reason="needs g++ and ninja")
def test_a_wheel_with_kernels_out_of_the_source_distribution(source, fresh, tmp_path):
    """Without pybind11, whose headers torch brings too; unoptimised, which is quicker."""
    compiler = script(tmp_path / "c++", UNOPTIMISED)
    done = hook(fresh, source, "build_wheel('.')", CXX=str(compiler), LIFEOPS_BUILD="cpu")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    wheel = source / done.stdout.splitlines()[-1]
    assert "none-any" not in wheel.name
    folder = fresh.parent.parent
    assert zipfile.ZipFile(wheel).testzip() is None
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    options = {"cwd": folder, "env": cleaned(PYTHONPATH=str(tmp_path / "installed")), "capture_output": True, "text": True, "check": True}
    out = subprocess.run([fresh, "-c", CHECK], **options).stdout
    assert out == f"{tmp_path / 'installed' / 'lifeops' / '__init__.py'} None\n"
    out = subprocess.run([fresh, "-m", "lifeops", "info"], **options).stdout
    assert "installed without sources beside it" in out  # of _info, the module that pybind11 makes


NONE = r"LIFEOPS_BUILD=none installs without kernels"
NO_TORCH = (
    r"lifeops: the kernels are compiled with torch 2\.10 or newer, {}: pip install torch ninja, then pip install --no-build-isolation \."
    rf" \(`uv pip` and `python -m build --no-isolation` likewise; {NONE}\)"
)
OLD_TORCH = {"__init__.py": "__version__ = '2.9.1+cpu'", "utils/__init__.py": "", "utils/cpp_extension.py": "CUDA_HOME = None"}
NO_CUDA = OLD_TORCH | {"__init__.py": "__version__, version = '2.10', type('', (), {'cuda': None})"}
LAME = """#!/bin/sh
case "$1" in -v|--version|-dumpfullversion) exec {} "$@" ;; esac
exit 1
"""
SENTENCES = {
    "no torch": ({"hidden": {"torch": None}}, NO_TORCH.format("none is installed here")),
    "old torch": ({"hidden": {"torch": OLD_TORCH}}, NO_TORCH.format(r"torch 2\.9\.1\+cpu is older than 2\.10 here")),
    "no setuptools": (
        {"hidden": {"setuptools": None}},
        "lifeops: building needs setuptools 77 or newer, and there is none here: pip install -U setuptools",
    ),
    "old setuptools": (
        {"hidden": {"setuptools": {"__init__.py": "__version__ = '65.5.0'", "build_meta.py": ""}}},
        r"lifeops: setuptools 65\.5\.0 is too old, 77 or newer is needed: pip install -U setuptools",
    ),
    "no ninja": ({"commands": ("g++",)}, "lifeops: building needs ninja, and there is none here: pip install ninja"),
    "no compiler": (
        {"commands": ("ninja",)},
        rf"lifeops: no C\+\+ compiler \(c\+\+ or g\+\+\) was found: apt install g\+\+, or set CXX \({NONE}\)",
    ),
    "no such build": ({"LIFEOPS_BUILD": "gpu"}, "lifeops: LIFEOPS_BUILD must be auto, none, cpu or cuda, got 'gpu'"),
    "no CUDA": (
        {"LIFEOPS_BUILD": "cuda", "hidden": {"torch": NO_CUDA}},
        r"lifeops: LIFEOPS_BUILD=cuda: torch 2\.10 was a build without CUDA at build time; LIFEOPS_BUILD=cpu builds the CPU kernels alone",
    ),
    "code that does not compile": (
        {"commands": ("ninja", "cat"), "CXX": "c++", "broken": True, "LIFEOPS_BUILD": "cpu"},
        rf"lifeops: the cpu kernels did not compile: Error compiling objects for extension, the compiler's words are above \({NONE}\)",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_cannot_be_built_ends_in_a_sentence(case, source, fresh, tmp_path):
    wanted, sentence = SENTENCES[case]
    env = {name: value for name, value in wanted.items() if name.isupper()}
    for package, files in wanted.get("hidden", {}).items():
        hiding(tmp_path / "hidden", package)
        for name, text in (files or {}).items():
            (tmp_path / "hidden" / package / name).parent.mkdir(exist_ok=True)
            (tmp_path / "hidden" / package / name).write_text(text)
        env["PYTHONPATH"] = str(tmp_path / "hidden")
    if "commands" in wanted:
        env["PATH"] = str(tmp_path / "bin")
        (tmp_path / "bin").mkdir()
        for name in wanted["commands"]:
            if shutil.which(name) is None:
                pytest.skip(f"needs {name}")
            (tmp_path / "bin" / name).symlink_to(Path(shutil.which(name)).resolve())
    if wanted.get("broken"):
        script(tmp_path / "bin" / "c++", LAME.format(shutil.which("g++")))
    done = hook(fresh, source, "build_wheel('.')", **env)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.fullmatch(sentence, done.stderr.splitlines()[-1])
    assert not list(source.glob("*.whl"))


@pytest.mark.parametrize("changes", [{"platform": "win32"}, {"headers": "/nowhere"}])
def test_what_other_machines_are_told(changes, monkeypatch):
    """Systems without kernels, and Pythons without headers, which shows as the compiler fails."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setenv("LIFEOPS_BUILD", "auto")
    setup = runpy.run_path(str(ROOT / "setup.py"))
    if "platform" in changes:
        monkeypatch.setattr(sys, "platform", changes["platform"])
        with pytest.raises(SystemExit, match=f"^lifeops: the kernels are built on Linux alone: {NONE}$"):
            setup["plan"]()
    else:
        monkeypatch.setattr("sysconfig.get_path", lambda name: changes["headers"])
        assert setup["not_compiled"](RuntimeError("words")) == "Python's headers are not in /nowhere, apt install python3-dev"


def test_the_makefile_installs_what_the_extra_says():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def names(requirements) -> set[str]:
        return {re.search(r"[\w-]+", requirement)[0] for requirement in requirements}

    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    tools = names(re.search(r"^TOOLS = (.*)$", makefile, re.M)[1].split())

    def installed(target: str) -> set[str]:
        return names(re.search(rf"^\$\(VENV\)/{target}\.ready:.*?constraints\.txt (.*?)$", makefile, re.M | re.S)[1].split())

    assert installed("demo") == names(extras["demo"])
    assert installed("test") - {"TOOLS", "ruff", "pytest-xdist"} | tools == names(extras["test"]) - {"numpy"}  # numpy: with torch


def test_versions_agree():
    out = subprocess.run([sys.executable, "-m", "lifeops", "--version"], capture_output=True, text=True, check=True).stdout
    assert out == f"lifeops {lifeops.__version__}\n"
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:]]
    assert None not in released
    assert not released or released[0][1] == lifeops.__version__
