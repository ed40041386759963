"""NaN and infinities go where the reference puts them, on every backend and instruction set.

Weights are left out: torch's own conv2d multiplies the zero padding with a NaN tap in float64 and does not in float32 (oneDNN).
"""

import os

import pytest
import torch

import lifeops
from lifeops import config, registry, testing, torchlib
from lifeops.ops.channel import activations

BACKEND = os.environ.get("LIFEOPS_TEST_BACKEND", "cpu")
INTERPRETED = BACKEND == "triton"
ISAS = ["auto"] if INTERPRETED else ["baseline", "avx2", "avx512"]
DTYPES = [torch.float32, torch.bfloat16] if INTERPRETED else [torch.float64, torch.float32, torch.float16, torch.bfloat16]
inf, nan = torch.inf, torch.nan
EDGES = [inf, -inf, nan, 3e4, -3e4, 6.0, 0.0, 3.0, -3.0, 40.0, -40.0, -1e-3, 2.0, -5.0]
registry.load(BACKEND)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setattr(config, "settings", config.settings._replace(cpu_isa=request.param))


def _kind(t):
    """2 where NaN, 1 and -1 at the infinities, else 0."""
    return torch.where(t.isnan(), 2, torch.where(t.isinf(), t.sign(), 0))


def _same(got, expected, dtype):
    assert torch.equal(_kind(got), _kind(expected)), (got[_kind(got) != _kind(expected)][:4], expected[_kind(got) != _kind(expected)][:4])
    tolerance = 8 * testing.EPS[dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


# ------------------------------------------------------------------------------------------------ activations


@pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_activations(act, dtype, isa):
    """Values and derivatives in the channel passes, the prologue, the epilogue and the prologue's gradient; vectors and their tails."""
    x = torch.tensor(EDGES).to(dtype)[None, :, None].repeat(1, 1, 17)
    n, ones, weight = len(EDGES), torch.ones_like(x), torch.ones(17, 1, 1, 1, dtype=dtype)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    value, slope = activations.value(wide, act), activations.derivative(wide, act)
    ops, place = torch.ops.lifeops, (1, n, 0, "keep")
    _same(ops.channel_act(x, None, None, None, None, act, n, BACKEND), value.to(dtype), dtype)
    _same(ops.channel_act_grad(ones, x, *[None] * 6, act, n, BACKEND), slope.to(dtype), dtype)
    nothing = None, None, "none"
    for around in ((None, None, act, *nothing), (*nothing, None, None, act)):
        _same(ops.token_dwconv_act(x, weight, None, *around, None, *place, False, False, BACKEND)[0], value.to(dtype), dtype)
    dx = ops.token_dwconv_act_bwd_dx(ones, x, weight, None, None, act, None, None, *place, BACKEND)[0]
    _same(dx, slope.to(dtype), dtype)


@pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", "gelu"])
def test_the_reference_is_torch(act):
    """Where torch's kernels agree with themselves: in float64, whole vectors. GELU in float32 too, but for oneDNN's NaN at inf."""
    x = torch.tensor(EDGES, dtype=torch.float64).repeat_interleave(64).requires_grad_()
    y = getattr(torch.nn.functional, act)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    _same(activations.value(x.detach(), act), y.detach(), torch.float64)
    _same(activations.derivative(x.detach(), act), dx, torch.float64)
    assert torch.equal(_kind(activations.value(x.detach().float(), act)), _kind(y.detach()))


# ------------------------------------------------------------------------------------------------ every operator


def _names(op):
    return [a.strip().split(" ")[-1] for a in op.schema[op.schema.index("(") + 1 : op.schema.index(") ->")].split(",")]


def _planted(op, sample, dtype, value):
    """The arguments of ``sample``, one at a time with one ``value`` in it."""
    args = testing.make(op, sample, dtype, backend=BACKEND)
    for i, (name, t) in enumerate(zip(_names(op), args, strict=True)):
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() and name not in ("weight", "dw2", "dw3"):
            planted = t.clone()
            at = torch.randint(t.numel(), (1,), generator=torch.Generator().manual_seed(i)).item()
            planted[torch.unravel_index(torch.tensor(at), t.shape)] = value
            yield name, (*args[:i], planted, *args[i + 1 :])


def _judged(op):
    """Outputs whose padded taps do not matter: the weight gradient of an infinite dy is NaN there or 0."""
    known = {"token_dwconv_bwd_dw": (1,), "token_dwconv_act_bwd_dw": (1,), "token_dwconv_act_bwd": (0, 2), "dw_shortcut_bwd": (0, 2),
             "token_dwconv_strided_bwd_dw": (1,)}  # fmt: skip
    return known.get(op.name, range(9))


OPS = [name for name in registry.ops if not name.startswith("local_attention") and BACKEND in registry.ops[name].impls]


@pytest.mark.parametrize("name", [n for n in OPS if n != "life_qkv" or not INTERPRETED])
def test_every_operator(name, isa):
    op = registry.ops[name]
    samples = [s for s in op.samples() if s.tiny][: 1 if INTERPRETED else 100]
    for sample in samples:
        for value in (inf,) if INTERPRETED else (inf, -inf, nan):
            for argument, args in _planted(op, sample, torch.float32, value):
                if op.is_empty(*args):
                    continue
                got, expected = testing.tensors(torchlib.overload(op)(*args)), testing.tensors(op.reference(*args))
                for i in set(_judged(op)) & set(range(len(got))) - set(op.kept):
                    assert torch.equal(_kind(got[i]), _kind(expected[i])), (sample.name, argument, value, i)


@pytest.mark.parametrize("K", [3, 5])
def test_one_patch_reaches_its_window(K, isa):
    """Its K x K neighbours in its image and channel, forward and back, through every activation."""
    H, W, P, C, at = 5, 16, 1, 19, (2, 7)
    x = torch.randn(3, P + H * W, C)
    x[1, P + at[0] * W + at[1], 4] = nan
    expected = torch.zeros(3, H, W, C, dtype=torch.bool)
    expected[1, at[0] - K // 2 : at[0] + K // 2 + 1, at[1] - K // 2 : at[1] + K // 2 + 1, 4] = True
    weight, place = torch.randn(C, 1, K, K), {"grid": (H, W), "num_prefix_tokens": P, "backend": BACKEND}
    for act in ("relu6",) if INTERPRETED else activations.ACTS:
        for around in ({"prologue": lifeops.ChannelAct(act=act)}, {"epilogue": lifeops.ChannelAct(act=act)}):
            y = lifeops.token_dwconv(x, weight, **place, **around)
            assert torch.equal(y[:, P:].isnan(), expected.flatten(1, 2)), (act, around)
            assert y[:, :P].isfinite().all()
    dx = torch.ops.lifeops.token_dwconv_bwd_dx(x, weight, H, W, P, "keep", BACKEND)
    assert torch.equal(dx[:, P:].isnan(), expected.flatten(1, 2))


def test_window_sums_of_an_infinite_border(isa):
    """The DW shortcut's bias: dy counts for the taps that see it, and what others sum stays finite."""
    if INTERPRETED:
        pytest.skip("one operator on CPU alone")
    H, W, C, K = 6, 7, 18, 3
    x, dy, mean = torch.zeros(2, H * W, C), torch.randn(2, H * W, C), torch.zeros(C)
    dy[1, 3 * W, 5] = inf  # the first column: taps left of the middle do not see it
    affine = torch.stack((torch.zeros(C), torch.ones(C), torch.ones(C)))  # dw is the window sums alone
    dw = torch.ops.lifeops.dw_shortcut_bwd(dy, x, torch.randn(C, 1, K, K), mean, affine, H, W, 0, False, BACKEND)[1]
    assert dw[:, 0].isnan().sum() <= K * K
    others = [c for c in range(C) if c != 5]
    assert dw[others].isfinite().all()


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("head", [0, 1, 2])
def test_rollout_keeps_nan(fusion, value, head, isa):
    """As torch.amax and amin do, whichever head has it; a query without weight adds nothing."""
    torch.manual_seed(0)
    q, k, r = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8), torch.rand(2, 2, 9)
    q[1, head, 4, 2] = value
    for ratio in (0.0, 0.3):
        run = lambda backend: lifeops.rollout_step(r, q, k, head_fusion=fusion, discard_ratio=ratio, backend=backend)  # noqa: B023, E731
        assert torch.equal(run(BACKEND).isnan(), run("reference").isnan())
        assert run(BACKEND)[1].isnan().all()
        assert run(BACKEND)[0].isfinite().all()
    r[:, :, 4] = 0
    assert lifeops.rollout_step(r, q, k, head_fusion=fusion, backend=BACKEND).isfinite().all()
    assert lifeops.rollout_step(r, q, k, head_fusion=fusion, backend="reference").isfinite().all()


@pytest.mark.parametrize("N", [1, 7, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_attention_shows_nan(N, dtype):
    """torch's CPU kernel gives 0 for a query of NaN among fewer than 16 keys, and for scores of inf in half precision."""
    if dtype == torch.float64 and INTERPRETED:
        pytest.skip("no kernel")
    torch.manual_seed(0)
    cases = (0, nan), (1, nan), (2, nan), (0, inf), (1, inf), (1, -inf)
    for which, value in cases[:1] if INTERPRETED else cases:
        qkv = [torch.randn(2, 2, N, 16).to(dtype) for _ in range(3)]
        qkv[which][1, 0, N // 2, 3] = value
        y, expected = (lifeops.local_attention(*qkv, grid=(1, N), backend=b) for b in (BACKEND, "reference"))
        assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.skipif(INTERPRETED, reason="a process of its own runs these")
def test_in_triton():
    pytest.importorskip("triton")
    from test_triton_ops import _interpreted

    selection = "(activations and float32) or (reaches and 3) or 1-nan-max or (shows and float32) or test_every_operator"
    assert _interpreted("test_nan.py", selection) >= 18
