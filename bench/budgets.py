"""What the Triton kernels cost per output element, read from their machine code: no GPU needed.

    python -m bench.budgets                 table for sm_80, sm_90 and sm_100; exit status 1 if a budget is exceeded
    python -m bench.budgets --arch 90 --json --only forward-3,dw-3

Each kernel is compiled off-line exactly as it would be launched for ViT-S (14x14 grid, C 384, bfloat16, one prefix token):
``forward_launch`` on meta tensors gives its constants. cuobjdump then lists the instructions. Counted is everything but
NOP, whole kernel, address arithmetic, masks, taps and the prefix programs' code included, times the threads of a program,
over the elements it writes. Straight-line code runs once, so its static count is what is executed; the loop over rows of
K >= 7 is counted K - 1 times, and the loop of the weight gradient as often as for a batch of 256. The prefix code is
counted although no program runs both it and the convolution: the figure is an upper bound by about 0.5 to 1.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import conv_arguments
from lifeops.kernels import _tile, token_dwconv, token_dwconv_act, token_dwconv_grad

# (instructions per element, registers) on every architecture, just above what is reached; the project's targets are 18,
# 42 and 72 for the forward. 128 threads: 128 registers leave four programs on an SM, 168 three, 255 two.
BUDGET = {
    "forward-3": (16.0, 96),
    "forward-5": (36.0, 128),
    "forward-7": (66.0, 136),
    "dw-3": (20.0, 128),
    "dw-5": (40.0, 168),
    "dw-7": (72.0, 255),
    "forward-3-w32": (18.0, 96),
    "forward-5-w32": (45.0, 128),
    "forward-7-w32": (84.0, 168),
    # LocalViT's steps around the convolution and the DW shortcut's (see _around); a row of x passes the prologue (K + 1) / 2 times
    "forward-3-pro": (23.0, 112),
    "forward-3-train": (29.0, 168),  # three programs on an SM, as with the 130 registers of sums that an outlier spoils
    "forward-3-eval": (32.0, 144),
    "forward-3-bwd": (28.0, 136),
    "forward-3-gelu": (42.0, 112),
    "forward-3-gelubwd": (47.0, 136),
    "dw-3-gelu": (47.0, 128),
    "forward-5-gelu": (76.0, 136),
    "forward-5-gelubwd": (68.0, 136),
    "dw-5-gelu": (79.0, 208),
    "forward-7-gelu": (118.0, 152),
    "forward-7-gelubwd": (96.0, 152),
    "dw-7-gelu": (168.0, 240),
    "forward-5-pro": (47.0, 128),
    "forward-5-train": (53.0, 168),
    "forward-5-eval": (56.0, 168),
    "forward-5-bwd": (49.0, 128),
    "forward-7-pro": (78.0, 136),
    "forward-7-train": (85.0, 144),
    "forward-7-eval": (89.0, 152),
    "forward-7-bwd": (76.0, 144),
    "dw-3-pro": (27.0, 136),
    "dw-5-pro": (50.0, 208),
    "dw-7-pro": (100.0, 240),
    # the general convolution per output element: what it reads grows with the square of the stride, and a stride of 2 allows 67
    "strided-3-1": (18.0, 112),
    "strided-3-2": (23.0, 104),
    "strided-3-4": (33.0, 80),
    "strided-3-2-m2": (21.0, 104),
    "strided-2-2": (18.0, 64),
    "strided-7-4": (175.0, 176),
    "transpose-3-1": (23.0, 136),
    "transpose-3-2": (12.0, 128),
    "transpose-3-4": (8.0, 64),
    "transpose-3-2-m2": (27.0, 120),
    "transpose-2-2": (8.0, 64),
    "transpose-7-4": (18.0, 64),
    "dws-3-1": (30.0, 96),
    "dws-3-2": (37.0, 96),
    "dws-3-4": (44.0, 112),
    "dws-3-2-m2": (34.0, 96),
    "dws-2-2": (26.0, 80),
    "dws-7-4": (250.0, 96),
    "pool-max-3-2": (58.0, 48),
    "pool-avg-3-2": (72.0, 48),
    "pool-place-3-2": (88.0, 64),
    "poolbwd-max-3-2": (60.0, 48),
    "poolbwd-avg-3-2": (66.0, 48),
}
ARCHS = (80, 90, 100)
BATCH, GRID, CHANNELS = 256, 14, 384
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", re.M)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_POINTER = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
            torch.int64: "*i64", torch.uint8: "*u8"}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """One compiled kernel. ``spilled`` is stack and local memory in bytes, ``seconds`` is short on a cache hit."""

    name: str
    arch: int
    per_element: float
    instructions: int
    registers: int
    spilled: int
    shared: int
    seconds: float

    @property
    def within(self) -> bool:
        per_element, registers = BUDGET[self.name]
        return self.spilled == 0 and self.per_element <= per_element and self.registers <= registers


def integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def specialisation(kernel, arguments: dict) -> tuple:
    """What a launch compiles for: constants, argument types, and ints that Triton may specialise on their value."""
    key = []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            key.append((parameter.name, str(value)))
        elif isinstance(value, torch.Tensor):
            key.append((parameter.name, value.dtype))
        elif parameter.do_not_specialize:
            key.append((parameter.name, integer(value)))
        else:
            key.append((parameter.name, integer(value), value == 1, value % 16 == 0))
    return tuple(key)


def source(kernel, arguments: dict) -> ASTSource:
    """The kernel as the launcher would compile it for ``arguments``, pointers aligned to 16 bytes."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = _POINTER[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else integer(value)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def cuobjdump() -> str:
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    if not found:
        raise FileNotFoundError("cuobjdump is neither in the Triton package nor on PATH")
    return found


def dump(cubin: bytes) -> tuple[list[tuple[int, str, str]], tuple[int, ...]]:
    """([(address, opcode, operands)] without NOP, (registers, stack, shared, local))."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = [subprocess.run([cuobjdump(), how, file.name], capture_output=True, text=True, check=True).stdout
                for how in ("-sass", "-res-usage")]  # fmt: skip
    code = [(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(text[0]) if op != "NOP"]
    return code, tuple(int(n) for n in _USAGE.search(text[1]).groups())


def executed(code: list[tuple[int, str, str]], trips: int) -> int:
    """Instructions of one thread, the largest loop (a branch backwards) ``trips`` times and everything else once."""
    loops = [0]
    for address, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest)
        if op.startswith("BRA") and target and int(target[1], 16) < address:
            loops.append(sum(int(target[1], 16) <= a <= address for a, _, _ in code))
    return len(code) + max(loops) * (trips - 1)


def cost(name: str, arch: int, kernel, arguments: dict, trips: int, written: int) -> Cost:
    """Compile for ``arch`` and count ``trips`` of the loop; a job writes ``written`` elements per channel."""
    start = time.perf_counter()
    options = dict(num_warps=_tile.WARPS, enable_fp_fusion=True)
    compiled = triton.compile(source(kernel, arguments), target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    code, (registers, stack, shared, local) = dump(compiled.asm["cubin"])
    count = executed(code, trips)
    elements = arguments["BLOCK_R"] * written * arguments["BLOCK_C"]
    return Cost(name, arch, count * _tile.WARPS * 32 / elements, len(code), registers, stack + local, shared, seconds)


def sequence(H: int, W: int, C: int = CHANNELS, dtype=torch.bfloat16, B: int = BATCH) -> torch.Tensor:
    return torch.empty((B, 1 + H * W, C), dtype=dtype, device="meta")


def forward_arguments(K: int, H: int = GRID, W: int = GRID, B: int = BATCH, steps: str = "") -> dict:
    x = sequence(H, W, B=B)
    weight = torch.empty((CHANNELS, 1, K, K), dtype=x.dtype, device="meta")
    return token_dwconv.forward_launch(x, weight, None, None, x, H, W, 1, 1, True, "bwd" in steps, _around(steps, x, H, W, K))[1]


def _around(steps: str, x: torch.Tensor, H: int, W: int, K: int) -> dict:
    """LocalViT's uses of prologue and epilogue: "pro" before the convolution, "train" with statistics behind it, "eval" with the
    second activation and pool, "bwd" the input gradient through the prologue; the DW shortcut's are "gelu" and "gelubwd".
    """
    if not steps:
        return token_dwconv.PLAIN
    value = torch.empty((CHANNELS,), device="meta")
    prologue = {"scale_ptr": value, "shift_ptr": value, "ACT": "hardswish"}
    sums = {"sums_ptr": token_dwconv_act._job_sums(x, H, W, K), "SUMS": True}
    epilogue = {"out_scale_ptr": value, "out_shift_ptr": value, "OUT_ACT": "hardswish"}
    backward = sums | {"pre_ptr": x, "pre_prefix": 1, "DERIVATIVE": True}
    gelu, norm = {"ACT": "gelu_first"}, {"out_scale_ptr": value, "out_shift_ptr": value, "OUT_ACT": "none"}
    chosen = {"pro": {}, "train": sums, "eval": sums | epilogue, "bwd": backward, "gelu": gelu, "gelubwd": backward | gelu | norm}
    return token_dwconv.PLAIN | prologue | chosen[steps]


def grad_arguments(K: int, H: int = GRID, W: int = GRID, B: int = BATCH, act: str = "") -> dict:
    x = sequence(H, W, B=B)
    value = torch.empty((CHANNELS,), device="meta") if act else None
    return token_dwconv_grad.grad_launch(x, x, K, H, W, 1, 1, True, value, value, act)[1]


def _forward(name: str, arch: int, K: int, W: int = GRID, steps: str = "") -> Cost:
    arguments = forward_arguments(K, W=W, steps=steps)
    written = token_dwconv.ROWS * arguments["SEGMENT"]
    return cost(name, arch, token_dwconv.token_dwconv_fwd_kernel, arguments, K - 1 if K >= 7 else 1, written)


def _grad(name: str, arch: int, K: int, act: str = "") -> Cost:
    arguments = grad_arguments(K, act=act)
    trips = arguments["iterations"]
    written = arguments["ROWS"] * arguments["SEGMENT"] * trips
    return cost(name, arch, token_dwconv_grad.token_dwconv_bwd_dw_kernel, arguments, trips, written)


def _general(name: str, arch: int, launch, *variant) -> Cost:
    kernel, arguments, written, trips = launch(*variant, CHANNELS, BATCH)
    return cost(name, arch, kernel, arguments, trips, written)


KERNELS = {
    **{f"forward-{K}": (_forward, K) for K in (3, 5, 7)},
    **{f"dw-{K}": (_grad, K) for K in (3, 5, 7)},
    **{f"forward-{K}-w32": (_forward, K, 32) for K in (3, 5, 7)},
    **{f"forward-{K}-{steps}": (_forward, K, GRID, steps) for K in (3, 5, 7) for steps in ("pro", "train", "eval", "bwd")},
    **{f"forward-{K}-{steps}": (_forward, K, GRID, steps) for K in (3, 5, 7) for steps in ("gelu", "gelubwd")},
    **{f"dw-{K}-pro": (_grad, K, "hardswish") for K in (3, 5, 7)},
    **{f"dw-{K}-gelu": (_grad, K, "gelu") for K in (3, 5, 7)},
    **{name: (_general, *launch) for name, launch in conv_arguments.LAUNCHES.items()},
}


def measure(names, archs) -> list[Cost]:
    return [KERNELS[name][0](name, arch, *KERNELS[name][1:]) for arch in archs for name in names]


def table(costs: list[Cost]) -> str:
    lines = [f"{'kernel':<16}{'sm':>5}{'instr/el':>10}{'budget':>8}{'instr':>7}{'regs':>6}{'spilled':>9}{'shared':>8}{'compile s':>11}"]
    for c in costs:
        lines.append(f"{c.name:<16}{c.arch:>5}{c.per_element:>10.2f}{BUDGET[c.name][0]:>8}{c.instructions:>7}{c.registers:>6}"
                     f"{c.spilled:>9}{c.shared:>8}{c.seconds:>11.1f}{'' if c.within else '  over budget'}")  # fmt: skip
    return "\n".join(lines)


def parse(name: str, doc: str, archs, kernels, argv: list[str] | None) -> argparse.Namespace:
    """The command line that all tables of compiled kernels share."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=doc.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=tuple(archs), help="compute capabilities, e.g. 80 90 100")
    parser.add_argument("--only", default=",".join(kernels), help="comma-separated kernels")
    parser.add_argument("--json", action="store_true", help="print rows instead of a table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse("budgets", __doc__, ARCHS, KERNELS, argv)
    costs = measure(args.only.split(","), args.arch)
    print(json.dumps([asdict(c) for c in costs]) if args.json else table(costs))
    return int(not all(c.within for c in costs))


if __name__ == "__main__":
    sys.exit(main())
