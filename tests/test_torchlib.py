"""The torch operators: opcheck on every op, compile (and that something was compiled), autocast, vmap, FLOPs, the guard."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lifeops
from lifeops import registry, testing, torchlib
from lifeops.testing import Maker

GRID = (4, 5)


def _problem(dtype=torch.float32, P=2, C=8, K=3, B=2, grad=True):
    draw = Maker(0, dtype)
    x, w, b = draw(B, P + 20, C), draw(C, 1, K, K), draw(C)
    return tuple(t.requires_grad_(grad) for t in (x, w, b))


OPCHECKED = ("plain", "dist", "drop", "cls", "scale1_key", "dim_10", "no_prefix", "window")
OPCHECK = [pytest.param(op, s, id=f"{name}-{s.name}") for name, op in registry.ops.items() for s in op.samples() if s.name in OPCHECKED]


@pytest.mark.parametrize(("op", "sample"), OPCHECK)
def test_opcheck(op, sample):
    args = testing.make(op, sample, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    results = torch.library.opcheck(torchlib.overload(op), args, test_utils=tests)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("prefix", ["keep", "zero", "drop"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_dynamic(backend, prefix):
    """One graph, no break, same numbers, and no recompilation past the second size."""
    if backend == "inductor" and prefix != "keep":
        pytest.skip("one inductor build is enough")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    def step(x, w, b, height, width):
        return lifeops.token_dwconv(x, w, b, grid=(height, width), num_prefix_tokens=2, prefix=prefix).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for height, width in ((4, 5), (3, 7), (6, 2), (5, 5)):
        draw = Maker(1, torch.float32)
        x, w, b = (t.requires_grad_() for t in (draw(2, 2 + height * width, 8), draw(8, 1, 3, 3), draw(8)))
        got, expected = compiled(x, w, b, height, width), step(x, w, b, height, width)
        torch.testing.assert_close(got, expected)
        for a, e in zip(torch.autograd.grad(got, (x, w, b)), torch.autograd.grad(expected, (x, w, b)), strict=True):
            torch.testing.assert_close(a, e)
    assert counters["stats"]["unique_graphs"] in (1, 2), counters
    assert counters["stats"]["calls_captured"] >= 1  # something was compiled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_conv2d(dtype):
    for x_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x, w, _ = _problem(x_dtype)
        with torch.autocast("cpu", dtype=dtype):
            y = lifeops.token_dwconv(x, w.float().detach().requires_grad_(), None, grid=GRID, num_prefix_tokens=2)
            conv = torch.nn.functional.conv2d(torch.zeros(1, 8, 4, 5, dtype=x_dtype), w.detach().to(x_dtype), groups=8, padding=1)
        assert y.dtype == conv.dtype
        y.float().sum().backward()  # outside the autocast region
        assert x.grad.dtype == x_dtype


def test_weight_gradient_keeps_the_parameters_dtype_and_strides():
    x, w, b = _problem(torch.bfloat16)
    weight = torch.nn.Parameter(w.detach().float().contiguous(memory_format=torch.channels_last))
    bias = torch.nn.Parameter(b.detach().float())
    lifeops.token_dwconv(x, weight, bias, grid=GRID, num_prefix_tokens=2).sum().backward()
    assert (weight.grad.dtype, bias.grad.dtype, x.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert weight.grad.stride() == weight.stride()


def test_direct_calls_have_gradients():
    x, w, b = _problem()
    y = torch.ops.lifeops.token_dwconv(x, w, b, None, 4, 5, 2, "keep", "")
    expected = lifeops.token_dwconv(x, w, b, grid=GRID, num_prefix_tokens=2)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), (x, w, b)), torch.autograd.grad(expected.sum(), (x, w, b)), strict=True):
        assert torch.equal(ours, theirs)


def _differentiable(args):
    """The floating-point tensors among a call's arguments, and the call with leaves in their places."""
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    return leaves, [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]


@pytest.mark.parametrize("name", [name for name in registry.ops if not name.endswith(("_bwd", "rollout_step"))])
def test_operators_have_the_gradients_of_their_formulas(name):
    """In exported and traced programs every operator is called on its own, with gradients: those of its reference."""
    op = registry.ops[name]
    for sample in op.samples():
        if not sample.tiny or getattr(sample, "dropout_p", 0) or 0 in (sample.B, getattr(sample, "H", 1), getattr(sample, "patches", 1)):
            continue
        args, leaves = _differentiable(testing.make(op, sample, torch.float64, backend="reference"))
        wanted, others = _differentiable(args)
        ours, theirs = (testing.tensors(f(*a)) for f, a in ((torchlib.overload(op), args), (op.reference, wanted)))
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.requires_grad and b.requires_grad and a.numel()]
        assert pairs
        ours, theirs = (torch.autograd.grad(sum(t.square().sum() for t in column), where, allow_unused=True, materialize_grads=True)
                        for column, where in zip(zip(*pairs, strict=True), (leaves, others), strict=True))  # fmt: skip
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name} {sample.name}: {text}")  # noqa: B023


def test_flops_equal_conv2d():
    """Forward as torch counts conv2d; forward and backward three times that (torch counts a depth-wise dW C times too high)."""
    x, w, _ = _problem()
    with FlopCounterMode(display=False) as ours:
        y = lifeops.token_dwconv(x, w, grid=GRID, num_prefix_tokens=2)
    with FlopCounterMode(display=False) as theirs:
        torch.nn.functional.conv2d(torch.randn(2, 8, 4, 5), w, padding=1, groups=8)
    assert ours.get_total_flops() == theirs.get_total_flops() == 2 * 9 * 8 * 20 * 2
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * ours.get_total_flops()


@pytest.mark.parametrize("in_dims", [(0, None, None), (0, 0, None), (None, 0, 0), (1, 0, 0)])
def test_vmap(in_dims):
    x, w, b = _problem(torch.float64, grad=False)
    size = 3
    mapped = [t if d is None else torch.stack([t * (i + 1) for i in range(size)], d) for t, d in zip((x, w, b), in_dims, strict=True)]

    def f(x, w, b):
        return lifeops.token_dwconv(x, w, b, grid=GRID, num_prefix_tokens=2)

    got = torch.func.vmap(f, in_dims=in_dims)(*mapped)
    for i in range(size):
        one = [t if d is None else t.select(d, i) for t, d in zip(mapped, in_dims, strict=True)]
        torch.testing.assert_close(got[i], f(*one))


def test_per_sample_gradients():
    x, w, b = _problem(torch.float64, grad=False)

    def loss(w, b, x):
        return lifeops.token_dwconv(x[None], w, b, grid=GRID, num_prefix_tokens=2).square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(None, None, 0))(w, b, x)
    for i in range(len(x)):
        for g, e in zip(got, torch.func.grad(loss, argnums=(0, 1, 2))(w, b, x[i]), strict=True):
            torch.testing.assert_close(g[i], e)


def test_profiler_shows_the_op():
    x, w, b = _problem(grad=False)
    with torch.profiler.profile() as prof:
        lifeops.token_dwconv(x, w, b, grid=GRID, num_prefix_tokens=2)
    assert any(e.key == "lifeops::token_dwconv" for e in prof.key_averages())


def _operators_seen(run):
    """The operators that a dispatch mode, the profiler and the tracer see ``run`` call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        sees_lifeops = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Mode():
        run()
    with torch.profiler.profile() as profiler:
        run()
    return seen, {event.key for event in profiler.key_averages()}


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning")
def test_who_looks_on_sees_the_operator():
    x, w = torch.randn(1, 5, 8, requires_grad=True), torch.randn(8, 1, 3, 3)

    def run():
        lifeops.token_dwconv(x, w, grid=(2, 2), num_prefix_tokens=1).sum().backward()

    dispatched, profiled = _operators_seen(run)
    for name in ("token_dwconv", "token_dwconv_bwd_dx"):
        assert f"lifeops::{name}" in dispatched
        assert f"lifeops::{name}" in profiled
    traced = torch.jit.trace(lambda t: lifeops.token_dwconv(t, w, grid=(2, 2), num_prefix_tokens=1), x.detach())
    assert "lifeops::token_dwconv" in str(traced.inlined_graph)


def test_a_subclass_passes_the_dispatcher():
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            with torch._C._DisableTorchDispatch():
                out = func(*args, **(kwargs or {}))
            return 2 * out.as_subclass(torch.Tensor) if func.name() == "lifeops::token_dwconv" else out

    x, w = torch.randn(1, 5, 8), torch.randn(8, 1, 3, 3)
    same = torch.Tensor._make_subclass(Doubled, x)
    plain, doubled = (lifeops.token_dwconv(t, w, grid=(2, 2), num_prefix_tokens=1) for t in (x, same))
    torch.testing.assert_close(doubled, 2 * plain)
