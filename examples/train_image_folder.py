"""Train a plain or LIFE DeiT from scratch on a folder of images with one sub-folder per class.

    python examples/train_image_folder.py path/to/images --attention life
    torchrun --nproc-per-node 4 examples/train_image_folder.py path/to/images --amp --resume checkpoint.pt

With sub-folders ``train`` and ``val`` those are used; otherwise every fifth image is kept for validation.
The checkpoint is replaced as a whole after every epoch; a run that was killed and goes on with --resume ends with the same weights, to
the bit, as one that was not. Images are read and augmented by torchvision if it imports, else by a small PIL reader that does not augment.
"""

import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from lifeops.cli.main import ended_plainly
from lifeops.files import make_folder, save
from lifeops.models.deit import VisionTransformer
from lifeops.nn import LifeAttention

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
    val_loader = DataLoader(Subset(val, val_index[rank::world_size]), args.batch_size, num_workers=args.workers)
    return loader, val_loader, len(val_index), num_classes


def train_epoch(model, loader, optimizer, schedule, device, autocast):
    """One pass over this process's share of the images; returns the last loss."""
    model.train()
    for x, y in loader:
        with autocast:
            heads = model(x.to(device))  # cls and dist logits
        loss = sum(torch.nn.functional.cross_entropy(logits.float(), y.to(device), label_smoothing=0.1) for logits in heads) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


@torch.no_grad()
def evaluate(model, loader, num_images, device, autocast):
    """Accuracy over the validation images of all processes."""
    model.eval()
    correct = torch.zeros((), device=device)
    for x, y in loader:
        with autocast:
            correct += (model(x.to(device)).argmax(-1) == y.to(device)).sum()
    if dist.is_initialized():
        dist.all_reduce(correct)
    return correct.item() / num_images


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of images: data/<class>/*.jpg or data/{train,val}/<class>/*.jpg")
    parser.add_argument("--attention", choices=("plain", "life"), default="life")
    parser.add_argument("--output", type=Path, default="checkpoint.pt", help="written after every epoch")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    sizes = {"img-size": 224, "patch-size": 16, "embed-dim": 192, "depth": 12, "num-heads": 3, "batch-size": 64}
    for name, value in {**sizes, "epochs": 100, "lr": 5e-4, "weight-decay": 0.05, "drop-path": 0.1, "workers": 4, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    rank, local_rank, world_size = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    torch.manual_seed(args.seed)
    loader, val_loader, num_val, num_classes = load_data(args, rank, world_size)
    model = VisionTransformer(
        args.img_size, args.patch_size, num_classes=num_classes, embed_dim=args.embed_dim, depth=args.depth, num_heads=args.num_heads,
        dist_token=True, attn=LifeAttention if args.attention == "life" else None, drop_path_rate=args.drop_path,
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    steps = args.epochs * len(loader)  # a twentieth of them warm up, then the rate follows half a cosine down to 0
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (0.05 * steps), (1 + math.cos(math.pi * step / steps)) / 2))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    saved = torch.load(args.resume, map_location=device, weights_only=True) if args.resume else {"epoch": 0}
    for name, part in parts.items() if args.resume else ():
        part.load_state_dict(saved[name])
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)
    if rank == 0:
        make_folder(args.output.parent, "--output")
        print(f"{args.attention} DeiT, {num_classes} classes, {world_size} x {device.type}, images read by {'torchvision' if T else 'PIL'}")
    for epoch in range(saved["epoch"], args.epochs):
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(args.seed + rank + world_size * (epoch + 1))  # augmentation, drop path: as if a resumed run had not ended
        loss = train_epoch(wrapped, loader, optimizer, schedule, device, autocast)
        accuracy = evaluate(model, val_loader, num_val, device, autocast)
        if rank == 0:
            print(f"epoch {epoch + 1}/{args.epochs}: loss {loss:.3f}, validation accuracy {100 * accuracy:.1f} %", flush=True)
            save({"epoch": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}, args.output)
    if world_size > 1:
        dist.destroy_process_group()
    return model


if __name__ == "__main__":
    raise SystemExit(ended_plainly("train_image_folder.py", main))
