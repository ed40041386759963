"""Same bits at any thread count, run after run, and for a sample alone or in its batch (forward and dX); torch's deterministic mode."""

import contextlib
import re
from pathlib import Path

import pytest
import torch

import lifeops
from lifeops import registry, testing, torchlib

FAMILIES = "token_dwconv", "token_pool", "channel", "dw_shortcut", "rollout", "local_attention"
SAME_BITS = [n for n in registry.ops if n.startswith(FAMILIES)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _sized(op, B, C, K):
    """A sample of the op, with every sum it can make, at a size that is cut into several tasks."""
    samples = {s.name: s for s in op.samples()}
    sample = samples.get("zero", next(iter(samples.values())))
    if hasattr(sample, "base"):
        return sample._replace(base=sample.base._replace(B=B, H=9, W=11, P=2, C=C, K=K))
    if hasattr(sample, "patches"):
        return sample._replace(B=B, patches=99, C=C)
    if hasattr(sample, "mask_batch"):
        return sample._replace(B=B, H=9, W=11, P=2, h=5, d=C // 5, K=K)
    if hasattr(sample, "discard_ratio"):
        return sample._replace(B=B, R=3, N=199, h=5, d=C // 5, discard_ratio=0.2)
    sample = sample._replace(B=B, H=9, W=11, P=2, C=C)
    return sample._replace(K=K) if hasattr(sample, "K") else sample


def _args(name, dtype, B=6, C=100, K=5):
    op = registry.ops[name]
    return op, testing.make(op, _sized(op, B, C, K), dtype, backend="cpu")


def _at(counts, threads, op, args):
    """The results at each number of threads."""
    for count in counts:
        threads(count)
        yield testing.tensors(torchlib.overload(op)(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAME_BITS)
def test_same_bits_at_any_thread_count_and_every_run(name, dtype, threads):
    """All operators but life_qkv, whose products are torch's."""
    for size in ({}, {"B": 1, "C": 40}):
        op, args = _args(name, dtype, **size)
        first, *others = _at((1, 2, 2, 3, 4, 1), threads, op, args)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_rows_summed_together_do_not_depend_on_the_threads(threads):
    """A grid too wide for one step of the weight gradient, in more channels than a task takes."""
    op = registry.ops["token_dwconv_strided_bwd_dw"]
    sample = next(s for s in op.samples() if s.name == "uneven_shares")._replace(H=21)
    first, *others = _at((1, 2, 3, 5), threads, op, testing.make(op, sample, torch.float32, backend="cpu"))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["token_dwconv", "token_dwconv_bwd_dx", "token_dwconv_act", "token_dwconv_strided", "token_dwconv_transpose", "token_pool",
             "local_attention"],
)  # fmt: skip
def test_batch_invariance(name, dtype):
    op, args = _args(name, dtype)
    together = testing.tensors(torchlib.overload(op)(*args))[0]
    B, batched = len(args[0]), 3 if name == "local_attention" else 1  # q, k and v
    for b in range(B):
        alone = testing.tensors(torchlib.overload(op)(*(a[b : b + 1] for a in args[:batched]), *args[batched:]))[0]
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("patches", [99, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "dim"), [("channel_act", 0), ("channel_act_pool", 0), ("channel_act_sums", 1), ("channel_act_grad", 0)])
def test_batch_invariance_of_an_images_sums(name, dim, dtype, patches):
    """One image, and the same among twenty: an image's sums were once cut by how many images there are."""
    op = registry.ops[name]
    sample = next(s for s in op.samples() if s.name == "plain")._replace(B=20, patches=patches, C=20)
    args = testing.make(op, sample, dtype, backend="cpu")
    alone = [a[:1] if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in args]
    (together,), (one,) = (testing.tensors(torchlib.overload(op)(*given)) for given in (args, alone))
    assert torch.equal(one, together.narrow(dim, 0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_a_shortcut_has_the_same_bits_at_any_thread_count(training, dtype, threads):
    """A module whose gradients are no single operator's: two kernels, trained."""
    torch.manual_seed(0)
    module = lifeops.nn.DWShortcut(40, (3, 5), num_prefix_tokens=2, dtype=dtype).train(training)
    x, y, dy = (torch.randn(3, 2 + 9 * 11, 40, dtype=dtype) for _ in range(3))

    def run(count):
        threads(count)
        out = module(x.requires_grad_(), y.requires_grad_(), grid=(9, 11))
        return out, *torch.autograd.grad(out, (x, y, *module.parameters()), dy)

    first, *others = map(run, (1, 2, 3, 4, 1))
    for other in others:
        assert all(map(torch.equal, first, other))


# ------------------------------------------------------------------------------------------------ torch.use_deterministic_algorithms


@contextlib.contextmanager
def _deterministic():
    """torch fills fresh memory with NaN then, too."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", registry.ops)
def test_deterministic_mode_changes_nothing(name, backend, dtype):
    registry.load("cpu")
    op, call = registry.ops[name], torchlib.overload(registry.ops[name])
    for sample in (s for s in op.samples() if s.tiny):
        args = testing.make(op, sample, dtype, backend=backend)
        before = testing.tensors(call(*args))
        with _deterministic():
            after = testing.tensors(call(*args))
        for a, b in zip(before, after, strict=True):
            exact = name in SAME_BITS and backend == "cpu"
            torch.testing.assert_close(b, a, equal_nan=True, **({"rtol": 0, "atol": 0} if exact else {}))


MODULES = {
    "life": lambda: lifeops.nn.LifeAttention(24, 3, num_prefix_tokens=1),
    "localvit": lambda: lifeops.nn.LocalityFeedForward(24, reduction=24, num_prefix_tokens=1),
    "local attention": lambda: lifeops.nn.LocalAttention(24, 3, num_prefix_tokens=1),
    "shortcut": lambda: lifeops.models.dw_shortcut("vit_tiny", img_size=32, depth=2),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules_train_in_deterministic_mode(name, autocast):
    torch.manual_seed(0)
    module = MODULES[name]()
    x = torch.randn(2, 3, 32, 32) if name == "shortcut" else torch.randn(2, 1 + 20, 24)
    grid = {} if name == "shortcut" else {"grid": (4, 5)}

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x, **grid)
        return y, *torch.autograd.grad(y.float().square().sum(), [p for p in module.parameters() if p.requires_grad])

    before = step()
    with _deterministic():
        after = step()
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b, a)


UNORDERED = re.compile(r"\batomic[A-Z]\w*|\btl\.atomic|::atomic|\b(?:red|atom)\.[a-z]+\.|__threadfence")
GPU_SOURCES = [path for folder, ending in (("kernels", "*.py"), ("csrc/cuda", "*.cu*"), ("csrc/cuda", "*.h"))
               for path in (Path(__file__).parent.parent / folder).glob(ending)]  # fmt: skip


def test_no_gpu_kernel_adds_in_an_order_of_its_own():
    """So that there is nothing that torch.use_deterministic_algorithms would have to forbid: every sum has one order."""
    assert len(GPU_SOURCES) > 30
    unordered = "tl.atomic_add(p, v)", "atomicAdd(p, v)", "cuda::atomic_ref<float>", "red.global.add.f32 [%0], %1;", "__threadfence();"
    assert all(map(UNORDERED.search, unordered))
    assert [path.name for path in GPU_SOURCES if UNORDERED.search(path.read_text())] == []
