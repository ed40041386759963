"""Views whose images, heads or tokens reach past 2^31 elements, on every backend at hand: offsets that are computed in 32 bits would read,
or write, somewhere else. The memory between them is never touched, so it takes none.

Triton's kernels run in its interpreter, in a process of its own; CUDA's on the host (see test_cuda_host.py).
"""

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import test_cuda_act_host as cuda_act
import test_cuda_channel_host as cuda_channel
import test_cuda_host as cuda
from cuda_tools import FwdParams
from fuzz.cases import Case, arguments, names
from lifeops import registry, testing, torchlib
from test_triton_ops import _interpreted

FAR = 2**31
BACKEND = os.environ.get("LIFEOPS_TEST_BACKEND", "cpu")
registry.load(BACKEND)
SEQUENCES = {"x", "dy", "residual", "block_output", "r", "q", "k", "v", "attn"}


def far(t: torch.Tensor, dim: int, step: int | None = None) -> torch.Tensor:
    """The values of ``t`` with a stride along ``dim`` such that its last index begins past ``FAR`` elements (or the stride ``step``)."""
    count = t.shape[dim]
    if count == 1:
        return t
    rest = t.numel() // count
    step = (-(-FAR // (count - 1)) // 64 + 1) * 64 + rest // 64 * 64 if step is None else step
    like = t.movedim(dim, 0).contiguous()
    memory = np.zeros((count - 1) * step + rest, dtype=f"i{t.element_size()}")  # pages that nobody writes to take no memory
    view = torch.from_numpy(memory).view(t.dtype).as_strided(like.shape, (step, *like.stride()[1:])).movedim(0, dim)
    return view.copy_(t)


def _given(name, dtype):
    """The arguments of a tiny call by name, three images and a grid that no two sizes of are equal."""
    sample = {"B": 3, "H": 2, "W": 3, "P": 1, "C": 9 if name == "life_qkv" else 8, "h": 2, "d": 16, "N": 21, "R": 2, "patches": 6, "K": 3}
    like = registry.ops[name].samples()[0]
    known = {*like._fields, *getattr(getattr(like, "base", None), "_fields", ())}
    case = Case(name, {n: v for n, v in sample.items() if n in known}, dtype, backend=BACKEND, seed=3)
    return dict(zip(names(registry.ops[name]), arguments(case), strict=True))


OPERATORS = [(name, dim) for name in registry.ops
             if BACKEND in registry.ops[name].impls and not name.startswith("norm_")  # which have no tokens
             for dim in range(3 if name.startswith(("local", "rollout")) else 2)]  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "dim"), OPERATORS)
def test_operators(name, dim, dtype):
    call, given = torchlib.overload(registry.ops[name]), _given(name, dtype)
    sequences = {n: far(t, dim) for n, t in given.items() if n in SEQUENCES and isinstance(t, torch.Tensor) and t.dim() > dim + 1}
    assert sequences
    assert all(t.untyped_storage().size() > FAR * t.element_size() for t in sequences.values())
    for got, want in zip(testing.tensors(call(*{**given, **sequences}.values())), testing.tensors(call(*given.values())), strict=True):
        near = (2e-2 if dtype == "bfloat16" else 1e-5) * want.abs().max().item() if want.numel() else 0
        torch.testing.assert_close(got, want, rtol=0, atol=near)


@pytest.mark.skipif(BACKEND != "cpu", reason="starts that process")
def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    assert _interpreted("test_far_strides.py", "test_operators and bfloat16") >= 20


# ------------------------------------------------------------------------------------------------ CUDA on the host

host = pytest.mark.skipif(BACKEND != "cpu", reason="no kernels of Triton")
WHERE = {  # dimension, bytes of a stride (None: the last one begins past 2^31 elements)
    "images": (0, None), "tokens": (1, None), "images, the most that tiles take": (0, 2**31 - 128), "images, one more": (0, 2**31),
}  # fmt: skip


def _tiles(t, W):
    """Whether the kernels of tiles take ``t``, which keep the strides of an image and of a row in 31 bits."""
    return max(t.stride(0), t.stride(1) * W) * t.element_size() < 2**31


@pytest.fixture(scope="module")
def shims(tmp_path_factory):
    found = {}
    for name in ("token_dwconv", "token_dwconv_act", "channel_act"):
        out = tmp_path_factory.mktemp("cuda_far") / f"{name}.so"
        cuda.compile_shim(out, "-Og", "-shared", "-fPIC", f"{name}.cpp")
        found[name] = ctypes.CDLL(str(out))
    return found


@host
@pytest.mark.parametrize("where", WHERE)
def test_cuda_convolution(shims, where):
    B, H, W, P, C, K = 5, 5, 9, 1, 8, 3
    dim, step = WHERE[where]
    x, dy, residual, weight = (torch.randn(s).bfloat16() for s in ((B, P + H * W, C),) * 3 + ((C, 1, K, K),))
    placed = [far(t, dim, step and step // 2) for t in (x, dy, residual)]
    y = far(torch.zeros_like(x), dim, step and step // 2)
    p = FwdParams(
        *map(cuda.pointer, (placed[0], weight, None, placed[2], y)), B, H, W, C, *placed[0].stride()[:2], *y.stride()[:2],
        *placed[2].stride()[:2], K, P, P, 0, False, *(cuda.DTYPES.index(torch.bfloat16),) * 2, 0,
    )  # fmt: skip
    vec = shims["token_dwconv"].shim_token_dwconv(ctypes.byref(p), cuda.MULTIPROCESSORS)
    assert (vec > 0) == _tiles(y, W)
    cuda.assert_close(y, cuda.reference_forward(x, weight, None, residual, H, W, P, "keep"), K * K + 1, torch.bfloat16)
    got = cuda.grad_weight(shims["token_dwconv"], placed[1], placed[0], K, H, W, P, P, torch.float32, torch.float32)
    assert (cuda.grad_weight.vec > 0) == _tiles(y, W)
    for sums, want in zip(got, cuda.reference_backward(dy, x, weight, H, W, P, "keep")[1:], strict=True):
        cuda.assert_close(sums.flatten(), want.flatten(), B * H * W, torch.bfloat16)


@host
@pytest.mark.parametrize("where", WHERE)
def test_cuda_convolution_with_activations(shims, where):
    dim, step = WHERE[where]
    s, act = cuda_act.Problem(5, 7, 9, 1, 8, 3, "keep", False, True, 0), cuda_act.Step(act="hardswish")
    x, dy, residual, weight = (torch.randn(n).to(s.dtype) for n in ((5, 64, 8),) * 3 + ((8, 1, 3, 3),))
    x_far, dy_far, residual_far = (far(t, dim, step and step // s.dtype.itemsize) for t in (x, dy, residual))

    def run(x, dy, residual):
        y, pool, stats, vec = cuda_act.forward(shims["token_dwconv_act"], s, x, weight, None, residual, act, act)
        dx, sums, _ = cuda_act.grad_input(shims["token_dwconv_act"], s, dy, x, weight, act)
        dw, _, _ = cuda_act.grad_weight(shims["token_dwconv_act"], s, dy, x, act)
        return (y, pool, stats, dx, sums, dw), vec

    got, vec = run(x_far, dy_far, residual_far)
    assert (vec > 0) == _tiles(x_far, 9)
    for a, b in zip(got, run(x, dy, residual)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@host
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["act", "pool", "sums", "grad", "stats"])
def test_cuda_channel_passes(shims, name, dim):
    x, dy = (torch.randn(3, 70, 8).bfloat16() for _ in range(2))
    beside = {"dy": dy} if name in ("sums", "grad") else {"residual": dy} if name == "act" else {}

    def run(place):
        given = {n: place(t) for n, t in beside.items()}
        return cuda_channel.run(shims["channel_act"], name, place(x), 70, act="hardswish", **given)[0]

    assert torch.equal(run(lambda t: far(t, dim)), run(lambda t: t))
