"""Fine-tune a pre-trained DINOv2-style ViT with registers, as it is and with depth-wise shortcuts that start as the identity.

    python examples/finetune_digits.py --out runs/finetune

The model is timm's vit_small_patch14_reg4_dinov2 (class token, 4 registers, layer scale), made small for scikit-learn's 8 x 8 digits, on
4 x 4 patches. "Pre-trained" means here: taught, without labels, by which quarter turn an image was rotated. Then a copy is converted
by lifeops.convert(model, "dw_shortcut", start="identity"), whose outputs are those of the original, and both are fine-tuned on the same
few labelled images in the same order. Needs timm, scikit-learn, matplotlib, rich; no download. Writes finetune.csv and finetune.png.
"""

import argparse
import copy
import csv
import statistics
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import cross_entropy

import lifeops
from lifeops.cli.main import ended_plainly
from lifeops.demo import data
from lifeops.files import make_folder, written

MODEL = "vit_small_patch14_reg4_dinov2"
SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4, "init_values": 1.0}
BATCH, EVERY = 64, 20  # images a step; steps between two points of the curves


def steps(model, images, labels, count, learning_rate, generator, after=None):
    """Train ``count`` steps of AdamW with a cosine schedule; ``after(i)`` is called behind step i."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    for i in range(count):
        chosen = torch.randint(len(images), (min(BATCH, len(images)),), generator=generator)
        model.train()
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if after is not None:
            after(i + 1)


def pretrained(pool, count, seed):
    """A model that tells by how many quarter turns an image was rotated."""
    torch.manual_seed(seed)
    model = timm.create_model(MODEL, **SMALL, num_classes=4)
    turned = torch.cat([pool.x.rot90(k, (2, 3)) for k in range(4)])
    steps(model, turned, torch.arange(4).repeat_interleave(len(pool)), count, 1e-3, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def accuracy(model, images):
    return 100 * (model.eval()(images.x).argmax(1) == images.y).float().mean().item()


def curve(model, train, test, count, seed):
    """[(step, test accuracy in percent)] of fine-tuning ``model`` on ``train``."""
    found = [(0, accuracy(model, test))]

    def note(i):
        if i % EVERY == 0 or i == count:
            found.append((i, accuracy(model, test)))

    steps(model, train.x, train.y, count, 1e-3, torch.Generator().manual_seed(seed), note)
    return found


def run(base, pool, test, size, seed, count):
    """{name: curve} of ``base`` and of its conversion, which begin with the same outputs."""
    base = copy.deepcopy(base)
    train, _ = data.draw(pool, size, seed)
    converted = lifeops.convert(copy.deepcopy(base), "dw_shortcut", start="identity")
    with torch.no_grad():
        torch.testing.assert_close(converted.eval()(test.x), base.eval()(test.x))
    models = {"as it is": base, "dw_shortcut": converted}
    return {name: curve(model, train, test, count, seed) for name, model in models.items()}


def summary(values):
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def table(curves, sizes):
    """Test accuracy behind the last step, mean and standard deviation over the seeds."""
    found = Table("labelled images", *curves[sizes[0]][0], title="test accuracy in %")
    for size in sizes:
        runs = curves[size]
        found.add_row(str(size), *(summary([r[name][-1][1] for r in runs]) for name in runs[0]))
    return found


def picture(curves, sizes, path):
    """Accuracy over steps, a panel for each number of labelled images."""
    figure = Figure(figsize=(4 * len(sizes), 3.2), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for name in curves[size][0]:
            runs = torch.tensor([[value for _, value in r[name]] for r in curves[size]])
            axes.plot([step for step, _ in curves[size][0][name]], runs.mean(0), label=name)
        axes.set(title=f"{size} labelled images", xlabel="fine-tuning steps")
    panels[0].set_ylabel("test accuracy in %")
    panels[-1].legend()
    with written(path) as part:
        figure.savefig(part, dpi=120, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 300], help="labelled images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    make_folder(args.out)
    curves = {size: [] for size in args.sizes}
    pool, test = data.load()
    for seed in track(range(args.seeds), "seeds"):
        base = pretrained(pool, args.pretrain_steps, seed)
        base.reset_classifier(data.NUM_CLASSES)
        for size in args.sizes:
            curves[size].append(run(base, pool, test, size, seed, args.steps))
    with written(args.out / "finetune.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("images", "seed", "model", "step", "accuracy"))
        writer.writerows((n, seed, name, *point) for n in curves for seed, r in enumerate(curves[n]) for name in r for point in r[name])
    Console().print(table(curves, args.sizes))
    picture(curves, args.sizes, args.out / "finetune.png")


if __name__ == "__main__":
    raise SystemExit(ended_plainly("finetune_digits.py", main))
