"""What the library says, and what it shows, where few calls lead: refusals of modules and of whole calls, printed modules and problems."""

import re

import pytest
import torch
from torch import nn

import lifeops
from lifeops import init, registry, testing
from lifeops.arguments import got
from lifeops.geometry import Grid
from lifeops.models import VisionTransformer
from lifeops.nn.eager_life import EagerLifeAttention, EagerLifeQKV

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
IMAGES = torch.zeros(1, 3, 32, 32)


def _two_kernels_one_norm():
    module = lifeops.nn.DWShortcut(6, (3, 5), 1)
    del module.batchnorms[1]
    return module(torch.ones(1, 7, 6), torch.ones(1, 7, 6), grid=(2, 3))


def _rollout(**options):
    return lifeops.rollout(VisionTransformer(**VIT).eval(), IMAGES, **options)


CALLS = {
    "vit, heads": (lambda: VisionTransformer(**{**VIT, "num_heads": 5}), "embed_dim must be a multiple of num_heads 5, got 48"),
    "vit, tokens": (lambda: VisionTransformer(**VIT, class_token=False, dist_token=True), "dist_token needs class_token"),
    "eager qkv, dim": (lambda: EagerLifeQKV(16), "EagerLifeQKV: dim must be a multiple of 3 (one third per scale), got 16"),
    "eager qkv, key": (lambda: EagerLifeQKV(12, aux_key="x"), "EagerLifeQKV: aux_key must be one of"),
    "eager attention": (lambda: EagerLifeAttention(12, 5), "EagerLifeAttention: dim must be a multiple of num_heads 5, got 12"),
    "life, dim": (lambda: lifeops.nn.LifeAttention(2, 1), "LifeAttention: three scales need a dim of at least 3, got 2"),
    "shortcut": (_two_kernels_one_norm, "DWShortcut: convs and batchnorms must be as many for each of 1 shortcuts, got 2 and 1"),
    "explain, arguments": (lambda: lifeops.explain(nn.Linear(2, 2), 1), "explain: a module is explained without further arguments"),
    "explain, module": (lambda: lifeops.explain(nn.Linear(2, 2)), "explain: Linear has no module of lifeops inside"),
    "use_grid": (lambda: lifeops.use_grid(nn.Linear(2, 2), (1, 1)).__enter__(), "use_grid: Linear has no module of lifeops that asks"),
    "rollout, classes": (lambda: _rollout(targets="hard", classes="1"), "classes must be ints in a list or tuple, or None, got '1'"),
    "rollout, targets": (lambda: _rollout(targets=torch.ones(1, 17) * 1j), "targets must be real weights with memory, got torch.complex64"),
    "rollout, logits": (
        lambda: _rollout(targets="soft", token_logits=torch.ones(1, 16, 2) * 1j),
        "token_logits must be real and dense, got torch.complex64",
    ),
    "rollout, prefix": (lambda: _rollout(num_prefix_tokens=3), "3 prefix tokens and a 4 x 4 grid are 19 tokens, the layers have 17"),
    "rollout, prefix unchecked": (
        lambda: _rollout(num_prefix_tokens=3, verify=False),
        "rollout: 3 prefix tokens and a 4 x 4 grid are 19 tokens, the layers have 17 (give num_prefix_tokens=…; turn patch dropout off)",
    ),
    "impulse": (
        lambda: init.impulse_qk(torch.full((6, 8), torch.nan), grid=(2, 3), num_heads=2, head_dim=4),
        "impulse_qk: position_embedding must be finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_message(name):
    call, message = CALLS[name]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call()


SHOWN = {
    "grid": (Grid(4, 6, 2), "2 + 4*6"),
    "life": (lifeops.nn.LifeQKV(12, 3), "LifeQKV(\n  dim=12, num_heads=3, num_prefix_tokens=1, aux_key='multiscale'"),
    "shortcut": (lifeops.nn.DWShortcut(6, 3, 2), "DWShortcut(\n  dim=6, num_prefix_tokens=2"),
    "local": (lifeops.nn.LocalAttention(2, 1), "LocalAttention(\n  num_heads=1, num_prefix_tokens=1"),
    "ffn": (lifeops.nn.LocalityFeedForward(6, 12), "LocalityFeedForward(\n  dim=6, hidden_dim=72, num_prefix_tokens=1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_shown(name):
    value, text = SHOWN[name]
    assert text in (str(value) if name == "grid" else repr(value))


def test_values_in_messages():
    """Numbers, names and short tuples as they are written, of long ones the beginning; of all else the kind."""
    assert [got(v) for v in (3, "a", None, (1, 2), {}, nn.Linear)] == ["3", "'a'", "None", "(1, 2)", "dict", "type"]
    assert got("x" * 200) == "'" + "x" * 99 + "…"
    assert got("x" * 98) == "'" + "x" * 98 + "'"
    assert got(10**5000) == "a huge int"
    assert got(torch.ones(2, 3)) == "a tensor (2, 3), layout torch.strided"
    assert got(torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)) == "a nested tensor"


def test_the_policy_tells_wrong_results():
    """lifeops.testing: a result that is off, of another dtype or shape, or not exact where it has to be, is an AssertionError."""
    op = registry.ops["token_dwconv"]
    args = testing.make(op, next(s for s in op.samples() if s.tiny), torch.float32, backend="reference", integers=True)
    y = op.reference(*args)
    testing.check(op, args, y), testing.check_exact(op, args, y)
    dtypes = "output 0 has dtype torch.float64, expected torch.float32"
    for wrong, message in ((y + 1, "output 0 is off by 1.000e+00, allowed "), (y.double(), dtypes)):
        with pytest.raises(AssertionError, match=f"^token_dwconv: {re.escape(message)}"):
            testing.check(op, args, wrong)
    with pytest.raises(AssertionError, match=r"^shape "):
        testing.check(op, args, y[:, 1:])
    wrong = y.clone()
    wrong.view(-1)[:2] += 1
    with pytest.raises(AssertionError, match=f"^token_dwconv: output 0 differs at 2 of {y.numel()} places"):
        testing.check_exact(op, args, wrong)
    nan = y.clone()
    nan.view(-1)[0] = torch.nan
    with pytest.raises(AssertionError, match="off by inf"):
        testing.check(op, args, nan)
