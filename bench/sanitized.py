"""Tiny calls of every CUDA kernel, for compute-sanitizer: `compute-sanitizer --tool racecheck python -m bench.sanitized --seconds 20`.

Inputs are made on the CPU and copied, for every kernel of torch's is watched as well; with PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor
is an allocation of its own, whose ends memcheck sees. In turn a call of every op, bfloat16 before float32, until the time is over.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import zip_longest

import torch

from lifeops import registry, testing, torchlib

DTYPES = (torch.bfloat16, torch.float32)


def calls(backend: str) -> Iterator[tuple[registry.Op, object, torch.dtype]]:
    """Tiny cases, the first of every op and dtype before the second of any."""
    each: dict[tuple[torch.dtype, str], list] = {}
    for op, sample, dtype in testing.cases(backend, tiny_only=True, dtypes=DTYPES):
        each.setdefault((dtype, op.name), []).append((op, sample, dtype))
    in_turn = [each[key] for key in sorted(each, key=lambda key: DTYPES.index(key[0]))]
    yield from (case for together in zip_longest(*in_turn) for case in together if case is not None)


def moved(args: tuple, device: str) -> tuple:
    """``args`` with every tensor's whole storage on ``device`` and its strides kept, by copies alone."""
    return tuple(_moved(a, device) if isinstance(a, torch.Tensor) else a for a in args)


def _moved(t: torch.Tensor, device: str) -> torch.Tensor:
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return whole.to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


def run(backend: str, device: str, seconds: float) -> dict[str, int]:
    """How many calls of each op ran."""
    start, ran = time.monotonic(), {}
    for op, sample, dtype in calls(backend):
        if time.monotonic() - start > seconds:
            print(f"stopped before {op.name} {sample.name} {dtype}: {seconds:.0f} s are over", flush=True)
            break
        args = moved(testing.make(op, sample, dtype, backend=backend), device)
        if not registry.reasons_against(op, backend, op.problem(*args)):
            torchlib.overload(op)(*args)
            ran[op.name] = ran.get(op.name, 0) + 1
    return ran


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitized", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="no new call is made after these")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench.sanitized: no CUDA device")
    ran = run("cuda", "cuda", args.seconds)
    torch.cuda.synchronize()
    print(f"{sum(ran.values())} calls: {ran}")
    return 0 if ran else 1


if __name__ == "__main__":
    raise SystemExit(main())
