"""Segment real cell nuclei, their outlines apart, with a ViT and a feature pyramid of its tokens, plain and with LIFE.

    python examples/segment_nuclei.py --out runs/segment

Each pixel of a photomicrograph is background, nucleus or outline (examples/nuclei.py says where the picture comes from). A small ViT on
8 x 8 patches, its tokens as maps of strides 2, 4, 8 and 16 (lifeops.nn.TokenPyramid) and a head of two 1 x 1 convolutions are trained on
crops of the picture's left part, plain and with LIFE's attention: same seeds, crops and schedule, whose rate was chosen for the plain
model on a part of the training picture. The mean intersection over union (mIoU) is that of the right quarter, which no crop touches.

Writes results.json, table.md, predictions.png and rollout.png: for each class, which patches LIFE's output draws on. A run that was
interrupted goes on: what it trained is in OUT/unfinished until it ends. Needs stardist (its picture), matplotlib, rich, Pillow.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import nuclei
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import lifeops
from lifeops.cli.main import ended_plainly
from lifeops.demo.report import Table, final_accuracies, mean_sd, write_markdown
from lifeops.demo.train import Run
from lifeops.demo.unfinished import Unfinished
from lifeops.files import make_folder, written

SYSTEMS = {"plain": "plain", "life": "LIFE"}
COLORS = torch.tensor([[0.1, 0.1, 0.15], [0.9, 0.55, 0.1], [1.0, 1.0, 1.0]])  # of nuclei.CLASSES
EVALUATIONS = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 500
    batch_size: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.05
    image: str = ""
    mask: str = ""


class Segmenter(nn.Module):
    """Logits of every pixel, (B, 1, H, W) to (B, classes, H, W): the pyramid's maps on the finest one's grid, two 1 x 1 convolutions."""

    def __init__(self, system: str):
        super().__init__()
        self.backbone = nuclei.Backbone(system)
        dim = self.backbone.pyramid.out_dim
        self.fuse = nn.Conv2d(len(self.backbone.pyramid.strides) * dim, dim, 1)
        self.head = nn.Conv2d(dim, len(nuclei.CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone(x)
        maps = [F.interpolate(m, size=maps[0].shape[2:], mode="bilinear") for m in maps]
        return F.interpolate(self.head(F.gelu(self.fuse(torch.cat(maps, 1)))), size=x.shape[2:], mode="bilinear")


@torch.no_grad()
def predicted(model: nn.Module, images: Tensor) -> Tensor:
    """(n, H, W) classes; leaves the model in evaluation mode."""
    return model.eval()(images).argmax(1)


def intersections_over_unions(found: Tensor, wanted: Tensor) -> list[float]:
    """One for each class, over all pixels; 1 for a class that neither has."""
    pairs = [(found == c, wanted == c) for c in range(len(nuclei.CLASSES))]
    return [((a & b).sum() / (a | b).sum()).item() if (a | b).any() else 1.0 for a, b in pairs]


def train_one(system: str, width: int, seed: int, settings: Settings) -> Run:
    """One model, trained on crops of the last ``width`` columns before the test quarter; mIoUs of that as ``accuracies``."""
    train, test = pictures(settings)
    train = train.columns(train.mask.shape[1] - width, train.mask.shape[1])
    train = nuclei.Picture(train.image, nuclei.classes_of(train.mask))
    images, wanted = test_tiles(test)
    torch.manual_seed(seed)
    model, run, generator = Segmenter(system), Run(system, width, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False)
    evaluate_at = {settings.steps * (i + 1) // EVALUATIONS for i in range(EVALUATIONS)}
    for step in range(1, settings.steps + 1):
        x, y = nuclei.random_crops(train, settings.batch_size, generator)
        loss = F.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
        if step in evaluate_at:
            run.at.append(step)
            run.accuracies.append(sum(intersections_over_unions(predicted(model, images), wanted)) / len(nuclei.CLASSES))
    run.weights = {name: t.numpy() for name, t in model.state_dict().items()}
    return run


def pictures(settings: Settings):
    return nuclei.load(*(Path(given) if given else None for given in (settings.image, settings.mask)))


def test_tiles(test: nuclei.Picture) -> tuple[Tensor, Tensor]:
    """Images and classes; classes are found before tiles are cut, so that a tile's border makes no outline."""
    return nuclei.tiles(nuclei.Picture(test.image, nuclei.classes_of(test.mask)))


def trained(run: Run) -> Segmenter:
    model = Segmenter(run.model)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in run.weights.items()})
    return model.eval()


# ------------------------------------------------------------------------------------------------ what is written


def table(runs: list[Run]) -> Table:
    rows = []
    for width in sorted({r.size for r in runs}):
        means = {system: mean_sd(final_accuracies(runs, system, width)) for system in SYSTEMS}
        cells = (f"{mean:.1f} ± {sd:.1f}" for mean, sd in means.values())
        rows.append((str(width), *cells, f"{means['life'][0] - means['plain'][0]:+.1f}"))
    seeds = len({r.seed for r in runs})
    title = f"mIoU of background, nucleus and outline in %, {'mean ± sd over ' if seeds > 1 else ''}{seeds} seed{'s' * (seeds > 1)}"
    return Table(title, ("columns trained on", *SYSTEMS.values(), "LIFE - plain"), rows)


def results(runs: list[Run], settings: Settings, test: tuple[Tensor, Tensor]) -> dict:
    """For results.json: settings, and of every run its curve and each class's IoU."""
    found = []
    for run in runs:
        ious = intersections_over_unions(predicted(trained(run), test[0]), test[1])
        of_classes = {name: round(100 * value, 2) for name, value in zip(nuclei.CLASSES, ious, strict=True)}
        curve = [(step, round(100 * value, 2)) for step, value in zip(run.at, run.accuracies, strict=True)]
        found.append({"model": run.model, "columns": run.size, "seed": run.seed, "mIoU": curve, "IoU": of_classes})
    return {"settings": dataclasses.asdict(settings), "runs": found}


def _grid_of_pictures(rows: dict[str, list[Tensor]], path: Path, titles=()) -> None:
    """One row of pictures under each name; grey ones and maps (H, W), coloured ones (H, W, 3)."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.3 * columns, 1.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, shown) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for axis, picture in zip(line, shown, strict=True):
            axis.imshow(picture.numpy(), cmap="gray" if picture.shape[0] == nuclei.SIZE else "viridis")
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=8)
    with written(path) as part:
        figure.savefig(part, dpi=120, format="png")


def predictions_picture(models: dict[str, Segmenter], test: tuple[Tensor, Tensor], path: Path, count: int = 8) -> None:
    images, wanted = (t[:count] for t in test)
    rows = {"picture": [*images[:, 0]], "by people": [*COLORS[wanted]]}
    rows |= {SYSTEMS[system]: [*COLORS[predicted(model, images)]] for system, model in models.items()}
    _grid_of_pictures(rows, path)


def class_maps(model: Segmenter, images: Tensor, shares: Tensor, targets: str) -> Tensor:
    """(B, classes, H, W): which patches the pixels of a class draw on. A patch stands for a class by its pixels' mean probability divided
    by the class's share of the picture, else no patch would stand for outlines.
    """

    def token_logits(output):
        return F.avg_pool2d(output.softmax(1), nuclei.PATCH).log() - shares.log().view(1, -1, 1, 1)

    return lifeops.rollout(model, images, targets, classes=range(len(nuclei.CLASSES)), token_logits=token_logits).maps


def shares_of(train: nuclei.Picture) -> Tensor:
    """How much of the training picture each class is."""
    counts = nuclei.classes_of(train.mask).flatten().bincount(minlength=len(nuclei.CLASSES))
    return counts / counts.sum()


def rollout_picture(model: Segmenter, test: tuple[Tensor, Tensor], shares: Tensor, path: Path, count: int = 4) -> None:
    """Roll-out maps of the tiles that show most of nuclei, each class's soft and hard targets beside each other."""
    images, wanted = (t[(test[1] == 1).sum((1, 2)).argsort(descending=True)[:count]] for t in test)
    maps = {targets: class_maps(model, images, shares, targets) for targets in ("soft", "hard")}
    rows = {}
    for i in range(len(images)):
        shown = [maps[targets][i, c] for c in range(len(nuclei.CLASSES)) for targets in maps]
        rows[f"tile {i + 1}"] = [images[i, 0], COLORS[wanted[i]], *shown]
    _grid_of_pictures(rows, path, ("picture", "by people", *(f"{c}, {targets}" for c in nuclei.CLASSES for targets in maps)))


# ------------------------------------------------------------------------------------------------ the command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/segment"), help="folder to write to (default: runs/segment)")
    parser.add_argument("--columns", type=int, nargs="+", default=[96, 384], help="pixel columns of the picture to train on")
    parser.add_argument("--seeds", type=int, default=3, help="runs per model (default: 3)")
    parser.add_argument("--steps", type=int, default=Settings().steps, help="training steps (default: %(default)s)")
    parser.add_argument("--image", default="", help="a grey picture of your own")
    parser.add_argument("--mask", default="", help="its mask: 0, and for each object a number of its own")
    args = parser.parse_args()
    if min(args.seeds, args.steps) < 1:
        parser.error("--seeds and --steps must be at least 1")
    if bool(args.image) != bool(args.mask):
        parser.error("--image and --mask go together")
    return args


def main() -> None:
    args = parse()
    settings = Settings(steps=args.steps, image=args.image, mask=args.mask)
    train, test = pictures(settings)
    if not nuclei.SIZE <= min(args.columns) <= max(args.columns) <= train.mask.shape[1]:
        raise SystemExit(f"--columns must be between {nuclei.SIZE} and {train.mask.shape[1]}, got {args.columns}")
    unfinished, console = Unfinished(make_folder(args.out) / "unfinished", settings), Console()
    widths, runs = sorted(set(args.columns)), []
    todo = [(system, width, seed) for width in widths for seed in range(args.seeds) for system in SYSTEMS]
    for one in track(todo, "models", console=console, transient=True, disable=not console.is_terminal):
        runs.append(unfinished.load(*one, with_weights=True) or train_one(*one, settings))
        unfinished.keep(runs[-1])
    shown, test = table(runs), test_tiles(test)
    shown.print(console)
    write_markdown(args.out / "table.md", [shown])
    with written(args.out / "results.json") as part:
        part.write_text(json.dumps(results(runs, settings, test), indent=1) + "\n", encoding="utf-8")
    models = {r.model: trained(r) for r in runs if (r.size, r.seed) == (widths[-1], 0)}
    predictions_picture(models, test, args.out / "predictions.png")
    rollout_picture(models["life"], test, shares_of(train), args.out / "rollout.png")
    unfinished.clear()
    console.print(f"The table, results and pictures are in {args.out}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(ended_plainly("segment_nuclei.py", main))
