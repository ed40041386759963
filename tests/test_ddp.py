"""Two processes train the example with DistributedDataParallel: gradients have the strides it expects, weights stay equal."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_image_folder.py"

# run by torchrun: the example as it is, the reducer's complaint about strides as an error, the final weights of this rank to a file
WORKER = """
import os, runpy, sys, warnings, torch
warnings.filterwarnings("error", message="Grad strides do not match")
script, folder = sys.argv[1:3]
model = runpy.run_path(script)["main"](sys.argv[3:])
torch.save(model.state_dict(), os.path.join(folder, f"rank{os.environ['RANK']}.pt"))
"""


@pytest.fixture
def image_folder(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for label in range(2):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 100, (20, 24, 3)) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / f"class{label}" / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the example would use the GPU, of which two processes need two")
def test_two_processes_end_with_equal_weights(image_folder, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = {"img-size": 16, "patch-size": 4, "embed-dim": 24, "depth": 1, "batch-size": 4, "workers": 0, "epochs": 1, "lr": 0.01}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    command = [*torchrun, worker, EXAMPLE, tmp_path, image_folder, *arguments, f"--output={tmp_path / 'checkpoint.pt'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "epoch 1/1" in result.stdout
    assert "2 x cpu" in result.stdout
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert torch.equal(saved["model"]["head.weight"], first["head.weight"])


# two processes, half a batch each: SyncBatchNorm against the whole batch in one process, DistributedDataParallel against each's own
SYNC = """
import copy, warnings, torch, torch.distributed as dist
from torch import nn
from lifeops.nn import ConvProjectionAttention, DWShortcut, LocalAgg, LocalityFeedForward
warnings.filterwarnings("error", message="Grad strides do not match")
dist.init_process_group("gloo")
rank = dist.get_rank()
def close(a, b): torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
def close_all(a, b):
    for s, t in zip(a, b, strict=True): close(s, t)
def mean(t):
    dist.all_reduce(t)
    return t / 2
modules = {
    LocalityFeedForward(8, 2.0, "hs+se", 4): lambda m, x: m(x, (3, 4)),
    DWShortcut(8, (3, 5)): lambda m, x: m(x, x.tanh(), (3, 4)),
    ConvProjectionAttention(8, 2): lambda m, x: m(x, (3, 4)),
    LocalAgg(8, num_prefix_tokens=1): lambda m, x: m(x, (3, 4)),
}
for module, run in modules.items():
    torch.manual_seed(0)
    alone = module.double()
    for p in alone.parameters(): nn.init.normal_(p)
    together = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(alone))
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
    single = copy.deepcopy(alone)
    x, g = torch.randn(2, 3, 13, 8).double(), torch.randn(2, 3, 13, 8).double()
    whole = x.flatten(0, 1).requires_grad_()
    expected = run(alone, whole)
    expected.backward(g.flatten(0, 1))
    mine = x[rank].requires_grad_()
    y = run(together, mine)
    y.backward(g[rank])
    close(y, expected.unflatten(0, (2, 3))[rank])
    close(mine.grad, whole.grad.unflatten(0, (2, 3))[rank])
    close_all([2 * mean(p.grad) for p in together.parameters()], [p.grad for p in alone.parameters()])
    close_all(together.state_dict().values(), alone.state_dict().values())
    run(parallel, x[rank]).backward(g[rank])
    run(single, x[rank]).backward(g[rank])
    close_all([p.grad for p in parallel.parameters()], [mean(p.grad) for p in single.parameters()])
    del parallel  # before the group: else its reducer may wait for gloo's thread, which waits for the interpreter's lock (torch 2.13)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_sync_batch_norm_sees_the_whole_batch(tmp_path):
    worker = tmp_path / "sync.py"
    worker.write_text(SYNC)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-4000:]
