"""What aarch64 compiles of csrc/ holds no x86-64 names, as the preprocessor shows on any machine; its own compiler, where there is one."""

import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

pybind11 = pytest.importorskip("pybind11")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = [CSRC / "bindings.cpp", CSRC / "info.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
CROSS = "aarch64-linux-gnu-g++"
AARCH64 = "-U__x86_64__", "-D__aarch64__", "-D__ARM_NEON"
HEADERS = "gnu/stubs-32.h", "arm_neon.h"  # C's own headers take the machine for a 32-bit one; NEON's are not here
X86 = re.compile(r"\b(_mm\w*|__m(128|256|512)\w*|__builtin_(ia32|cpu)_\w+|\w+_avx(2|512))\b")
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def _includes():
    from torch.utils import cpp_extension

    return [f"-I{folder}" for folder in (*cpp_extension.include_paths(), pybind11.get_include(), sysconfig.get_path("include"))]


def _own_lines(source, *options):
    """What the preprocessor leaves of csrc/ in a source."""
    command = ["g++", "-E", "-std=c++17", *options, *_includes(), str(source)]
    own, lines = False, []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        marker = re.match(r'# \d+ "(.*?)"', line)
        if marker:
            own = Path(marker[1]).is_relative_to(CSRC)
        elif own and line.strip():
            lines.append(line)
    return lines


@each_source
def test_no_names_of_another_processor(source, tmp_path):
    for header in HEADERS:
        (tmp_path / header).parent.mkdir(exist_ok=True)
        (tmp_path / header).touch()
    lines = _own_lines(source, *AARCH64, f"-I{tmp_path}")
    assert not [line for line in lines if X86.search(line)]
    assert bool(lines) != ("_avx" in source.stem)  # those are empty there


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these names are for x86-64")
def test_the_names_are_found_where_they_are():
    found = {source.stem for source in SOURCES if any(map(X86.search, _own_lines(source)))}
    assert found >= {"kernels_avx2", "kernels_avx512", "info", "channel_act", "rollout_step", "token_dwconv"}


@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"no {CROSS}")
@each_source
def test_aarch64_compiles(source, tmp_path):
    (tmp_path / "pyconfig.h").touch()
    command = [CROSS, "-fsyntax-only", "-Werror", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", *_includes(), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
