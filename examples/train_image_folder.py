"""Train a ViT from scratch on a folder of images with one sub-folder per class, plain or with any of lifeops' systems.

    python examples/train_image_folder.py path/to/images --system life
    torchrun --nproc-per-node 4 examples/train_image_folder.py path/to/images --amp --resume checkpoint.pt
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29400 examples/train_image_folder.py \
        path/to/images --fsdp --amp --accumulate 4 --model cvt_13 --output shared/run --resume shared/run

The model is a ViT of the sizes that are given with --system in it, or --model by its name, of this library or of timm.
With sub-folders ``train`` and ``val`` those are used; otherwise every fifth image is kept for validation. Of several processes each has
the whole model (DistributedDataParallel) or, with --fsdp, a part of every block (FSDP2), on one machine or many.

The checkpoint is replaced as a whole after every epoch: a file, or with --fsdp a folder that all machines see, from which any number of
processes can go on (torch.distributed.checkpoint). A run that was killed and goes on with --resume ends with the same weights, to the
bit, as one that was not. Images are read and augmented by torchvision if it imports, else by a small PIL reader that does not augment.
"""

import argparse
import contextlib
import csv
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from lifeops.cli.main import ended_plainly
from lifeops.demo.train import SYSTEMS, Recipe, build
from lifeops.files import make_folder, save, written
from lifeops.models import named
from lifeops.models.named import SYSTEMS as NAMED

try:
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder
except (ImportError, RuntimeError):  # RuntimeError: torchvision's operators do not match this torch
    from PIL import Image

    T = None

    class ImageFolder(Dataset):  # the part of torchvision's that is used here; the only transform is a size
        def __init__(self, root, size):
            self.size, self.classes = (size, size), sorted(p.name for p in root.iterdir() if p.is_dir())
            endings = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
            self.samples = [(f, i) for i, c in enumerate(self.classes) for f in sorted((root / c).iterdir()) if f.suffix.lower() in endings]

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            with Image.open(self.samples[index][0]) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB").resize(self.size)))
            return pixels.permute(2, 0, 1) / 127.5 - 1, self.samples[index][1]


def make_transform(size, train):
    """From a PIL image to (3, size, size) in [-1, 1]."""
    if T is None:
        return size
    steps = [T.RandomResizedCrop(size, (0.4, 1.0)), T.RandomHorizontalFlip()] if train else [T.Resize((size, size))]
    return T.Compose([*steps, T.ToTensor(), T.Normalize(0.5, 0.5)])


def load_data(args, rank, world_size):
    """Training and validation loader of this process's share, number of validation images, number of classes."""
    split = all((args.data / name).is_dir() for name in ("train", "val"))
    train = ImageFolder(args.data / "train" if split else args.data, make_transform(args.img_size, True))
    val = ImageFolder(args.data / "val" if split else args.data, make_transform(args.img_size, False))
    num_classes, val_index = len(train.classes), range(len(val))
    if not split:
        train, val_index = Subset(train, [i for i in range(len(train)) if i % 5]), val_index[::5]
    if not len(train) or not len(val_index):
        raise SystemExit(f"no images in class sub-folders of {args.data}")
    loader = DataLoader(train, args.batch_size, sampler=DistributedSampler(train, world_size, rank), num_workers=args.workers)
    mine = [*val_index[rank::world_size], *val_index[:1]][: -(-len(val_index) // world_size)]  # every process calls the model as often
    val_loader = DataLoader(Subset(val, mine), args.batch_size, num_workers=args.workers)
    return loader, val_loader, len(val_index), num_classes


# ------------------------------------------------------------------------------------------------ one model, several processes


def blocks_of(model):
    """What is in the innermost lists of blocks, whatever stages they are in."""
    named = {name: m for name, m in model.named_modules() if re.fullmatch(r"blocks?\d*", name.rpartition(".")[2])}
    innermost = [m for name, m in named.items() if not any(other.startswith(f"{name}.") for other in named)]
    return [block for m in innermost for block in m]


def shard(model, device, world_size, gathered):
    """``model`` with parameters, gradients and optimizer state of every block in ``world_size`` parts, which come together in the dtype
    ``gathered``, None for their own; gradients are added up in float32.
    """
    mesh, policy = init_device_mesh(device.type, (world_size,)), MixedPrecisionPolicy(gathered, gathered and torch.float32)
    for part in (*blocks_of(model), model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


@contextlib.contextmanager
def exchanging(model, now):
    """Around a batch: whether its backward adds gradients up over the processes, which is needed once for each step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not now else contextlib.nullcontext():
        yield


def mean_over_processes(t):
    """In place."""
    if dist.is_initialized():
        dist.all_reduce(t)
        t /= dist.get_world_size()
    return t


# ------------------------------------------------------------------------------------------------ checkpoints


def newest(folder):
    """The last epoch's folder that was written to its end, or None: its ".metadata" is what is written last."""
    whole = [path for path in folder.glob("epoch-*") if (path / ".metadata").exists()]
    return max(whole, default=None)


class Training:
    """What is trained, and what of it a checkpoint holds: ``epoch``, the number of epochs that are done, and each step's loss, too."""

    def __init__(self, model, optimizer, schedule, sharded):
        self.model, self.optimizer, self.schedule, self.sharded = model, optimizer, schedule, sharded
        self.epoch, self.losses = 0, []

    def _state(self):
        plain = self.model.state_dict(), self.optimizer.state_dict()
        model, optimizer = get_state_dict(self.model, self.optimizer) if self.sharded else plain
        rest = {"schedule": self.schedule.state_dict(), "epoch": self.epoch, "losses": self.losses}
        return {"model": model, "optimizer": optimizer, **rest}

    def save(self, output, rank):
        if not self.sharded:
            if rank == 0:
                save(self._state(), output)
            return
        now = output / f"epoch-{self.epoch:06}"
        dcp.save(self._state(), checkpoint_id=now)  # comes back when all processes have written
        for before in output.glob("epoch-*") if rank == 0 else ():
            if before != now:
                shutil.rmtree(before)

    def load(self, given, device, rank):
        if not self.sharded:
            state = torch.load(given, map_location=device, weights_only=True)
            self.model.load_state_dict(state["model"]), self.optimizer.load_state_dict(state["optimizer"])
        elif (folder := newest(given)) is None:  # killed in its first epoch, or not begun
            if rank == 0:
                print(f"no whole checkpoint in {given}: starting anew", file=sys.stderr)
            return
        else:
            state = self._state()
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.losses = state["epoch"], state["losses"]


def train_epoch(model, training, loader, accumulate, device, autocast):
    """One pass over this process's share of the images, a step for every ``accumulate`` batches; the mean loss of the steps."""
    model.train()
    losses = []
    for i, (x, y) in enumerate(loader):
        first = i - i % accumulate
        count = min(accumulate, len(loader) - first)  # batches of this step
        with exchanging(model, now=i == first + count - 1):
            with autocast:
                logits = model(x.to(device))
            heads = logits if isinstance(logits, tuple) else (logits,)  # cls and dist logits
            parts = [torch.nn.functional.cross_entropy(t.float(), y.to(device), label_smoothing=0.1) for t in heads]
            loss = sum(parts) / len(parts) / count
            loss.backward()
        losses.append(loss.detach() + (losses.pop() if i > first else 0))
        if i == first + count - 1:
            training.optimizer.step()
            training.optimizer.zero_grad()
            training.schedule.step()
    training.epoch += 1
    training.losses += (found := mean_over_processes(torch.stack(losses)).tolist())
    return sum(found) / len(found)


@torch.no_grad()
def evaluate(model, loader, num_images, device, autocast):
    """Accuracy over the validation images of all processes, with the mean of their batch norms' running statistics."""
    for buffer in filter(torch.is_floating_point, model.buffers()):
        mean_over_processes(buffer)
    model.eval()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    left, correct = len(range(rank, num_images, world_size)), torch.zeros((), device=device)
    for x, y in loader:
        with autocast:
            correct += (model(x.to(device)).argmax(-1) == y.to(device))[:left].sum()
        left = max(0, left - len(y))
    return mean_over_processes(correct).item() * world_size / num_images


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of images: data/<class>/*.jpg or data/{train,val}/<class>/*.jpg")
    systems = tuple(dict.fromkeys((*NAMED, *SYSTEMS)))
    parser.add_argument("--system", choices=systems, help="what is built into the ViT (default: life; of --model its own)")
    parser.add_argument("--model", help="a model by its name (deit_tiny, cvt_13, …, or timm's) instead of --patch-size to --num-heads")
    parser.add_argument("--output", type=Path, help="written after every epoch (default: checkpoint.pt; with --fsdp the folder checkpoint)")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--losses", type=Path, help="CSV file of every step's loss, written after every epoch")
    parser.add_argument("--fsdp", action="store_true", help="share every block's parameters among torchrun's processes")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16")
    sizes = {"img-size": 224, "patch-size": 16, "embed-dim": 192, "depth": 12, "num-heads": 3, "batch-size": 64, "accumulate": 1}
    for name, value in {**sizes, "epochs": 100, "lr": 5e-4, "weight-decay": 0.05, "drop-path": 0.1, "workers": 4, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.fsdp and "RANK" not in os.environ:
        parser.error("--fsdp needs torchrun: torchrun --nproc-per-node 2 examples/train_image_folder.py …")
    if args.accumulate < 1:
        parser.error("--accumulate must be at least 1")
    args.system = args.system if args.model else args.system or "life"
    if not args.model and args.system not in ("plain", *SYSTEMS):
        parser.error(f"--system {args.system} is a model of its own: give --model")
    args.output = args.output or Path("checkpoint" if args.fsdp else "checkpoint.pt")
    return args


def set_up(args, rank, world_size, device):
    """(what is trained, the model as it is called in training, autocast, training and validation loader, number of validation images)."""
    loader, val_loader, num_val, num_classes = load_data(args, rank, world_size)
    torch.manual_seed(args.seed)
    if args.model:
        model = named(args.model, args.system, img_size=args.img_size, num_classes=num_classes)
    else:
        recipe = Recipe(patch_size=args.patch_size, embed_dim=args.embed_dim, depth=args.depth, num_heads=args.num_heads)
        host = {"img_size": args.img_size, "in_chans": 3, "num_classes": num_classes, "drop_path_rate": args.drop_path}
        model = build(args.system, recipe, args.seed, **host)
    model.to(device)
    # FSDP2 leaves buffers as they are, and torch's batch norm takes no bfloat16 weights beside float32 statistics
    gathered = args.fsdp and args.amp and not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if args.fsdp:
        shard(model, device, world_size, torch.bfloat16 if gathered else None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp and not gathered)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    steps = args.epochs * -(-len(loader) // args.accumulate)  # a twentieth of them warm up, then half a cosine down to 0
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (0.05 * steps), (1 + math.cos(math.pi * step / steps)) / 2))
    training = Training(model, optimizer, schedule, args.fsdp)
    if args.resume:
        training.load(args.resume, device, rank)
    called = DistributedDataParallel(model) if world_size > 1 and not args.fsdp else model
    if rank == 0:
        make_folder(args.output if args.fsdp else args.output.parent, "--output")
        what = f"{args.model or 'ViT'}, {args.system or 'its own system'}, {num_classes} classes"
        print(f"{what}, {world_size} x {device.type}, images read by {'torchvision' if T else 'PIL'}")
    return training, called, autocast, loader, val_loader, num_val


def main(argv=None):
    args = parse(argv)
    rank, local_rank, world_size = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own_group = (world_size > 1 or args.fsdp) and not dist.is_initialized()
    if own_group:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    training, called, autocast, loader, val_loader, num_val = set_up(args, rank, world_size, device)
    for epoch in range(training.epoch, args.epochs):
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(args.seed + rank + world_size * (epoch + 1))  # augmentation, drop path: as if a resumed run had not ended
        loss = train_epoch(called, training, loader, args.accumulate, device, autocast)
        accuracy = evaluate(training.model, val_loader, num_val, device, autocast)
        training.save(args.output, rank)
        if rank == 0:
            if args.losses:
                with written(args.losses) as part, part.open("w", newline="") as file:
                    csv.writer(file).writerows([("step", "loss"), *enumerate(training.losses, start=1)])
            print(f"epoch {epoch + 1}/{args.epochs}: loss {loss:.3f}, validation accuracy {100 * accuracy:.1f} %", flush=True)
    del called  # before the group: else its reducer may wait for gloo's thread, which waits for the interpreter's lock (torch 2.13)
    if own_group:
        dist.destroy_process_group()
    return training.model


if __name__ == "__main__":
    raise SystemExit(ended_plainly("train_image_folder.py", main))
