"""A few tiny calls of every CUDA kernel, for compute-sanitizer: `compute-sanitizer --tool racecheck python -m bench.sanitized`."""

from __future__ import annotations

import torch

from lifeops import registry, testing, torchlib


def main() -> int:
    if not torch.cuda.is_available():
        raise SystemExit("bench.sanitized: no CUDA device")
    ran = 0
    for op, sample, dtype in testing.cases("cuda"):
        if dtype != torch.bfloat16 or not sample.tiny:
            continue
        args = testing.make(op, sample, dtype, backend="cuda", device="cuda")
        if not registry.reasons_against(op, "cuda", op.problem(*args)):
            torchlib.overload(op)(*args)
            ran += 1
    torch.cuda.synchronize()
    print(f"{ran} calls")
    return 0 if ran else 1


if __name__ == "__main__":
    raise SystemExit(main())
