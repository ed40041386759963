"""What the Triton attention kernels of local_attention compile to: registers, spills, shared memory. No GPU needed.

    python -m bench.attention_budgets                 table for sm_80, sm_90 and sm_100; exit status 1 if a budget is exceeded
    python -m bench.attention_budgets --arch 90 --json --only fwd-198-64,dkv-198-64

Names are kernel, tokens, head width and what is added: "mask" (a float mask per head), "drop" (dropout and that mask), "fp32". Each
kernel is compiled as it would be launched on chunks of a bfloat16 qkv projection. A budget is no spill, and shared memory that
fits consumer parts of sm_80 (99 KB), two programs on an SM of sm_90 (113 KB) and one of sm_100, whose kernels stage more of it.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench.budgets import ARCHS, dump, parse, source
from lifeops.kernels import local_attention as forward
from lifeops.kernels import local_attention_grad as backward
from lifeops.ops.local_attention.formula import heads

SHARED = {80: 99 << 10, 90: 113 << 10, 100: 132 << 10}
HEADS = 3


@dataclass(frozen=True)
class Cost:
    """One compiled kernel. ``spilled`` is stack and local memory in bytes, ``shared`` in bytes."""

    name: str
    arch: int
    instructions: int
    registers: int
    spilled: int
    shared: int
    warps: int
    seconds: float

    @property
    def within(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED[self.arch]


def problem(N: int, d: int, extra: str):
    """q, k, v, attn_mask, key_mask, seed, scale, dropout_p on the meta device."""
    dtype = torch.float32 if extra == "fp32" else torch.bfloat16
    q, k, v = torch.empty((2, N, 3, HEADS, d), dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
    mask = torch.empty((1, HEADS, N, N), device="meta") if extra in ("mask", "drop") else None
    seed = torch.empty((1,), dtype=torch.int64, device="meta") if extra == "drop" else None
    return q, k, v, mask, None, seed, d**-0.5, 0.1 if extra == "drop" else 0.0


def launch(kind: str, N: int, d: int, extra: str):
    """(kernel, config, arguments)."""
    q, k, v, mask, *rest = problem(N, d, extra)
    y, lse = q.new_empty((2, N, HEADS * d)), torch.empty((2, HEADS, N), device="meta")
    if kind == "fwd":
        return forward.local_attention_fwd_kernel, *forward.forward_launch(q, k, v, mask, *rest, y, lse)[1:]
    config, shared, own = backward.backward_arguments(heads(y, HEADS), q, k, v, heads(y, HEADS), lse, mask, *rest)
    if kind == "dq":
        return backward.local_attention_bwd_dq_kernel, config, shared | own | {"dq_ptr": y}
    if kind == "dkv":
        return backward.local_attention_bwd_dkv_kernel, config, shared | {"dk_ptr": y, "dv_ptr": y}
    return backward.local_attention_bwd_mask_kernel, *backward.mask_launch(q, mask, shared)[1:]


def cost(name: str, arch: int) -> Cost:
    kind, N, d, *extra = name.split("-")
    kernel, config, arguments = launch(kind, int(N), int(d), extra[0] if extra else "")
    options = dict(num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)
    start = time.perf_counter()
    compiled = triton.compile(source(kernel, arguments), target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    code, (registers, stack, _, local) = dump(compiled.asm["cubin"])
    return Cost(name, arch, len(code), registers, stack + local, compiled.metadata.shared, config.warps, seconds)


NAMES = (
    *(f"fwd-{N}-64" for N in (15, 32, 64, 128, 198, 256, 1026)), "fwd-198-16", "fwd-198-32", "fwd-198-48", "fwd-198-80", "fwd-256-128",
    "fwd-1026-128", "fwd-64-32-mask", "fwd-198-64-mask", "fwd-1026-128-mask", "fwd-64-32-drop", "fwd-198-64-drop", "fwd-198-128-drop",
    "fwd-15-64-fp32", "fwd-198-64-fp32", "fwd-198-128-fp32",
    *(f"{kind}-{case}" for kind in ("dq", "dkv") for case in (
        "15-64", "198-32", "198-48", "198-64", "198-128", "64-32-mask", "198-64-mask", "198-64-drop", "198-128-drop", "198-32-fp32",
        "198-64-fp32", "198-128-fp32",
    )),
    "bias-64-32-mask", "bias-198-64-mask", "bias-198-64-drop", "bias-198-128-drop",
)  # fmt: skip


def table(costs: list[Cost]) -> str:
    lines = [f"{'kernel':<20}{'sm':>5}{'instr':>7}{'regs':>6}{'warps':>7}{'spilled':>9}{'shared':>8}{'compile s':>11}"]
    for c in costs:
        lines.append(f"{c.name:<20}{c.arch:>5}{c.instructions:>7}{c.registers:>6}{c.warps:>7}{c.spilled:>9}{c.shared:>8}"
                     f"{c.seconds:>11.1f}{'' if c.within else '  over budget'}")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse("attention_budgets", __doc__, ARCHS, NAMES, argv)
    costs = [cost(name, arch) for arch in args.arch for name in args.only.split(",")]
    print(json.dumps([asdict(c) for c in costs]) if args.json else table(costs))
    return int(not all(c.within for c in costs))


if __name__ == "__main__":
    sys.exit(main())
