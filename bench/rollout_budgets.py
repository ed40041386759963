"""What the roll-out's Triton kernels need on sm_80, sm_90 and sm_100, read from their machine code: no GPU needed.

    python -m bench.rollout_budgets         table; exit status 1 where a kernel spills or has more shared memory than an SM

Each kernel is compiled off-line as ``launches`` would launch it on q and k that are chunks of a ViT's qkv.
"""

from __future__ import annotations

import itertools
import json
import sys
import time

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench import budgets
from lifeops.kernels import _tile, rollout_step

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one program
TOKENS = 198
OPTIONS = ("num_stages", "maxnreg")  # of the arguments, what is no parameter of a kernel
# dtype, channels of a head, maps, fusion, dropped entries
CASES = {
    "bf16-64-mean": (torch.bfloat16, 64, 1, "mean", 0),
    "bf16-64-mean-r16": (torch.bfloat16, 64, 16, "mean", 0),
    "fp32-64-mean": (torch.float32, 64, 1, "mean", 0),
    "fp32-64-max-r16": (torch.float32, 64, 16, "max", 0),
    "bf16-64-min-discard": (torch.bfloat16, 64, 16, "min", 100),
    "fp32-64-mean-discard": (torch.float32, 64, 1, "mean", 100),
    "bf16-256-max-r16": (torch.bfloat16, 256, 16, "max", 0),
    "fp32-256-mean-discard": (torch.float32, 256, 16, "mean", 100),
    "fp16-80-mean-r16": (torch.float16, 80, 16, "mean", 0),
    "fp64-64-mean": (torch.float64, 64, 1, "mean", 0),
    "fp64-64-max-discard": (torch.float64, 64, 16, "max", 100),
}


def compiled(name: str, arch: int):
    """Rows (case, kernel, arch, registers, spilled bytes, shared bytes, seconds)."""
    dtype, d, maps, fusion, dropped = CASES[name]
    qkv = torch.empty((2, TOKENS, 3, 6, d), dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    r = torch.empty((2, maps, TOKENS), dtype=wide, device="meta")
    for kernel, _, arguments in rollout_step.launches(r, qkv[0], qkv[1], d**-0.5, fusion, 0.5, dropped, r):
        start = time.perf_counter()
        options = {"num_warps": _tile.WARPS, "enable_fp_fusion": True} | {k: arguments[k] for k in OPTIONS if k in arguments}
        done = triton.compile(budgets.source(kernel, arguments), target=GPUTarget("cuda", arch, 32), options=options)
        _, (registers, stack, _, local) = budgets.dump(done.asm["cubin"])
        seconds = round(time.perf_counter() - start, 1)
        yield name, kernel.__name__, arch, registers, stack + local, done.metadata.shared, seconds


def within(row) -> bool:
    return row[4] == 0 and row[5] <= SHARED[row[2]]


def main(argv: list[str] | None = None) -> int:
    args = budgets.parse("rollout_budgets", __doc__, SHARED, CASES, argv)
    rows = [row for arch, name in itertools.product(args.arch, args.only.split(",")) for row in compiled(name, arch)]
    if args.json:
        print(json.dumps(rows))
    else:
        print(f"{'case':<24}{'kernel':<24}{'sm':>4}{'regs':>6}{'spilled':>9}{'shared':>8}{'compile s':>11}")
        for row in rows:
            print("{:<24}{:<24}{:>4}{:>6}{:>9}{:>8}{:>11}".format(*row) + ("" if within(row) else "  over budget"))
    return int(not all(map(within, rows)))


if __name__ == "__main__":
    sys.exit(main())
