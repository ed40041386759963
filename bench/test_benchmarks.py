"""The problems of `python -m bench` as a pytest-benchmark suite: `pytest bench --benchmark-only [--benchmark-compare]`.

Grouped by problem, one entry per variant, with the row's other columns in ``extra_info``: compulsory bytes and FLOPs of a call,
peak memory, what is saved for backward, operator calls. A wrong result is not timed.
"""

import functools

import pytest
import torch

from bench import columns, module_check, optional, systems
from bench.case import check, inputs_of, runner
from bench.problems import SYSTEMS, TIMM, Problem, problems

QUICK = [p for system in SYSTEMS for p in problems(system, quick=True, dtypes=("float32",)) if p.mode != "bwd"]
PLAIN = {
    "life_qkv": ("plain_linear", "plain_conv1x1", "products"),
    "local_attention": ("sdpa",),
    "localvit_ffn": ("mlp",),
    "rollout": ("product",),
    "life_attention": ("plain",),
    "dw_shortcut_block": ("block",),
    "vit_life": ("plain",),
    "vit_localvit": ("plain",),
}


def variants(p: Problem) -> tuple[str, ...]:
    same = {"rollout": "naive"}.get(p.system, "eager")
    if p.system == "token_dwconv" and p.mode in ("fwd", "dw"):
        return ("lifeops", "eager", "onednn") if p.mode == "fwd" else ("lifeops", "onednn")
    return ("lifeops", same, *PLAIN.get(p.system, ()))


CASES = [(p, v) for p in QUICK for v in variants(p)]


@functools.lru_cache(maxsize=1)
def _built(p):
    """The variants of one problem and their inputs."""
    case = systems.case(p)
    return case, inputs_of(case, 1), {}


@pytest.fixture
def two_threads(benchmark):
    before = torch.get_num_threads()
    torch.set_num_threads(2 if benchmark.enabled else before)  # without timing the other core belongs to another worker
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("problem", "variant"), CASES, ids=[f"{p.system}-{p.mode}-{p.name}-{v}" for p, v in CASES])
def test_speed(benchmark, problem, variant):
    if problem.system in TIMM and not optional.installed("timm"):
        pytest.skip("timm is not installed")
    case, inputs, known = _built(problem)
    check(case, case.variants[variant], inputs, known)
    benchmark.group = f"{problem.system} {problem.mode} {problem.name}"
    benchmark.extra_info.update(columns.facts(case, variant, inputs)._asdict())
    benchmark.pedantic(runner(case.variants[variant], problem.mode, inputs), rounds=9, warmup_rounds=2)


@pytest.mark.parametrize("name", module_check.modules())
def test_module_check(benchmark, name):
    """What a fused module pays at every call to see that its layers are plain."""
    module = module_check.modules()[name]
    benchmark.group = "module_check"
    assert benchmark(module_check.is_fused, module)
