"""The problems of `python -m bench` as a pytest-benchmark suite: `pytest bench --benchmark-only [--benchmark-compare]`.

Grouped by problem, one entry per variant, with peak memory (bytes) and FLOPs of a call in ``extra_info``.
"""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import systems
from bench.problems import SYSTEMS, problems
from lifeops.demo.measure import peak_memory

QUICK = [p for system in SYSTEMS for p in problems(system, quick=True, dtypes=("float32",))]
VARIANTS = {
    ("token_dwconv", "fwd"): ("lifeops", "eager", "onednn"),
    ("token_dwconv", "dw"): ("lifeops", "onednn"),
    ("token_dwconv", "fwdbwd"): ("lifeops", "eager"),
    ("life_qkv", "fwd"): ("lifeops", "eager", "plain_linear", "plain_conv1x1"),
    ("life_qkv", "fwdbwd"): ("lifeops", "eager", "plain_linear", "plain_conv1x1"),
    ("local_attention", "fwd"): ("lifeops", "sdpa", "eager"),
    ("local_attention", "fwdbwd"): ("lifeops", "sdpa", "eager"),
    ("life_attention", "fwd"): ("lifeops", "eager"),
    ("life_attention", "fwdbwd"): ("lifeops", "eager"),
    ("localvit_ffn", "fwd"): ("lifeops", "eager", "mlp"),
    ("localvit_ffn", "fwdbwd"): ("lifeops", "eager", "mlp"),
    ("dw_shortcut", "fwd"): ("lifeops", "eager"),
    ("dw_shortcut", "fwdbwd"): ("lifeops", "eager"),
    ("dw_shortcut_block", "fwd"): ("lifeops", "eager", "block"),
    ("dw_shortcut_block", "fwdbwd"): ("lifeops", "eager", "block"),
}
CASES = [(p, v) for p in QUICK for v in VARIANTS[p.system, p.mode]]


@functools.lru_cache(maxsize=1)
def _built(p):
    """The variants of one problem, checked once: a wrong result is not timed."""
    variants, check = systems.build(p)
    check()
    return variants


@pytest.fixture
def two_threads(benchmark):
    before = torch.get_num_threads()
    torch.set_num_threads(2 if benchmark.enabled else before)  # without timing the other core belongs to another worker
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("problem", "variant"), CASES, ids=[f"{p.system}-{p.mode}-{p.name}-{v}" for p, v in CASES])
def test_speed(benchmark, problem, variant):
    run = _built(problem)[variant]
    benchmark.group = f"{problem.system} {problem.mode} {problem.name}"
    with FlopCounterMode(display=False) as flops:
        run()
    benchmark.extra_info.update(peak_bytes=peak_memory(run), flops=flops.get_total_flops())
    benchmark.pedantic(run, rounds=9, warmup_rounds=2)
