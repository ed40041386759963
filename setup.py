"""Build switches of the compiled kernels. LIFEOPS_BUILD=auto|none|cpu|cuda; MAX_JOBS and TORCH_CUDA_ARCH_LIST as usual.

auto builds the CPU kernels, and the CUDA kernels where nvcc and a CUDA torch are; that these are left out, and why, is printed, kept in
lifeops/_build.json and told again at run time. What cannot be built ends the build with a sentence that says what to type: an
installation without kernels is made by LIFEOPS_BUILD=none alone.
"""

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
BUILD = os.environ.get("LIFEOPS_BUILD", "auto").strip().lower()
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10: one binary for every later torch
CXX = ["-O2", "-std=c++17", "-ffp-contract=fast", "-fvisibility=hidden", "-fno-tree-slp-vectorize", "-g0", TARGET]
if "clang" not in os.environ.get("CXX", ""):  # gcc would carry loaded columns over in registers and spill the sums for it
    CXX[1:1] = ["-fno-predictive-commoning", "-ftree-vectorize", "-fvect-cost-model=dynamic"]  # the latter two: of -O3
HOW = "pip install --no-build-isolation --force-reinstall --no-deps ."
NONE = "LIFEOPS_BUILD=none installs without kernels"
COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}  # sdist needs neither torch nor compiler


def stop(sentence):
    """End the build, without a traceback."""
    raise SystemExit(f"lifeops: {sentence}")


def import_torch():
    """torch of the environment that is installed into, also from within pip's isolated build environment. ImportError without one."""
    for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if path not in sys.path:
            sys.path.append(path)
    import torch
    from torch.utils import cpp_extension

    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10):
        raise ImportError(f"torch {torch.__version__} is older than 2.10")
    cpp_extension.CUDA_HOME = cuda_home(cpp_extension.CUDA_HOME)
    return torch, cpp_extension


def cuda_home(home):
    """``home``, what torch took for CUDA's folder: two above the nvcc of the PATH. Where that is a script that calls another one, the
    folder of that one: compiling passes without, linking does not find the runtime.
    """
    nvcc = home and shutil.which("nvcc", path=f"{home}/bin")
    if not nvcc or Path(home, "include", "cuda_runtime.h").exists():
        return home
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    found = re.search(r"^#\$ TOP=(.+)$", subprocess.run(command, capture_output=True, text=True, check=False).stderr, re.M)
    top = Path(found[1].strip()).resolve() if found else None
    return str(top) if top and (top / "include" / "cuda_runtime.h").exists() else home


def sources_digest():
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def nvcc_release(home):
    """"13.0", as nvcc says it."""
    said = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release ([\d.]+)", said)
    return found[1] if found else "an unknown release"


def default_archs(release):
    """Architectures where no device says them; machine code of x.0 runs on every x.y. From CUDA 12.8 on Blackwell's, whose kernels would
    otherwise be compiled from PTX at first use, for tens of seconds.
    """
    known = [int(n) for n in re.findall(r"\d+", release)][:2]
    return "8.0;9.0+PTX;10.0;12.0+PTX" if known >= [12, 8] else "8.0;9.0+PTX"


def plan():
    """What to build, and why not the rest: ({"cpu", "cuda"}, {backend: reason}). Ends the build where that cannot be done."""
    if BUILD not in ("auto", "none", "cpu", "cuda"):
        stop(f"LIFEOPS_BUILD must be auto, none, cpu or cuda, got {BUILD!r}")
    if BUILD == "none":
        return set(), dict.fromkeys(("cpu", "cuda"), "left out by LIFEOPS_BUILD=none at build time")
    torch, cpp_extension = torch_or_stop()
    compiler_or_stop()
    missing = {"cuda": why} if (why := without_cuda(torch, cpp_extension.CUDA_HOME)) else {}
    if BUILD == "cuda" and missing:
        stop(f"LIFEOPS_BUILD=cuda: {missing['cuda']}; LIFEOPS_BUILD=cpu builds the CPU kernels alone")
    return {"cpu", "cuda"} - missing.keys(), missing


def torch_or_stop():
    try:
        return import_torch()
    except ImportError as error:
        found = "none is installed here" if isinstance(error, ModuleNotFoundError) else f"{error} here"
        stop(
            f"the kernels are compiled with torch 2.10 or newer, {found}: pip install torch ninja, then pip install --no-build-isolation ."
            f" (`uv pip` and `python -m build --no-isolation` likewise; {NONE})"
        )


def compiler_or_stop():
    """What beside torch compiles: a compiler and ninja."""
    if sys.platform != "linux":
        stop(f"the kernels are built on Linux alone: {NONE}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not (shutil.which(compiler) or shutil.which("g++")):
        stop(f"no C++ compiler ({compiler} or g++) was found: apt install g++, or set CXX ({NONE})")
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # ninja's, where the environment is not activated
    if not shutil.which("ninja"):
        stop("building needs ninja, and there is none here: pip install ninja")


def without_cuda(torch, home):
    """Why the CUDA kernels are not built, or None."""
    if BUILD == "cpu":
        return "left out by LIFEOPS_BUILD=cpu at build time"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was a build without CUDA at build time"
    if home is None or not shutil.which("nvcc", path=f"{home}/bin"):
        return "nvcc was not found at build time (set CUDA_HOME)"
    if (found := nvcc_release(home)).split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"at build time nvcc was of CUDA {found}, torch {torch.__version__} of CUDA {torch.version.cuda} (set CUDA_HOME)"
    return None


def pybind11_headers():
    """The package's, which an isolated build fetches; else those that torch brings, which are on the path already."""
    try:
        import pybind11
    except ModuleNotFoundError:
        return []
    return [pybind11.get_include()]


def extensions(built):
    if not built:
        return [], {}
    torch, cpp = import_torch()
    files = [ROOT / "csrc/bindings.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")]
    flags, make = {"cxx": CXX}, cpp.CppExtension
    archs = ""
    if "cuda" in built:
        if not torch.cuda.is_available():  # otherwise cpp_extension asks the devices
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_archs(nvcc_release(cpp.CUDA_HOME)))
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "the build machine's devices")
        files += (ROOT / "csrc/cuda").glob("*.cu")
        flags["nvcc"] = ["-O3", "-std=c++17", "-lineinfo", "-DUSE_CUDA", TARGET]
        make = cpp.CUDAExtension
    facts = {"LIFEOPS_BUILT": " ".join(sorted(built)), "LIFEOPS_CUDA_ARCHS": archs, "LIFEOPS_SOURCES": sources_digest()}
    relative = sorted(str(f.relative_to(ROOT)) for f in files)
    ops = make("lifeops._ops", relative, extra_compile_args=flags, extra_link_args=["-Wl,--as-needed"])
    macros = [(name, f'"{value}"') for name, value in facts.items()]
    headers = [*pybind11_headers(), *cpp.include_paths()]
    info = Extension("lifeops._info", ["csrc/info.cpp"], include_dirs=headers, define_macros=macros, language="c++")
    info.extra_compile_args = {"cxx": ["-O1", "-std=c++17", "-g0"]}  # BuildExtension's form

    class Build(cpp.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.parallel = 2  # pybind11's one file beside the kernels

        def build_extension(self, ext):
            alone = copy.copy(self)  # ninja's file lies in build_temp, one for each extension
            alone.build_temp = os.path.join(self.build_temp, ext.name)
            super(Build, alone).build_extension(ext)

        def run(self):
            try:
                super().run()
            except Exception as error:
                stop(f"the {' and '.join(sorted(built))} kernels did not compile: {not_compiled(error)} ({NONE})")
            keep(MISSING, ROOT if self.inplace or self.editable_mode else Path(self.build_lib), compiled=True)

    return [ops, info], {"build_ext": Build}


def not_compiled(error):
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        return f"Python's headers are not in {headers}, apt install python3-dev"
    return f"{str(error).splitlines()[0]}, the compiler's words are above"


def report(missing):
    """Say what was left out."""
    for backend, reason in missing.items():
        print(f"\n*** lifeops: {backend} kernels LEFT OUT: {reason}.\n*** To build them: {HOW}\n", file=sys.stderr)


def keep(missing, folder, compiled=False):
    """Note it beside the modules, where `lifeops info` and the fallback warning find it, and what the compiled ones are: a checksum of each
    file and of the sources, by which lifeops/built.py tells a damaged and a stale one.
    """
    package = folder / "lifeops"
    if not package.is_dir():
        return
    notes = {"left_out": missing, "how": HOW}
    if compiled:
        notes["sources"] = sources_digest()
        notes["files"] = {path.name: f"{zlib.crc32(path.read_bytes()):08x}" for path in sorted(package.glob("_*.so"))}
    part = package / "_build.json.part"
    part.write_text(json.dumps(notes))
    part.replace(package / "_build.json")


class BuildPy(build_py):
    """Puts _build.json beside the modules also where nothing is compiled."""

    def run(self):
        super().run()
        if not EXTENSIONS:
            keep(MISSING, ROOT if self.editable_mode else Path(self.build_lib))


BUILT, MISSING = plan() if COMPILING & set(sys.argv[1:]) else (set(), {})
report(MISSING)
EXTENSIONS, COMMANDS = extensions(BUILT)
setup(
    packages=["lifeops", "lifeops.data", *(f"lifeops.{name}" for name in find_packages("lifeops")), "lifeops.kernels"],
    package_dir={"lifeops": "lifeops", "lifeops.kernels": "kernels"},
    ext_modules=EXTENSIONS,
    cmdclass={"build_py": BuildPy, **COMMANDS},
)
