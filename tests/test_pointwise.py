"""Both CPU paths of point-wise products give the same results; the table decides, the environment overrides."""

import pytest
import torch

from lifeops import config, pointwise, registry, testing, torchlib


@pytest.mark.parametrize("path", ["linear", "conv1x1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 72, 67], ids=["few", "enough", "left_over"])  # for oneDNN's gradients
def test_both_paths_and_their_gradients(path, dtype, tokens, monkeypatch):
    monkeypatch.setattr(config, "settings", config.settings._replace(cpu_gemm=path))
    x, w, b, dy = (torch.randint(-1, 2, s).to(dtype) for s in ((2, tokens, 12), (9, 12), (9,), (2, tokens, 9)))
    assert torch.equal(pointwise.pointwise(x, w, b), (x.double() @ w.double().t() + b.double()).to(dtype))
    apart = w.repeat_interleave(2, 1)[:, ::2], b.repeat_interleave(2)[::2]  # parameters whose elements lie apart
    assert torch.equal(pointwise.pointwise(x, *apart), pointwise.pointwise(x, w, b))
    assert torch.equal(pointwise.pointwise_bwd_dx(dy, apart[0]), (dy.double() @ w.double()).to(dtype))
    assert torch.equal(pointwise.pointwise_bwd_dx(dy, w), (dy.double() @ w.double()).to(dtype))
    assert torch.equal(pointwise.pointwise_bwd_dw(dy, x), torch.einsum("bno,bni->oi", dy.double(), x.double()).to(dtype))


@pytest.mark.parametrize("path", ["linear", "conv1x1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_paths_inside_life(path, dtype, monkeypatch):
    monkeypatch.setattr(config, "settings", config.settings._replace(cpu_gemm=path))
    op = registry.ops["life_qkv"]
    for sample in op.samples():
        args = testing.make(op, sample, dtype, backend="cpu")
        testing.check(op, args, torchlib.overload(op)(*args), terms=op.reduces(sample))


def test_the_table_decides_and_the_environment_overrides(monkeypatch):
    key = (pointwise.vendor(), torch.backends.cpu.get_cpu_capability(), "float32", "wide")
    monkeypatch.setattr(pointwise, "_table", lambda: {key: "conv1x1"})
    pointwise.choose.cache_clear()
    try:
        assert pointwise.choose(torch.float32, 768, "auto") == "conv1x1"
        assert pointwise.choose(torch.float32, 192, "auto") == "linear"  # no row: F.linear
        assert pointwise.choose(torch.float32, 768, "linear") == "linear"
    finally:
        pointwise.choose.cache_clear()


def test_every_row_of_the_table_is_a_known_path():
    rows = pointwise._table()
    assert rows
    assert set(rows.values()) <= {"linear", "conv1x1"}


def test_small_products_are_left_to_the_other_library(monkeypatch):
    monkeypatch.setattr(pointwise, "choose", lambda dtype, channels, setting: "conv1x1")
    monkeypatch.setattr(config, "settings", config.settings._replace(cpu_gemm="auto"))
    sizes = {(2, 16, 48): False, (64, 64, 48): True}
    for (B, N, C), taken in sizes.items():
        assert pointwise._as_convolution(torch.randn(B, N, C), torch.randn(C, C)) == taken
