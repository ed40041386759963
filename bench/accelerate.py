"""`python -m bench accelerate`: each kind of module that ``lifeops.accelerate`` knows beside the original.

The inputs, memory layout included, are those that the module gets from a random image. Both run in turn in one process, on one thread,
whose own time counts, with an allocator that keeps freed memory; docs/accelerate.md has the table between two marks.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import lifeops
from bench import rows
from bench.measure import WARM_ALLOCATOR, interleaved
from bench.timm_systems import timm_class
from lifeops.hosts.token_convs import ENTRIES
from lifeops.integrations.token_convs import TokenConv

PAGE = Path(__file__).parent.parent / "docs" / "accelerate.md"
MARK = "<!-- measured -->\n{}<!-- /measured -->"
TIMM = {
    "twins_peg": "twins_pcpvt_small", "coat_cpe": "coat_lite_mini", "coat_crpe": "coat_lite_mini", "pvt_v2_ffn": "pvt_v2_b2",
    "xcit_lpi": "xcit_small_12_p16_224", "davit_cpe": "davit_tiny", "edgenext_block": "edgenext_small", "tiny_vit_conv": "tiny_vit_5m_224",
    "focalnet_level": "focalnet_tiny_lrf",
}  # fmt: skip
CHANNELS_LAST = {"tiny_vit_conv"}  # hosts whose maps are tokens in memory only in torch's channels-last format
HF = {"pvt_v2_ffn_hf": ("PvtV2Config", "PvtV2Model", {}), "segformer_ffn": ("SegformerConfig", "SegformerModel", {})}


class Row(NamedTuple):
    """Ratios original / lifeops, medians: above 1 lifeops is faster."""

    kind: str
    host: str
    path: str
    shape: tuple[int, ...]
    kernel: str
    infer: float
    train: float


def _model(kind: str) -> tuple[str, torch.nn.Module]:
    if kind in TIMM:
        timm_class("twins_pos_conv")  # makes timm importable
        import timm

        return TIMM[kind], timm.create_model(TIMM[kind])
    import transformers

    config, model, options = HF[kind]
    return model, getattr(transformers, model)(getattr(transformers, config)(**options))


def _inputs(model: torch.nn.Module, found: list[tuple[str, TokenConv]], image: torch.Tensor) -> dict[str, tuple]:
    """What each module is called with, by path."""
    seen, handles = {}, []

    def hook(path):
        return lambda _, args, kwargs: seen.__setitem__(path, (*args, *kwargs.values()))

    for path, module in found:
        handles.append(module.register_forward_pre_hook(hook(path), with_kwargs=True))
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return seen


def _train(module, args) -> object:
    """One call of forward and backward, for every input that is a tensor and all parameters."""
    args = tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
    with torch.no_grad():
        dy = torch.randn_like(module(*args))

    def run():
        torch.autograd.backward(module(*args), dy, inputs=[a for a in args if isinstance(a, torch.Tensor)] + [*module.parameters()])

    return run


def _infer(module, args):
    def run():
        with torch.no_grad():
            module(*args)

    return run


def measured(kind: str, seconds: float, batch: int = 2) -> list[Row]:
    """A row for the first module of every input shape and kernel size."""
    host, model = _model(kind)
    image = torch.randn(batch, 3, 224, 224)
    if kind in CHANNELS_LAST:
        host, model, image = f"{host}, channels last", *(t.to(memory_format=torch.channels_last) for t in (model, image))
    lifeops.accelerate(model.eval(), kinds=kind)
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, TokenConv)]
    seen, rows_of = _inputs(model, found, image), {}
    for path, ours in found:
        args, kernel = seen[path], "/".join(str(conv.kernel_size[0]) for conv in ours.convs())
        with torch.no_grad():
            if (args[0].shape, kernel) in rows_of or not ours.takes(args[0]):
                continue
        theirs = lifeops.revert(copy.deepcopy(ours))
        ratios = []
        for make in (_infer, _train):
            timing = interleaved({"theirs": [make(theirs, args)], "ours": [make(ours, args)]}, seconds, clock=time.process_time)
            ratios.append(timing["theirs"].median / timing["ours"].median)
        rows_of[args[0].shape, kernel] = Row(kind, host, path, tuple(args[0].shape), kernel, *ratios)
    return [*rows_of.values()]


def table(found: list[Row]) -> str:
    """The rows as Markdown, with the machine that they were measured on."""
    lines = [f"{rows.machine('cpu')}, torch {torch.__version__}, float32, one thread, evaluation mode.\n"]
    lines += ["| kind | module | input | K | forward | forward + backward |", "|---|---|---|---:|---:|---:|"]
    for r in found:
        lines.append(f"| `{r.kind}` | {r.host} `{r.path}` | {'x'.join(map(str, r.shape))} | {r.kernel} | {r.infer:.2f} | {r.train:.2f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m bench accelerate", description=__doc__)
    p.add_argument("--kind", choices=tuple(ENTRIES), action="append", help="default: all")
    p.add_argument("--seconds", type=float, default=1.0, help="per module and mode")
    p.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    args = p.parse_args(argv)
    if not WARM_ALLOCATOR.items() <= os.environ.items():  # read when a process starts
        command = [sys.executable, "-m", "bench", "accelerate", *argv]
        return subprocess.run(command, env={**os.environ, **WARM_ALLOCATOR}, check=False).returncode
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    for kind in args.kind or ENTRIES:
        found += measured(kind, args.seconds)
        print(*found[-4:], sep="\n", flush=True)
    if args.write:
        PAGE.write_text(re.sub(MARK.format(".*?"), lambda _: MARK.format(table(found)), PAGE.read_text(), flags=re.DOTALL))
    else:
        print(table(found))
    return 0
