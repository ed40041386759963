"""`lifeops rollout IMAGE… --model NAME`: attention roll-out of images as pictures and arrays."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lifeops.attention_maps import PREFIX, rollout
from lifeops.integrations import convert, load_official
from lifeops.integrations.official import lifeops_deit, state_dict_of
from lifeops.ops.rollout_step import FUSIONS

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_NEEDS = {"matplotlib": "matplotlib", "PIL": "pillow"}


class Loaded(NamedTuple):
    """A model and what its images must be: (channels, height, width), mean and standard deviation per channel."""

    model: nn.Module
    size: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lifeops rollout",
        description="Which patches an image model's output draws on. For every image writes OUT/<image>.npy, the maps (R, H, W), and"
        " OUT/<image>_<label>.png, the image beside each map laid over it, as multiples of a patch's even share.",
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--model", required=True, help="a timm name; lifeops (a plain, LIFE or LocalViT DeiT of the checkpoint's sizes);"
                        " official (the authors' checkpoints); transformers:FOLDER")  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, help="weights: .safetensors, or a torch file (read with weights_only=True)")
    parser.add_argument("--pretrained", action="store_true", help="timm's own weights (downloads them)")
    parser.add_argument("--convert", choices=("life", "localvit"), help="lifeops.convert a timm model before its checkpoint is loaded")
    parser.add_argument("--num-heads", type=int, help="of --model lifeops or official, where the checkpoint does not tell")
    parser.add_argument("--target", default=None, help="cls, mean, hard, soft, a token's index or a patch ROW,COLUMN (default: cls)")
    parser.add_argument("--classes", type=int, nargs="+", help="of --target hard or soft (default: the class that the model predicts)")
    parser.add_argument("--class-names", type=Path, help="a text file with one name per line")
    parser.add_argument("--head-fusion", choices=FUSIONS, default="mean")
    parser.add_argument("--residual", type=float, default=0.5, help="share of the skip connection (default: 0.5)")
    parser.add_argument("--discard-ratio", type=float, default=0.0, help="share of each row, its smallest entries, dropped (default: 0)")
    parser.add_argument("--start-layer", type=int, default=0, help="first attention layer that counts (default: 0)")
    parser.add_argument("--prefix", choices=PREFIX, default="normalize", help="maps sum to 1 (default) or to 1 minus the prefix's share")
    parser.add_argument("--out", type=Path, default=Path("rollout"), help="folder to write to (default: rollout)")
    return parser


# ------------------------------------------------------------------------------------------------ models and images


def load(name: str, checkpoint: Path | None, *, pretrained=False, system: str | None = None, num_heads: int | None = None) -> Loaded:
    """The model that ``name`` means, in eval mode."""
    if name in ("lifeops", "official"):
        if checkpoint is None:
            raise ValueError(f"--model {name} reads its sizes from --checkpoint")
        model = lifeops_deit(checkpoint, num_heads=num_heads) if name == "lifeops" else load_official(checkpoint, num_heads=num_heads)
        embed = model.patch_embed
        return Loaded(model.eval(), (embed.proj.in_channels, *embed.img_size), *(_HALF if name == "lifeops" else _IMAGENET))
    if name.startswith("transformers:"):
        from transformers import AutoModelForImageClassification

        model = AutoModelForImageClassification.from_pretrained(name.removeprefix("transformers:"), local_files_only=True)
        side = model.config.image_size
        size = (side, side) if isinstance(side, int) else tuple(side)
        loaded = Loaded(model, (model.config.num_channels, *size), *_HALF)
    else:
        loaded = _timm(name, pretrained, system)
    if checkpoint is not None:
        loaded.model.load_state_dict(state_dict_of(checkpoint), strict=True)
    loaded.model.eval()
    return loaded


def _timm(name: str, pretrained: bool, system: str | None) -> Loaded:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"--model must be lifeops, official, transformers:FOLDER or a timm model, got {name!r}")
    model = timm.create_model(name, pretrained=pretrained)
    config = timm.data.resolve_model_data_config(model)
    if system is not None:
        convert(model, system)
    return Loaded(model, config["input_size"], config["mean"], config["std"])


def read_image(path: Path, loaded: Loaded) -> tuple[Tensor, np.ndarray]:
    """The model's input (1, channels, height, width) and the picture it shows: the middle of the image at the model's size."""
    from PIL import Image, ImageOps

    channels, height, width = loaded.size
    with Image.open(path) as image:
        image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.BICUBIC)
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
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=90)


def _names(path: Path | None) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path else []


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


def run_image(path: Path, loaded: Loaded, args: argparse.Namespace) -> list[Path]:
    """Roll out one image; returns the files written."""
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
    maps = found.maps[0].numpy()
    np.save(args.out / f"{path.stem}.npy", maps)
    written = [args.out / f"{path.stem}.npy"]
    for label, map_ in zip(found.labels, maps, strict=True):
        shown = _named(label, names)
        written.append(args.out / f"{path.stem}_{re.sub(r'[^0-9A-Za-z]+', '-', shown).strip('-')}.png")
        draw(written[-1], picture, map_, f"{path.name}: {shown}{predicted}")
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    missing = [package for module, package in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"lifeops rollout needs {', '.join(missing)}: pip install lifeops[demo]", file=sys.stderr)
        return 1
    absent = [path for path in (*args.images, args.checkpoint, args.class_names) if path is not None and not path.is_file()]
    if absent:
        parser.error(f"no such file: {', '.join(map(str, absent))}")
    try:
        loaded = load(args.model, args.checkpoint, pretrained=args.pretrained, system=args.convert, num_heads=args.num_heads)
        args.out.mkdir(parents=True, exist_ok=True)
        for path in args.images:
            print(*run_image(path, loaded, args), sep="\n")
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    return 0
