"""Installations in any state: import isolation, missing and stale libraries, the shadowing source folder, what info says."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lifeops
from lifeops import built, config, native, registry
from lifeops.cli import info

PACKAGE = Path(lifeops.__file__).parent
ROOT = Path(__file__).parent.parent


def run(code, *, cwd=None, **env):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copied(tmp_path):
    """The package in a folder of its own, compiled files included, in front of the installed one."""
    shutil.copytree(PACKAGE, tmp_path / "lifeops", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


CALL = """
import warnings, torch, lifeops
from lifeops import registry, torchlib
warnings.simplefilter("ignore")
y = lifeops.token_dwconv(torch.ones(1, 5, 4), torch.ones(4, 1, 3, 3), grid=(2, 2), num_prefix_tokens=1)
assert y[0, 1:].eq(4).all() and y[0, 0].eq(1).all()
print(torchlib.last_backend["token_dwconv"], "|", registry.unavailable("cpu"))
"""


def test_import_touches_neither_triton_nor_the_gpu():
    out = run(
        "import sys, torch; before = set(sys.modules); import lifeops\n"
        "print(any(m.split('.')[0] in ('triton', 'timm', 'matplotlib', 'sklearn', 'rich') for m in set(sys.modules) - before),"
        " torch.cuda.is_initialized())"
    )
    assert out.split() == ["False", "False"]


def test_an_older_torch_is_refused():
    code = "import torch; torch.__version__ = '2.9.1+cpu'\ntry: import lifeops\nexcept ImportError as error: print(error)"
    assert run(code) == "lifeops needs torch 2.10 or newer, found torch 2.9.1+cpu\n"


def test_import_is_quick():
    out = run("import torch, time; t = time.process_time(); import lifeops; print(time.process_time() - t)")
    torch_out = run("import time; t = time.process_time(); import torch; print(time.process_time() - t)")
    assert float(out) < float(torch_out)  # a ratio in one run: nothing heavy hangs on the import


def test_works_where_triton_cannot_be_imported():
    blocked = "import sys\nsys.modules['triton'] = None\n"
    out = run(blocked + CALL + "print(registry.reasons_against(registry.ops['token_dwconv'], 'triton', "
              "registry.ops['token_dwconv'].problem(torch.ones(1, 5, 4), torch.ones(4, 1, 3, 3))))")  # fmt: skip
    assert out.startswith("cpu")
    assert "triton" in out.splitlines()[-1]


def test_a_missing_library_leaves_the_reference(copied):
    for path in (copied / "lifeops").glob("_ops*.so"):
        path.unlink()
    out = run(CALL, cwd=copied, PYTHONPATH=str(copied))
    assert out.startswith("reference | ")
    assert "no compiled kernels" in out


def test_a_broken_library_leaves_the_reference(copied):
    for path in (copied / "lifeops").glob("_ops*.so"):
        path.write_bytes(b"not a library")
    out = run(CALL, cwd=copied, PYTHONPATH=str(copied))
    assert out.startswith("reference | ")


def test_a_stale_library_is_detected(copied):
    source = copied / "lifeops" / "native.py"
    source.write_text(source.read_text().replace("bool flip, int isa) -> ()", "bool flip, int isa, int more) -> ()"))
    out = run(CALL, cwd=copied, PYTHONPATH=str(copied))
    assert out.startswith("reference | ")
    assert "is stale: expected" in out
    assert "rebuild it with" in out


def test_the_source_folder_in_front_of_an_installation_is_named(tmp_path):
    """As after `pip install .`, run from the repository root: the source package has no library."""
    shutil.copytree(PACKAGE, tmp_path / "lifeops", ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json"))
    (tmp_path / "setup.py").write_text("")
    out = run(CALL, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert out.startswith("reference | ")
    assert "shadows it (run from another folder)" in out


def test_info_names_the_shadowed_installation(tmp_path):
    """The source folder in front of an installed package with its own metadata."""
    installed, source = tmp_path / "site", tmp_path / "source"
    for folder in (installed, source):
        shutil.copytree(PACKAGE, folder / "lifeops", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (source / "setup.py").write_text("")
    (installed / "lifeops-0.1.0.dist-info").mkdir()
    (installed / "lifeops-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lifeops\nVersion: 0.1.0\n")
    out = run("import lifeops.cli.info; print(lifeops.cli.info.text())", cwd=source, PYTHONPATH=f"{source}{os.pathsep}{installed}")
    assert f"shadows the installation in {installed / 'lifeops'}: run from another folder" in out


def test_info_of_other_installations(tmp_path, monkeypatch):
    """Without sources, without its module, with another installation's, behind a source folder, with a damaged module."""
    package = tmp_path / "source" / "lifeops"
    package.mkdir(parents=True)
    monkeypatch.setattr(built, "FOLDER", package)
    assert info._freshness("0") == "installed without sources beside it"
    assert info._shadowed() is None
    assert info._version("lifeops-nowhere") == "not installed"
    if registry.unavailable("cpu") is None:
        assert info.build() == {"extension": f"missing: {package} has none; the one found belongs to {PACKAGE}"}
    with monkeypatch.context() as patch:
        patch.delattr(lifeops, "_info", raising=False)
        patch.setitem(sys.modules, "lifeops._info", None)
        assert info.build()["extension"].startswith("missing: ")
        assert "_info" in info.build()["extension"]
    (package / "_info.so").write_bytes(b"no library")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert info.build()["extension"].startswith("missing: _info.so is damaged or not for this machine: ")
    (package.parent / "setup.py").touch()
    installed = tmp_path / "site" / "lifeops"
    for folder in (installed, installed.parent / "lifeops-0.1.0.dist-info"):
        folder.mkdir(parents=True)
    (installed / "__init__.py").touch()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lifeops\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(installed.parent)
    assert info._shadowed() == f"this is {package}, which shadows the installation in {installed}: run from another folder"


def test_every_package_is_installed():
    """setup.py lists packages by looking, but a folder without __init__.py would be left out."""
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - {"."}
    assert all((PACKAGE / folder / "__init__.py").is_file() for folder in folders)


def test_info_names_versions_backends_and_switches():
    text = info.text()
    for part in ("torch", "triton", "CPU instruction set", "reference", "cuda", "LIFEOPS_BACKEND", "LIFEOPS_STRICT", "compiler"):
        assert part in text
    out = subprocess.run([sys.executable, "-m", "lifeops", "info"], capture_output=True, text=True, check=True).stdout
    assert "backends" in out


@pytest.mark.skipif(registry.unavailable("cpu") is not None, reason="no compiled CPU kernels")
@pytest.mark.parametrize("limit", ["auto", "baseline", "avx2", "avx512"])
def test_info_names_the_instruction_set_that_runs(limit, monkeypatch):
    from lifeops import _info

    monkeypatch.setattr(config, "settings", config.settings._replace(cpu_isa=limit))
    has, order = _info.isa(), ["baseline", "avx2", "avx512"]
    taken = min(order.index(has), order.index(limit) if limit != "auto" else 3)
    said = info.build()["CPU instruction set"]
    vectors = {"x86_64": "SSE2", "aarch64": "NEON"}.get(platform.machine())
    assert said.split(",")[0] == (f"baseline ({vectors} vectors)" if taken == 0 and vectors else order[taken])
    assert said.endswith(f", by LIFEOPS_CPU_ISA; this CPU has {has}") == (taken < order.index(has))


def test_info_tells_a_stale_build(monkeypatch):
    monkeypatch.setattr(built, "sources_digest", lambda csrc: "something else")
    if (PACKAGE.parent / "csrc").is_dir() and not registry.unavailable("cpu"):
        assert "STALE" in info.build()["extension"]


def test_the_library_speaks_only_the_stable_abi():
    """No C++ symbols of libtorch: one binary for every torch from 2.10 on."""
    nm = shutil.which("nm")
    if nm is None or registry.unavailable("cpu"):
        pytest.skip("needs nm and the compiled kernels")
    symbols = subprocess.run([nm, "-D", "--undefined-only", str(native._find())], capture_output=True, text=True, check=True).stdout
    unstable = [s for s in symbols.split() if "N2at" in s or "N3c10" in s or "N5torch" in s or s.startswith("Py")]
    assert not unstable


def test_the_library_refuses_what_it_cannot_read():
    """Called past Python's checks: memory is read only as the dtypes that it holds."""
    if registry.unavailable("cpu"):
        pytest.skip("needs the compiled kernels")
    t = torch.ones(1, 2, 8, dtype=torch.int32)
    arguments = {"x": t, "weight": torch.ones(8, 1, 3, 3), "bias": None, "residual": None, "y": t, "H": 1, "W": 2}
    with pytest.raises(RuntimeError, match="lifeops_native: dtype must be float64, float32, float16 or bfloat16"):
        torch.ops.lifeops_native.token_dwconv(**arguments, x_prefix=0, y_prefix=0, prefix_mode=0, flip=False, isa=0)


def _setup(monkeypatch) -> dict:
    """What setup.py defines; nothing is built."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setenv("LIFEOPS_BUILD", "none")
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "setup.py"))


def _script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


needs_setup = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="installed without sources beside it")


@needs_setup
@pytest.mark.parametrize("header", [True, False])
def test_cuda_is_found_behind_an_nvcc_that_is_a_script(header, tmp_path, monkeypatch):
    """torch takes the folder above the script's for CUDA's: everything compiles, and nothing is linked."""
    cuda_home = _setup(monkeypatch)["cuda_home"]
    cuda, wrapper = tmp_path / "cuda-13.0", tmp_path / "local"
    nvcc = _script(cuda / "bin" / "nvcc", f'case "$*" in *--dryrun*) echo "#\\$ TOP={cuda}/bin/.." >&2 ;; esac')
    _script(wrapper / "bin" / "nvcc", f'exec {nvcc} "$@"')
    if header:
        (cuda / "include").mkdir()
        (cuda / "include" / "cuda_runtime.h").touch()
    assert cuda_home(str(wrapper)) == str(cuda if header else wrapper)
    assert cuda_home(str(cuda)) == str(cuda)
    assert cuda_home(str(tmp_path)) == str(tmp_path)
    assert cuda_home(None) is None


@needs_setup
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_cuda_of_this_machine_has_its_headers(monkeypatch):
    home = _setup(monkeypatch)["cuda_home"](str(Path(shutil.which("nvcc")).parent.parent))
    assert Path(home, "include", "cuda_runtime.h").exists()


@needs_setup
def test_blackwell_is_built_for_where_nvcc_knows_it(monkeypatch):
    default = _setup(monkeypatch)["default_archs"]
    assert [default(release) for release in ("12.6", "an unknown release")] == ["8.0;9.0+PTX"] * 2
    assert all("10.0" in default(release) and "12.0" in default(release) for release in ("12.8", "13.0"))


@needs_setup
@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("Cuda compilation tools, release 12.4, V12.4.99", None),
        ("Cuda compilation tools, release 13.0, V13.0.48", r"at build time nvcc was of CUDA 13\.0, torch .* of CUDA 12\.8"),
        ("nothing", "at build time nvcc was of CUDA an unknown release"),
    ],
)
def test_an_nvcc_that_does_not_fit_torch_costs_the_cuda_kernels_alone(says, reason, tmp_path, monkeypatch):
    """torch's extension builder refuses another major release of CUDA, and the CPU kernels with it."""
    cpp_extension, plan = pytest.importorskip("torch.utils.cpp_extension"), _setup(monkeypatch)["plan"]
    monkeypatch.setitem(plan.__globals__, "BUILD", "auto")
    _script(tmp_path / "bin" / "nvcc", f"echo '{says}'")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    built, missing = plan()
    assert built == ({"cpu"} if reason else {"cpu", "cuda"})
    assert re.match(reason or "", missing.get("cuda", ""))


def test_fork_after_use():
    """A worker process forked after the kernels ran can run them too (data loaders, launchers)."""
    code = CALL + (
        "import os\npid = os.fork()\n"
        "if pid == 0:\n    torch.set_num_threads(1)\n"
        "    lifeops.token_dwconv(torch.ones(1, 5, 4), torch.ones(4, 1, 3, 3), grid=(2, 2), num_prefix_tokens=1)\n    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
    )
    run(code, OMP_NUM_THREADS="1")


def test_dependencies_point_one_way():
    """geometry, errors <- registry <- ops <- backends; ops know no backend, nothing but torchlib touches torch.library."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.parent.name == "ops":
            assert "import triton" not in text
            assert "lifeops.native" not in text
            assert "lifeops.kernels" not in text
        if path.name not in ("torchlib.py",):
            assert "torch.library." not in text, path
        if path.name not in ("config.py", "info.py"):
            assert "os.environ.get" not in text, path
            assert "os.getenv" not in text, path
