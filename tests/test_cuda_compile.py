# SPDX-License-Identifier: Apache-2.0
"""Every .cu compiles, nothing spills, and the forward and dW kernels stay inside their instruction budgets. No GPU.

LIFEOPS_ALL_ARCHS=1 compiles for sm_75, 80, 90 and 100 instead of sm_90 alone.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import cuda_budgets
import cuda_conv_budgets
from cuda_tools import ROOT, find_tool

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
KERNELS = [s for s in SOURCES if "launch.cuh" in s.read_text()]  # no torch in these
LAUNCHERS = [s for s in SOURCES if s not in KERNELS]
ARCHS = [75, 80, 90, 100] if os.environ.get("LIFEOPS_ALL_ARCHS") == "1" else [90]

pytestmark = pytest.mark.skipif(find_tool("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """(source stem, arch) -> (cubin, properties); all sources of an arch are compiled at once, as many as there are CPUs."""
    from concurrent.futures import ThreadPoolExecutor

    folder = tmp_path_factory.mktemp("cubin")
    jobs = [(s, arch, folder / f"{s.stem}.{arch}.cubin") for arch in ARCHS for s in KERNELS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda job: cuda_budgets.compile_cubin(job[0], job[2], job[1]), jobs)
        return {(s.stem, arch): (out, properties) for (s, arch, out), properties in zip(jobs, done, strict=True)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", KERNELS, ids=lambda s: s.stem)
def test_no_spills(cubins, source, arch):
    properties = cubins[source.stem, arch][1]
    assert len(properties) >= 3, "the two kernels for any K and the second stage are always there"
    bad = {name: p for name, p in properties.items() if p["stack"] or p["spills"]}
    assert not bad, bad


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    if find_tool("cuobjdump") is None:
        pytest.skip("cuobjdump is not installed: neither a full CUDA toolkit nor Triton")
    planner = cuda_budgets.Planner(tmp_path_factory.mktemp("planner"))
    if planner.missing:
        pytest.skip(planner.missing)
    return planner


def check_budget(cubin, planner, kernel, K, budget, act=None):
    key = (kernel, "bf16", K, 2, 7)
    code = next(c for name, c in cuda_budgets.functions(cubin).items() if cuda_budgets.variant(name) == key)
    got = cuda_budgets.instructions_per_element(code, planner, key, act)
    assert got <= budget, f"{got:.2f} instructions per element"
    # Fewer than the products alone, border taps left out, would mean that the count is wrong.
    assert got > (K * 14 - K // 2 * (K // 2 + 1)) ** 2 / 14**2


@pytest.mark.parametrize("kernel", ["fwd", "bwd_dw"])
@pytest.mark.parametrize("K", [3, 5, 7])
def test_instruction_budget(cubins, planner, kernel, K):
    check_budget(cubins["token_dwconv_bf16", cuda_budgets.ARCH][0], planner, kernel, K, cuda_budgets.BUDGET[kernel, K])


@pytest.mark.parametrize("case", cuda_budgets.ACT_BUDGET, ids=lambda c: "-".join(map(str, c)))
def test_instruction_budget_with_a_prologue(cubins, planner, case):
    kernel, K, act = case
    cubin = cubins["token_dwconv_act_bf16", cuda_budgets.ARCH][0]
    check_budget(cubin, planner, kernel, K, cuda_budgets.ACT_BUDGET[case], act)


def test_instruction_budgets_of_the_general_convolution(cubins, planner):
    found = cuda_conv_budgets.measured(cubins["token_conv_bf16", cuda_budgets.ARCH][0], planner)
    found = {key[1:]: count for key, count in found.items()}
    assert found.keys() == cuda_conv_budgets.BUDGET.keys()
    assert {key: count for key, count in found.items() if count > cuda_conv_budgets.BUDGET[key]} == {}
    for kernel, even in (("fwd", False), ("fwd", True), ("bwd_dw", False)):
        assert 9 < found[kernel, 3, 2, even] <= cuda_conv_budgets.RATIO * found[kernel, 3, 1, even]


@pytest.mark.parametrize("source", LAUNCHERS, ids=lambda s: s.stem)
def test_launcher_compiles(source, tmp_path):
    """Against the headers of the installed torch, CUDA build or not."""
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{p}" for p in include_paths()]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    command = [find_tool("nvcc"), "-std=c++17", "-arch=sm_90", "-DUSE_CUDA", target, *includes, "-Xcompiler", "-fPIC"]
    done = subprocess.run([*command, "-c", "-o", str(tmp_path / "o.o"), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
