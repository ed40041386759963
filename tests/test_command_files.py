"""The command line's files: what cannot be read or written is one line and exit code 2, and what is written is whole and nobody else's."""

import argparse
import inspect
import os
import pathlib
import re

import numpy as np
import pytest
import torch

import lifeops
from conftest import declare_torchvision_ops
from lifeops import cli
from lifeops.cli import rollout as rollout_cli
from lifeops.cli.main import COMMANDS, told_plainly
from lifeops.files import distinct, make_folder, written
from lifeops.integrations.convert import SYSTEMS
from lifeops.models import dw_shortcut
from lifeops.models.deit import VisionTransformer
from lifeops.models.swin import SwinTransformer
from test_checkpoints import life

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 4}


@pytest.fixture
def folder(tmp_path):
    """Pictures and checkpoints, whole and not."""
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES)
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(out=pathlib.Path("x"))}, tmp_path / "model.pth")
    torch.save({**model.state_dict(), "pos_embed": torch.randn(5)}, tmp_path / "rank.pth")
    torch.save({"model": {k: v for k, v in model.state_dict().items() if "norm" not in k}}, tmp_path / "missing.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "model.pth").read_bytes()[:3000])
    (tmp_path / "text.pth").write_text("hello world, not a checkpoint")
    for name in ("empty.pth", "empty.png", "file"):
        (tmp_path / name).touch()
    for seed, place in enumerate(("ok.png", "a/0001.png", "b/0001.png", "b/0001.jpg")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / place)
    whole = (tmp_path / "ok.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:400])
    (tmp_path / "flipped.png").write_bytes(whole[:60] + bytes([255 - b for b in whole[60:90]]) + whole[90:])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    return tmp_path


def run(*images, model="lifeops", checkpoint="model.pth", out="out", options=()):
    weights = [] if checkpoint is None else ["--checkpoint", checkpoint]
    return cli.main(["rollout", *images, "--model", model, *weights, "--out", out, *options])


def refused(capsys, *args, **options):
    """The one line on stderr of a command that exits with 2."""
    with pytest.raises(SystemExit) as stop:
        run(*args, **options)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


BAD = {
    "cut picture": ({"image": "cut.png"}, "cut.png cannot be read as an image"),
    "damaged picture": ({"image": "flipped.png"}, "flipped.png cannot be read as an image"),
    "text as picture": ({"image": "text.png"}, "text.png cannot be read as an image"),
    "empty picture": ({"image": "empty.png"}, "empty.png cannot be read as an image"),
    "folder as picture": ({"image": "a"}, "no such file: a"),
    "absent picture": ({"image": "absent.png"}, "no such file: absent.png"),
    "cut checkpoint": ({"checkpoint": "cut.pth"}, "cut.pth: expected a torch file, found one that is damaged"),
    "text as checkpoint": ({"checkpoint": "text.pth"}, "text.pth: expected a torch or safetensors file, found text"),
    "empty checkpoint": ({"checkpoint": "empty.pth"}, "found an empty file"),
    "absent checkpoint": ({"checkpoint": "absent.pth"}, "no such file: absent.pth"),
    "rank": (
        {"checkpoint": "rank.pth", "options": ["--num-heads", "3"]},
        "a DeiT checkpoint must have 3 dimensions, none of them 0, got shape (5,)",
    ),
    "missing keys": (
        {"checkpoint": "missing.pth", "options": ["--num-heads", "3"]},
        'Missing key(s) in state_dict: "blocks.0.norm1',
    ),
    "other family": ({"model": "official"}, "model.pth: no known checkpoint; looked for LIFE DeiT"),
    "out is a file": ({"out": "file"}, "--out must be a folder that can be written to, got file"),
    "out is inside a file": ({"out": "file/x"}, "--out must be a folder that can be written to, got file/x"),
    "class names": ({"options": ["--class-names", "latin.txt"]}, "--class-names must be a UTF-8 text file, got latin.txt"),
    "key": ({"options": ["--key", "model_ema"]}, "key must be one of 'model', got 'model_ema'"),
    "heads": ({"options": ["--num-heads", "4"]}, "num_heads must be the model's own, 3 by the checkpoint's metadata, got 4"),
    "img_size": ({"options": ["--img-size", "1", "2", "3"]}, "--img-size must be one or two positive numbers, got 1 2 3"),
    "transformers": ({"model": "transformers:a"}, "--model transformers:a cannot be loaded"),
    "timm's name": ({"model": "vit"}, "--model must be lifeops, official, transformers:FOLDER or a timm model, got 'vit'"),
    "timm's tag": ({"model": "vit_tiny_patch16_224.tag"}, "--model vit_tiny_patch16_224.tag: Invalid pretrained tag (tag)"),
    "no weights": (
        {"model": "vit_giant_patch14_224", "checkpoint": None, "options": ["--pretrained"]},
        "--pretrained: No pretrained weights exist for vit_giant_patch14_224",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    options, message = BAD[name]
    model = options.get("model", "lifeops")
    if model not in ("lifeops", "official"):
        declare_torchvision_ops()
        pytest.importorskip("transformers" if "transformers" in name else "timm")
    line = refused(capsys, options.get("image", "ok.png"), **{k: v for k, v in options.items() if k != "image"})
    assert line.startswith("lifeops rollout: error: ")
    assert message in line
    assert not list(folder.glob("out/*"))


def test_a_folder_that_cannot_be_written_to(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert "--out must be a folder that can be written to, got out: no permission" in refused(capsys, "ok.png")


def test_a_full_disk(folder, capsys, monkeypatch):
    """What is written when a run ends is whole; nothing else is left."""
    monkeypatch.chdir(folder)

    def full(path, *args):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rollout_cli, "draw", full)
    assert "No space left on device" in refused(capsys, "ok.png")
    assert [p.name for p in (folder / "out").iterdir()] == ["ok.npy"]


def test_info_says_what_it_prints(capsys):
    for args, code in ((["--help"], 0), (["nonsense"], 2)):
        with pytest.raises(SystemExit) as stop:
            cli.main(["info", *args])
        assert stop.value.code == code
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: lifeops info" in text
    assert "each backend's ops, or why it is missing; the environment variables" in text
    assert cli.main(["info"]) == 0
    assert "CPU instruction set" in capsys.readouterr().out


def test_bugs_keep_their_traceback(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def bug(*args, **options):
        raise AttributeError("a bug")

    monkeypatch.setattr(rollout_cli, "rollout", bug)
    with pytest.raises(AttributeError, match="a bug"):
        run("ok.png")
    with pytest.raises(ModuleNotFoundError, match=r"lifeops\.nowhere"), told_plainly(argparse.ArgumentParser()):
        import lifeops.nowhere  # noqa: F401


# ------------------------------------------------------------------------------------------------ names


def test_images_of_one_name(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert run("a/0001.png", "b/0001.png", "b/0001.jpg", "a/0001.png") == 0
    arrays = {p.stem: np.load(p) for p in (folder / "out").glob("*.npy")}
    assert sorted(arrays) == ["0001", "0001-2", "0001-3", "0001-4"]
    assert len(list((folder / "out").iterdir())) == 8
    printed = capsys.readouterr()
    assert "the files of b/0001.png are named 0001-2: another image is named 0001" in printed.err
    assert len(printed.out.split()) == 8
    assert np.array_equal(arrays["0001"], arrays["0001-4"])
    assert not np.array_equal(arrays["0001"], arrays["0001-2"])
    assert run("b/0001.png", out="alone") == 0
    assert np.array_equal(np.load(folder / "alone" / "0001.npy"), arrays["0001-2"])


def test_distinct():
    assert distinct(["a", "b"]) == ["a", "b"]
    assert distinct(["a", "a", "a-2", "A", "a-2"]) == ["a", "a-3", "a-2", "A-4", "a-2-2"]
    assert distinct([]) == []


def test_the_class_that_is_predicted(folder, monkeypatch):
    """Where a target by class comes without --classes: the one whose map is drawn is the model's answer."""
    monkeypatch.chdir(folder)
    model = VisionTransformer(**SIZES)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, 1.0, 3.0, 2.0])
    torch.save({"model": model.state_dict()}, "third.pth")
    assert run("ok.png", checkpoint="third.pth", options=["--num-heads", "3", "--target", "soft"]) == 0
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["ok.npy", "ok_class-2.png"]


@pytest.mark.parametrize(("command", "needs"), [("rollout", "pillow"), ("demo", "scikit-learn, rich")])
def test_a_command_whose_packages_are_not_installed(command, needs, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main([command]) == 1
    needs = f"matplotlib, numpy, {needs}"
    assert capsys.readouterr().err == f"lifeops {command} needs {needs}: pip install {needs.replace(',', '')}\n"


def test_the_commands_are_printed(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name:<9}{command.does}\n" in said for name, command in COMMANDS.items())


@pytest.mark.parametrize(
    ("args", "prog"),
    [
        ("nonsense", "lifeops"),
        ("rollout a.png", "lifeops rollout"),
        ("flops --system", "lifeops flops"),
        ("demo --nonsense", "lifeops demo"),
        ("info more", "lifeops info"),
    ],
)
def test_wrong_usage_is_one_line(args, prog, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args.split())
    assert stop.value.code == 2
    assert re.fullmatch(rf"{prog}: error: .+ \({prog} --help\)\n", capsys.readouterr().err)


def test_defaults_are_those_of_the_function():
    """But for ``classes``, of which a command draws one picture each."""
    args = rollout_cli.make_parser().parse_args(["a.png", "--model", "lifeops"])
    defaults = inspect.signature(lifeops.rollout).parameters
    names = "head_fusion", "residual", "discard_ratio", "start_layer", "prefix"
    assert {name: getattr(args, name) for name in names} == {name: defaults[name].default for name in names}


def test_a_model_without_trained_weights_is_marked(folder, monkeypatch):
    """In the title of each picture; not where a checkpoint is loaded."""
    declare_torchvision_ops()
    timm, titles = pytest.importorskip("timm"), []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(rollout_cli, "draw", lambda part, picture, map_, title: titles.append(title) or part.touch())
    options = ["--img-size", "32", "--num-classes", "4", "--convert", "dw_shortcut"]
    assert run("ok.png", model="vit_tiny_patch16_224", checkpoint=None, options=options) == 0
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4)
    torch.save(lifeops.convert(model, "dw_shortcut").state_dict(), "converted.pth")
    assert run("ok.png", model="vit_tiny_patch16_224", checkpoint="converted.pth", options=options) == 0
    assert [title.splitlines()[1:] for title in titles] == [["random weights: means nothing"], []]


def test_labels_of_one_name(folder, monkeypatch):
    """Class names that differ in what a file name cannot hold, and a formula that is none."""
    monkeypatch.chdir(folder)
    (folder / "names.txt").write_text("a b\na/b\n猫\n$\\frac{$\n", encoding="utf-8")
    assert run("ok.png", options=["--class-names", "names.txt", "--target", "soft", "--classes", "0", "1", "2", "3"]) == 0
    assert {p.name for p in (folder / "out").glob("*.png")} == {"ok_a-b.png", "ok_a-b-2.png", "ok_class-2.png", "ok_frac.png"}


def test_no_input_is_overwritten(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "ok.png").rename(folder / "ok_cls-token.png")
    (folder / "a" / "0001.png").rename(folder / "ok.png")
    before = (folder / "ok_cls-token.png").read_bytes()
    line = refused(capsys, "ok.png", "ok_cls-token.png", out=".")
    assert "ok_cls-token.png is an input that the output would overwrite; choose another --out" in line
    assert (folder / "ok_cls-token.png").read_bytes() == before
    assert not (folder / "ok.npy").exists()


def test_written(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")

    def cut():
        with written(target) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut()
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert target.read_text() == "old"
    with written(target) as part:
        assert (part.parent, part.suffix) == (tmp_path, ".part")
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert make_folder(tmp_path / "a" / "b").is_dir()


# ------------------------------------------------------------------------------------------------ models


def test_what_the_checkpoint_does_not_tell(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save({"model": dict(life("multiscale").state_dict()), "model_ema": {}}, "life.pth")
    assert "pass num_heads" in refused(capsys, "ok.png", checkpoint="life.pth")
    assert run("ok.png", checkpoint="life.pth", options=["--num-heads", "3"]) == 0
    assert (
        "lifeops rollout: warning: lifeops_deit: the checkpoint does not tell, so assumed aux_key='multiscale'" in capsys.readouterr().err
    )
    told = ["--num-heads", "3", "--aux-key", "scale1", "--key", "model"]
    for model in ("lifeops", "official"):
        assert run("ok.png", model=model, checkpoint="life.pth", out=model, options=told) == 0
    assert not capsys.readouterr().err
    assert not np.array_equal(np.load("out/ok.npy"), np.load("official/ok.npy"))
    assert run("ok.png", model="official", checkpoint="life.pth", out="large", options=[*told, "--img-size", "48", "64"]) == 0
    assert np.load("large/ok.npy").shape == (1, 6, 8)


def test_official_models_without_a_patch_embedding(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    for model in (
        dw_shortcut("vit_tiny", depth=1, img_size=32),
        SwinTransformer(32, 2, embed_dim=12, depths=(2,), num_heads=(2,), window_size=4),
    ):
        torch.save(model.state_dict(), "shortcut.pth")
        assert "error: rollout: " in refused(capsys, "ok.png", model="official", checkpoint="shortcut.pth")


def test_a_timm_model_and_its_checkpoint(folder, capsys, monkeypatch):
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(folder)
    model = timm.create_model("vit_tiny_patch16_224")
    state = {f"module.{name}": t for name, t in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state, "state_dict_ema": dict(state), "args": argparse.Namespace()}, "timm.pth")
    assert run("ok.png", model="vit_tiny_patch16_224", checkpoint="timm.pth") == 0
    assert "warning: load: took the weights under 'state_dict'; for others pass key='state_dict_ema'" in capsys.readouterr().err
    assert "no known checkpoint; looked for VisionTransformer" in refused(capsys, "ok.png", model="vit_tiny_patch16_224")
    timm_tiny = {k: v[:1] if k == "head.bias" else v for k, v in model.state_dict().items()}
    torch.save(timm_tiny, "head.pth")
    assert "size mismatch for head.bias" in refused(capsys, "ok.png", model="vit_tiny_patch16_224", checkpoint="head.pth")
    loaded = lifeops.convert(model, "life")
    torch.save(loaded.state_dict(), "life.pth")
    assert run("ok.png", model="vit_tiny_patch16_224", checkpoint="life.pth", options=["--convert", "life"]) == 0
    line = refused(capsys, "ok.png", model="vit_tiny_patch16_224", checkpoint="life.pth")
    assert line.endswith(
        "life.pth: the checkpoint is of a model converted to 'life': lifeops.convert(model, 'life'), with the options that it had, before"
        " loading it (lifeops rollout: --convert life)"
    )


def test_a_timm_model_of_another_size_and_other_classes(folder, capsys, monkeypatch):
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(folder)
    model = lifeops.convert(timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=(64, 96)), "dw_shortcut")
    torch.save(model.state_dict(), "five.pth")
    told = ["--convert", "dw_shortcut", "--num-classes", "5", "--img-size", "64", "96"]
    assert run("ok.png", model="vit_tiny_patch16_224", checkpoint="five.pth", options=told) == 0
    assert not capsys.readouterr().err
    assert np.load("out/ok.npy").shape == (1, 4, 6)
    for options, wrong in ((["--num-heads", "3"], "--num-heads"), (["--act", "relu6", "--aux-key", "scale1"], "--aux-key, --act")):
        message = f"--model vit_tiny_patch16_224 does not read {wrong}"
        assert message in refused(capsys, "ok.png", model="vit_tiny_patch16_224", checkpoint="five.pth", options=options)
    refusal = refused(capsys, "ok.png", model="resnet18", checkpoint="five.pth", options=["--img-size", "64"])
    assert "--model resnet18 does not take img_size" in refusal


def test_random_weights_are_told(folder, capsys, monkeypatch):
    declare_torchvision_ops()
    pytest.importorskip("timm")
    monkeypatch.chdir(folder)
    assert run("ok.png", model="vit_tiny_patch16_224", checkpoint=None) == 0
    assert "lifeops rollout: warning: vit_tiny_patch16_224 has random weights" in capsys.readouterr().err


def _saved(folder, system=None):
    """A small ViT of transformers, converted and saved; the model."""
    declare_torchvision_ops()
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 24, "image_size": 32}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, patch_size=8, num_labels=3)).eval()
    if system is not None:
        lifeops.convert(model, system)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_converted_transformers_model(system, folder, capsys, monkeypatch):
    """From its own folder, or from the folder of the plain one and a checkpoint; never without --convert, nor with new layers unsaid."""
    monkeypatch.chdir(folder)
    plain, model = _saved("plain"), _saved("saved", system)
    torch.save(model.state_dict(), "converted.pth")
    torch.save(plain.state_dict(), "plain.pth")
    x = rollout_cli.read_image(folder / "ok.png", rollout_cli.Loaded(model, (3, 32, 32), (0.5,) * 3, (0.5,) * 3))[0]
    expected = lifeops.rollout(model, x).maps[0].numpy()
    for name, checkpoint in (("saved", None), ("plain", "converted.pth")):
        assert run("ok.png", model=f"transformers:{name}", checkpoint=checkpoint, out=name, options=["--convert", system]) == 0
        assert "warning" not in capsys.readouterr().err
        np.testing.assert_allclose(np.load(f"{name}/ok.npy"), expected, rtol=1e-5)
    line = f"holds a model converted to '{system}': give --convert {system}"
    assert line in refused(capsys, "ok.png", model="transformers:saved", checkpoint=None)
    other = next(s for s in SYSTEMS if s != system)
    assert line in refused(capsys, "ok.png", model="transformers:saved", checkpoint=None, options=["--convert", other])
    line = refused(capsys, "ok.png", model="transformers:plain", checkpoint="converted.pth")
    assert f"the checkpoint is of a model converted to '{system}': lifeops.convert(model, '{system}')" in line
    line = refused(capsys, "ok.png", model="transformers:plain", checkpoint="plain.pth", options=["--convert", system])
    assert f"the checkpoint is of a model that was not converted, this one is, to '{system}': load it, then lifeops.convert" in line
    assert run("ok.png", model="transformers:plain", checkpoint=None, options=["--convert", system]) == 0
    assert f"warning: transformers:plain has layers of '{system}' with random weights" in capsys.readouterr().err
    assert "does not read --pretrained" in refused(capsys, "ok.png", model="transformers:plain", checkpoint=None, options=["--pretrained"])


def test_transformers_folders_that_lack(folder, capsys, monkeypatch):
    """An image size, or one weight of a converted model."""
    monkeypatch.chdir(folder)
    _saved("saved", "life")
    transformers, files = pytest.importorskip("transformers"), pytest.importorskip("safetensors.torch")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=2)
    transformers.ResNetForImageClassification(config).save_pretrained("resnet")
    transformers.AutoModelForImageClassification.from_pretrained("resnet")
    capsys.readouterr()  # what its packages say as they are first imported
    line = refused(capsys, "ok.png", model="transformers:resnet", checkpoint=None)
    assert line.endswith("--model transformers:resnet does not tell its image size")
    path = folder / "saved" / "model.safetensors"
    state = files.load_file(path)
    gone = next(name for name in state if name.endswith("classifier.bias"))
    files.save_file({name: t for name, t in state.items() if name != gone}, path, {"format": "pt"})
    with pytest.raises(SystemExit, match="2"):
        run("ok.png", model="transformers:saved", checkpoint=None, options=["--convert", "life"])
    line = capsys.readouterr().err.splitlines()[-1]  # behind transformers' own report
    assert line.endswith(f"holds a model converted to 'life', whose weights transformers does not find: {gone}, …")


@pytest.mark.parametrize("model", ["lifeops", "official"])
def test_our_models_are_told_what_they_are_by_their_checkpoints(model, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    line = refused(capsys, "ok.png", model=model, options=["--convert", "life", "--pretrained"])
    assert f"--model {model} does not read --pretrained, --convert" in line
    torch.save(lifeops.convert(VisionTransformer(**SIZES), "dw_shortcut").state_dict(), "converted.pth")
    line = refused(capsys, "ok.png", model=model, checkpoint="converted.pth")
    assert "converted.pth: the checkpoint is of a model converted to 'dw_shortcut': lifeops.convert(model, 'dw_shortcut')" in line


@pytest.mark.parametrize("system", ["life", "impulse"])
def test_demo_refuses_a_folder_before_it_trains(system, folder, capsys):
    for package in ("sklearn", "rich"):
        pytest.importorskip(package)
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--system", system, "--out", str(folder / "file")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lifeops demo: error: --out must be a folder that can be written to, got {folder / 'file' / system}")
