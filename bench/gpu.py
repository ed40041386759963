"""The GPU's benchmark set: ops, blocks and whole models beside their baselines, one row per variant, written as it is measured.

    python -m bench.gpu ops --out DIR [--seconds 120]        all ops, local blocks; cold cache, eager and CUDA graphs
    python -m bench.gpu models --out DIR                     training and inference steps of whole models, plain and converted

``--device cpu --tiny`` rehearses it without a GPU. A variant whose result is wrong on the tensors to be timed gets no number.
Stops starting new problems when ``--seconds`` are over, so that a run that is cut off still has the first rows.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch

import lifeops
from bench import device as timing
from bench import systems
from bench.baselines import eager_dwconv, shift_and_add
from bench.problems import Problem
from bench.rows import commit
from lifeops import registry

WIDTHS = {"T": 192, "S": 384, "B": 768}
SHAPES = [(256, 14, 14), (64, 32, 32), (16, 64, 64)]
ATTENTION = {"local_attention": "local_attention", "rollout": "rollout_step"}  # systems whose op has not every backend
COMPILED = {(14, 384, 3), (14, 768, 3)}  # (W, C, K) where torch.compile is a baseline: each takes seconds to compile
FIELDS = ["device", "torch", "triton", "commit", *Problem._fields, "variant", "how", "median_ms", "q25_ms", "q75_ms", "peak_bytes", "note"]


def problems(tiny: bool) -> Iterator[Problem]:
    """Most telling first: the run may be cut off."""
    shapes, widths = ([(2, 4, 5)], [24]) if tiny else (SHAPES, [WIDTHS[k] for k in "SBT"])
    for (B, H, W), C, K in product(shapes, widths, (3, 5, 7)):
        for mode in ("fwd", "dw", "fwdbwd"):
            yield Problem("token_dwconv", mode, B, H, W, C, K, "bfloat16")
    if tiny:
        shapes, widths = [(2, 4, 5)], [192]
    systems_ = ("life_qkv", "localvit_ffn", "dw_shortcut", "dw_shortcut_block", "life_attention", "local_attention", "rollout")
    for system, (B, H, W), C, mode in product(systems_, shapes, widths, ("fwd", "fwdbwd")):
        if C % 64 == 0 and (system, mode) != ("rollout", "fwdbwd"):
            yield Problem(system, mode, B, H, W, C, 3 if system == "local_attention" else 0, "bfloat16")


def backends(device: str) -> list[str]:
    """What lifeops can run with there."""
    return ["cpu"] if device == "cpu" else ["triton", "cuda"]


def _compiled(p: Problem, device: str) -> dict[str, Callable]:
    """torch.compile of the eager path and of the unrolled one, for the forward pass of a few problems."""
    if p.system != "token_dwconv" or p.mode != "fwd" or (p.W, p.C, p.K) not in COMPILED:
        return {}
    with torch.device(device):
        x = torch.randn(p.B, p.P + p.H * p.W, p.C, dtype=torch.bfloat16)
        w = torch.randn(p.C, 1, p.K, p.K, dtype=torch.bfloat16)
    whole, unrolled = torch.compile(eager_dwconv), torch.compile(shift_and_add)
    return {"compiled": lambda: whole(x, w, p), "compiled_shifts": lambda: unrolled(x, w, p)}


def _under(backend: str, fn: Callable) -> Callable:
    def run():
        with lifeops.use_backend(backend):
            return fn()

    return run


def variants(p: Problem, device: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """What is timed, and why a backend of lifeops is not."""
    with torch.device(device):
        built, check = systems.build(p)
    ours = built.pop("lifeops")
    built = {{"onednn": "cudnn"}.get(k, k): v for k, v in built.items() if k not in ("compiled", "plain_conv1x1")}
    found, notes = {}, {}
    for backend in backends(device):
        registry.load(backend)
        if p.system in ATTENTION and backend not in registry.ops[ATTENTION[p.system]].impls:
            notes[f"lifeops_{backend}"] = "no kernels"
            continue
        try:
            _under(backend, check)()
            _under(backend, ours)()
        except (AssertionError, RuntimeError) as error:  # lifeops.NotSupported is a RuntimeError
            notes[f"lifeops_{backend}"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        found[f"lifeops_{backend}"] = _under(backend, ours)
    return {**found, **built, **_compiled(p, device)}, notes


class Rows:
    """A CSV file that gets every row as soon as there is one."""

    def __init__(self, path: Path, device: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, FIELDS, restval="")
        self.writer.writeheader()
        try:
            import triton

            version = triton.__version__
        except ImportError:
            version = "none"
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self.facts = {"device": name, "torch": torch.__version__, "triton": version, "commit": commit()}

    def add(self, p: Problem, variant: str, how: str, time=None, peak=None, note=""):
        row = {**self.facts, **p._asdict(), "variant": variant, "how": how, "note": note}
        if time is not None:
            row.update(median_ms=round(time.median, 5), q25_ms=round(time.q25, 5), q75_ms=round(time.q75, 5))
        if peak is not None:
            row["peak_bytes"] = peak
        self.writer.writerow(row)
        self.file.flush()


def measure(p: Problem, c: timing.Clock, rows: Rows) -> None:
    """One problem: what is not supported, then every variant."""
    runs, notes = variants(p, c.device)
    for name, note in notes.items():
        rows.add(p, name, "none", note=note)
    time_all(p, runs, c, rows)


def time_all(p: Problem, runs: dict[str, Callable], c: timing.Clock, rows: Rows) -> None:
    """Eager calls behind a flushed cache, CUDA graphs, and peak memory."""
    peaks = {name: timing.peak_bytes(fn, c.device) for name, fn in runs.items()}
    for name, t in timing.interleaved(runs, c).items():
        rows.add(p, name, "eager", t, peaks[name])
    graphs = {name: timing.captured(fn, c.device) for name, fn in runs.items() if not name.startswith("compiled")}
    graphs = {name: fn for name, fn in graphs.items() if fn is not None}
    if graphs:
        for name, t in timing.interleaved(graphs, c).items():
            rows.add(p, name, "graph", t, peaks[name])


def models(tiny: bool, device: str) -> Iterator[tuple[Problem, dict[str, Callable]]]:
    """Training steps and inference of the library's ViT-T and ViT-S models in bfloat16, each beside its plain host."""
    for size in ("tiny",) if tiny else ("tiny", "small"):
        yield from _models(size, tiny, device)


def _models(size: str, tiny: bool, device: str) -> Iterator[tuple[Problem, dict[str, Callable]]]:
    from lifeops.models import deit, dw_shortcut, localvit
    from lifeops.nn import LifeAttention

    side, depth, B = (4, 2, 2) if tiny else (14, 12, 256)
    width, heads = {"tiny": (192, 3), "small": (384, 6)}[size]
    host = {"img_size": 16 * side, "patch_size": 16, "num_classes": 100, "depth": depth, "embed_dim": width, "num_heads": heads}
    makers = {
        "plain": lambda: deit.VisionTransformer(**host),
        "life": lambda: deit.VisionTransformer(attn=LifeAttention, **host),
        "localvit": lambda: localvit(**host),
        "dw_plain": lambda: dw_shortcut(f"vit_{size}", every=None, **host),
        "dw_shortcut": lambda: dw_shortcut(f"vit_{size}", **host),
    }
    for mode in ("fwd", "fwdbwd"):
        runs = {}
        for system, make in makers.items():
            with torch.device(device):
                model = make().to(torch.bfloat16).train(mode == "fwdbwd")
                images = torch.randn(B, 3, 16 * side, 16 * side, dtype=torch.bfloat16)
            runs[system] = _step(model, images, mode)
        yield Problem("model", mode, B, side, side, width, 0, "bfloat16"), runs


def _step(model, images, mode: str) -> Callable:
    if mode == "fwd":
        return torch.no_grad()(lambda: model(images))
    parameters = [q for q in model.parameters() if q.requires_grad]
    return lambda: torch.autograd.grad(model(images).float().logsumexp(-1).sum(), parameters)


def run_ops(args, c: timing.Clock) -> int:
    rows, start, failed = Rows(args.out / f"{args.stage}.csv", c.device), time.perf_counter(), 0
    for p in problems(args.tiny):
        if time.perf_counter() - start > args.seconds:
            print(f"stopped before {p.system} {p.mode} {p.name}: {args.seconds} s are over", flush=True)
            break
        try:
            measure(p, c, rows)
        except Exception as error:
            failed += 1
            rows.add(p, "all", "none", note=f"{type(error).__name__}: {str(error)[:200]}")
        print(f"{time.perf_counter() - start:6.1f} s  {p.system} {p.mode} {p.name}", flush=True)
    return failed


def run_models(args, c: timing.Clock) -> int:
    rows, start = Rows(args.out / f"{args.stage}.csv", c.device), time.perf_counter()
    for p, runs in models(args.tiny, c.device):
        time_all(p, runs, c, rows)
        print(f"{time.perf_counter() - start:6.1f} s  {p.system} {p.mode} {p.name}", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("ops", "models"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=150, help="no new problem is started after these")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: tiny sizes")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench.gpu: no CUDA device; `--device cpu --tiny` rehearses the run")
    registry.load("reference")
    c = timing.clock(args.device, 0.02 if args.tiny else 0.25)
    return (run_ops if args.stage == "ops" else run_models)(args, c)


if __name__ == "__main__":
    raise SystemExit(main())
