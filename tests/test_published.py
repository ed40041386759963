"""Published and counted sizes, the shape-only cost of a model, and the command that shows them."""

import pytest
import torch

import lifeops
from conftest import declare_torchvision_ops
from lifeops import cli, use_backend
from lifeops.cli import flops as flops_cli
from lifeops.cost import model_cost, published
from lifeops.models import named
from lifeops.models.named import HOST_SYSTEMS, NAMES, SYSTEMS, system_in, systems_of
from lifeops.nn import wrap

ROWS = [(row, model) for row in published.rows() for model in row.models if model in NAMES]
IDS = [f"{model}-{row.system}-{row.num_classes}" for row, model in ROWS]
FIRST = {row: model for row, model in reversed(ROWS) if row.gmacs or row.counted_gmacs}  # not its other names
OFTEN = "cait_xxs24", "cvt_21", "cvt_w24", "edgevit_s"  # the same blocks more often, or wider: counted where the models are tested
MACS = [(row, model) for row, model in FIRST.items() if model not in OFTEN]
SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 7, "depth": 2}


def _digits(value):
    return len(f"{value:g}".partition(".")[2])


@pytest.mark.parametrize(("row", "model"), ROWS, ids=IDS)
def test_parameters(row, model):
    with torch.device("meta"):
        params = model_cost.count_params(named(model, row.system, num_classes=row.num_classes))
    assert params == row.counted_params
    if row.params_m is not None and not row.note:
        assert round(params / 1e6, _digits(row.params_m)) == row.params_m


def _evaluated(model, row):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        host = named(model, row.system, num_classes=row.num_classes).eval().requires_grad_(False)
    mode = FakeTensorMode()
    model_cost.without_memory(host, mode)
    with mode:
        return model_cost._evaluated(host, torch.empty(1, 3, row.img_size, row.img_size))


@pytest.mark.parametrize(("row", "model"), MACS, ids=[f"{model}-{row.system}-{row.num_classes}" for row, model in MACS])
def test_macs(row, model):
    """To the digits counted, and with fvcore's norms to the digits published."""
    macs, norm_ops = _evaluated(model, row)
    for found, counted in ((macs, row.counted_gmacs), (macs + norm_ops, row.counted_gmacs_with_norms)):
        if counted is not None:
            assert round(found / 1e9, 3 if model == "deit_base" else 4) == counted
    if row.gmacs is not None and not row.note:
        digits = 4 if model == "vit_tiny" else _digits(row.gmacs)
        assert round((macs + (0 if row.system == "regionvit" else norm_ops)) / 1e9, digits) == row.gmacs  # which counts products alone


def test_rows():
    assert {row.system for row in published.rows()} == set(SYSTEMS)
    assert all("arXiv" in row.source for row in published.rows())
    assert published.find("deit_tiny", "plain", 100, None, None).counted_params == 5_543_716
    assert published.find("deit_tiny", "plain", 1000, (224, 224), 16).counted_params == 5_717_416
    assert published.find("deit_tiny", "life", 1000, None, None).num_classes == 100  # the nearest there is
    assert published.find("deit_tiny", "plain", 1000, (256, 256), None) is None
    assert published.find("deit_tiny", "dw_shortcut", 1000, None, None) is None


def test_what_is_shown_of_a_row():
    """What is published, else in brackets what it counts to; the classes where they are others."""
    row = published.rows()[0]._replace(num_classes=10, params_m=5.7, gmacs=None, counted_params=5_717_416, counted_gmacs=1.2)
    assert flops_cli.published_text(None, 10) == "-"
    assert flops_cli.published_text(row, 10) == "5.7 / -"
    assert flops_cli.published_text(row, 1000) == "5.7 / - with 10 classes"
    assert flops_cli.published_text(row._replace(params_m=None), 10) == "(5.71742 / 1.2)"


def test_norms_are_counted_by_element():
    """As fvcore does: 5 of a layer norm, 2 of a batch norm."""
    maps, tokens = torch.nn.BatchNorm2d(3).eval(), torch.nn.LayerNorm(4).eval()
    model = torch.nn.Sequential(maps, tokens)
    assert model_cost.count_norm_ops(model, lambda: model(torch.zeros(2, 3, 5, 4))) == (2 + 5) * 2 * 3 * 5 * 4


# ------------------------------------------------------------------------------------------------ shapes alone


@pytest.mark.parametrize("system", systems_of("deit_tiny"))
def test_the_cost_from_shapes_is_that_of_a_real_step(system):
    cost = model_cost.model_cost(lambda: named("deit_tiny", system, **SMALL), (3, 32, 32), batch=2)
    model, x = named("deit_tiny", system, **SMALL), torch.randn(2, 3, 32, 32)
    with use_backend("reference"):  # of a compiled kernel two small results may share a storage
        flops, saved = model_cost._trained(model, x)
        macs, norm_ops = model_cost._evaluated(model.eval().requires_grad_(False), x)
    assert cost == (model_cost.count_params(model), macs / 2, flops / 4, norm_ops / 2, saved / 2)


def test_saved_bytes():
    x, w = torch.randn(10, 20, requires_grad=True), torch.randn(20, 30, requires_grad=True)
    assert model_cost.saved_bytes(lambda: x @ w) == 4 * (10 * 20 + 20 * 30)
    assert model_cost.saved_bytes(lambda: x @ w, [w]) == 4 * 10 * 20
    assert model_cost.saved_bytes(lambda: (x * 2).exp().square(), [x]) == 4 * 10 * 20  # exp's output, twice
    assert model_cost.saved_bytes(lambda: x + 1) == 0


def test_shared_parameters_stay_shared():
    layer = torch.nn.Linear(3, 3, device="meta")
    model = torch.nn.Sequential(layer, torch.nn.Linear(3, 3, device="meta"))
    model[1].weight = layer.weight
    model_cost.without_memory(model, torch._subclasses.fake_tensor.FakeTensorMode())
    assert model[0].weight is model[1].weight
    assert model_cost.count_params(model) == 9 + 3 + 3


# ------------------------------------------------------------------------------------------------ names and command


def test_named_says_what_there_is():
    with pytest.raises(ValueError, match=r"named: system must be one of 'plain', 'life', .*, got 'swin'"):
        named("deit_tiny", "swin")
    with pytest.raises(ValueError, match=r"named: the system of vit_tiny must be one of 'plain', 'dw_shortcut', got 'life'"):
        named("vit_tiny", "life")
    declare_torchvision_ops()
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"named: the model must be one of deit_tiny, .* or a timm model, got 'deit_huge'"):
        named("deit_huge")


def test_flops_command(capsys):
    assert cli.main(["flops", "vit_tiny", "--num-classes", "10"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in out.splitlines() if "│" in line}
    assert rows["plain"][:3] == ["5.519", "1.2535", "1.2580"]
    assert rows["plain"][-1] == "- / 1.258"
    assert rows["dw_shortcut"][:3] == ["5.547", "1.2576", "1.2630"]
    assert rows["dw_shortcut"][-1] == "- / 1.263"
    assert float(rows["dw_shortcut"][4]) < float(rows["plain"][4]) + 0.1
    assert "arXiv 2407.19394" in out


def test_flops_command_with_a_timm_model(capsys):
    declare_torchvision_ops()
    pytest.importorskip("timm")
    arguments = ["flops", "deit_tiny_patch16_224", "--img-size", "32", "64", "--patch-size", "16", "--system", "life", "--batch", "2"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    with torch.device("meta"):
        params = model_cost.count_params(named("deit_tiny", "life", img_size=(32, 64)))
    assert f"{params / 1e6:.3f}" in out
    assert "plain" not in out


def test_flops_command_leaves_out_systems_that_a_host_cannot_have(capsys, monkeypatch):
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")

    def parameters_alone(build, image_size, batch):
        with torch.device("meta"):
            return model_cost.ModelCost(model_cost.count_params(build()), 0, 0, 0, 0)

    monkeypatch.setattr(flops_cli, "model_cost", parameters_alone)
    assert cli.main(["flops", "pvt_v2_b0", "--num-classes", "10"]) == 0
    printed = capsys.readouterr()
    plain = sum(p.numel() for p in timm.create_model("pvt_v2_b0", num_classes=10).parameters())
    shortcuts = (3 * 3 + 3) * 2 * (32 + 64 + 160 + 256)  # two blocks in each of four stages
    assert f"{plain / 1e6:.3f}" in printed.out
    assert f"{(plain + shortcuts) / 1e6:.3f}" in printed.out
    assert "life: convert: PyramidVisionTransformerV2 has its blocks in 4 stages" in printed.err


def _registered(monkeypatch, build):
    """``build`` as a timm model "mine"."""
    declare_torchvision_ops()
    registry = pytest.importorskip("timm.models._registry")

    def mine(pretrained=False, num_classes=10, **kwargs):
        model = build(num_classes)
        if not hasattr(model, "patch_embed"):  # whose image size tells itself
            model.pretrained_cfg = {"input_size": (3, 32, 32), "num_classes": num_classes}
        return model

    mine.__module__ = __name__
    monkeypatch.setitem(registry._model_entrypoints, "mine", mine)


def _vit(num_classes):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=num_classes)


def _nested(num_classes):
    model = torch.nn.Sequential(lifeops.convert(_vit(num_classes), "localvit"))
    model.num_classes = num_classes
    return model


BUILT = {
    "life": lambda n: lifeops.convert(_vit(n), "life"),
    "dw_shortcut": lambda n: lifeops.convert(_vit(n), "dw_shortcut"),
    "localvit": _nested,
    "life + dw_shortcut": lambda n: named("deit_tiny", "life", img_size=32, depth=2, num_classes=n),
}


def _with_shortcuts(num_classes):
    model = BUILT["life + dw_shortcut"](num_classes)
    model.blocks = wrap(model.blocks)
    return model


@pytest.mark.parametrize("system", BUILT)
def test_flops_command_names_the_system_that_a_model_comes_with(system, capsys, monkeypatch):
    """Converted before, inside another module, or never plain: one row, named as what it is, and nothing to say about others."""
    build = _with_shortcuts if "+" in system else BUILT[system]
    _registered(monkeypatch, build)
    assert cli.main(["flops", "mine", "--num-classes", "10"]) == 0
    printed = capsys.readouterr()
    rows = [line.split("│")[1:3] for line in printed.out.splitlines() if line.startswith("│")][1:]
    assert [[cell.strip() for cell in row] for row in rows] == [[system, f"{model_cost.count_params(build(10)) / 1e6:.3f}"]]
    assert not printed.err
    assert model_cost.count_params(named("mine", system)) == model_cost.count_params(build(10))
    with pytest.raises(SystemExit) as stop:
        cli.main(["flops", "mine", "--system", "plain"])
    assert stop.value.code == 2
    assert f"named: mine comes with the system '{system}', so its system must be that, got 'plain'" in capsys.readouterr().err


def test_flops_command_of_timm_models_that_are_none(capsys):
    declare_torchvision_ops()
    pytest.importorskip("timm")
    for arguments, message in (
        (["vit_none"], "or a timm model, got 'vit_none'"),
        (["resnet18", "--img-size", "64"], "resnet18 does not take"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["flops", *arguments])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_flops_command_of_a_reverted_model(capsys, monkeypatch):
    _registered(monkeypatch, lambda n: lifeops.revert(BUILT["life"](n)))
    assert cli.main(["flops", "mine"]) == 0
    out = capsys.readouterr().out
    assert [s for s in HOST_SYSTEMS if f"│ {s} " in out] == list(HOST_SYSTEMS)
    assert system_in(_vit(3)) == system_in(named("vit_tiny", depth=1)) == "plain"
    assert system_in(named("vit_tiny", "dw_shortcut", depth=1)) == "dw_shortcut"


def test_flops_command_lists_what_is_published(capsys):
    assert cli.main(["flops"]) == 0
    out = capsys.readouterr().out
    assert "deit_tiny" in out
    assert "LocalViT-PVT-T" in out
    assert "27.88 / 6.01" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deit_tiny", "--img-size", "1", "2", "3"], "--img-size must be one or two positive numbers, got 1 2 3"),
        (["deit_tiny", "--batch", "0"], "--batch and --num-classes must be positive, got 0 and 1000"),
        (["deit_tiny", "--patch-size", "0"], "--patch-size must be positive, got 0"),
        (["deit_tiny", "--img-size", "30"], "img_size must be a multiple of patch_size"),
        (["cvt_13", "--patch-size", "8"], "named: cvt: CvT: patch_size must be one int for each of the 3 stages, got 8"),
        (["vit_tiny", "--system", "localvit"], "named: the system of vit_tiny must be one of 'plain', 'dw_shortcut', got 'localvit'"),
    ],
)
def test_flops_command_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["flops", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
