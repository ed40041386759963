"""Which GPUs the kernels compile for, without any: what each Triton kernel and each CUDA file takes on every architecture.

    python -m bench.targets triton                 a row per kernel, a column per architecture of NVIDIA and AMD
    python -m bench.targets nvcc                   the same of csrc/cuda
    python -m bench.targets triton --only gfx950 --kernels dq-198-64

A cell is registers of a thread, and "+ n" where n bytes of them lie in memory; of a CUDA file the most of all its kernels. bfloat16,
on sm_75, which has none, float16. Where the library refuses a kernel on an architecture the cell is "refused".
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench import attention_budgets, budgets, conv_arguments, rollout_budgets
from lifeops.kernels import _tile, rollout_step, token_dwconv, token_dwconv_grad
from lifeops.kernels.local_attention import LEAST_CAPABILITY

ROOT = Path(__file__).resolve().parent.parent
NVIDIA = (75, 80, 86, 89, 90, 100, 103, 120)
AMD = ("gfx942", "gfx950")
TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in NVIDIA} | {name: GPUTarget("hip", name, 64) for name in AMD}
CUDA_FILES = ("token_dwconv_bf16", "token_conv_bf16", "channel_act_bf16")
_ATTENTION = ("fwd-198-64", "dq-198-64", "dkv-198-64", "fwd-198-64-mask")
_GENERAL = ("strided-3-2", "transpose-3-2", "dws-3-2", "pool-max-3-2")
_HALF = {torch.bfloat16: torch.float16}


def _conv(kernel, arguments):
    return kernel, arguments, {"num_warps": _tile.WARPS}


def _attention(name: str):
    kind, N, d, *extra = name.split("-")
    kernel, config, arguments = attention_budgets.launch(kind, int(N), int(d), extra[0] if extra else "")
    return kernel, arguments, {"num_warps": config.warps, "num_stages": config.stages}


def _rollout(number: int):
    dtype, d, maps, fusion, dropped = rollout_budgets.CASES["bf16-64-mean-r16"]
    q, k, _ = torch.empty((2, rollout_budgets.TOKENS, 3, 6, d), dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
    r = torch.empty((2, maps, rollout_budgets.TOKENS), device="meta")
    kernel, _, arguments = rollout_step.launches(r, q, k, d**-0.5, fusion, 0.5, dropped, r)[number]
    return kernel, arguments, {"num_warps": _tile.WARPS, "num_stages": 2}


def _general(name: str):
    make, *variant = conv_arguments.LAUNCHES[name]
    return _conv(*make(*variant, budgets.CHANNELS, budgets.BATCH)[:2])


KERNELS = {
    **{f"forward-{K}": (lambda K=K: _conv(token_dwconv.token_dwconv_fwd_kernel, budgets.forward_arguments(K))) for K in (3, 7)},
    "forward-3-train": lambda: _conv(token_dwconv.token_dwconv_fwd_kernel, budgets.forward_arguments(3, steps="train")),
    **{f"dw-{K}": (lambda K=K: _conv(token_dwconv_grad.token_dwconv_bwd_dw_kernel, budgets.grad_arguments(K))) for K in (3, 7)},
    **{name: (lambda name=name: _general(name)) for name in _GENERAL},
    **{name: (lambda name=name: _attention(name)) for name in _ATTENTION},
    "rollout-stats": lambda: _rollout(0),
    "rollout-step": lambda: _rollout(-1),
}


def compiled(name: str, target: str) -> str:
    """One cell of the table of Triton's kernels."""
    to = TARGETS[target]
    if name in _ATTENTION and to.backend == "cuda" and to.arch < 10 * LEAST_CAPABILITY[0]:
        return "refused"
    kernel, arguments, options = KERNELS[name]()
    if to.arch == 75:  # no bfloat16
        arguments = {k: v.to(_HALF.get(v.dtype, v.dtype)) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if to.backend == "hip" and arguments.get("PRECISION") == "tf32x3":
        arguments |= {"PRECISION": rollout_step.precision(torch.float32, hip=True)}
    done = triton.compile(budgets.source(kernel, arguments), target=to, options=options | {"enable_fp_fusion": True})
    if to.backend == "hip":
        said = done.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{what}: *(\d+)", said)[1]) for what in ("vgpr_count", "private_segment_fixed_size"))
        return _cell(registers, spilled)
    _, (registers, stack, _, local) = budgets.dump(done.asm["cubin"])
    return _cell(registers, stack + local)


def _cell(registers: int, spilled: int) -> str:
    return f"{registers} + {spilled}" if spilled else str(registers)


def nvcc(name: str, target: str) -> str:
    """One cell of the table of CUDA files: the most registers and the most bytes of stack of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-O3", "-std=c++17", f"-arch={target}", "-cubin", "-Xptxas", "-v", "-o", f"{folder}/out.cubin"]
        done = subprocess.run([*command, str(ROOT / "csrc/cuda" / f"{name}.cu")], capture_output=True, text=True, check=False)
    if done.returncode:
        return "fails"
    said = done.stdout + done.stderr
    return _cell(*(max(map(int, re.findall(pattern, said))) for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack frame")))


def _tried(cell, name: str, target: str) -> str:
    try:
        return cell(name, target)
    except Exception as error:
        print(f"{name} on {target}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
        return "fails"


def table(cell, names, targets, jobs: int) -> Iterator[str]:
    """Markdown, a line at a time."""
    yield _line(["kernel", *targets])
    yield _line(["---", *["---:"] * len(targets)])
    with ThreadPoolExecutor(jobs) as pool:
        for name in names:
            yield _line([f"`{name}`", *pool.map(lambda target, name=name: _tried(cell, name, target), targets)])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.targets", description=__doc__.splitlines()[0])
    parser.add_argument("compiler", choices=("triton", "nvcc"))
    parser.add_argument("--only", default="", help="comma-separated architectures")
    parser.add_argument("--kernels", default="", help="comma-separated rows")
    parser.add_argument("--jobs", type=int, default=1, help="runs of nvcc at a time")
    args = parser.parse_args(argv)
    by_triton, failed = args.compiler == "triton", 0
    if not by_triton and shutil.which("nvcc") is None:
        raise SystemExit("bench.targets: nvcc is not installed")
    names = args.kernels.split(",") if args.kernels else list(KERNELS if by_triton else CUDA_FILES)
    targets = args.only.split(",") if args.only else [t for t in TARGETS if by_triton or t.startswith("sm_")]
    for line in table(compiled if by_triton else nvcc, names, targets, 1 if by_triton else args.jobs):
        print(line, flush=True)
        failed += "fails" in line
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
