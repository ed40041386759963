"""The choice of a backend: order, insisting, falling back, strict mode, explanations."""

import copy
import importlib
import pickle
import warnings

import pytest
import torch

import lifeops
from lifeops import config, errors, registry, torchlib


@pytest.fixture
def settings(monkeypatch):
    def change(**values):
        monkeypatch.setattr(config, "settings", config.settings._replace(**values))
        registry._warned.clear()

    return change


def _run(backend=None, K=3):
    x, w = torch.randn(1, 17, 4), torch.randn(4, 1, K, K)
    y = lifeops.token_dwconv(x, w, grid=(4, 4), num_prefix_tokens=1, backend=backend)
    return y, torchlib.last_backend["token_dwconv"]


def test_the_argument_beats_the_context_beats_the_environment(settings):
    settings(backend="reference")
    assert _run()[1] == "reference"
    with lifeops.use_backend("cpu"):
        assert _run()[1] == "cpu"
        assert _run("reference")[1] == "reference"
        with lifeops.use_backend(None):
            assert _run()[1] == "reference"
    assert _run()[1] == "reference"


def test_cpu_kernels_are_the_default_on_cpu():
    assert _run()[1] == "cpu"


def test_a_large_kernel_falls_back_and_warns_once(settings):
    settings()
    with pytest.warns(lifeops.FallbackWarning, match=r"cpu: K = 17 is larger than 15"):
        assert _run(K=17)[1] == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(K=17)


LAYER = """
import lifeops, torch

class Layer(torch.nn.Module):
    def forward(self, x, weight):
        return lifeops.token_dwconv(x, weight, grid=(3, 4))
"""


@pytest.mark.parametrize(("where", "compiled"), [("mine.py", False), ("installed", False), ("installed", True)])
def test_a_warning_points_at_the_line_of_the_user(where, compiled, settings):
    """Not at the library's nor torch's, nor at an installed package's that holds the module."""
    settings()
    registry.forget_choices()
    file, names = where.replace("installed", f"{errors._OTHERS[0]}package.py"), {}
    exec(compile(LAYER, file, "exec"), names)
    layer = names["Layer"]()
    layer = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    with pytest.warns(lifeops.FallbackWarning) as seen:
        layer(torch.ones(1, 12, 4), torch.ones(4, 1, 17, 17))
    assert seen[0].filename == (where if where == "mine.py" else __file__)


def test_a_warning_of_an_import_points_at_the_line_that_imports(tmp_path, monkeypatch):
    """As that of sources which have changed: the backend is imported at the first call."""
    (tmp_path / "warns_as_it_is_imported.py").write_text("from lifeops import errors\nerrors.warn('said')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(errors, "_OWN", str(tmp_path))
    with pytest.warns(UserWarning, match="^said$") as seen:
        importlib.import_module("warns_as_it_is_imported")
    assert seen[0].filename == __file__


def test_a_warning_without_a_line_of_the_user_points_behind_the_library(monkeypatch):
    monkeypatch.setattr(errors, "_OTHERS", ("/", "<"))  # as where a command of an installed package runs
    with pytest.warns(UserWarning, match="^said$") as seen:
        errors.warn("said")
    assert seen[0].filename == __file__


def test_strict_makes_a_fallback_an_error(settings):
    settings(strict=True)
    with pytest.raises(lifeops.NotSupported, match="K = 17 is larger than 15"):
        _run(K=17)
    assert _run()[1] == "cpu"


def test_an_environment_wish_that_cannot_be_met_warns(settings):
    settings(backend="cuda")
    with pytest.warns(lifeops.FallbackWarning, match="cuda: "):
        assert _run()[1] == "cpu"


def test_insisting_raises_with_every_reason():
    with pytest.raises(lifeops.NotSupported) as caught:
        _run("cuda", K=3)
    error = caught.value
    assert (error.op, error.backend) == ("token_dwconv", "cuda")
    assert error.reasons
    again = pickle.loads(pickle.dumps(error))
    assert (again.op, again.reasons) == (error.op, error.reasons)


def test_explain_lists_every_backend_and_copies():
    x, w = torch.randn(2, 4, 17).transpose(1, 2), torch.randn(4, 1, 3, 3)
    report = lifeops.explain("token_dwconv", x, w, torch.zeros(4), grid=(4, 4), num_prefix_tokens=1)
    assert [e.op for e in report] == ["token_dwconv", "token_dwconv_bwd_dx", "token_dwconv_bwd_dw", "token_dwconv_bwd_db"]
    assert report[0].chosen == "cpu"
    assert report[0].copies == ("x",)
    assert set(report[0].reasons) == set(config.BACKENDS)
    assert "not cuda: " in str(report)
    assert "copies x" in str(report)
    with pytest.raises(ValueError, match=r"op must be one of 'token_dwconv', .*'rollout_step', got 'conv'"):
        lifeops.explain("conv")


def test_copies_are_counted():
    x, w = torch.randn(2, 17, 8), torch.randn(4, 1, 3, 3)
    before = torchlib.copies["count"]
    for view in (x[:, :, :4], x[:, 1:, 2:6][:, :16], x.expand(2, 17, 8)[:, :, 4:]):
        lifeops.token_dwconv(view, w, grid=(4, 4), num_prefix_tokens=view.shape[1] - 16)
    assert torchlib.copies["count"] == before
    lifeops.token_dwconv(x[:, :, ::2], w, grid=(4, 4), num_prefix_tokens=1)
    assert torchlib.copies["count"] == before + 1


def test_an_error_inside_supports_propagates(monkeypatch):
    op = registry.ops["token_dwconv"]

    def broken(problem):
        raise ZeroDivisionError

    monkeypatch.setitem(op.impls, "cpu", copy.replace(op.impls["cpu"], supports=broken) if hasattr(copy, "replace") else _with(op, broken))
    registry.forget_choices()
    with pytest.raises(ZeroDivisionError):
        _run()
    registry.forget_choices()


def _with(op, supports):
    import dataclasses

    return dataclasses.replace(op.impls["cpu"], supports=supports)


def test_environment_values_are_checked(monkeypatch):
    monkeypatch.setenv("LIFEOPS_BACKEND", "fastest")
    with pytest.raises(ValueError, match="LIFEOPS_BACKEND must be one of"):
        config.refresh()
    monkeypatch.setenv("LIFEOPS_BACKEND", "triton")
    monkeypatch.setenv("LIFEOPS_STRICT", "1")
    try:
        assert config.refresh()[:2] == ("triton", True)
    finally:
        monkeypatch.delenv("LIFEOPS_BACKEND")
        monkeypatch.delenv("LIFEOPS_STRICT")
        config.refresh()


def test_cost_counts_every_tensor_once():
    x, w = torch.randn(2, 17, 4, dtype=torch.bfloat16), torch.randn(4, 1, 3, 3)
    cost = registry.ops["token_dwconv"].cost(x, w, None, None, 4, 4, 1, "keep", "")
    assert cost == registry.Cost(bytes=2 * 2 * 17 * 4 * 2 + 4 * 9 * 4, flops=2 * 9 * 4 * 16 * 2)
    dw = registry.ops["token_dwconv_bwd_dw"].cost(x, x, 3, 4, 4, 1, "keep", torch.float32, None, "")
    assert dw == registry.Cost(bytes=2 * 2 * 17 * 4 * 2 + 4 * 9 * 4, flops=2 * 9 * 4 * 16 * 2)


def test_registering_twice_or_for_an_unknown_op_is_an_error():
    with pytest.raises(ValueError, match="registered already"):
        registry.add(registry.ops["token_dwconv"])
    with pytest.raises(ValueError, match="no op 'conv3d'"):
        registry.register("conv3d", "cpu", print, supports=list, priority=1)
