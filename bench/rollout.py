"""`python -m bench.rollout`: time and peak memory of attention roll-out beside the plain way of computing it.

Time: one layer, r Â from q, k (B, h, N, d), variants interleaved in one process, least of the calls. ``naive`` is what one would write:
softmax(q kᵀ) of all heads, their mean, r times it; ``product`` is q kᵀ alone, the part that no way can leave out.

Memory: growth of a fresh process's resident set to its peak (Linux), C++ scratch included. ``layers``: 12 layers whose q and k exist
already; ``naive`` makes one layer's matrices at a time and lets them go. ``model``: a whole ViT, images to maps; ``naive`` runs it unfused
and keeps each layer's head mean, ``heads`` what hooks on its attention collect, ``forward`` is the fused model without any roll-out.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import rows
from lifeops import rollout, rollout_step
from lifeops.files import written
from lifeops.models.deit import VisionTransformer

# B, N, h, d, R
TIMED = [(1, 197, 3, 64, 1), (16, 197, 6, 64, 1), (1, 785, 3, 64, 1), (1, 785, 6, 64, 1), (4, 785, 12, 64, 1), (1, 785, 6, 64, 16),
         (1, 1370, 12, 64, 1), (1, 4096, 8, 64, 1), (1, 4096, 8, 64, 16)]  # fmt: skip
TOKENS, HEADS, WIDTH, LAYERS = 4096, 8, 64, 12
WAYS = {"layers": ("lifeops", "naive"), "model": ("lifeops", "forward", "naive", "heads")}


def naive_step(r, q, k):
    attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    return (r @ attention + r) / 2


def inputs(B, N, h, d, R, dtype=torch.float32):
    """q and k as chunks of a projection, r with rows that sum to 1."""
    q, k, _ = torch.randn(B, N, 3, h, d).to(dtype).permute(2, 0, 3, 1, 4)
    r = torch.rand(B, R, N)
    return r / r.sum(-1, keepdim=True), q, k


def variants_of(size: tuple, dtype: torch.dtype) -> dict:
    """The variants as callables on the same tensors, checked: a wrong result has no speed."""
    r, q, k = inputs(*size, dtype)
    low = r.to(dtype)
    variants = {"lifeops": lambda: rollout_step(r, q, k), "naive": lambda: naive_step(low, q, k), "product": lambda: q @ k.mT}
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    assert (variants["lifeops"]() - variants["naive"]()).abs().max() <= limit
    return variants


def timing(dtype: torch.dtype, least: int) -> None:
    print(f"{'B':>3}{'N':>6}{'h':>4}{'d':>4}{'R':>4}{'lifeops ms':>12}{'naive ms':>10}{'product ms':>12}{'naive / lifeops':>17}")
    for size in TIMED:
        variants = variants_of(size, dtype)
        best = dict.fromkeys(variants, float("inf"))
        start, calls = time.perf_counter(), 0
        while calls < least or time.perf_counter() - start < 1.5:
            for name, run in variants.items():
                begin = time.perf_counter()
                run()
                best[name] = min(best[name], 1e3 * (time.perf_counter() - begin))
            calls += 1
        ours, naive, product = best.values()
        print("{:>3}{:>6}{:>4}{:>4}{:>4}".format(*size) + f"{ours:>12.2f}{naive:>10.2f}{product:>12.2f}{naive / ours:>17.2f}", flush=True)


# ------------------------------------------------------------------------------------------------ memory, one fresh process each


def layers(step, made: list) -> None:
    r = torch.full((1, 1, TOKENS), 1 / TOKENS)
    for q, k in reversed(made):
        r = step(r, q, k)


def _unfused(attn, kept: list, fuse: bool, tokens: torch.Tensor) -> torch.Tensor:
    q, k, v = attn.qkv(tokens).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attention = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
    kept.append(attention.mean(1) if fuse else attention)
    return attn.proj((attention @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def whole(way: str, model, x) -> None:
    if way in ("lifeops", "forward"):
        rollout(model, x) if way == "lifeops" else model(x)
        return
    kept = []
    for block in model.blocks:  # the attention that this host computes with a fused kernel, written out
        block.attn.forward = functools.partial(_unfused, block.attn, kept, way == "naive")
    model(x)
    r = torch.zeros(1, 1, kept[0].shape[-1])
    r[..., 0] = 1
    for matrix in reversed(kept):
        matrix = matrix if way == "naive" else matrix.mean(1)
        r = (r @ matrix + r) / 2


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def grown(what: str) -> float:
    """MiB by which the peak of this process grew."""
    level, way = what.split("-")
    if level == "layers":
        made = [inputs(1, TOKENS, HEADS, WIDTH, 1)[1:] for _ in range(LAYERS)]
    else:
        side = int(TOKENS**0.5)
        model = VisionTransformer(16 * side, 16, embed_dim=HEADS * WIDTH, depth=LAYERS, num_heads=HEADS, num_classes=10).eval()
        made = model, torch.randn(1, 3, 16 * side, 16 * side)
    rollout_step(*inputs(1, 64, 2, 8, 1))  # loads what is loaded lazily
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    if level == "layers":
        layers(naive_step if way == "naive" else rollout_step, made)
    else:
        whole(way, *made)
    return resident("VmHWM") - before


def memory(threads: int, levels: list[str]) -> dict[str, dict[str, float]]:
    """Peak MiB of every way, by level."""
    every = {}
    print(f"peak MiB, N = {TOKENS}, {LAYERS} layers, {HEADS} heads of {WIDTH}, one map")
    for level in levels:
        found = every[level] = {}
        for way in WAYS[level]:
            command = [sys.executable, "-m", "bench.rollout", "--threads", str(threads), "--grown", f"{level}-{way}"]
            found[way] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(level, *(f"{way} {mib:.1f} ({mib / found['lifeops']:.1f}x)" for way, mib in found.items()), sep="   ", flush=True)
    return every


def save(path: Path, every: dict[str, dict[str, float]]) -> None:
    size = {"N": TOKENS, "layers": LAYERS, "heads": HEADS}
    about = {"machine": rows.machine("cpu"), "torch": torch.__version__, "commit": rows.commit()} | size
    with written(path) as part:
        part.write_text(json.dumps(about | {"peak_mib": every}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rollout", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--least", type=int, default=7, help="calls of each variant, at least (default: 7)")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--level", choices=tuple(WAYS), help="of the memory; default: all, which takes minutes")
    parser.add_argument("--out", type=Path, help="JSON file for the memory, which docs/performance.md shows")
    parser.add_argument("--skip-time", action="store_true")
    parser.add_argument("--grown", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.grown:
        print(grown(args.grown))
        return 0
    if not args.skip_time:
        timing(getattr(torch, args.dtype), args.least)
    if not args.skip_memory:
        every = memory(args.threads, [args.level] if args.level else list(WAYS))
        if args.out:
            save(args.out, every)
    return 0


if __name__ == "__main__":
    sys.exit(main())
