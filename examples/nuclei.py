"""What segment_nuclei.py and detect_nuclei.py share: one photomicrograph of real cell nuclei, each with a mask drawn by people, and a ViT
with a feature pyramid.

The picture (512 x 512 pixels, 125 nuclei) comes with the package stardist (BSD-3-Clause; pip install --no-deps stardist: nothing of it is
imported), which has it from the 2018 Data Science Bowl (Caicedo et al., Nature Methods 16, 2019). Its right quarter is for tests alone.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lifeops.models import VisionTransformer
from lifeops.nn import LifeAttention, TokenPyramid

SIZE, PATCH = 64, 8  # pixels of a crop's side, of a patch's
CLASSES = "background", "nucleus", "outline"


class Picture(NamedTuple):
    """``image``: (1, H, W) float32 of mean 0 and variance 1; ``mask``: (H, W) int64, 0 and the number of the nucleus a pixel lies in."""

    image: Tensor
    mask: Tensor

    def columns(self, first: int, last: int) -> "Picture":
        return Picture(self.image[:, :, first:last], self.mask[:, first:last])


def packaged(name: str) -> Path:
    """A picture inside the package stardist."""
    found = importlib.util.find_spec("stardist")
    if found is None:
        raise SystemExit("the nuclei come with the package stardist: pip install --no-deps stardist (or give --image and --mask)")
    return Path(found.submodule_search_locations[0]) / "data" / "images" / name


def load(image: Path | None = None, mask: Path | None = None) -> tuple[Picture, Picture]:
    """(for training, for tests): the left three quarters of a picture and its right quarter."""
    pixels, numbers = (
        np.array(Image.open(given or packaged(own))) for given, own in ((image, "img2d.tif"), (mask, "mask2d.tif"))
    )
    if pixels.ndim != 2 or pixels.shape != numbers.shape or pixels.shape[0] < SIZE or pixels.shape[1] < 4 * SIZE:
        raise SystemExit(f"image and mask must be grey, of one size, at least {SIZE} x {4 * SIZE}, got {pixels.shape} and {numbers.shape}")
    grey = torch.from_numpy(pixels.astype(np.float32)).log1p()  # a few nuclei are ten times as bright as the others
    whole = Picture(((grey - grey.mean()) / grey.std())[None], torch.from_numpy(numbers.astype(np.int64)))
    width = pixels.shape[1]
    return whole.columns(0, 3 * width // 4), whole.columns(3 * width // 4, width)


def classes_of(mask: Tensor) -> Tensor:
    """(…, H, W) numbers of nuclei to ``CLASSES``: an outline is where the 3 x 3 pixels around are not all of one nucleus or background."""
    numbers = mask.float().unsqueeze(-3)
    outline = F.max_pool2d(numbers, 3, 1, 1) != -F.max_pool2d(-numbers, 3, 1, 1)
    return torch.where(outline.squeeze(-3), 2, (mask > 0).long())


def turned(picture: Tensor, way: int) -> Tensor:
    """(…, H, W) by ``way`` quarter turns, from 4 on mirrored, too."""
    return (picture.flip(-1) if way >= 4 else picture).rot90(way % 4, (-2, -1))


def random_crops(picture: Picture, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(count, 1, SIZE, SIZE) and (count, SIZE, SIZE), cut anywhere and turned any way."""
    H, W = picture.mask.shape
    rows, columns, ways = (torch.randint(n, (count,), generator=generator).tolist() for n in (H - SIZE + 1, W - SIZE + 1, 8))
    places = [(slice(r, r + SIZE), slice(c, c + SIZE), way) for r, c, way in zip(rows, columns, ways, strict=True)]
    images = [turned(picture.image[:, r, c], way) for r, c, way in places]
    return torch.stack(images), torch.stack([turned(picture.mask[r, c], way) for r, c, way in places])


def tiles(picture: Picture) -> tuple[Tensor, Tensor]:
    """The same of the picture's tiles, row by row; what is left over at its right and bottom is left out."""

    def cut(t):
        return t.unfold(-2, SIZE, SIZE).unfold(-2, SIZE, SIZE).flatten(-4, -3)

    return cut(picture.image).transpose(0, 1), cut(picture.mask)


class Backbone(nn.Module):
    """A ViT with a cls token and four registers, and its tokens as maps of several strides: (B, 1, SIZE, SIZE) to as many maps."""

    def __init__(self, system: str, out_dim: int = 32, strides=(2, 4, 8, 16), embed_dim: int = 96, depth: int = 4, num_heads: int = 3):
        super().__init__()
        attn = {"plain": None, "life": LifeAttention}[system]
        sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "num_classes": 0}
        self.vit = VisionTransformer(SIZE, PATCH, in_chans=1, num_reg_tokens=4, attn=attn, **sizes)
        place = {"num_prefix_tokens": self.vit.num_prefix_tokens, "grid": self.vit.patch_embed.grid_size}
        self.pyramid = TokenPyramid(embed_dim, out_dim, patch_size=PATCH, strides=strides, **place)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.pyramid(self.vit.forward_features(x))
