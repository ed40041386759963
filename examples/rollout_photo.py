"""Where a Vision Transformer looks in a photograph: attention roll-out of the two that scikit-learn brings along.

    python examples/rollout_photo.py --out runs/rollout_photo

A small ViT with LIFE's attention learns to tell grey crops of china.jpg from those of flower.jpg, half a minute on one CPU core; then
lifeops.rollout says which patches of the whole photographs its class token draws on, and which other ones the patch in the middle does.
Writes rollout_photo.png: each photograph, and both maps laid over it, as multiples of a patch's even share (red: more than that, blue:
less); and prints where they are highest. No download. Needs scikit-learn, matplotlib, rich. ``lifeops rollout photo.jpg --model …`` does
the same with a model of timm, of transformers, or of your own.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.progress import track
from sklearn.datasets import load_sample_images

import lifeops
from lifeops.cli.main import ended_plainly
from lifeops.files import make_folder, written
from lifeops.models import VisionTransformer

SIZE, PATCH = (96, 144), 8  # of the images that the model sees: 12 x 18 patches
MODEL = {"img_size": SIZE, "patch_size": PATCH, "in_chans": 1, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 2}
BATCH = 16
CENTRE = SIZE[0] // PATCH // 2, SIZE[1] // PATCH // 2


def photographs():
    """{name: (1, H, W) in [-1, 1]}, grey, so that colours do not tell them apart."""
    found = load_sample_images()
    greys = (torch.tensor(image).float().mean(-1)[None] / 127.5 - 1 for image in found.images)
    return dict(zip((Path(name).stem for name in found.filenames), greys, strict=True))


def crops(photo, count, generator):
    """``count`` random parts of a photograph, a half to nine tenths as high and wide, mirrored or not, at the model's size."""
    out = []
    for _ in range(count):
        share = 0.5 + 0.4 * torch.rand((), generator=generator).item()
        height, width = (int(share * n) for n in photo.shape[1:])
        y, x = (int(torch.randint(n - m + 1, (), generator=generator)) for n, m in zip(photo.shape[1:], (height, width), strict=True))
        part = F.interpolate(photo[None, :, y : y + height, x : x + width], SIZE, mode="bilinear", antialias=True)
        out.append(part.flip(3) if torch.rand((), generator=generator) < 0.5 else part)
    return torch.cat(out)


def batch(photos, generator):
    """Crops of both photographs, and which one each is from."""
    half = BATCH // 2
    return torch.cat([crops(photo, half, generator) for photo in photos]), torch.arange(len(photos)).repeat_interleave(half)


def trained(photos, steps, seed):
    """A ViT with LIFE's attention that tells the crops apart, and the share of fresh ones that it gets right, in percent."""
    torch.manual_seed(seed)
    model, generator = VisionTransformer(**MODEL, attn=lifeops.nn.LifeAttention), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    for _ in track(range(steps), "training"):
        x, y = batch(photos, generator)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*(batch(photos, generator) for _ in range(4)), strict=True))
        return model, 100 * (model(x).argmax(1) == y).float().mean().item()


def maps(model, photos):
    """The images, and {title: (2, H, W)}: what the class token, and the patch in the middle beside itself, draw on, in multiples of the
    even share.
    """
    x = torch.cat([F.interpolate(photo[None], SIZE, mode="bilinear", antialias=True) for photo in photos])
    targets = {"the class token": "cls", "the patch in the middle": CENTRE}
    found = {title: lifeops.rollout(model, x, target, prefix="normalize").maps[:, 0] for title, target in targets.items()}
    found["the patch in the middle"][:, CENTRE[0], CENTRE[1]] = 0
    return x[:, 0], {title: of * of[0].numel() for title, of in found.items()}


def highest(map_):
    """Where a map is highest, in words."""
    row, column = divmod(int(map_.argmax()), map_.shape[1])
    return f"{map_.max().item():.1f} times a patch's even share in row {row + 1} of {map_.shape[0]}, column {column + 1} of {map_.shape[1]}"


def picture(images, found, names, path):
    """A row for each photograph, a column for each map."""
    figure = Figure(figsize=(3.4 * (1 + len(found)), 2.5 * len(names)), layout="constrained")
    grid, box = figure.subplots(len(names), 1 + len(found), squeeze=False), (0, SIZE[1], SIZE[0], 0)
    for line, image, name, row in zip(grid, images, names, range(len(names)), strict=True):
        for axes, title in zip(line, (name, *(f"what {title} draws on" for title in found)), strict=True):
            axes.imshow(image, cmap="gray", extent=box)
            axes.set_title(title, fontsize=9)
            axes.set(xticks=[], yticks=[])
        for axes, of in zip(line[1:], found.values(), strict=True):
            shown = axes.imshow(of[row], cmap="coolwarm", alpha=0.6, extent=box, vmin=0, vmax=2, interpolation="bilinear")
            figure.colorbar(shown, ax=axes, label="times the even share", shrink=0.8)
        line[-1].add_patch(Rectangle((CENTRE[1] * PATCH, CENTRE[0] * PATCH), PATCH, PATCH, fill=False, edgecolor="black"))
    with written(path) as part:
        figure.savefig(part, dpi=110, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rollout_photo"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_folder(args.out)
    photos = photographs()
    model, right = trained(list(photos.values()), args.steps, args.seed)
    print(f"{right:.0f} % of fresh crops told apart")
    images, found = maps(model, list(photos.values()))
    for title, of in found.items():
        for name, map_ in zip(photos, of, strict=True):
            print(f"{name}: {title} draws most on {highest(map_)}")
    path = args.out / "rollout_photo.png"
    picture(images, found, list(photos), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(ended_plainly("rollout_photo.py", main))
