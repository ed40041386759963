"""What --model means on the command line: timm's models, transformers' folders, and checkpoints of this library and of the authors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lifeops.hosts.host import CONVERSION
from lifeops.integrations import convert, load_official
from lifeops.integrations.checkpoint_files import read
from lifeops.integrations.checkpoint_states import load_into
from lifeops.integrations.converted_states import system_of
from lifeops.integrations.official import lifeops_deit

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_OWN, _FOLDER = ("lifeops", "official"), "transformers:"  # what --model says beside timm's names


class Loaded(NamedTuple):
    """A model and what its images must be: (channels, height, width), mean and standard deviation per channel. ``random``: what of it was
    not loaded.
    """

    model: nn.Module
    size: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    random: str = ""


def load(
    name: str, checkpoint: Path | None, *, pretrained=False, system: str | None = None, key: str | None = None,
    num_classes: int | None = None, **told,
) -> Loaded:  # fmt: skip
    """The model that ``name`` means, in eval mode; ``told``: what :func:`lifeops.load_official` is told of a checkpoint."""
    _check_told(name, {"num_classes": num_classes, "pretrained": pretrained or None, "convert": system, **told})
    if name in _OWN:
        if checkpoint is None:
            raise ValueError(f"--model {name} reads its sizes from --checkpoint")
        model = (lifeops_deit if name == "lifeops" else load_official)(checkpoint, key=key, **told)
        return Loaded(model.float().eval(), _image_shape(model), *(_HALF if name == "lifeops" else _IMAGENET))
    folder = name.startswith(_FOLDER)
    sizes = {"num_classes": num_classes, "img_size": told.get("img_size")}
    loaded = _transformers(name.removeprefix(_FOLDER), system) if folder else _timm(name, pretrained, sizes)
    if system is not None and not hasattr(loaded.model, CONVERSION):
        convert(loaded.model, system)
        loaded = loaded._replace(random=loaded.random or f"layers of {system!r} with random weights")
    if checkpoint is not None:
        load_into(loaded.model, checkpoint, key, "load")
        loaded = loaded._replace(random="")
    elif loaded.random:
        hint = "" if folder or pretrained else "--pretrained or "
        warnings.warn(f"{name} has {loaded.random}, its maps mean nothing: give {hint}--checkpoint", stacklevel=2)
    loaded.model.eval()
    return loaded


def _check_told(name: str, given: dict) -> None:
    """Raise where an option is given that a model of this kind does not read."""
    of_others = ("convert",) if name.startswith(_FOLDER) else ("num_classes", "img_size", "pretrained", "convert")
    read = ("num_heads", "aux_key", "act", "img_size") if name in _OWN else of_others
    unread = [f"--{option.replace('_', '-')}" for option, value in given.items() if value is not None and option not in read]
    if unread:
        raise ValueError(f"--model {name} does not read {', '.join(unread)}")


def _image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images of a model of this library."""
    embed = getattr(model, "patch_embed", getattr(model, "pixel_embed", None))
    if embed is not None:
        in_chans = embed.in_chans if hasattr(embed, "in_chans") else embed.proj.in_channels
        return (in_chans, *getattr(embed, "img_size", getattr(model, "img_size", ())))
    patches = model.to_patch_embedding[0]
    return (patches.in_chans, *patches.img_size)


def _transformers(folder: str, system: str | None) -> Loaded:
    """The model that was saved in a folder, also one that was converted to ``system`` before."""
    from transformers import AutoModelForImageClassification as Auto
    from transformers.utils import logging

    logging.disable_progress_bar()  # standard error has what is wrong, a line each
    what = f"--model {_FOLDER}{folder}"
    try:
        held = system_of(name for file in sorted(Path(folder).glob("*.safetensors")) for name in read(file))
        if held in (None, system):
            cls = Auto if held is None else _converted(folder, held)
            model, info = cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # damaged files raise anything
        raise ValueError(f"{what} cannot be loaded ({type(error).__name__}: {error})") from error
    if held not in (None, system):
        raise ValueError(f"{what} holds a model converted to {held!r}: give --convert {held}")
    lost = {*info["missing_keys"], *info["unexpected_keys"]}
    if held is not None and lost:
        raise ValueError(f"{what} holds a model converted to {held!r}, whose weights transformers does not find: {sorted(lost)[0]}, …")
    side = getattr(model.config, "image_size", None)
    if side is None:
        raise ValueError(f"{what} does not tell its image size")
    size = (side, side) if isinstance(side, int) else tuple(side)
    return Loaded(model, (model.config.num_channels, *size), *_HALF)


def _converted(folder: str, system: str) -> type[nn.Module]:
    """The class of the model in ``folder``, whose models are converted as they are made: before from_pretrained looks for their weights."""
    from transformers import AutoConfig, AutoModelForImageClassification

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        cls = type(AutoModelForImageClassification.from_config(config, trust_remote_code=False))

    def init(self, config):
        cls.__init__(self, config)
        convert(self, system)

    return type(cls.__name__, (cls,), {"__init__": init})


def _timm(name: str, pretrained: bool, sizes: dict) -> Loaded:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"--model must be lifeops, official, transformers:FOLDER or a timm model, got {name!r}")
    sizes = {option: value for option, value in sizes.items() if value is not None}
    try:
        model = timm.create_model(name, pretrained=pretrained, **sizes)
    except TypeError as error:
        raise ValueError(f"--model {name} does not take {' and '.join(sizes)} ({error})") from error
    except RuntimeError as error:  # timm has no weights of it, or none of that tag
        raise ValueError(f"{'--pretrained' if pretrained else f'--model {name}'}: {error}") from error
    config = timm.data.resolve_model_data_config(model)
    shape, random = config["input_size"], "" if pretrained else "random weights"
    return Loaded(model, (shape[0], *sizes.get("img_size", shape[1:])), config["mean"], config["std"], random)
