"""Gradients: gradcheck and gradgradcheck in float64, frozen inputs, what is saved, upstream gradients of any strides."""

import pytest
import torch

import lifeops
from lifeops import torchlib
from lifeops.testing import Maker

BACKENDS = ["reference", "cpu"]


def _problem(dtype=torch.float64, P=2, C=3, K=3, prefix="keep", residual=True):
    draw = Maker(0, dtype)
    rows = 6 + (0 if prefix == "drop" else P)
    tensors = draw(2, P + 6, C), draw(C, 1, K, K), draw(C), draw(2, rows, C) if residual else None
    return tuple(None if t is None else t.requires_grad_() for t in tensors)


def _f(prefix="keep", backend=None):
    def run(x, w, b, residual=None):
        return lifeops.token_dwconv(x, w, b, grid=(2, 3), num_prefix_tokens=2, prefix=prefix, residual=residual, backend=backend)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix", ["keep", "zero", "drop"])
@pytest.mark.parametrize("K", [1, 3, 5])
def test_gradcheck_and_gradgradcheck(backend, prefix, K):
    args, fast = _problem(K=K, prefix=prefix), backend == "reference"
    assert torch.autograd.gradcheck(_f(prefix, backend), args, fast_mode=fast)
    assert torch.autograd.gradgradcheck(_f(prefix, backend), args, fast_mode=fast)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("prefix", "P"), [("keep", 2), ("zero", 2), ("drop", 0)])
def test_the_input_as_its_own_residual(backend, prefix, P):
    x, w, b, _ = _problem(P=P, residual=False)

    def run(x, w, b, again=False):
        other = x.clone() if again else x
        return lifeops.token_dwconv(x, w, b, grid=(2, 3), num_prefix_tokens=P, prefix=prefix, residual=other, backend=backend)

    torch.testing.assert_close(run(x, w, b), run(x, w, b, again=True))
    assert torch.autograd.gradcheck(run, (x, w, b))
    assert torch.autograd.gradgradcheck(run, (x, w, b))
    torchlib.last_backend.clear()
    run(x, w, b).sum().backward()
    assert "token_dwconv_bwd_dx" not in torchlib.last_backend  # dy is added in the kernel


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_gradient_alone(backend):
    x, w, b, _ = _problem(residual=False)
    w.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda x, b: _f("keep", backend)(x, w, b), (x, b))
    assert torch.autograd.gradgradcheck(lambda x, b: _f("drop", backend)(x, w, b), (x, b))


@pytest.mark.parametrize("wants", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_frozen_inputs_cost_nothing(wants):
    """Only the operators of gradients that are needed run, and only what they read is saved."""
    args = [t.detach().requires_grad_(bool(n)) for t, n in zip(_problem()[:3], wants, strict=True)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = _f()(*args)
    assert {t.data_ptr() for t in saved} == ({args[1].data_ptr()} if wants[0] else set()) | ({args[0].data_ptr()} if wants[1] else set())
    torchlib.last_backend.clear()
    y.sum().backward()
    ran = {name.removeprefix("token_dwconv_bwd_") for name in torchlib.last_backend}
    assert ran == {n for n, need in zip(("dx", "dw", "db"), (wants[0], wants[1], wants[2] and not wants[1]), strict=True) if need}
    assert [t.grad is not None for t in args] == [bool(n) for n in wants]


def test_nothing_but_save_for_backward_holds_tensors():
    x, w, b, residual = _problem()
    y = _f()(x, w, b, residual)
    held = [v for v in vars(y.grad_fn).values() if isinstance(v, torch.Tensor)]
    assert not held
    with torch.no_grad():
        assert _f()(x, w, b, residual).grad_fn is None


UPSTREAM = {
    "sum": lambda y: y.sum(),
    "expand": lambda y: (y * torch.ones(1, 1, 1, dtype=y.dtype).expand_as(y)).sum(),
    "transposed": lambda y: (y.transpose(1, 2) * torch.arange(y.numel(), dtype=y.dtype).view(y.shape[0], y.shape[2], -1)).sum(),
    "cat_split": lambda y: sum((i + 1) * p.square().sum() for i, p in enumerate(torch.cat((y, y), -1).split((1, 4, 1), -1))),
    "sliced": lambda y: y[:, ::2, 1:].square().sum(),
}


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("consumer", UPSTREAM)
def test_upstream_gradients_of_any_strides(consumer, backend):
    args = _problem(residual=False)[:3]
    grads = [torch.autograd.grad(UPSTREAM[consumer](_f("keep", b)(*args)), args) for b in (backend, "reference")]
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


def test_backend_of_the_forward_is_kept_for_backward():
    args = _problem()[:3]
    with lifeops.use_backend("reference"):
        y = _f()(*args)
    torchlib.last_backend.clear()
    y.sum().backward()
    assert set(torchlib.last_backend.values()) == {"reference"}


def test_checkpoint_gives_the_same_gradients():
    args = _problem()
    plain = torch.autograd.grad(_f()(*args).square().sum(), args)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(_f(), *args, use_reentrant=False).square().sum(), args)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_empty_batch_and_grid(shape):
    B, H, W = shape
    draw = Maker(0, torch.float32)
    x, w, b = (t.requires_grad_() for t in (draw(B, 2 + H * W, 4), draw(4, 1, 3, 3), draw(4)))
    y = lifeops.token_dwconv(x, w, b, grid=(H, W), num_prefix_tokens=2)
    assert y.shape == x.shape
    y.sum().backward()
    assert torch.equal(w.grad, torch.zeros_like(w))
    assert torch.equal(b.grad, torch.zeros_like(b))
    assert torch.equal(x.grad, torch.ones_like(x))
