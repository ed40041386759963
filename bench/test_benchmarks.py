"""The problems of `python -m bench` as a pytest-benchmark suite: `pytest bench --benchmark-only [--benchmark-compare]`.

Grouped by problem, one entry per variant, with peak memory (bytes) and FLOPs of a call in ``extra_info``.
"""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import systems
from bench.problems import problems
from lifeops.demo.measure import peak_memory

QUICK = [p for system in ("token_dwconv", "life_qkv", "life_attention") for p in problems(system, quick=True, dtypes=("float32",))]
CASES = [(p, v) for p in QUICK for v in ("lifeops", "eager", "onednn", "plain_linear", "plain_conv1x1")]


@functools.lru_cache(maxsize=1)
def _built(p):
    """The variants of one problem, checked once: a wrong result is not timed."""
    variants, check = systems.build(p)
    check()
    return variants


@pytest.mark.parametrize(("problem", "variant"), CASES, ids=[f"{p.system}-{p.mode}-{p.name}-{v}" for p, v in CASES])
def test_speed(benchmark, problem, variant):
    torch.set_num_threads(2)
    variants = _built(problem)
    if variant not in variants:
        pytest.skip(f"{problem.system} {problem.mode} has no variant {variant}")
    run = variants[variant]
    benchmark.group = f"{problem.system} {problem.mode} {problem.name}"
    with FlopCounterMode(display=False) as flops:
        run()
    benchmark.extra_info.update(peak_bytes=peak_memory(run), flops=flops.get_total_flops())
    benchmark.pedantic(run, rounds=9, warmup_rounds=2)
