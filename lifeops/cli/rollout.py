"""`lifeops rollout IMAGE… --model NAME`: attention roll-out of images as pictures and arrays."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lifeops.attention_maps.rollout import PREFIX, rollout
from lifeops.cli.main import Parser, image_pair, told_plainly
from lifeops.cli.models import Loaded, load
from lifeops.files import distinct, make_folder, written
from lifeops.integrations.convert import SYSTEMS
from lifeops.ops.rollout_step import FUSIONS


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lifeops rollout",
        description="Which patches an image model's output draws on. For every image writes OUT/<image>.npy, the maps (R, H, W), and"
        " OUT/<image>_<label>.png, the image beside each map laid over it, as multiples of a patch's even share. Of images with equal"
        " names the second's files are named <image>-2, and so on.",
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--model", required=True, help="a timm name; lifeops (a plain, LIFE or LocalViT DeiT of the checkpoint's sizes);"
                        " official (the authors' checkpoints); transformers:FOLDER")  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, help="weights: .safetensors, or a torch file (read with weights_only=True)")
    parser.add_argument("--key", help="which of several state dicts in the checkpoint, such as model_ema (default: the model itself)")
    parser.add_argument("--pretrained", action="store_true", help="timm's own weights of a timm model (downloads them)")
    told = "lifeops.convert a timm or transformers model before weights of one that was converted are loaded"
    parser.add_argument("--convert", choices=tuple(SYSTEMS), help=told)
    parser.add_argument("--num-classes", type=int, help="of a timm model, where the checkpoint has other classes than its name's")
    untold = "of --model lifeops or official, where the checkpoint does not tell"
    parser.add_argument("--num-heads", type=int, help=untold)
    parser.add_argument("--aux-key", choices=("scale1", "multiscale"), help=f"LIFE's, {untold}")
    parser.add_argument("--act", help=f"LocalViT's activation, {untold}")
    sizes = "of a timm model, or of --model lifeops or official, if not the name's or the checkpoint's"
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help=sizes)
    parser.add_argument("--target", default=None, help="cls, mean, pool, hard, soft, a token's index or a patch ROW,COLUMN (default: cls)")
    parser.add_argument("--classes", type=int, nargs="+", help="of --target hard or soft (default: the class that the model predicts; in"
                        " Python each that is predicted for a patch)")  # fmt: skip
    parser.add_argument("--class-names", type=Path, help="a text file with one name per line")
    parser.add_argument("--head-fusion", choices=FUSIONS, default="mean")
    parser.add_argument("--residual", type=float, default=0.5, help="share of the skip connection (default: 0.5)")
    parser.add_argument("--discard-ratio", type=float, default=0.0, help="share of each row, its smallest entries, dropped (default: 0)")
    parser.add_argument("--start-layer", type=int, default=0, help="first attention layer that counts (default: 0)")
    sums = "keep: maps sum to 1 minus what fell on the prefix tokens (default); normalize: to 1"
    parser.add_argument("--prefix", choices=PREFIX, default="keep", help=sums)
    parser.add_argument("--out", type=Path, default=Path("rollout"), help="folder to write to (default: rollout)")
    return parser


# ------------------------------------------------------------------------------------------------ images


def read_image(path: Path, loaded: Loaded) -> tuple[Tensor, np.ndarray]:
    """The model's input (1, channels, height, width) and the picture it shows: the middle of the image at the model's size."""
    from PIL import Image, ImageOps

    channels, height, width = loaded.size
    try:
        with Image.open(path) as image:
            image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.BICUBIC)
    except Exception as error:  # damaged files raise anything: OSError, SyntaxError, struct.error, …
        raise ValueError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error
    pixels = np.asarray(image, dtype=np.float32).reshape(height, width, -1) / 255
    mean, std = (torch.tensor(list(values)[:channels]).view(1, -1, 1, 1) for values in (loaded.mean, loaded.std))
    return (torch.from_numpy(pixels).permute(2, 0, 1)[None] - mean) / std, pixels.squeeze()


# ------------------------------------------------------------------------------------------------ pictures


def draw(path: Path, picture: np.ndarray, map_: np.ndarray, title: str) -> None:
    """The picture, and beside it the map laid over it with a colour bar: multiples of the even share 1 / (H W)."""
    from matplotlib.figure import Figure

    share, box = map_ * map_.size, (0, picture.shape[1], picture.shape[0], 0)
    pale = 0.55 + 0.45 * (picture if picture.ndim == 2 else picture.mean(-1))  # so that colours are the map's, not the picture's
    figure = Figure(figsize=(6.4, 3.1), layout="constrained")  # no pyplot: nothing global, no display needed
    left, right = figure.subplots(1, 2)
    for axis, shown in ((left, picture), (right, pale)):
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=box)
        axis.set(xticks=[], yticks=[])
    top = max(float(share.max()), 1e-9)
    heat = right.imshow(share, cmap="viridis", alpha=0.7, vmin=0, vmax=top, extent=box, interpolation="bilinear")
    figure.colorbar(heat, ax=right, label="times the even share", shrink=0.9)
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.savefig(path, dpi=90, format="png")


def _names(path: Path | None) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines() if path else []
    except UnicodeDecodeError as error:
        raise ValueError(f"--class-names must be a UTF-8 text file, got {path}: {error.reason}") from error


def _named(label: str, names: list[str]) -> str:
    kind, _, number = label.partition(" ")
    return names[int(number)] if kind == "class" and int(number) < len(names) else label


def _logits(output) -> Tensor | None:
    logits = getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) and logits.dim() == 2 else None


def _target(text: str | None):
    """What --target means: a name, an int or (row, column)."""
    if text is None or not re.fullmatch(r"-?\d+(,\d+)?", text):
        return text
    numbers = tuple(int(n) for n in text.split(","))
    return numbers if len(numbers) == 2 else numbers[0]


def _slug(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z]+", "-", text).strip("-")


def _targets(out: Path, name: str, labels: Sequence[str], inputs: set[Path]) -> list[Path]:
    """The array and each label's picture. ValueError where one of them is an input."""
    targets = [out / f"{name}.npy", *(out / f"{name}_{slug}.png" for slug in distinct(labels))]
    hit = next((path for path in targets if path.resolve() in inputs), None)
    if hit is not None:
        raise ValueError(f"{hit} is an input that the output would overwrite; choose another --out")
    return targets


def run_image(path: Path, name: str, loaded: Loaded, args: argparse.Namespace) -> list[Path]:
    """Roll out one image into files that begin with ``name``; returns them."""
    x, picture = read_image(path, loaded)
    names, target, classes = _names(args.class_names), _target(args.target), args.classes
    if target in ("hard", "soft") and classes is None:
        with torch.no_grad():
            logits = _logits(loaded.model(x))
        classes = None if logits is None else [int(logits.argmax())]
    options = {name: getattr(args, name) for name in ("head_fusion", "residual", "discard_ratio", "start_layer", "prefix")}
    found = rollout(loaded.model, x, target, classes=classes, **options)
    logits = _logits(found.output)
    predicted = "" if logits is None else f", predicted: {_named(f'class {int(logits.argmax())}', names)}"
    untrained = f"\n{loaded.random}: means nothing" if loaded.random else ""
    maps, shown = found.maps[0].numpy(), [_named(label, names) for label in found.labels]
    slugs = [_slug(text) or _slug(label) for text, label in zip(shown, found.labels, strict=True)]
    inputs = {p.resolve() for p in (*args.images, args.checkpoint, args.class_names) if p is not None}
    targets = _targets(args.out, name, slugs, inputs)
    with written(targets[0]) as part, part.open("wb") as file:
        np.save(file, maps)
    for target, text, map_ in zip(targets[1:], shown, maps, strict=True):
        with written(target) as part:
            draw(part, picture, map_, f"{path.name}: {text}{predicted}{untrained}")
    return targets


def run(args: argparse.Namespace) -> None:
    absent = [path for path in (*args.images, args.checkpoint, args.class_names) if path is not None and not path.is_file()]
    if absent:
        raise ValueError(f"no such file: {', '.join(map(str, absent))}")
    told = {"num_heads": args.num_heads, "aux_key": args.aux_key, "act": args.act, "img_size": image_pair(args.img_size)}
    told |= {"key": args.key, "num_classes": args.num_classes}
    loaded = load(args.model, args.checkpoint, pretrained=args.pretrained, system=args.convert, **told)
    make_folder(args.out)
    for path, name in zip(args.images, distinct([path.stem for path in args.images]), strict=True):
        if name != path.stem:
            print(f"the files of {path} are named {name}: another image is named {path.stem}", file=sys.stderr)
        print(*run_image(path, name, loaded, args), sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    with told_plainly(parser):
        run(args)
    return 0
