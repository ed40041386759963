"""examples/train_image_folder.py in two processes: FSDP2 for every system, gradient accumulation, a process that is killed, resuming."""

import csv
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lifeops.models.named import SYSTEMS

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "train_image_folder.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SIZES = {"img-size": 16, "patch-size": 4, "embed-dim": 12, "depth": 2, "batch-size": 2, "workers": 0, "lr": 0.01}
OPTIONS = [f"--{name}={value}" for name, value in SIZES.items()]
STEPS = "--epochs=3", "--accumulate=2", "--drop-path=0.3"
TIMEOUT = 300

needs_gloo = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the example would use the GPU, of which two processes need two")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """22 images of two classes, of which 5 are for validation."""
    Image, folder = pytest.importorskip("PIL.Image"), tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for label in range(2):
        (folder / f"class{label}").mkdir()
        for i in range(11):
            pixels = torch.randint(100 * label, 100 * label + 150, (16, 16, 3), generator=generator).byte()
            Image.fromarray(pixels.numpy()).save(folder / f"class{label}" / f"{i}.png")
    return folder


def started(*command):
    command, environment = [*TORCHRUN, *map(str, command)], {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err[-4000:]
    return out


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """What the worker printed, and the folder it wrote: "undisturbed" is a run to compare with."""
    out = tmp_path_factory.mktemp("out")
    return ended(started(HERE / "image_folder_worker.py", EXAMPLE, images, out, *OPTIONS)), out


def losses(path):
    return torch.tensor([float(row["loss"]) for row in csv.DictReader(path.open())], dtype=torch.float64)


@needs_gloo
@on_cpu
def test_every_system_is_shared_out(undisturbed):
    assert all(f"trained: {system}\n" in undisturbed[0] for system in SYSTEMS)


def child(process, rank):
    """The process of a rank below torchrun's."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(pid) for pid in found if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes())


@needs_gloo
@on_cpu
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process by Linux's /proc")
def test_a_killed_process(images, undisturbed, tmp_path):
    """One of two is killed behind the first epoch; the same command then ends with the losses and weights of the undisturbed run."""
    run = tmp_path / "run"
    command = EXAMPLE, images, *OPTIONS, *STEPS, "--fsdp", "--output", run, "--resume", run, "--losses", tmp_path / "losses.csv"
    process = started(*command)
    assert "2 x cpu" in process.stdout.readline()
    assert "epoch 1/3" in process.stdout.readline()
    os.kill(child(process, 1), signal.SIGKILL)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert "epoch 3/3" not in out
    assert err.count(f"no whole checkpoint in {run}: starting anew") == 1
    assert "epoch 1/3" not in ended(started(*command))
    expected = losses(undisturbed[1] / "undisturbed.csv")
    assert len(expected) == 3 * 3
    torch.testing.assert_close(losses(tmp_path / "losses.csv"), expected, rtol=0, atol=1e-6)
    assert [path.name for path in run.iterdir()] == ["epoch-000003"]


@needs_gloo
@on_cpu
def test_another_number_of_processes(images, undisturbed, tmp_path, monkeypatch):
    """One process goes on from what two left, here to train no more."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    options = [*OPTIONS, *STEPS, "--fsdp", "--output", str(tmp_path), "--resume", str(undisturbed[1] / "undisturbed")]
    model = runpy.run_path(str(EXAMPLE))["main"]([str(images), *options])
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    expected = torch.load(undisturbed[1] / "weights.pt", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_accumulation_is_a_larger_batch(images, tmp_path):
    """Two batches of 4, and one of 2 at the end of 17 images' 5 batches, a step each; in one go where batches are as large."""
    main, found = runpy.run_path(str(EXAMPLE))["main"], []
    for batch, accumulate in ((16, 1), (4, 4)):
        path = tmp_path / f"{batch}.csv"
        settings = [f"--batch-size={batch}", f"--accumulate={accumulate}", "--epochs=2", "--drop-path=0", f"--losses={path}"]
        main([str(images), *OPTIONS, *settings, "--output", str(tmp_path / "checkpoint.pt")])
        found.append(losses(path))
    assert len(found[0]) == 2 * 2  # 16 images, then the last one
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fsdp"], "--fsdp needs torchrun"),
        (["--accumulate=0"], "must be at least 1"),
        (["--system=mvit"], "--system mvit is a model of its own: give --model"),
    ],
)
def test_wrong_options(images, options, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    example = runpy.run_path(str(EXAMPLE))
    monkeypatch.delitem(example["SYSTEMS"], "mvit")  # as are systems that no ViT takes in
    with pytest.raises(SystemExit) as stop:
        example["main"]([str(images), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
