"""What a row says beside the time: bytes, FLOPs, memory and calls of one variant, and its share of the speed of light.

bytes: compulsory traffic, every input and parameter read once, every result written once (bwd: dy and the inputs in, gradients
out; fwdbwd: fwd plus bwd), equal to the registry's cost of an op. FLOPs: torch's counter with the ops' formulas, MAC = 2. Saved: the
storages autograd keeps for backward, parameters left out. Calls: operators dispatched (CPU) or kernels launched (GPU).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import device
from bench.baselines import does_same_work
from bench.case import Case, Inputs, Run, Variant, outputs, runner
from lifeops.model_cost import saved_bytes


class Facts(NamedTuple):
    bytes: int
    flops: int
    peak_bytes: int
    saved_bytes: int | None
    launches: int | None


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def traffic(v: Variant, mode: str, i: Inputs) -> int:
    with torch.no_grad():
        out = _size(outputs(v.forward(i)))
    read = _size(v.leaves(i))
    forward, backward = read + out, out + 2 * read
    return {"fwd": forward, "dw": forward, "bwd": backward, "fwdbwd": forward + backward}[mode]


def flops(v: Variant, mode: str, i: Inputs) -> int:
    """Counted on attention's plain form: its fused CPU kernel has no formula."""
    with sdpa_kernel(SDPBackend.MATH):
        run = runner(v, mode, i)
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops()


def saved(v: Variant, i: Inputs) -> int:
    """Bytes kept for backward, without parameters and weights."""
    return saved_bytes(lambda: v.forward(i), (*v.parameters, *(i[n] for n in v.reads if n in ("w", "b"))))


class _Calls(TorchDispatchMode):
    """Counts operator calls. Views and allocations count too: each is a trip through the dispatcher."""

    sees_lifeops = True

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def launches(run: Run, where: str) -> int:
    if where == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profiler.events())
    with _Calls() as calls:
        run()
    return calls.count


def facts(case: Case, name: str, i: Inputs, where: str = "cpu") -> Facts:
    """Of one call in the problem's mode. Who does the same work is given lifeops' bytes and FLOPs: torch's counter takes a depth-wise
    weight gradient for a dense one, and sees nothing of a compiled function, whose calls are unknown on the CPU too.
    """
    v, mode = case.variants[name], case.problem.mode
    run = runner(v, mode, i)
    counted = case.variants.get("lifeops", v) if does_same_work(name) else v
    calls = None if v.compiled and where == "cpu" else launches(run, where)
    kept = saved(v, i) if mode in ("bwd", "fwdbwd") else None
    return Facts(traffic(counted, mode, i), flops(counted, mode, i), device.peak_bytes(run, where), kept, calls)


def floors(bytes: float, flops: float, clone_gbs: float, gemm_tflops: float, issue_ms: float = 0.0) -> dict[str, float]:
    """Milliseconds that each ceiling alone allows."""
    return {"bytes": bytes / clone_gbs / 1e6, "flops": flops / gemm_tflops / 1e9, "issue": issue_ms}


def derived(row: dict) -> dict:
    """GB/s, TFLOP/s, the share of the speed of light and what binds, from a row's time, costs and ceilings."""
    ms = row["median_ms"]
    limits = floors(row["bytes"], row["flops"], row["clone_gbs"], row["gemm_tflops"], row["issue_ms"] or 0.0)
    bound = max(limits, key=limits.get)
    speeds = {"gbs": round(row["bytes"] / ms / 1e6, 2), "tflops": round(row["flops"] / ms / 1e9, 5)}
    return {**speeds, "share": round(limits[bound] / ms, 4), "bound": bound}
