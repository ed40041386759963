"""Fixed-form initialisations of depth-wise kernels: impulse, box, Gaussian and uniform, all of the same energy.

``norm`` is the L2 norm of a filter, by default √(1/3) ≈ 0.577 at every K: what U(-1/K, 1/K) has on average, and what the authors give
their impulses. Source: arXiv 2401.12511 (random impulses as spatial filters train as well as learned ones) and its code; the authors'
ConvMixer in timm takes ``norm=K**-0.5``. ``norm=1`` makes an impulse a pure shift.

Filters are drawn at random, one for every channel, or ``num_filters`` of them that channels share: assigned at random
(``assign="random"``) or in runs of neighbouring channels (``"groups"``). Sharing is a start: training does not keep it.
``frozen=True`` turns the weight's gradient off; ``lifeops.token_dwconv`` then computes dX alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from lifeops.arguments import check_choice, check_flags, check_floating, check_int, check_positive, check_tensor, got
from lifeops.init.closed_form import check_generator
from lifeops.options import Assign

DEFAULT_NORM = 3**-0.5
W = TypeVar("W", bound=Tensor | nn.Module)


def impulse_conv_(
    weight: W, *, norm: float = DEFAULT_NORM, num_filters: int | None = None, assign: Assign = "random", frozen: bool = False,
    generator: torch.Generator | None = None,
) -> W:  # fmt: skip
    """One tap per filter, anywhere in the K x K window with equal chance. ``weight``: (C, 1, K, K), or a module (see ``random_conv_``)."""

    def draw(count: int, K: int) -> Tensor:
        taps = torch.randint(K * K, (count, 1), generator=generator)
        return torch.zeros(count, K * K).scatter_(1, taps, norm)

    return _fill("impulse_conv_", weight, draw, norm, num_filters, assign, frozen, generator)


def box_(
    weight: W, taps: int, *, norm: float = DEFAULT_NORM, num_filters: int | None = None, assign: Assign = "random", frozen: bool = False,
    generator: torch.Generator | None = None,
) -> W:  # fmt: skip
    """``taps`` different random taps of equal value norm / √taps, 1 <= taps <= K². Otherwise as :func:`impulse_conv_`."""

    def draw(count: int, K: int) -> Tensor:
        order = torch.rand(count, K * K, generator=generator).argsort(1)
        return torch.zeros(count, K * K).scatter_(1, order[:, :taps], norm * taps**-0.5)

    for w in _weights("box_", weight):
        most = w.shape[-1] ** 2
        if isinstance(taps, bool) or not isinstance(taps, int) or not 1 <= taps <= most:
            raise ValueError(f"box_: taps must be an int between 1 and K*K = {most}, got {got(taps)}")
    return _fill("box_", weight, draw, norm, num_filters, assign, frozen, generator)


def gaussian_(
    weight: W, variance: float, *, norm: float = DEFAULT_NORM, num_filters: int | None = None, assign: Assign = "random",
    frozen: bool = False, generator: torch.Generator | None = None,
) -> W:  # fmt: skip
    """exp(-r² / 2 variance) around a random tap. ``norm`` is the root mean square over the filters: those at the border have less.

    Otherwise as :func:`impulse_conv_`.
    """
    variance = check_positive("gaussian_", "variance", variance)

    def draw(count: int, K: int) -> Tensor:
        centres = torch.randint(K, (2, count, 1), generator=generator)
        y, x = (torch.exp(-0.5 / variance * (torch.arange(K) - c).square()) for c in centres)
        filters = (y[:, :, None] * x[:, None, :]).flatten(1)
        return filters * (norm / filters.square().sum(1).mean().sqrt())

    return _fill("gaussian_", weight, draw, norm, num_filters, assign, frozen, generator)


def random_conv_(
    weight: W, *, norm: float = DEFAULT_NORM, num_filters: int | None = None, assign: Assign = "random", frozen: bool = False,
    generator: torch.Generator | None = None,
) -> W:  # fmt: skip
    """Uniform in ±norm √3 / K (with the default norm ±1/K, PyTorch's own default for depth-wise convolutions).

    Args:
        weight: a tensor (C, 1, K, K), or a module: then every depth-wise ``nn.Conv2d`` in it (groups = channels), in order.
        norm, num_filters, assign, frozen: see the module's text.
        generator: a CPU generator; drawn on the CPU and copied.

    Returns ``weight``. Raises ValueError, TypeError: not depth-wise, or options out of range.
    """

    def draw(count: int, K: int) -> Tensor:
        bound = norm * 3**0.5 / K
        return torch.empty(count, K * K).uniform_(-bound, bound, generator=generator)

    return _fill("random_conv_", weight, draw, norm, num_filters, assign, frozen, generator)


def _fill(op: str, target, draw: Callable[[int, int], Tensor], norm, num_filters, assign: str, frozen: bool, generator):
    check_generator(op, generator)
    check_choice(op, "assign", assign, ("random", "groups"))
    check_positive(op, "norm", norm), check_flags(op, frozen=frozen), check_int(op, "num_filters", num_filters, optional=True)
    weights = _weights(op, target)
    for weight in weights:
        C, K = weight.shape[0], weight.shape[-1]
        if num_filters is not None and not 1 <= num_filters <= C:
            raise ValueError(f"{op}: num_filters must be between 1 and the {C} channels, got {num_filters}")
    for weight in weights:
        C, K = weight.shape[0], weight.shape[-1]
        filters = draw(num_filters or C, K)[_assignment(C, num_filters, assign, generator)]
        with torch.no_grad():
            weight.copy_(filters.view(C, 1, K, K))
        if frozen:
            weight.requires_grad_(False)
    return target


def _assignment(C: int, num_filters: int | None, assign: str, generator) -> Tensor:
    """(C,): the filter of every channel."""
    if num_filters is None:
        return torch.arange(C)
    if assign == "groups":
        return torch.arange(C) * num_filters // C
    return torch.randint(num_filters, (C,), generator=generator)


def _weights(op: str, target) -> list[Tensor]:
    if isinstance(target, nn.Module):
        convs = [m for m in target.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels == m.out_channels]
        if not convs:
            raise ValueError(f"{op}: {type(target).__name__} has no depth-wise nn.Conv2d (groups = in_channels = out_channels)")
        weights = [m.weight for m in convs]
    elif isinstance(target, Tensor):
        weights = [target]
    else:
        raise TypeError(f"{op}: weight must be a tensor or a module, got {type(target).__name__}")
    for weight in weights:
        check_tensor(op, "weight", weight), check_floating(op, "weight", weight)
        if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
            raise ValueError(f"{op}: weight must have shape (C, 1, K, K) as in nn.Conv2d(groups=C), got {tuple(weight.shape)}")
    return weights
