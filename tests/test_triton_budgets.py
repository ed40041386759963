"""Machine code of the Triton kernels without a GPU: instructions per element, registers, spills, number of variants."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


def python(*arguments: str) -> str:
    """Output of a Python process that compiles: with TRITON_INTERPRET=1 there would be nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_compiled_for_hopper():
    """The exit status says whether spills, instructions or registers exceed the budget; `make budgets` compiles the rest."""
    names = "forward-3,forward-5,forward-7,dw-3,forward-3-pro,forward-3-train,forward-3-eval,forward-3-bwd,dw-3-pro,forward-3-gelu"
    costs = {c["name"]: c for c in json.loads(python("-m", "bench.budgets", "--arch", "90", "--json", "--only", names))}
    assert len(costs) == 10
    for cost in costs.values():
        assert cost["spilled"] == 0
        assert cost["shared"] <= 4096
    assert costs["forward-3-pro"]["per_element"] - costs["forward-3"]["per_element"] <= 9  # affine and h-swish, every row twice


def test_attention_compiles_for_amd_and_is_refused_before_ampere():
    """gfx950 has no TF32; the exit status says whether something failed. docs/gpus.md has all kernels and architectures."""
    table = python("-m", "bench.targets", "triton", "--only", "sm_75,gfx950", "--kernels", "fwd-198-64,rollout-stats").splitlines()
    assert table[0] == "| kernel | sm_75 | gfx950 |"
    assert re.fullmatch(r"\| `fwd-198-64` \| refused \| \d+ \|", table[2])
    assert re.fullmatch(r"\| `rollout-stats` \| \d+ \| \d+ \|", table[3])


GRIDS = """
import json
from bench import budgets
from lifeops.kernels import token_dwconv as f, token_dwconv_grad as g

grids = [(h, w) for h in (1, 2, 7, 13, 56) for w in (1, 3, 7, 8, 14, 16, 17, 28, 32, 64)]
kernels = [(f.token_dwconv_fwd_kernel, budgets.forward_arguments), (g.token_dwconv_bwd_dw_kernel, budgets.grad_arguments)]
print(json.dumps([
    [len(grids), len({budgets.specialisation(kernel, arguments(K, h, w, B=1 + h + w)) for h, w in grids})]
    for kernel, arguments in kernels for K in (3, 5, 7, 9)
]))
"""


def test_fifty_grids_need_at_most_four_variants():
    for grids, variants in json.loads(python("-c", GRIDS)):
        assert grids == 50
        assert variants <= 4


CONFIGS = """
import torch
from lifeops.kernels import _tile, token_dwconv as f, token_dwconv_grad as g

for C in (1, 3, 33, 64, 96, 192, 384, 768, 1000):
    for K in (1, 3, 5, 7, 9, 15):
        for dtype in _tile.TL_DTYPE:
            for config in (f.forward_config(14, 14, C, K, dtype), g.grad_config(14, 14, C, K, dtype)):
                assert config.WHOLE and config.SEGMENT == 14
                lanes, rest = divmod(config.BLOCK_R * config.BLOCK_C, 32 * _tile.WARPS)
                assert rest == 0 and lanes in (1, 2, 4)
assert f.forward_config(14, 14, 384, 3, torch.bfloat16).BLOCK_C == 128
assert f.forward_config(14, 14, 192, 3, torch.bfloat16).BLOCK_C == 64, "192 = 3 * 64 wastes nothing, 2 * 128 a quarter"
assert f.segments(14, 14, 3) == (14, True) and f.segments(1, 14, 3) == (16, False) and f.segments(7, 7, 3) == (8, False)
assert f.segments(32, 32, 3) == (16, False) and f.segments(16, 16, 7) == (16, True)
assert g.split(1, 3) == (1, 1) and g.split(10**6, 3)[0] <= g.PROGRAMS // 3
for tiles in range(1, 600):
    parts, iterations = g.split(tiles, 6)
    assert (parts - 1) * iterations < tiles <= parts * iterations
"""


def test_configurations_are_pure_functions_of_the_problem():
    python("-c", CONFIGS)


IMPORTS = """
import sys
import lifeops
assert "triton" not in sys.modules, "import lifeops must not import Triton"
sys.modules["triton"] = None
from lifeops import registry
import lifeops.kernels
assert "triton" in registry.unavailable("triton")
"""


def test_imports_without_triton():
    python("-c", IMPORTS)
