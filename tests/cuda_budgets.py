# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and instructions per element of every CUDA tile kernel, without a GPU.

    python tests/cuda_budgets.py

Instructions are those the warps of a problem execute (tests/sass.py), prologue, index arithmetic, prefix rows and the
partial sums included, NOP left out, over B * H * W * C / 32. One bf16 read and one write per element allow 27 at full
issue rate on an H200 before a kernel stops being bound by memory.
"""

import ctypes
import functools
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import sass
from cuda_tools import ACTS, ROOT, AffineAct, FwdParams, GradWeightParams, compile_for_host, find_tool

ARCH, PARAMETERS = 90, 0x210  # where sm_90 keeps kernel arguments in constant bank 0
BUDGET = {("fwd", 3): 18, ("fwd", 5): 42, ("fwd", 7): 72, ("bwd_dw", 3): 20, ("bwd_dw", 5): 37, ("bwd_dw", 7): 60}
ACT_BUDGET = {  # with a prologue of batch norm and h-swish: the plain budget and 5; GELU and batch norm; gradients with their sums
    ("act_fwd", 3, "hardswish"): 23,
    ("act_fwd", 5, "hardswish"): 47,
    ("act_fwd", 3, "gelu_first"): 33,  # 31.6 before statistics were joined row by row, which holds registers
    ("act_bwd_dx", 3, "hardswish"): 31,
    ("act_bwd_dx", 3, "gelu_first"): 41,
    ("act_bwd_dw", 3, "hardswish"): 25,
    ("act_bwd_dw", 3, "gelu_first"): 37,
}
TYPES = {"f": "f32", "6__half": "f16", "13__nv_bfloat16": "bf16"}
_TILE = re.compile(
    r"token_dwconv_(fwd|bwd_dw|act_fwd|act_bwd_dx|act_bwd_dw)_tile_kernelI(f|6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)ELi(\d+)E"
)
_PTXAS = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


def variant(name: str) -> tuple | None:
    """A mangled name -> (kernel, dtype, K, channels per thread, tile width), None if it is no tile kernel."""
    m = _TILE.search(name)
    return m and (m[1], TYPES[m[2]], int(m[3]), int(m[4]), int(m[5]))


def compile_cubin(source: Path, out: Path, arch: int = ARCH) -> dict[str, dict[str, int]]:
    """nvcc to a cubin; -> mangled name -> registers, stack and spill bytes."""
    command = [find_tool("nvcc"), "-O3", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-o", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {
        name: {"registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads)}
        for name, stack, stores, loads, registers in _PTXAS.findall(done.stdout + done.stderr)
    }


@functools.lru_cache(1)  # several tests read the same file
def functions(cubin: Path) -> dict[str, list[tuple]]:
    """mangled name -> instructions."""
    text = subprocess.run([find_tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\S+)", text)
    return {name: sass.parse(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


class Planner:
    """The launch the library would make, from csrc/cuda/token_dwconv_plan.h compiled by g++."""

    def __init__(self, folder: Path):
        self.missing = compile_for_host(folder / "plan.so", "-O0", "-shared", "-fPIC", "plan.cpp")
        self.library = None if self.missing else ctypes.CDLL(str(folder / "plan.so"))

    def plan(self, kernel: str, B: int, W: int, C: int, K: int, dtype: int, act: str | None) -> tuple[dict[int, int], int, tuple]:
        """-> constant bank, blocks, (channels per thread, tile width) for a W x W grid, one prefix row, no bias."""
        N, P = 1 + W * W, 1
        x, w, y, z = (i << 32 for i in range(1, 5))
        strides = (N * C, C) * (2 if kernel.endswith("dw") else 3)
        if kernel.endswith("dw"):
            p = GradWeightParams(x, y, w, z, B, W, W, C, *strides, K, P, P, dtype, dtype, dtype)
        else:
            residual = z if kernel.endswith("dx") else None  # the forward pass's x
            p = FwdParams(x, w, None, residual, y, B, W, W, C, *strides, K, P, P, 0, kernel.endswith("dx"), dtype, dtype, dtype)
        steps = [] if act is None else [ctypes.byref(AffineAct(5 << 32, 6 << 32, ACTS.index(act)))]
        if kernel == "act_fwd":
            steps += [ctypes.byref(AffineAct(None, None, 0)), None]  # no epilogue, no sums
        if kernel == "act_bwd_dx":
            steps += [ctypes.c_void_p(i << 32) for i in (7, 8, 9)]  # a, b, sums
        buffer, out = ctypes.create_string_buffer(2048), (ctypes.c_int * 3)()
        size = getattr(self.library, f"shim_plan_{kernel}")(ctypes.byref(p), *steps, buffer, out)
        words = struct.unpack(f"<{size // 4}I", buffer.raw[: size // 4 * 4])
        return {PARAMETERS + 4 * i: word for i, word in enumerate(words)}, out[0], (out[1], out[2])


def instructions_per_element(
    code: list[tuple], planner: Planner, key: tuple, act: str | None = None, B: int = 256, blocks_run: int = 3
) -> float:
    """A sample of the blocks of a W x W grid, W two tiles, C 384; for one channel per thread 383 channels."""
    kernel, dtype, K, vec, tile_w = key
    W, C = 2 * tile_w, 384 if vec == 2 else 383
    constants, blocks, chosen = planner.plan(kernel, B, W, C, K, ["f64", "f32", "f16", "bf16"].index(dtype), act)
    assert chosen == (vec, tile_w), f"the plan runs {chosen}, not {(vec, tile_w)}"
    run = range(0, blocks, max(1, blocks // blocks_run))[:blocks_run]
    count = sum((sass.run(code, constants, 32 * warp, block) for block in run for warp in range(4)), Counter())
    return count.total() * 32 * blocks / (len(run) * B * W * W * C)


def table(dtypes: tuple[str, ...] = ("bf16", "f16", "f32")) -> list[dict]:
    """A row per tile kernel."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        planner = Planner(Path(folder))
        for dtype in dtypes:
            for kind, acts in ((dtype, (None,)), (f"act_{dtype}", ("hardswish", "gelu_first"))):
                cubin = Path(folder) / f"{kind}.cubin"
                properties = compile_cubin(ROOT / "csrc" / "cuda" / f"token_dwconv_{kind}.cu", cubin)
                for name, code in functions(cubin).items():
                    for act in acts if variant(name) else ():
                        rows.append(row_of(code, properties[name], planner, variant(name), act))
    order = ("fwd", "act_fwd", "act_bwd_dx", "bwd_dw", "act_bwd_dw")
    return sorted(rows, key=lambda r: (order.index(r["kernel"]), r["dtype"], r["K"], -r["vec"], r["tile_w"]))


def row_of(code: list[tuple], properties: dict, planner: Planner, key: tuple, act: str | None) -> dict:
    row = dict(zip(("kernel", "dtype", "K", "vec", "tile_w"), key, strict=True), act=act, **properties)
    row["instructions"] = instructions_per_element(code, planner, key, act)
    budget = BUDGET.get((key[0], key[2])) if act is None else ACT_BUDGET.get((key[0], key[2], act))
    row["budget"] = budget if key[1] == "bf16" and key[3:] == (2, 7) else None
    return row


def main() -> None:
    columns = ("kernel", "dtype", "K", "vec", "tile_w", "act", "registers", "stack", "spills", "instructions", "budget")
    print(f"sm_{ARCH}, B 256, grid of two tiles, C 384 (383 where vec is 1), one prefix row")
    print(" ".join(f"{c:>12}" for c in columns))
    for row in table():
        row["instructions"] = f"{row['instructions']:.1f}"
        print(" ".join(f"{'-' if row[c] is None else row[c]:>12}" for c in columns))


if __name__ == "__main__":
    main()
