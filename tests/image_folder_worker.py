"""Run by torchrun in two processes: examples/train_image_folder.py with every system, sharded and with whole copies of the model.

    image_folder_worker.py SCRIPT IMAGES OUT OPTIONS…
"""

import csv
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

script, images, out, *options = sys.argv[1:]
out = Path(out)
dist.init_process_group("gloo")
rank = dist.get_rank()
example = runpy.run_path(script)


def losses_of(name, *more):
    """(each step's loss, the model) of one short training."""
    model = example["main"]([images, *options, "--output", str(out / name), "--losses", str(out / f"{name}.csv"), *more])
    dist.barrier()
    return torch.tensor([float(row["loss"]) for row in csv.DictReader((out / f"{name}.csv").open())]), model


def whole_weights(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


accumulated = "--epochs=3", "--accumulate=2", "--drop-path=0.3"
undisturbed, model = losses_of("undisturbed", "--fsdp", *accumulated)
torch.testing.assert_close(undisturbed, losses_of("accumulated", *accumulated)[0], rtol=1e-5, atol=1e-5)
weights = whole_weights(model)
if rank == 0:
    torch.save(weights, out / "weights.pt")

models = {"sit": ("--model=sit_tiny", "--img-size=64", "--lr=0.0001")}  # no ViT takes it in
models |= {system: (f"--system={system}",) for system in ("plain", *example["SYSTEMS"])}
for system, more in models.items():
    more += ("--epochs=1",)
    whole, model = losses_of(f"{system}-whole", *more)
    shared, trained = losses_of(f"{system}-shared", *more, "--fsdp")
    low, _ = losses_of(f"{system}-low", *more, "--fsdp", "--amp")
    assert len(whole.unique()) == len(whole) == 5
    torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low, whole, rtol=0.1, atol=0.1)
    assert not torch.equal(low, shared)
    resume = "--fsdp", "--seed=1", "--output", str(out / "again"), "--resume", str(out / f"{system}-shared")
    resumed = example["main"]([images, *options, *more, *resume])  # which has no epoch left to train
    torch.testing.assert_close(whole_weights(resumed), whole_weights(trained), rtol=0, atol=0)
    if rank == 0:
        print(f"trained: {system}", flush=True)

# five validation images for two processes: of the sixth place's image nothing is counted
args = example["parse"]([images, *options])
_, loader, count, _ = example["load_data"](args, rank, 2)
_, every, _, _ = example["load_data"](args, 0, 1)
assert (len(loader.dataset), count, len(every.dataset)) == (3, 5, 5)
nothing = torch.autocast("cpu", enabled=False)
for flip in (1, -1):  # with all logits' signs changed what was right is wrong
    def answer(x, flip=flip):
        return flip * model(x)

    answer.eval, answer.buffers = model.eval, model.buffers
    correct = sum((answer(x).argmax(-1) == y).sum().item() for x, y in every)
    assert example["evaluate"](answer, loader, count, torch.device("cpu"), nothing) == correct / 5
dist.destroy_process_group()
