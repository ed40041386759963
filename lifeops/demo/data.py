"""scikit-learn's bundled handwritten digits (1797 grey images of 8 x 8, 10 classes): real images, no download.

A third of the images is the test set, the same in every run. Training sets are drawn from the other two thirds (the pool) by
seed, classes in proportion. Settings were tuned on what a training set leaves of the pool, never on the test set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NUM_CLASSES = 10
IMG_SIZE = 8
_POOL_SIZE = 1200
MIN_SIZE, MAX_SIZE = NUM_CLASSES, _POOL_SIZE - NUM_CLASSES  # an image of every class to train on and one left over


class Images(NamedTuple):
    """``x``: (n, 1, 8, 8) float32 in [-1, 1]; ``y``: (n,) int64 labels."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:  # the number of images, not of fields
        return self.x.shape[0]

    def take(self, index) -> Images:
        return Images(self.x[index], self.y[index])


def load() -> tuple[Images, Images]:
    """(pool, test): 1200 images that training sets are drawn from, 597 to test on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images).float().div(8).sub(1).unsqueeze(1)
    pool, test = _split(Images(x, torch.from_numpy(digits.target).long()), _POOL_SIZE, seed=0)
    return pool, test


def draw(pool: Images, size: int, seed: int) -> tuple[Images, Images]:
    """(training set of ``size`` images, what is left of the pool)."""
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"the size of a training set must be between {MIN_SIZE} and {MAX_SIZE}, got {size}")
    return _split(pool, size, seed)


def _split(images: Images, size: int, seed: int) -> tuple[Images, Images]:
    from sklearn.model_selection import train_test_split

    first, second = train_test_split(range(len(images)), train_size=size, stratify=images.y.numpy(), random_state=seed)
    return images.take(first), images.take(second)
