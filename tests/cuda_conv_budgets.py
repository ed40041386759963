# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and instructions per output element of the tile kernels of the general token convolution, without a GPU.

    python tests/cuda_conv_budgets.py

Counted as in cuda_budgets.py, over the elements that are written (of the weight gradient: those of dy), on a coarse grid of 16 x 16, two
tiles wide. At stride 2 an output has four inputs: 67 instructions are the full issue rate on an H200 where memory is the limit.
"""

import ctypes
import re
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import sass
from cuda_budgets import ARCH, PARAMETERS, TYPES, Planner, compile_cubin, functions
from cuda_tools import ROOT, ConvGradWeightParams, ConvParams, ConvShape

BATCH, SIDE, CHANNELS = 256, 16, 384
BUDGET = {  # (kernel, K, stride, whether two channels of y read one of x), bfloat16
    ("fwd", 3, 1, False): 19,
    ("fwd", 3, 2, False): 23,
    ("fwd", 3, 4, False): 30,
    ("fwd", 3, 8, False): 30,
    ("fwd", 3, 1, True): 18.5,
    ("fwd", 3, 2, True): 23.5,
    ("transpose", 3, 2, False): 11,
    ("transpose", 3, 4, False): 4.5,
    ("transpose", 2, 2, False): 6,
    ("transpose", 4, 4, False): 5.5,
    ("bwd_dw", 3, 1, False): 21,
    ("bwd_dw", 3, 2, False): 25,
    ("bwd_dw", 3, 4, False): 31.5,
    ("bwd_dw", 3, 8, False): 31.5,
}
RATIO = 1.35  # of the instructions at stride 2 to those at stride 1
_TILE = re.compile(r"token_conv_(fwd|transpose|bwd_dw)_tile_kernelI(f|6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)E(?:Li(\d+)E)?(?:Li(\d+)E)?")


def variant(name: str) -> tuple | None:
    """A mangled name -> (dtype, kernel, K, stride, whether two channels of y read one of x), None if it is no tile kernel."""
    m = _TILE.search(name)
    return m and (TYPES[m[2]], m[1], int(m[3]), int(m[4]), int(m[6] or 2) == 1)


def plan(planner: Planner, key: tuple) -> tuple[dict[int, int], int]:
    """-> constant bank and blocks of the launch that the library would make, one prefix row where it may be."""
    dtype, kernel, K, stride, even = key
    m, number = 1 + even, ["f64", "f32", "f16", "bf16"].index(dtype)
    C, P, pad, fine = CHANNELS // m, int(m == 1), K // 2 if stride < K else 0, SIDE * stride
    shape = ConvShape(fine, fine, SIDE, SIDE, K, K, stride, stride, pad, pad)
    x, w, y, z = (i << 32 for i in range(1, 5))
    few, many = ((P + SIDE * SIDE) * C * m, C * m), ((P + fine * fine) * C, C)
    buffer, out = ctypes.create_string_buffer(2048), (ctypes.c_int * 3)()
    if kernel == "bwd_dw":
        p = ConvGradWeightParams(y, x, w, z, BATCH, C, m, shape, *many, *few, P, P, number, number, number)
        size = planner.library.shim_plan_conv_bwd_dw(ctypes.byref(p), buffer, out)
    else:
        sides = (*few, *many) if kernel == "transpose" else (*many, *few)
        p = ConvParams(x, w, None, y, BATCH, C, m, shape, *sides, P, P, 0, kernel == "transpose", False, number, number, number)
        size = planner.library.shim_plan_conv(ctypes.byref(p), buffer, out)
    assert tuple(out[1:]) == (K, stride), f"the plan runs {tuple(out[1:])}, not {(K, stride)}"
    words = struct.unpack(f"<{size // 4}I", buffer.raw[: size // 4 * 4])
    return {PARAMETERS + 4 * i: word for i, word in enumerate(words)}, out[0]


def instructions_per_element(code: list[tuple], planner: Planner, key: tuple, blocks_run: int = 3) -> float:
    constants, blocks = plan(planner, key)
    side = SIDE * key[3] if key[1] == "transpose" else SIDE
    run = range(0, blocks, max(1, blocks // blocks_run))[:blocks_run]
    count = sum((sass.run(code, constants, 32 * warp, block) for block in run for warp in range(4)), Counter())
    return count.total() * 32 * blocks / (len(run) * BATCH * side * side * CHANNELS)


def measured(cubin: Path, planner: Planner) -> dict[tuple, float]:
    """Instructions per element of every tile kernel in ``cubin`` by its variant."""
    kernels = {variant(name): code for name, code in functions(cubin).items() if variant(name)}
    return {key: instructions_per_element(code, planner, key) for key, code in kernels.items()}


def main() -> None:
    print(f"sm_{ARCH}, B {BATCH}, coarse grid {SIDE} x {SIDE}, C {CHANNELS}")
    print(f"{'kernel':<12}{'dtype':>6}{'K':>3}{'stride':>8}{'even':>6}{'registers':>11}{'stack':>7}{'spills':>8}{'instructions':>14}{'budget':>8}")
    with tempfile.TemporaryDirectory() as folder:
        planner = Planner(Path(folder))
        for dtype in ("bf16", "f16", "f32"):
            cubin = Path(folder) / f"{dtype}.cubin"
            properties = {variant(name): p for name, p in compile_cubin(ROOT / "csrc" / "cuda" / f"token_conv_{dtype}.cu", cubin).items()}
            for key, count in sorted(measured(cubin, planner).items()):
                p, (_, kernel, K, stride, even) = properties[key], key
                budget = BUDGET[key[1:]] if dtype == "bf16" else "-"
                print(f"{kernel:<12}{dtype:>6}{K:>3}{stride:>8}{even:>6}{p['registers']:>11}{p['stack']:>7}{p['spills']:>8}{count:>14.1f}{budget:>8}")


if __name__ == "__main__":
    main()
