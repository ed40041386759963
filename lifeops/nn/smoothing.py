"""Curriculum by Smoothing (arXiv 2003.01367): a Gaussian blur of the patch map that fades as training goes on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lifeops import geometry, torchlib
from lifeops.arguments import check_callable, check_int, check_number
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_input, check_kernel_size
from lifeops.nn.scripting import NotScripted
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.token_dwconv.public import token_dwconv

NAME = "TokenSmoothing"
DECAY, EVERY = 0.9, 5  # the authors': a tenth less every five epochs


class TokenSmoothing(NotScripted, nn.Module):
    """The patches of (B, P + H*W, C) tokens filtered by one Gaussian for all channels; prefix tokens pass untouched.

        w[i, j] = g_i g_j, g_i = exp(-(i - (K - 1) / 2)² / (2 σ²)) / Σ exp(…)           zero padding, K // 2 unless told otherwise

    The filter is kept in float64 whatever the model is cast to, is no parameter and is not in the state dict, so that a model that was
    trained with it is loaded without. Only x has a gradient. A compiled program takes every σ but 0. With σ = 0 the tokens come back as
    they are, the very tensor, and no kernel runs.

    :meth:`step` after an epoch sets σ to ``schedule(epoch)``; ``step(epoch)`` says which epoch comes, as after a resumed training. By
    default ``sigma * 0.9 ** (epoch // 5)``, as the authors have it. σ holds in evaluation, too, as there.

    Args:
        sigma: σ >= 0 of the first epoch; the attribute is the present one and may be set.
        kernel_size: K, odd; the authors' are 3, 5 and 7.
        num_prefix_tokens: P >= 0. grid: (H, W) for every call, or None: then ``forward`` must be given it.
        padding: None is K // 2; the authors have 0 for K = 7. With another the result lies on ``lifeops.conv_grid(grid, K, 1, padding)``.
        schedule: from the epoch's number to σ.

    >>> for epoch in range(epochs):
    ...     train(model)
    ...     for m in model.modules():
    ...         if isinstance(m, lifeops.nn.TokenSmoothing):
    ...             m.step()

    Raises ValueError for an even kernel, a negative σ, and a grid that the kernel does not fit.
    """

    needs_grid = True

    def __init__(
        self, sigma: float = 1.0, kernel_size: int = 3, num_prefix_tokens: int = 0, *, grid: tuple[int, int] | None = None,
        padding: int | None = None, schedule: Callable[[int], float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel_size = check_kernel_size(NAME, kernel_size)
        self.num_prefix_tokens = check_int(NAME, "num_prefix_tokens", num_prefix_tokens, 0)
        padding = check_int(NAME, "padding", padding, 0, optional=True)
        check_callable(NAME, "schedule", schedule)
        self.padding = self.kernel_size // 2 if padding is None else padding
        self.register_buffer("taps", self._room(None), persistent=False)
        self.sigma, self.epoch = sigma, 0
        self.schedule = functools.partial(faded, self.sigma) if schedule is None else schedule
        self.grid_holder = GridHolder(geometry.fixed_grid(NAME, grid, num_prefix_tokens))

    @property
    def sigma(self) -> float:
        """σ of the next call."""
        return self._sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        self._sigma = check_number(NAME, "sigma", value, "finite and not negative", lambda v: v >= 0)
        self._smooths = self._sigma > 0
        half = self.kernel_size // 2
        line = [math.exp(-(i / self._sigma) * (i / self._sigma) / 2) if self._smooths else float(i == 0) for i in range(-half, half + 1)]
        line = [tap / math.fsum(line) for tap in line]
        with torch.no_grad():  # in place: captured programs read this memory
            self.taps.copy_(torch.tensor([[[[a * b for b in line] for a in line]]], dtype=self.taps.dtype, device="cpu"))

    def _room(self, device) -> Tensor:
        """For the filter; Apple's GPUs have no float64."""
        wide = torch.float32 if torch.empty(0, device=device).device.type == "mps" else torch.float64
        return torch.empty(1, 1, self.kernel_size, self.kernel_size, dtype=wide, device=device)

    def _apply(self, fn, recurse=True):
        """To another device, but not to another dtype; filled anew, as ``to_empty`` loses the values."""
        old = self._buffers.pop("taps")
        super()._apply(fn, recurse)
        self._buffers["taps"] = self._room(fn(old.new_empty(0, dtype=torch.float32)).device)
        self.sigma = self._sigma
        return self

    def step(self, epoch: int | None = None) -> float:
        """Go to ``epoch``, by default the next, and return its σ."""
        self.epoch = self.epoch + 1 if epoch is None else check_int(NAME, "epoch", epoch, 0)
        self.sigma = self.schedule(self.epoch)
        return self.sigma

    def filter(self, dtype: torch.dtype = torch.float32, device=None) -> Tensor:
        """(1, 1, K, K), of sum 1."""
        return self.taps.to(device, dtype)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """x (B, P + H*W, C), grid (H, W) -> (B, P + H'*W', C)."""
        P = self.num_prefix_tokens
        grid = check_input(NAME, x, None, self.grid_holder.of(NAME, grid), P)
        geometry.filtered_grid(NAME, *grid, (self.kernel_size,) * 2, (1, 1), (self.padding,) * 2)
        same = self.padding == self.kernel_size // 2
        if same and not self._smooths:
            return x
        weight = self.filter(accumulate_dtype(torchlib.autocast_dtype(x) or x.dtype), x.device).repeat(x.shape[2], 1, 1, 1)
        return token_dwconv(x, weight, grid=grid, num_prefix_tokens=P, padding=None if same else self.padding)

    def extra_repr(self) -> str:
        found = f"sigma={self.sigma:g}, kernel_size={self.kernel_size}, num_prefix_tokens={self.num_prefix_tokens}"
        return found if self.padding == self.kernel_size // 2 else f"{found}, padding={self.padding}"


def faded(sigma: float, epoch: int) -> float:
    """The authors' schedule."""
    return sigma * DECAY ** (epoch // EVERY)
