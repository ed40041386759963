"""What the hosts are built with and called with, checked under the model's name."""

from __future__ import annotations

import numbers

from torch import nn

from lifeops.arguments import LARGEST, check_flags, check_floating, check_int, check_number, check_positive, check_rate, check_tensor, got
from lifeops.nn.inputs import check_like


def to_pair(model: str, name: str, value) -> tuple[int, int]:
    """``value`` as (H, W), checked."""
    pair = (value, value) if isinstance(value, numbers.Integral) else value
    wrong = not isinstance(pair, (tuple, list)) or len(pair) != 2
    if wrong or not all(isinstance(n, numbers.Integral) and not isinstance(n, bool) and 0 < n < LARGEST for n in pair):
        raise ValueError(f"{model}: {name} must be a positive int or two of them (H, W), got {got(value)}")
    return int(pair[0]), int(pair[1])


def grid_of(model: str, img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Patches per side."""
    if any(n % p for n, p in zip(img_size, patch_size, strict=True)):
        raise ValueError(f"{model}: img_size must be a multiple of patch_size {patch_size}, got {img_size}")
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


def check_images(model: str, x, in_chans: int, img_size: tuple[int, int] | None, first: nn.Module | None = None) -> None:
    """``first`` is the layer that reads them. Without ``img_size`` they may be of any size."""
    check_tensor(model, "x", x)
    expected = (in_chans, "H", "W") if img_size is None else (in_chans, *img_size)
    if x.ndim != 4 or x.shape[1] != in_chans or (img_size is not None and tuple(x.shape[2:]) != tuple(img_size)):
        raise ValueError(f"{model}: x must be images (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
    check_floating(model, "x", x)
    check_like(model, "x", x, first)


_LEAST = {"num_classes": 0, "depth": 0, "cls_depth": 0, "num_reg_tokens": 0}  # of all other sizes 1


def check_sizes(model: str, optional: tuple[str, ...] = (), **sizes) -> None:
    """Ints by name; those named in ``optional`` may be None."""
    for name, value in sizes.items():
        check_int(model, name, value, _LEAST.get(name, 1), name in optional)


def check_stages(name: str, **numbers) -> None:
    """A positive int for each stage, by name."""
    for what, values in numbers.items():
        if not isinstance(values, (tuple, list)) or not values:
            raise TypeError(f"{name}: {what} must be one int per stage, got {got(values)}")
        check_sizes(name, **{f"{what}[{i}]": n for i, n in enumerate(values)})


def check_counts(name: str, least: int = 1, **numbers) -> None:
    """As many ints for each name as for the first, one per stage."""
    count = next((len(values) for values in numbers.values() if isinstance(values, (tuple, list))), 1)
    for what, values in numbers.items():
        if not isinstance(values, (tuple, list)) or not values or len(values) != count:
            raise ValueError(f"{name}: {what} must be one int for each of the {count} stages, got {got(values)}")
        for s, n in enumerate(values):
            check_int(name, f"{what}[{s}]", n, least)


def check_rates(model: str, *, mlp_ratio, drop=(), eps=None, **flags) -> None:
    """The width of the MLP, a rate of dropout as (name, value), an epsilon, and flags by name."""
    check_positive(model, "mlp_ratio", mlp_ratio)
    if drop:
        check_rate(model, *drop)
    check_number(model, "norm_eps", eps, "finite and not negative", lambda v: v >= 0, optional=True)
    check_flags(model, **flags)
