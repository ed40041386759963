"""Processes that are forked, interrupted or killed: data loaders, the demo and its workers, training that goes on from a checkpoint."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import ROOT, TIMEOUT, ended, fault, started

from lifeops import cli
from lifeops.demo.train import INITIALISATIONS, Recipe, Run, run_one
from lifeops.demo.unfinished import Unfinished


def until(condition, process) -> None:
    """Waits for ``condition()`` while ``process`` runs."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ forks and threads

FORK = """
import multiprocessing, threading, torch, lifeops
from torch.utils.data import DataLoader

def op(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1 + 48 * 48, 33, generator=generator)
    weight = torch.randn(33, 1, 3, 3, generator=generator, requires_grad=True)
    y = lifeops.token_dwconv(x, weight, grid=(48, 48), num_prefix_tokens=1)
    return torch.cat((y.detach()[0, :9].flatten(), torch.autograd.grad(y.square().sum(), weight)[0].flatten()))

def child(seed, queue):
    torch.set_num_threads(1)  # as data loaders do: OpenMP's threads do not come along
    queue.put(op(seed).numpy())

if __name__ == "__main__":
    torch.set_num_threads(2)
    expected = [op(seed) for seed in range(4)]  # the parent has used its threads before it forks
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(1, queue))
    process.start()
    assert torch.equal(torch.from_numpy(queue.get()), expected[1])
    process.join()
    assert process.exitcode == 0
    loader = DataLoader(range(4), batch_size=1, num_workers=2, collate_fn=lambda seeds: op(*seeds), multiprocessing_context="fork")
    assert all(map(torch.equal, loader, expected))
    assert torch.get_num_threads() == 2
    assert all(map(torch.equal, map(op, range(4)), expected))
    found = {}
    threads = [threading.Thread(target=lambda s=seed: found.update({s: op(s)})) for seed in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(4))
    print("alike")
"""


@fault(
    "fork after the kernels' threads have run, DataLoader workers that call ops, ops from several Python threads",
    "the same bits everywhere; the number of threads that was set stays",
)
def test_forks(tmp_path):
    (tmp_path / "fork.py").write_text(FORK)
    assert ended(tmp_path / "fork.py")[0] == "alike\n"


# ------------------------------------------------------------------------------------------------ the demo

DEMO = ["demo", "--system", "impulse", "--sizes", "20", "--epochs", "10", "--seeds", "1"]


def has_demo():
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@fault(
    "`lifeops demo` (`make demo`) is killed while it trains",
    "no half file; the next run takes up what was trained; losses, accuracies and table are those of an undisturbed run, to the bit",
)
def test_a_killed_demo_is_gone_on_with(tmp_path, capsys):
    has_demo()
    from lifeops.demo import report
    from lifeops.demo.impulse import SYSTEM

    out, left = tmp_path / "out" / "impulse", tmp_path / "out" / "impulse" / "unfinished"
    process = started("-m", "lifeops", *DEMO, "--jobs", "1", "--out", out.parent)
    until(lambda: sum(name.endswith(".pt") for name in files(left)) >= 2, process)
    process.kill()
    process.communicate(timeout=TIMEOUT)
    assert files(out) == {"unfinished"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed process
    try:
        recipe = Recipe(epochs=10, num_heads=6)
        undisturbed = [run_one(name, 20, 0, recipe, name == "default") for name in INITIALISATIONS]
        for run in undisturbed[:2]:
            stored = Unfinished(left, recipe).load(run.model, 20, 0, False)
            assert (stored.losses, stored.accuracies, stored.at) == (run.losses, run.accuracies, run.at)
            assert len(run.losses) == 10
            assert all(np.array_equal(stored.weights[name], value) for name, value in (run.weights or {}).items())
        damaged = left / "default_20_0.pt"
        damaged.write_bytes(damaged.read_bytes()[:-100])
        assert cli.main([*DEMO, "--jobs", "1", "--out", str(out.parent)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "of them are done, in an earlier demo that did not end" in capsys.readouterr().out
    report.write_csv(tmp_path / "table.csv", SYSTEM, undisturbed, {})
    assert (out / "table.csv").read_bytes() == (tmp_path / "table.csv").read_bytes()
    assert files(out) == {"table.csv", "table.md", "curves.png", "heads.png"}


def test_unfinished_runs_of_other_settings_are_not_taken(tmp_path):
    weights = {"a": np.arange(3.0)}
    Unfinished(tmp_path, Recipe()).keep(Run("plain", 50, 0, [0.1, 0.2], [2], [0.5], weights))
    found = Unfinished(tmp_path, Recipe()).load("plain", 50, 0, True)
    assert (found.losses, found.at, found.accuracies) == ([0.1, 0.2], [2], [0.5])
    assert np.array_equal(found.weights["a"], weights["a"])
    assert Unfinished(tmp_path, Recipe(lr=1e-3)).load("plain", 50, 0, False) is None
    assert Unfinished(tmp_path, Recipe()).load("plain", 50, 1, False) is None
    Unfinished(tmp_path, Recipe()).keep(Run("plain", 50, 0, [0.1], [1], [0.5]))
    assert Unfinished(tmp_path, Recipe()).load("plain", 50, 0, True) is None


def workers_of(pid: int) -> list[int]:
    """The processes that train: of ``pid``'s children those that multiprocessing spawned, without its tracker."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def demo_at_work(tmp_path, epochs=4000):
    """A demo that trains in two processes, in a process group as of a terminal, and those two."""
    has_demo()
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs /proc")
    process = started("-m", "lifeops", *DEMO, "--jobs", "2", "--epochs", str(epochs), "--out", tmp_path, start_new_session=True)
    until(lambda: len(workers_of(process.pid)) == 2, process)
    return process, workers_of(process.pid)


@fault(
    "Ctrl-C, which a terminal sends to all of a demo's processes",
    "one line that says how many runs are done and kept, exit code 130, within seconds; no process and no half file is left",
)
def test_ctrl_c_ends_the_demo(tmp_path):
    process, workers = demo_at_work(tmp_path, epochs=300)
    left = tmp_path / "impulse" / "unfinished"
    until(lambda: any(name.endswith(".pt") for name in files(left)), process)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)
    assert time.monotonic() - start < 10  # 1 to 2 s where nothing else runs
    done = len([name for name in files(left) if name.endswith(".pt")])
    assert (process.returncode, err) == (
        130, f"lifeops demo: stopped after {done} of 4 runs; the same command goes on from there ({left})\n"
    )  # fmt: skip
    assert not any(map(alive, workers))
    assert not [name for name in files(left) if name.endswith(".part")]


@fault("a demo is killed while its worker processes train", "they end, too")
def test_workers_end_with_the_demo(tmp_path):
    process, workers = demo_at_work(tmp_path)
    process.kill()
    process.communicate(timeout=TIMEOUT)  # also waits until the workers, who have its pipes, have gone
    end = time.monotonic() + TIMEOUT
    while any(map(alive, workers)):
        assert time.monotonic() < end
        time.sleep(0.02)


@fault("a worker process of the demo is killed, as where memory runs out", "one line, exit code 2")
def test_a_killed_worker(tmp_path):
    process, workers = demo_at_work(tmp_path)
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=TIMEOUT)
    line = "lifeops demo: error: a training process was killed from outside (is there enough memory for --jobs of them?)\n"
    assert (process.returncode, err) == (2, line)
    assert not any(map(alive, workers))


# ------------------------------------------------------------------------------------------------ training

EXAMPLE = ROOT / "examples" / "train_image_folder.py"
TRAIN = ["--img-size", "16", "--patch-size", "4", "--embed-dim", "24", "--depth", "2", "--batch-size", "4", "--workers", "0",
         "--epochs", "4", "--drop-path", "0.3"]  # fmt: skip


@fault(
    "training (examples/train_image_folder.py) is killed and goes on from its checkpoint",
    "the checkpoint is whole; weights, optimizer and losses end as those of an undisturbed run, to the bit",
)
def test_training_goes_on_to_the_same_bits(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for kind in range(2):
        (tmp_path / "images" / str(kind)).mkdir(parents=True)
        for n in range(8):
            pixels = np.random.default_rng(10 * kind + n).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / str(kind) / f"{n}.png")
    command = [EXAMPLE, tmp_path / "images", *TRAIN, "--output"]
    undisturbed, _ = ended(*command, tmp_path / "whole.pt")
    process = started(*command, tmp_path / "killed.pt")
    seen = [process.stdout.readline() for _ in range(3)]  # what is trained, and two epochs
    process.kill()
    process.communicate(timeout=TIMEOUT)
    at = torch.load(tmp_path / "killed.pt", weights_only=True)["epoch"]  # of the second epoch, or the first where it was quicker
    rest, _ = ended(*command, tmp_path / "killed.pt", "--resume", tmp_path / "killed.pt")
    assert [*seen[: 1 + at], *rest.splitlines(keepends=True)[1:]] == undisturbed.splitlines(keepends=True)
    states = [torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "killed.pt")]
    assert same(*states)
    assert not list(tmp_path.glob(".*.part"))


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
