"""The demo end to end in a tiny setting, its two LIFE implementations against each other, its DeiT and its measurements."""

import csv
import io
import re
import subprocess
import sys

import pytest
import torch

import lifeops
from conftest import declare_torchvision_ops
from lifeops import cli
from lifeops.demo import data, measure, run
from lifeops.demo.attention import cls_attention, region_attention
from lifeops.demo.train import SYSTEMS, Recipe, Run, accuracy, build, fit
from lifeops.integrations.official import lifeops_deit
from lifeops.models.deit import VisionTransformer
from lifeops.nn.eager_life import EagerLifeAttention, EagerLifeQKV
from test_life import golden

TINY = {"img_size": 16, "patch_size": 8, "num_classes": 5, "embed_dim": 12, "depth": 2, "num_heads": 3}


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def demo_output(tmp_path_factory):
    """One tiny demo: what it printed and the folder it wrote."""
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "lifeops", "demo", "--quick", "--sizes", "100", "--epochs", "40", "--seeds", "2", "--jobs", "2"]
    result = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result, out / "life"


def test_demo_writes_its_files_and_says_where(demo_output):
    result, folder = demo_output
    assert {p.name for p in folder.iterdir()} == {"table.csv", "table.md", "curves.png", "attention.png", "plain.pt", "life.pt"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in folder.glob("*.png"))
    assert str(folder) in result.stdout.splitlines()[-1]
    assert len(result.stdout.splitlines()) < 40  # no progress bars outside a terminal, but a line for what is done
    assert re.search(r"^training, 2 at a time\n100 images: 4 of 4 runs after \d+ s\nmeasuring time", result.stdout, re.M)
    assert "profiler_start" not in result.stderr


@pytest.mark.filterwarnings("error")
def test_demo_keeps_models_that_tell_their_heads(demo_output):
    attns = [lifeops_deit(demo_output[1] / f"{name}.pt").blocks[0].attn for name in ("plain", "life")]
    assert ([a.num_heads for a in attns], attns[1].qkv.aux_key) == ([Recipe().num_heads] * 2, "multiscale")


def test_every_system_is_tried():
    assert set(SYSTEMS) == {"life", *OTHERS}


OTHERS = {
    "localvit": "LocalViT", "dw_shortcut": "DW shortcut", "cvt": "CvT", "edgevit": "EdgeViT", "mvit": "MViT", "regionvit": "RegionViT",
    "conv_ffn": "PVTv2's feed-forward",
    "life_swinv2": "LIFE in Swin V2",
}  # fmt: skip


@pytest.mark.parametrize("system", OTHERS)
def test_other_systems_run(system, tmp_path):
    """The other systems than the one above, as short as can be."""
    options = ["--quick", "--sizes", "50", "--epochs", "2", "--seeds", "1", "--jobs", "1"]
    assert cli.main(["demo", "--system", system, *options, "--out", str(tmp_path)]) == 0
    text = (tmp_path / system / "table.md").read_text(encoding="utf-8")
    assert all(label in text for label in ("| 50 |", f"| {OTHERS[system]} (authors) |", f"| {OTHERS[system]} (lifeops) |"))
    assert (tmp_path / system / "attention.png").exists()


def test_initialisations_run(tmp_path):
    options = ["--quick", "--sizes", "50", "--epochs", "2", "--seeds", "1", "--jobs", "1"]
    assert cli.main(["demo", "--system", "impulse", *options, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "impulse" / "table.md").read_text(encoding="utf-8")
    assert all(label in text for label in ("| 50 |", "| images | default | position x18 | mimetic | impulse |"))
    assert {p.name for p in (tmp_path / "impulse").iterdir()} == {"table.csv", "table.md", "curves.png", "heads.png"}


@pytest.mark.parametrize("size", [data.MIN_SIZE - 1, data.MAX_SIZE + 1])
def test_training_sets_have_bounds(size):
    with pytest.raises(ValueError, match=f"the size of a training set must be between {data.MIN_SIZE} and {data.MAX_SIZE}, got {size}"):
        data.draw(None, size, 0)


@pytest.mark.parametrize("quick", [True, False])
def test_what_is_measured(quick, monkeypatch):
    """The demo's own model, and unless --quick DeiT-Tiny with two prefix tokens at 224."""
    rich, measured = pytest.importorskip("rich.console"), []
    monkeypatch.setattr(run, "_measure", lambda models, batch, *rest: measured.append((models, batch)) or len(measured))
    costs = run.measure_all(rich.Console(quiet=True), SYSTEMS["life"], Recipe(), quick)
    assert list(costs.values()) == list(range(1, len(measured) + 1)) == ([1] if quick else [1, 2])
    assert len(measured[0][1].x) == Recipe().batch_size
    if not quick:
        models, batch = measured[1]
        assert "DeiT-Tiny, 224 x 224, batch 2" in list(costs)[1]
        assert batch.x.shape == (2, 3, 224, 224)
        assert {(m.num_prefix_tokens, m.embed_dim, len(m.blocks)) for m in models.values()} == {(2, 192, 12)}
        assert list(models) == list(SYSTEMS["life"].labels)


def test_time_left_is_told_from_the_second_run_on():
    progress = pytest.importorskip("lifeops.demo.progress")
    assert [progress.clock(seconds) for seconds in (0.4, 59.4, 59.6, 125)] == ["0 s", "59 s", "1 min 00 s", "2 min 05 s"]
    assert [progress.time_left(done, 24, 10.0) for done in (0, 1, 2, 23)] == ["", "", "about 1 min 50 s left", "about 0 s left"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal):
    """A bar with the time left in a terminal; elsewhere a line for each size as its last run ends."""
    progress, rich = pytest.importorskip("lifeops.demo.progress"), pytest.importorskip("rich.console")
    console = rich.Console(file=io.StringIO(), force_terminal=terminal, width=100)
    finished = progress.Finished(console, [50, 50, 100, 100])
    with progress.counter(console, "training", 4) as count:
        for size in (50, 100, 50, 100):
            finished(Run("plain", size, 0))
            count()
    said = console.file.getvalue()
    if terminal:
        assert "4/4" in said
        assert "left" in said
    else:
        assert said == "training\n50 images: 3 of 4 runs after 0 s, about 0 s left\n100 images: 4 of 4 runs after 0 s\n"


def test_ctrl_c_while_costs_are_measured(tmp_path, monkeypatch, capsys):
    """What is trained stays, and the line says so."""
    pytest.importorskip("rich")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_all", interrupted)
    options = ["--quick", "--sizes", "50", "--epochs", "1", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path)]
    assert cli.main(["demo", *options]) == 130
    kept = tmp_path / "life" / "unfinished"
    said = f"lifeops demo: stopped after training, while costs were measured; the same command goes on from there ({kept})\n"
    assert capsys.readouterr().err == said
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize(("system", "what"), [("life", "roll-out"), ("cvt", "last block ("), ("regionvit", "of RegionViT's region tokens")])
def test_the_picture_of_attention(system, what, tmp_path, monkeypatch):
    """One kind of map for both models, as multiples of a patch's even share: roll-outs where both have them."""
    report, recipe = pytest.importorskip("lifeops.demo.report"), Recipe()
    states = {name: build(name, recipe).state_dict() for name in SYSTEMS[system].trained}
    runs = [Run(name, 50, 0, weights={k: v.numpy() for k, v in state.items()}) for name, state in states.items()]
    figures = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, part, **options: figures.append(figure) or part.touch())
    report.plot_attention(tmp_path / "attention.png", SYSTEMS[system], runs, recipe)
    title, see = figures[0].get_suptitle().splitlines()
    assert what in title
    assert "Bright patches weigh most" in see
    assert [axis.get_ylabel() for axis in figures[0].axes][-2:] == ["times the\neven share"] * 2
    maps = [axis.images[0].get_array() for axis in figures[0].axes[6:18]]
    assert all(shown.mean() == pytest.approx(1, abs=1e-5) for shown in maps)
    if system == "life":
        expected = lifeops.rollout(build("life", recipe).eval(), data.load()[1].x[:1]).maps[0, 0]
        torch.testing.assert_close(torch.as_tensor(maps[6].data), 16 * expected / expected.sum(), rtol=1e-4, atol=0)


def test_where_signals_cannot_be_blocked(monkeypatch):
    """As on Windows: what runs inside runs all the same."""
    monkeypatch.delattr(run.signal, "pthread_sigmask")
    monkeypatch.setattr(run.resource_tracker, "ensure_running", lambda: pytest.fail("is for systems with signal masks"))
    with run._deaf_to_interrupts():
        ran = True
    assert ran


def test_demo_table_has_every_row(demo_output):
    _, folder = demo_output
    with (folder / "table.csv").open(newline="") as file:
        rows = {(r["model"], r["quantity"]): float(r["value"]) for r in csv.DictReader(file)}
    quantities = ("parameters", "MACs per image", "seconds per training step", "peak bytes of a training step")
    costs = {(model, q) for model in ("plain", "eager", "life") for q in quantities}
    assert rows.keys() == costs | {("plain", "accuracy %"), ("life", "accuracy %")}
    assert min(rows.values()) > 0
    for quantity in quantities[:2]:
        assert rows["eager", quantity] == rows["life", quantity] > rows["plain", quantity]
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert all(label in text for label in ("| 100 |", "| plain |", "| LIFE (authors) |", "| LIFE (lifeops) |"))


def test_demo_learns(demo_output):
    _, folder = demo_output
    with (folder / "table.csv").open(newline="") as file:
        accuracies = {r["model"]: float(r["value"]) for r in csv.DictReader(file) if r["quantity"] == "accuracy %"}
    assert accuracies["plain"] > 13  # chance is 10 ± 1; so short a run leaves seeds far apart
    assert accuracies["life"] > 25


def test_command_line_errors(capsys):
    for arguments in (["demo", "--system", "nonsense"], ["demo", "--sizes", "5"], ["demo", "--seeds", "0"], ["nonsense"]):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 4
    assert "choose from 'life'" in message or "choose from life" in message
    assert "between 10 and 1190" in message


@pytest.mark.parametrize(
    ("eager", "system"),
    [("eager", "life"), ("eager_dw_shortcut", "dw_shortcut"), ("eager_cvt", "cvt"), ("eager_edgevit", "edgevit"),
     ("eager_mvit", "mvit"), ("eager_regionvit", "regionvit"), ("eager_conv_ffn", "conv_ffn")],
)
def test_eager_and_lifeops_train_alike(eager, system):
    pytest.importorskip("sklearn")
    images, _ = data.draw(data.load()[0], 50, seed=0)
    recipe, losses = Recipe(steps=5), {}
    weights = build(eager, recipe).state_dict()
    for name in (eager, system):
        model, run = build(name, recipe), Run(name, 50, 0)
        model.load_state_dict(weights)
        fit(model, images, recipe, 0, run)
        losses[name] = torch.tensor(run.losses)
    torch.testing.assert_close(losses[eager], losses[system], rtol=0, atol=1e-4)
    assert losses[system][0] != losses[system][-1]


def test_same_images_in_the_same_order():
    pytest.importorskip("sklearn")
    pool, test = data.load()
    first, rest = data.draw(pool, 100, seed=3)
    second, _ = data.draw(pool, 100, seed=3)
    other, _ = data.draw(pool, 100, seed=4)
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.x, other.x)
    assert (len(pool), len(test), len(first), len(rest)) == (1200, 597, 100, 1100)
    assert first.y.bincount().min() >= 9


@pytest.mark.parametrize(
    ("name", "side"), [("plain", 4), ("eager", 4), ("life", 4), ("dw_shortcut", 4), ("cvt", 2), ("edgevit", 2), ("mvit", 2)]
)
def test_attention_of_the_class_token(name, side):
    model = build(name, Recipe())
    x = torch.randn(2, 1, 8, 8)
    maps = cls_attention(model, x)
    assert maps.shape == (2, side, side)  # as many as there are keys
    assert (maps > 0).all()
    assert (maps.sum((1, 2)) < 1).all()  # the rest goes to the prefix tokens
    assert 0 <= accuracy(model, data.Images(x, torch.zeros(2, dtype=torch.int64))) <= 1


def test_attention_of_the_regions():
    x = torch.randn(2, 1, 8, 8)
    maps = region_attention(build("regionvit", Recipe()), x)
    assert maps.shape == (2, 4, 4)
    assert (maps > 0).all()
    windows = maps.unflatten(1, (2, 2)).unflatten(3, (2, 2)).sum((2, 4))
    assert (windows < 1).all()  # the rest goes to the region's own token
    assert (windows > 0.3).all()


def test_attention_is_the_same_from_both_implementations():
    eager, life = build("eager", Recipe()), build("life", Recipe())
    life.load_state_dict(eager.state_dict())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(cls_attention(eager, x), cls_attention(life, x))


def test_peak_memory_is_the_running_maximum():
    def allocate():
        a = torch.empty(1 << 20)  # 4 MiB
        del a
        b = torch.empty(1 << 20)
        return torch.empty(1 << 19), b.sum()

    assert 6 << 20 <= measure.peak_memory(allocate) <= (6 << 20) + 4096


def test_macs_count_attention():
    model = VisionTransformer(**TINY)
    tokens, patches, dim = 5, 4, 12
    blocks = 2 * (tokens * 12 * dim**2 + 2 * tokens**2 * dim)
    expected = patches * 3 * 64 * dim + blocks + dim * 5
    assert measure.count_macs(lambda: model(torch.randn(1, 3, 16, 16))) == expected


# the baseline -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["life_qkv_c24_p1_5x5", "life_qkv_c24_p1_5x5_norm", "life_qkv_c12_p0_4x4"])
def test_eager_life_is_the_authors(name):
    case = golden(name)
    qkv = EagerLifeQKV(case["x"].shape[-1], int(case["prefix"]), "param.norm.weight" in case, aux_key="scale1").double()
    qkv.load_state_dict({k.removeprefix("param."): v for k, v in case.items() if k.startswith("param.")})
    x = case["x"].requires_grad_()
    out = qkv(x, tuple(case["grid"].tolist()))
    torch.autograd.backward(out, [case["gq"], case["gk"], case["gv"]])
    for tensor, key in zip(out, "qkv", strict=True):
        close(tensor, case[key])
    close(x.grad, case["grad_x"])
    for key, parameter in qkv.named_parameters():
        close(parameter.grad, case[f"grad.{key}"])


def test_deit_with_eager_life_is_the_authors():
    case = golden("life_deit_c24_d2")
    model = VisionTransformer(
        32, 8, num_classes=7, embed_dim=24, depth=2, num_heads=3, attn=lambda *sizes: EagerLifeAttention(*sizes, aux_key="scale1")
    ).double()
    model.load_state_dict({k.removeprefix("param."): v for k, v in case.items() if k.startswith("param.")})
    close(model.eval()(case["x"]), case["y"])


def test_eager_life_treats_every_prefix_token_alike():
    attn = EagerLifeAttention(12, 3, num_prefix_tokens=3, qkv_norm=True)
    x = torch.randn(2, 3 + 8, 12)
    order = [2, 0, 1, *range(3, 11)]
    torch.testing.assert_close(attn(x, (2, 4))[:, order], attn(x[:, order], (2, 4)))


def test_eager_life_errors():
    with pytest.raises(ValueError, match="multiple of 3"):
        EagerLifeQKV(16)
    with pytest.raises(ValueError, match="aux_key"):
        EagerLifeQKV(12, aux_key="first")
    with pytest.raises(ValueError, match="multiple of num_heads"):
        EagerLifeAttention(12, 5)
    with pytest.raises(ValueError, match=r"1 \+ 2\*4 = 9"):
        EagerLifeQKV(12)(torch.zeros(1, 10, 12), (2, 4))


# the DeiT -----------------------------------------------------------------------------------------------------------------


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("dist", "registers"), [(False, 0), (True, 0), (False, 4)])
def test_state_dict_is_timms(dist, registers):
    declare_torchvision_ops()
    vit = pytest.importorskip("timm.models.deit" if dist else "timm.models.vision_transformer")
    theirs = (vit.VisionTransformerDistilled if dist else vit.VisionTransformer)(**TINY, reg_tokens=registers)
    ours = VisionTransformer(**TINY, dist_token=dist, num_reg_tokens=registers)
    assert shapes(ours) == shapes(theirs)
    assert ours.num_prefix_tokens == theirs.num_prefix_tokens
    if not registers:  # timm puts the registers before the patches too, but adds the position embedding in another order
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_published_sizes():
    def params(**kwargs):
        with torch.device("meta"):
            return measure.count_params(VisionTransformer(num_classes=100, **kwargs))

    assert params() == 5_543_716
    assert params(attn=EagerLifeAttention) == 5_617_444
    assert params(embed_dim=384, num_heads=6) == 21_704_164


def test_prefix_tokens_outputs_and_grid():
    sizes = {**TINY, "img_size": (16, 24), "patch_size": (8, 4), "in_chans": 1}
    model = VisionTransformer(**sizes, dist_token=True, num_reg_tokens=2, attn=EagerLifeAttention, drop_path_rate=0.5)
    assert model.num_prefix_tokens == 4
    assert model.patch_embed.grid_size == (2, 6)
    assert model.pos_embed.shape == (1, 4 + 12, 12)
    x = torch.randn(3, 1, 16, 24)
    cls, dist = model(x)
    assert cls.shape == dist.shape == (3, 5)
    tokens = model.eval().forward_features(x)
    assert tokens.shape == (3, 16, 12)
    torch.testing.assert_close(model(x), (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2)
    assert VisionTransformer(**sizes, class_token=False)(x).shape == (3, 5)
    assert VisionTransformer(**{**sizes, "num_classes": 0})(x).shape == (3, 12)


def test_drop_path_keeps_the_mean():
    from lifeops.models.deit import DropPath

    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(4000, 2, 3))
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (dropped == dropped[:, :1, :1]).all()  # whole samples
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 18}, "multiple of patch_size"),
        ({"img_size": (16, 0)}, "img_size must be a positive int"),
        ({"patch_size": (8, 8, 8)}, "patch_size must be"),
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"class_token": False, "dist_token": True}, "needs class_token"),
        ({"num_reg_tokens": -1}, "num_reg_tokens"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
    ],
)
def test_deit_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**TINY, **changes})


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 16, 24), (3, 16, 16)])
def test_deit_refuses_other_images(shape):
    with pytest.raises(ValueError, match=r"must be images \(B, 3, 16, 16\)"):
        VisionTransformer(**TINY)(torch.zeros(shape))
