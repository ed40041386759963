"""What a checkpoint's tensors, its metadata and the caller tell about a model; what is left to assume is noted, never silent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lifeops.errors import CheckpointError


class Given(NamedTuple):
    """What the caller says, as in :func:`lifeops.load_official`; None: nothing."""

    num_heads: int | None = None
    aux_key: str | None = None
    act: str | None = None
    img_size: tuple[int, int] | None = None
    num_classes: int | None = None
    window_size: int | None = None
    stage_blocks: tuple[int, ...] | None = None


class Facts:
    """Sizes of a model of ``family`` by its state dict. ``assumed`` and ``notes`` collect what a caller must hear.

    Everything raises CheckpointError where the state dict does not fit or does not tell.
    """

    def __init__(self, family: str, state: Mapping[str, Tensor], given: Given):
        self.family, self.state, self.given = family, state, given
        self.assumed: dict[str, Any] = {}
        self.notes: list[str] = []

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Of a tensor that must be there."""
        if name not in self.state:
            raise CheckpointError(f"the {self.family} checkpoint has no {name!r}")
        shape = tuple(self.state[name].shape)
        if len(shape) != dims or 0 in shape:
            raise CheckpointError(f"{name!r} of a {self.family} checkpoint must have {dims} dimensions, none of them 0, got shape {shape}")
        return shape

    def count(self, prefix: str) -> int:
        """How many modules are listed under ``prefix``."""
        numbers = {k[len(prefix) :].split(".")[0] for k in self.state if k.startswith(prefix)}
        return sum(n.isdigit() for n in numbers)

    def side(self, name: str, count: int) -> int:
        """The side of a square of ``count``."""
        side = math.isqrt(max(count, 0))
        if side < 1 or side * side != count:
            raise CheckpointError(f"the {self.family} models are square, got {name} for {count}; pass img_size=… where it is none")
        return side

    def classes(self, head: str, least: int = 1) -> int:
        classes = self.shape(head, 2)[0] if self.given.num_classes is None else self.given.num_classes
        if classes < least:
            raise CheckpointError(f"num_classes of a {self.family} model must be at least {least}, got {classes}")
        return classes

    def image_size(self, name: str, count: int, patch_size: tuple[int, int]) -> tuple[int, int]:
        """Of ``count`` positions: the caller's, to which other positions are resampled from a square, or that square's."""
        if self.given.img_size is None:
            side = self.side(name, count)
            return side * patch_size[0], side * patch_size[1]
        H, W = (n // p for n, p in zip(self.given.img_size, patch_size, strict=True))
        if count != H * W or math.isqrt(count) ** 2 == count:
            side = self.side(name, count)
            if count == H * W and H != W:
                self.notes.append(f"read {name} as that of {side} x {side} patches and resampled it to {H} x {W}")
        return self.given.img_size

    def tell(self, name: str, modules: Sequence[str], assumption=None):
        """What metadata of one of ``modules`` or the caller says of ``name``, else the noted assumption; None if there is none."""
        metadata, given = getattr(self.state, "_metadata", {}), getattr(self.given, name, None)
        told = next((metadata[m][name] for m in modules if name in metadata.get(m, ())), None)
        if told is not None and given not in (None, told):
            raise CheckpointError(f"{name} must be the model's own, {told!r} by the checkpoint's metadata, got {given!r}")
        if told is None and given is None and assumption is not None:
            self.assumed[name] = assumption
            return assumption
        return given if told is None else told

    def heads(self, width: int, modules: Sequence[str], published: Mapping[int, int]) -> int:
        """Of attention ``width`` wide; ``published`` maps the widths of published models to their heads."""
        heads = self.tell("num_heads", modules, published.get(width))
        if not isinstance(heads, int) or heads < 1 or width % heads:
            got = "" if heads is None else f", got {heads!r}"
            raise CheckpointError(f"cannot tell the heads of a model of width {width}; pass num_heads=…, which divides it{got}")
        return heads

    def stage_heads(self, widths: Sequence[int], attentions: Sequence[str], published: Mapping[int, int]) -> list[int]:
        """Of every stage, whose ``attentions`` are named: what metadata does not tell is as wide as the first stage's."""
        first = self.heads(widths[0], attentions[:1], published)
        metadata = getattr(self.state, "_metadata", {})
        assumed = [width * first // widths[0] for width in widths]
        return [metadata.get(name, {}).get("num_heads", heads) for name, heads in zip(attentions, assumed, strict=True)]

    def warnings(self) -> list[str]:
        if not self.assumed:
            return self.notes
        values = ", ".join(f"{name}={value!r}" for name, value in self.assumed.items())
        arguments = ", ".join(f"{name}=…" for name in self.assumed)
        return [*self.notes, f"the checkpoint does not tell, so assumed {values}; pass {arguments} to say otherwise"]
