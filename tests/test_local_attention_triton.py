"""The Triton attention kernels without a GPU: what only they have in the interpreter, and what they compile to.

The registry's own cases run in the interpreter from tests/test_triton_ops.py; here the interpreter and the compiler each get a process
of their own. One check by hand: TRITON_INTERPRET=1 pytest -o "python_functions=check_*" tests/test_local_attention_triton.py
"""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from test_triton_budgets import python
from test_triton_ops import _interpreted

FILE = Path(__file__)
SAMPLES = ("past_a_tile", "no_keys", "padding_and_mask", "life_scale")


def test_in_the_interpreter():
    _interpreted(FILE.name, "", "-o", "python_functions=check_*")


def test_registry_cases_in_the_interpreter():
    _interpreted("test_ops.py", f"local_attention and test_oracle and float32 and ({' or '.join(SAMPLES)})")


@pytest.mark.parametrize(
    ("dtype", "has", "reasons"),
    [
        (torch.float16, (7, 5), ["attention needs compute capability 8.0, got 7.5"]),
        (torch.float32, (7, 5), ["attention needs compute capability 8.0, got 7.5"]),
        (torch.bfloat16, (7, 5), ["bfloat16 needs compute capability 8.0, got 7.5"]),
        (torch.float16, (8, 0), []),
        (torch.bfloat16, (12, 0), []),
        (torch.bfloat16, (9, 4), []),  # gfx942, as torch numbers it
    ],
)
def test_older_devices_are_refused_with_the_reason(dtype, has, reasons, monkeypatch):
    from lifeops.kernels import local_attention, token_dwconv
    from lifeops.ops.local_attention.spec import Problem

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has)
    problem = Problem(torch.device("cuda", 0), dtype, dtype, C=64, K=3, d=64, N=198, dropout=False)
    assert local_attention.supports(problem) == reasons
    assert token_dwconv.supports(problem) == [r for r in reasons if r.startswith("bfloat16")]


def test_precision_is_one_that_every_architecture_takes():
    """gfx950 has no TF32; it is asked for where it changes what is computed, float32 on NVIDIA."""
    from lifeops.kernels import local_attention, rollout_step

    assert {local_attention.precision(dtype) for dtype in local_attention.DTYPES} <= {"ieee", "widened"}
    assert [rollout_step.precision(t, hip=False) for t in (torch.float64, torch.float32)] == ["ieee", "tf32x3"]
    assert rollout_step.precision(torch.float32, hip=True) == "ieee"


def _problem(N, B=1, h=1, d=16, dtype=torch.float32):
    torch.manual_seed(0)
    return tuple(t.to(dtype) for t in torch.randn(B, N, 3, h, d).permute(2, 0, 3, 1, 4))


def _expected(q, k, v, dy, keep=None, mask=None):
    """(y, lse, dq, dk, dv, dmask) in float64 by autograd; ``keep`` multiplies the probabilities."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    bias = None if mask is None else mask.double().requires_grad_()
    s = leaves[0] @ leaves[1].transpose(-1, -2) * q.shape[-1] ** -0.5
    s = s if bias is None else s + bias
    p = s.softmax(-1)
    y = ((p if keep is None else p * keep) @ leaves[2]).transpose(1, 2).flatten(2)
    y.backward(dy.double())
    return y.detach(), s.logsumexp(-1).detach(), *(t.grad for t in leaves), None if bias is None else bias.grad


def _compare(qkv, dy, tolerance, keep=None, mask=None, seed=None, dropout_p=0.0):
    from lifeops.kernels.local_attention_grad import attention, attention_bwd

    settings = mask, None, seed, qkv[0].shape[-1] ** -0.5, dropout_p
    y, lse = attention(*qkv, *settings)
    *grads, dmask = attention_bwd(dy, *qkv, y, lse, *settings, mask is not None)
    for got, want in zip((y, lse, *grads, dmask), _expected(*qkv, dy, keep, mask), strict=True):
        if want is not None:
            assert (got.double() - want).abs().max() <= tolerance * max(1, want.abs().max())


@pytest.mark.parametrize("N", [1, 15, 16, 17, 33, 65])
def check_tile_edges(N, poison):
    qkv = _problem(N)
    _compare(qkv, torch.randn(1, N, 16), 1e-5)


@pytest.mark.parametrize("d", [1, 8, 24, 40])
def check_widths_of_heads(d, poison):
    """Whose last channels are masked."""
    _compare(_problem(18, 2, 2, d), torch.randn(2, 18, 2 * d), 1e-5)


@pytest.mark.parametrize("N", [65, 198, 256, 257])
def check_one_block_and_streaming_in_half_precision(N, poison):
    from lifeops.kernels._attention import forward_config

    one_block_of = {65: 128, 198: 208, 256: 256, 257: 0}
    keys = forward_config(N, 16, torch.float16, False).KEYS
    assert keys == one_block_of[N]
    qkv = _problem(N, dtype=torch.float16)
    _compare(qkv, torch.randn(1, N, 16).half(), 3e-3)


def check_a_mask_shared_by_images_and_heads(poison):
    for shape in ((1, 1, 18, 18), (2, 1, 18, 18), (1, 2, 18, 18)):
        _compare(_problem(18, 2, 2), torch.randn(2, 18, 32), 1e-5, mask=torch.randn(shape))


@pytest.mark.parametrize(("N", "dtype"), [(20, torch.float32), (34, torch.float32), (20, torch.float16)], ids=str)
def check_dropout(N, dtype):
    """The probabilities that forward keeps, read off an identity of values, are those that backward keeps."""
    from lifeops.kernels.local_attention_grad import attention

    seed, dropout_p, settings = torch.tensor([5]), 0.25, (None, None)
    zero, keep = torch.zeros(1, 2, N, 16, dtype=dtype), []
    for start in range(0, N, 16):
        v = torch.eye(N, dtype=dtype)[:, start : start + 16]
        v = torch.nn.functional.pad(v, (0, 16 - v.shape[1])).expand(1, 2, N, 16)
        keep.append(attention(zero, zero, v, *settings, seed, 1.0, dropout_p)[0].unflatten(2, (2, 16)).transpose(1, 2))
    keep = (torch.cat(keep, -1)[..., :N].double() * N).round(decimals=1 if dtype == torch.float16 else 3)
    kept = keep > 0
    assert abs(kept.double().mean() - 0.75) < 0.08
    assert not torch.equal(kept[0, 0], kept[0, 1])
    keep = kept / (1 - dropout_p)
    qkv = _problem(N, 1, 2, dtype=dtype)
    _compare(qkv, torch.randn(1, N, 32, dtype=dtype), 1e-5 if dtype == torch.float32 else 3e-3, keep, None, seed, dropout_p)


def check_nan_in_a_hidden_key(poison):
    from lifeops.kernels.local_attention_grad import attention, attention_bwd

    mask = torch.rand(1, 1, 18, 18) > 0.3
    mask[..., 7] = False
    for attn_mask in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        results = []
        for value in (0.0, float("nan")):
            q, k, v = (t.clone() for t in _problem(18))
            k[:, :, 7], v[:, :, 7] = value, value
            settings = attn_mask, None, None, 0.25, 0.0
            y, lse = attention(q, k, v, *settings)
            results.append((y, lse, *attention_bwd(torch.ones(1, 18, 16), q, k, v, y, lse, *settings, False)[:3]))
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True))


def check_samples_do_not_see_their_batch():
    from lifeops.kernels.local_attention import attention

    qkv = _problem(20, 3)
    together = attention(*qkv, None, None, None, 0.25, 0.0)
    alone = attention(*(t[1:2] for t in qkv), None, None, None, 0.25, 0.0)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


def check_reasons_against():
    from lifeops.kernels.local_attention import supports
    from lifeops.ops.local_attention.spec import Problem

    cpu, half = torch.device("cpu"), torch.bfloat16
    assert supports(Problem(cpu, half, half, 96, 3, 48, 198, True)) == []
    assert supports(Problem(cpu, half, None, 128, 0, 128, 100000, False)) == []
    assert supports(Problem(cpu, torch.float64, None, 64, 0, 64, 5, False)) == [
        "dtype must be float32, float16 or bfloat16, got torch.float64"
    ]
    assert supports(Problem(cpu, half, half, 256, 4, 256, 70000, True)) == [
        "K must be odd and at most 15, got 4", "heads must be at most 128 wide, got d = 256", "dropout needs N <= 65535, got 70000",
    ]  # fmt: skip


def test_compiled_within_budget():
    """No spills, shared memory within the device; `make budgets` compiles every variant."""
    command = "-m", "bench.attention_budgets", "--arch", "80", "90", "100", "--json", "--only", "fwd-198-64,dkv-198-64"
    rows = json.loads(python(*command))
    assert [(row["arch"], row["name"][:3]) for row in rows] == [(a, kind) for a in (80, 90, 100) for kind in ("fwd", "dkv")]
    assert all(row["spilled"] == 0 and row["registers"] <= 255 and row["shared"] <= 99 << 10 for row in rows)


VARIANTS = """
import torch
from bench import budgets
from lifeops.kernels import _attention as a, local_attention as f, local_attention_grad as g
from bench.attention_budgets import launch

def variants(kind, tokens, extra=""):
    return len({(budgets.specialisation(kernel, arguments), config.warps) for kernel, config, arguments in
                (launch(kind, N, 64, extra) for N in tokens)})

assert variants("fwd", range(2, 300)) == len(a.ONE_BLOCK) + 1
assert variants("dq", range(2, 300)) <= 3 and variants("dkv", range(2, 300)) <= 3
assert [a.one_block(n) for n in (1, 16, 17, 49, 64, 65, 197, 208, 209, 256, 257)] == [16, 16, 32, 64, 64, 128, 208, 208, 256, 256, 0]
assert [a.width(d) for d in (1, 16, 20, 48, 64, 80, 128)] == [16, 16, 32, 64, 64, 128, 128]
"""


def test_token_counts_share_their_variants():
    python("-c", VARIANTS)
