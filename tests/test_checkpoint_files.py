"""Checkpoint files as training scripts leave them on disk: every form is read, nothing of it is run, and what is none is named."""

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import os
import pathlib
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import lifeops
from lifeops.integrations.checkpoint_files import foreign_globals, read
from lifeops.integrations.official import lifeops_deit
from test_checkpoints import life, quiet, same

RAN = []  # what code of a checkpoint would leave

# ------------------------------------------------------------------------------------------------ foreign objects


class Settings(dict):
    """As yacs' and EasyDict: a dict with attributes."""

    def __init__(self, *args, **items):
        super().__init__(*args, **items)
        self.__dict__["frozen"] = True


class Words(list):
    """A list of its own class."""


class Nodes:
    """As OmegaConf's: items, a parent and types in its state."""

    def __init__(self, parent=None):
        self.parent, self.content, self.kind = parent, {"a": (Settings, Words)}, collections.OrderedDict

    def __setstate__(self, state):
        RAN.append("setstate")


class Color(enum.Enum):
    RED = 1


class Outer:
    class Inner:
        pass


@dataclasses.dataclass
class Recipe:
    rate: float = 1e-3
    where: pathlib.Path = pathlib.Path("out")


class Runs:
    """Code in a checkpoint."""

    def __reduce__(self):
        return RAN.append, ("reduce",)


def _scheduler():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    scaler = torch.amp.GradScaler("cpu")
    return {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "scaler": scaler.state_dict(), "object": schedule}


BESIDE = {
    "namespace": argparse.Namespace(lr=1e-3, output_dir=pathlib.Path("out"), nested=argparse.Namespace(a=[1, None, "x"])),
    "simple_namespace": types.SimpleNamespace(lr=1e-3),
    "numpy_scalars": {"acc": np.float64(1), "n": np.int64(3), "ok": np.bool_(True), np.int32(3): np.float32(2)},
    "numpy_arrays": [np.arange(6.0).reshape(2, 3), np.array(["a", "b"]), np.array([1, None], dtype=object), np.zeros(0), np.dtype("f4")],
    "random_states": {"python": random.getstate(), "numpy": np.random.RandomState(0).get_state(), "rng": np.random.default_rng(0)},
    "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("/c"), pathlib.PureWindowsPath("d")],
    "settings": Settings(MODEL=Settings(TYPE="vit", DEPTHS=[2, 2]), EMPTY=Settings()),
    "list_of_its_own": [Words("abc"), collections.deque([1, 2], maxlen=3)],
    "omegaconf_like": Nodes(Nodes()),
    "containers": [
        collections.defaultdict(list, a=[1]), collections.Counter("aab"), {1, 2}, frozenset("ab"), b"", b"bytes", bytearray(b"x"), 2**70,
        1j, range(3), slice(1), datetime.datetime(2024, 1, 2), datetime.timedelta(3), collections.OrderedDict(a=1), Ellipsis, float("nan"),
    ],
    "enums_and_dataclasses": {Color.RED: Recipe(), "class": Recipe, "partial": functools.partial(int, base=2), "method": "a".join},
    "nested_class": [Outer.Inner, Outer.Inner()],
    "training": _scheduler(),
    "whole_modules": [nn.Sequential(nn.Linear(2, 2), nn.GELU()), torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)],
    "torch_values": [torch.float16, torch.device("cpu"), torch.Size((1, 2)), torch.random.get_rng_state(), nn.Parameter(torch.ones(2))],
    "code": [Runs(), eval, print, functools.reduce],
}  # fmt: skip


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BESIDE)
def test_what_scripts_save_beside_the_model(name, new_format, tmp_path):
    RAN.clear()
    model = life()
    content = {"args": BESIDE[name], "model": model.state_dict(), "epoch": 3}
    if name == "whole_modules" and not new_format:
        pytest.skip("files of torch before 1.6 hold the modules' source, which weights_only=True refuses")
    torch.save(content, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=new_format)
    same(quiet(lifeops.load_official, tmp_path / "checkpoint.pth"), model)
    same(quiet(lifeops.load_official, content), model)
    assert not RAN


def test_real_settings(tmp_path):
    config = pytest.importorskip("yacs.config")
    node = config.CfgNode({"MODEL": config.CfgNode({"TYPE": "vit", "DEPTHS": [2, 2]})})
    torch.save({"model": life().state_dict(), "config": node}, tmp_path / "checkpoint.pth")
    same(quiet(lifeops.load_official, tmp_path / "checkpoint.pth"), life())


def test_classes_that_are_not_installed(tmp_path, monkeypatch):
    """As a real one of another machine: the module is neither there nor looked for."""
    module = types.ModuleType("nowhere")
    for cls in (type("Plain", (), {}), type("Node", (dict,), {}), type("Row", (list,), {})):
        cls.__module__ = "nowhere"
        setattr(module, cls.__name__, cls)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nowhere", module)
        plain = module.Plain()
        plain.rows = [module.Row("ab"), module.Node(a=module.Node())]
        torch.save({"state_dict": life().state_dict(), "args": plain}, tmp_path / "checkpoint.pth")
    same(quiet(lifeops.load_official, tmp_path / "checkpoint.pth"), life())


def test_known_globals():
    found = foreign_globals(pickle.dumps([Settings(a=1), Words("ab"), Recipe()], protocol=2))
    assert {name: found[f"{__name__}.{name}"] for name in ("Settings", "Words", "Recipe")} == {
        "Settings": "dict", "Words": "list", "Recipe": None,
    }  # fmt: skip


def test_code_of_the_system_is_refused(tmp_path):
    class System:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": life().state_dict(), "args": System()}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"checkpoint\.pth: .* not allowed .*system"):
        lifeops.load_official(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "ran").exists()


def test_reading_leaves_no_class_allowed(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"model": life().state_dict(), "args": Recipe()}, tmp_path / "checkpoint.pth")
    read(str(tmp_path / "checkpoint.pth"))
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "checkpoint.pth", weights_only=True)


# ------------------------------------------------------------------------------------------------ files that are none


@pytest.fixture
def broken(tmp_path):
    """Files by what they are, and what the message must say."""
    whole = tmp_path / "whole.pth"
    torch.save({"model": life().state_dict(), "args": argparse.Namespace()}, whole)
    old = tmp_path / "old.pth"
    torch.save({"model": life().state_dict()}, old, _use_new_zipfile_serialization=False)
    torch.save(nn.Linear(2, 2), tmp_path / "object.pth")
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "inside.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pth")
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    (tmp_path / "folder.pth").mkdir()
    for name, content in {
        "cut.pth": whole.read_bytes()[:3000], "end.pth": whole.read_bytes()[:-30], "cut_old.pth": old.read_bytes()[:2000],
        "empty.pth": b"", "lfs.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "text.pth": b"hello world",
        "page.pth": b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "zeros.pth": bytes(500), "gz.pth": b"\x1f\x8b" + bytes(50),
        "cut.safetensors": (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_off', "noise.pth": bytes(range(128, 256)),
        "pickle.pth": pickle.dumps({"a": 1}), "magic.pth": b"\x80\x02", "utf8.pth": "é".encode() * 40,
        "latin.pth": "héllo".encode("latin-1"),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    return tmp_path


BROKEN = {
    "cut.pth": "damaged, cut short",
    "end.pth": "damaged, cut short",
    "cut_old.pth": "damaged, cut short",
    "empty.pth": "found an empty file",
    "lfs.pth": "Git LFS pointer",
    "text.pth": "found text: 'hello world'",
    "page.pth": "found a web page",
    "zeros.pth": "found bytes 00 00",
    "gz.pth": "found gzip",
    "cut.safetensors": "expected a safetensors file, found one that is damaged",
    "noise.pth": "damaged, cut short",
    "pickle.pth": "found a pickle of protocol",
    "magic.pth": "damaged, cut short",
    "utf8.pth": "found text",
    "latin.pth": "found bytes 68 e9 6c 6c 6f",
    "folder.pth": "found a folder",
    "object.pth": "got a whole pickled torch.nn.modules.linear.Linear object; save its state_dict",
    "inside.pth": "'model' is a pickled torch",
    "list.pth": "got a list, not a dict",
    "tensor.pth": "got a Tensor, not a dict",
    "script.pth": "a TorchScript archive",
    "arrays.npz": "a zip archive that torch.save did not write",
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_checkpoint(name, broken):
    for load in (lifeops.load_official, lifeops_deit):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            load(broken / name)
        message = str(error.value)
        assert message.startswith(f"{load.__name__}: {broken / name}: ")
        assert BROKEN[name] in message
        assert "\n" not in message
        assert "weights_only=False" not in message


def test_a_safetensors_file_where_that_package_is_missing(tmp_path, monkeypatch):
    """Says which package, not that the file were damaged."""
    (tmp_path / "a.pth").write_bytes((2).to_bytes(8, "little") + b"{}")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match="safetensors"):
        read(str(tmp_path / "a.pth"))


def test_every_cut_of_a_file(tmp_path):
    torch.save({"model": life().state_dict(), "args": argparse.Namespace()}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for length in [*range(1, 400, 7), *range(400, len(whole), len(whole) // 60)]:
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pth"):
            lifeops.load_official(tmp_path / "cut.pth")


def test_checksums(tmp_path):
    """A byte of a tensor that has changed is found; files without checksums are taken."""
    model = life()
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    content = bytearray((tmp_path / "whole.pth").read_bytes())
    at = content.find(model.pos_embed.detach().numpy().tobytes())
    content[at + 10] ^= 0xFF
    (tmp_path / "changed.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"changed\.pth: expected a torch file, found one that is damaged: the checksum of 'whole/data/"):
        lifeops.load_official(tmp_path / "changed.pth")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "none.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    same(quiet(lifeops.load_official, tmp_path / "none.pth"), model)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        lifeops.load_official(tmp_path / "absent.pth")
