"""Every error message of the public functions: what was expected and what came."""

import re

import pytest
import torch

import lifeops
from lifeops import registry


def _call(**changes):
    args = {
        "x": torch.randn(2, 198, 8), "weight": torch.randn(8, 1, 3, 3), "bias": None, "grid": (14, 14), "num_prefix_tokens": 2,
        "prefix": "keep", "residual": None, "backend": None,
    }  # fmt: skip
    args.update(changes)
    x, weight, bias = args.pop("x"), args.pop("weight"), args.pop("bias")
    return lifeops.token_dwconv(x, weight, bias, **args)


CASES = {
    "tokens": ({"x": torch.randn(2, 197, 8)}, ValueError, "x.shape[1] must be P + H*W = 2 + 14*14 = 198, got 197"),
    "patch_drop": ({"x": torch.randn(2, 100, 8)}, ValueError, "turn patch dropout off"),
    "grid_type": ({"grid": 14}, TypeError, "grid must be two ints (H, W), got 14"),
    "grid_length": ({"grid": (14, 14, 1)}, TypeError, "grid must be two ints (H, W), got (14, 14, 1)"),
    "grid_float": ({"grid": (14.0, 14)}, TypeError, "grid must be two ints"),
    "grid_negative": ({"grid": (-1, 14)}, ValueError, "grid must not be negative, got (-1, 14)"),
    "prefix_count": ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must not be negative, got -1"),
    "prefix_type": ({"num_prefix_tokens": "2"}, TypeError, "num_prefix_tokens must be an int, got '2'"),
    "prefix_mode": ({"prefix": "skip"}, ValueError, "prefix must be one of 'keep', 'zero', 'drop', got 'skip'"),
    "x_rank": ({"x": torch.randn(198, 8)}, ValueError, "x must have shape (B, N, C), got (198, 8)"),
    "x_dtype": ({"x": torch.ones(2, 198, 8, dtype=torch.int32)}, TypeError, "x.dtype must be float64, float32, float16 or bfloat16, got torch.int32"),
    "not_tensor": ({"x": [1.0]}, TypeError, "x and weight must be tensors, got list and Tensor"),
    "weight_rank": ({"weight": torch.randn(8, 3, 3)}, ValueError, "weight must have shape (C, 1, K, K) as in nn.Conv2d(groups=C), got (8, 3, 3)"),
    "weight_dense": ({"weight": torch.randn(8, 8, 3, 3)}, ValueError, "weight must have shape (C, 1, K, K)"),
    "weight_channels": ({"weight": torch.randn(9, 1, 3, 3)}, ValueError, "weight.shape[0] must be the 8 channels of the sequence or a multiple of them, got 9"),
    "weight_shared": ({"weight": torch.randn(3, 1, 3, 3)}, ValueError, "must be the 8 channels of the sequence, a multiple or a divisor of them, got 3"),
    "weight_heads": (
        {"x": torch.randn(2, 2, 198, 8), "weight": torch.randn(4, 1, 3, 3)}, ValueError,
        "weight.shape[0] must be 1, the 8 channels of a head or the 16 of all heads, got 4",
    ),
    "multiplier": (
        {"weight": torch.randn(16, 1, 3, 3)}, ValueError, 'prefix="keep" copies rows, which needs as many channels on both sides, got a channel multiplier of 2',
    ),
    "stride_zero": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride_pair": ({"stride": (2, 2, 2)}, ValueError, "stride must be an int or two, got (2, 2, 2)"),
    "padding": ({"padding": -1}, ValueError, "padding must not be negative, got -1"),
    "kernel_fits": ({"weight": torch.randn(8, 1, 17, 3), "padding": 1}, ValueError, "the kernel (17, 3) must fit the grid (14, 14) padded by (1, 1)"),
    "strided_residual": ({"stride": 2, "residual": torch.randn(2, 198, 8)}, ValueError, "residual must have the output's shape (2, 51, 8), got (2, 198, 8)"),
    "weight_dtype": ({"weight": torch.ones(8, 1, 3, 3, dtype=torch.int8)}, TypeError, "weight.dtype must be float64"),
    "weight_device": ({"weight": torch.randn(8, 1, 3, 3, device="meta")}, ValueError, "weight must be on the sequence's device cpu, got meta"),
    "bias_shape": ({"bias": torch.randn(7)}, ValueError, "bias must have shape (8,), got (7,)"),
    "residual_shape": ({"residual": torch.randn(2, 196, 8)}, ValueError, "residual must have the output's shape (2, 198, 8), got (2, 196, 8)"),
    "residual_dtype": ({"residual": torch.randn(2, 198, 8).double()}, TypeError, "residual.dtype must be x.dtype = torch.float32, got torch.float64"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of 'reference', 'cpu', 'cuda', 'triton' or None, got 'gpu'"),
    "backend_refuses": ({"backend": "cuda"}, lifeops.NotSupported, "token_dwconv: backend 'cuda' cannot run this problem"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_token_dwconv_message(name):
    changes, error, message = CASES[name]
    with pytest.raises(error, match=re.escape(message)):
        _call(**changes)


def test_message_names_the_op():
    with pytest.raises(ValueError, match=r"^token_dwconv: "):
        _call(grid=(13, 14))


def test_gradient_ops_check_their_own_arguments():
    dy, w = torch.randn(1, 5, 4), torch.randn(4, 1, 3, 3)
    with pytest.raises(ValueError, match=r"token_dwconv_bwd_dx: dy\.shape"):
        torch.ops.lifeops.token_dwconv_bwd_dx(dy, w, 2, 2, 2, "keep", "")
    with pytest.raises(ValueError, match="x and dy must agree"):
        torch.ops.lifeops.token_dwconv_bwd_dw(dy, torch.randn(2, 5, 4), 3, 2, 2, 1, "keep", torch.float32, None, "")


def _life(C=12, **changes):
    x = changes.pop("x", torch.randn(2, 22, C))
    w = {
        "w1": torch.randn(C, C), "b1": torch.randn(C), "dw2": torch.randn(C, 1, 3, 3), "pw2": torch.randn(C, C),
        "dw3": torch.randn(C, 1, 5, 5), "pw3": torch.randn(C, C),
    }  # fmt: skip
    w.update({k: changes.pop(k) for k in list(changes) if k in w})
    return lifeops.life_qkv(x, *w.values(), **{"grid": (4, 5), "num_prefix_tokens": 2, **changes})


LIFE = {
    "tokens": ({"x": torch.randn(2, 23, 12)}, ValueError, "life_qkv: x.shape[1] must be P + H*W = 2 + 4*5 = 22, got 23"),
    "rank": ({"x": torch.randn(22, 12)}, ValueError, "life_qkv: x must have shape (B, N, C), got (22, 12)"),
    "channels": ({"C": 2, "x": torch.randn(2, 22, 2)}, ValueError, "life_qkv: three scales need at least 3 channels, got C = 2"),
    "scale1": (
        {"C": 16, "x": torch.randn(2, 22, 16), "aux_key": "scale1"}, ValueError,
        "life_qkv: aux_key='scale1' needs a dim divisible by 3 (the authors' models), got 16",
    ),
    "aux_key": ({"aux_key": "cls"}, ValueError, "aux_key must be 'multiscale' or 'scale1', got 'cls'"),
    "layout": ({"layout": "heads"}, ValueError, "layout must be 'qkv' or 'scales', got 'heads'"),
    "w1": ({"w1": torch.randn(11, 12)}, ValueError, "w1 must have shape (12, 12) for C = 12, got (11, 12)"),
    "pw2": ({"pw2": torch.randn(12, 12, 3, 3)}, ValueError, "pw2 must have shape (C_out, C_in) or (C_out, C_in, 1, 1), got (12, 12, 3, 3)"),
    "dw3": ({"dw3": torch.randn(6, 1, 5, 5)}, ValueError, "dw3 must have shape (12, 1) + (K, K) for C = 12, got (6, 1, 5, 5)"),
    "dtype": ({"w1": torch.randn(12, 12).double()}, TypeError, "w1.dtype must be x.dtype = torch.float32, got torch.float64"),
}


@pytest.mark.parametrize("name", LIFE)
def test_life_qkv_message(name):
    changes, error, message = LIFE[name]
    with pytest.raises(error, match=re.escape(message)):
        _life(**changes)


def _attention(**changes):
    args = {"q": torch.randn(2, 3, 22, 4), "k": torch.randn(2, 3, 22, 4), "v": torch.randn(2, 3, 22, 4), "weight": None, "bias": None}
    args.update({name: changes.pop(name) for name in list(changes) if name in args})
    return lifeops.local_attention(*args.values(), **{"grid": (4, 5), "num_prefix_tokens": 2, **changes})


ATTENTION = {
    "not_tensor": ({"q": 1}, TypeError, "local_attention: q, k and v must be tensors, got int, Tensor, Tensor"),
    "rank": ({"q": torch.randn(2, 22, 12)}, ValueError, "q must have shape (B, h, N, d), got (2, 22, 12)"),
    "tokens": ({"grid": (4, 4)}, ValueError, "local_attention: q.shape[2] must be P + H*W = 2 + 4*4 = 18, got 22"),
    "dtype": ({"q": torch.ones(2, 3, 22, 4).int()}, TypeError, "q.dtype must be float64, float32, float16 or bfloat16, got torch.int32"),
    "other_dtype": ({"k": torch.randn(2, 3, 22, 4).double()}, ValueError, "k must be like q: (2, 3, 22, 4), torch.float32 on cpu, got (2, 3, 22, 4), torch.float64 on cpu"),
    "other_shape": ({"v": torch.randn(2, 3, 22, 8)}, ValueError, "v must be like q: (2, 3, 22, 4), torch.float32 on cpu, got (2, 3, 22, 8)"),
    "weight": ({"weight": torch.randn(4, 1, 3, 3)}, ValueError, "weight.shape[0] must be the 12 channels of the sequence, got 4"),
    "weight_even": ({"weight": torch.randn(12, 1, 2, 2)}, ValueError, "local_attention: the kernel size must be odd, got K = 2"),
    "bias": ({"weight": torch.randn(12, 1, 3, 3), "bias": torch.randn(4)}, ValueError, "bias must have shape (12,), got (4,)"),
    "bias_alone": ({"bias": torch.randn(12)}, ValueError, "bias belongs to weight, which is None"),
    "mask_shape": ({"attn_mask": torch.randn(5, 22, 22)}, ValueError, "attn_mask must have shape (B or 1, h or 1, N, N) = (2 or 1, 3 or 1, 22, 22), got (1, 5, 22, 22)"),
    "mask_rank": ({"attn_mask": torch.randn(1, 1, 1, 22, 22)}, ValueError, "attn_mask must have at most 4 dimensions, got (1, 1, 1, 22, 22)"),
    "mask_type": ({"attn_mask": "causal"}, TypeError, "attn_mask must be a tensor or None, got str"),
    "mask_dtype": ({"attn_mask": torch.ones(22, 22).int()}, TypeError, "attn_mask.dtype must be bool (True: attend) or floating point (added), got torch.int32"),
    "mask_device": ({"attn_mask": torch.ones(22, 22, device="meta")}, ValueError, "attn_mask must be on q's device cpu, got meta"),
    "key_mask_dtype": ({"key_mask": torch.ones(2, 22)}, TypeError, "key_mask.dtype must be bool (True: the token exists), got torch.float32"),
    "key_mask_shape": ({"key_mask": torch.ones(22).bool()}, ValueError, "key_mask must have shape (B, N) = (2, 22) on cpu, got (22,) on cpu"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    "negative_dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
    "backend": ({"backend": "cuda"}, lifeops.NotSupported, "local_attention: backend 'cuda' cannot run this problem"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
def test_local_attention_message(name):
    changes, error, message = ATTENTION[name]
    with pytest.raises(error, match=re.escape(message)):
        _attention(**changes)


def test_local_attention_gradient_checks_its_own_arguments():
    q, y, lse = torch.randn(1, 2, 5, 3), torch.randn(1, 5, 6), torch.randn(1, 2, 5)
    call = torch.ops.lifeops.local_attention_bwd
    rest = (None, None, None, 2, 2, 1, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"local_attention_bwd: dy must have shape \(B, N, C\) = \(1, 5, 6\)"):
        call(y[:, 1:], q, q, q, None, y, lse, *rest, False, "")
    with pytest.raises(ValueError, match=r"lse must have shape \(B, h, N\) = \(1, 2, 5\)"):
        call(y, q, q, q, None, y, lse[:, 1:], *rest, False, "")
    with pytest.raises(ValueError, match="only a floating-point attn_mask has a gradient"):
        call(y, q, q, q, None, y, lse, *rest, True, "")
    with pytest.raises(ValueError, match="seed must be given exactly where dropout_p > 0"):
        torch.ops.lifeops.local_attention(q, q, q, None, None, None, None, None, 2, 2, 1, 1.0, 0.5, True, "")


T = torch.zeros(1, 5, 4)  # a prefix token and a 2 x 2 grid
V, W3 = torch.zeros(4), torch.zeros(4, 1, 3, 3)
Q = torch.zeros(1, 2, 5, 2)
OPERATORS = {  # what only a call of the operator itself can get wrong
    "patches": ("channel_stats", (T, "none", 6, ""), "must have at least the 6 patch tokens, got 5"),
    "statistics": ("dw_shortcut_eval", (T, T, W3, None, V, None, V, V, 1e-5, 2, 2, 1, ""), "mean and var must both be given or both be None"),
    "kernel": ("token_dwconv_bwd_dw", (T, T, 4, 2, 2, 1, "keep", T.dtype, None, ""), "the kernel size must be odd, got K = 4"),
    "dropout": ("local_attention", (Q, Q, Q, None, None, None, None, None, 2, 2, 1, 1.0, 1.0, True, ""), r"dropout_p must be in \[0, 1\), got 1\.0"),
    "seed": (
        "local_attention", (Q, Q, Q, None, None, None, None, torch.zeros((), dtype=torch.int64, device="meta"), 2, 2, 1, 1.0, 0.5, True, ""),
        "seed must be on q's device cpu, got meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_message(name):
    op, args, message = OPERATORS[name]
    with pytest.raises(ValueError, match=f"^{op}: .*{message}"):
        registry.ops[op].check(*args)


def test_module_messages():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got dim = 10, num_heads = 3"):
        lifeops.nn.LifeAttention(10, 3)
    with pytest.raises(ValueError, match="aux_key='scale1' needs a dim divisible by 3"):
        lifeops.nn.LifeQKV(32, 4, aux_key="scale1")
    with pytest.raises(ValueError, match="aux_key must be 'multiscale' or 'scale1', got 'figure'"):
        lifeops.nn.LifeQKV(33, 3, aux_key="figure")
    with pytest.raises(ValueError, match="the grid is unknown"):
        lifeops.nn.LifeAttention(12, 3)(torch.randn(1, 5, 12))
