"""LIFE's q, k and v in the place of the linear layer that an attention makes its own by: the rest of it stays what it is.

For attention that does more with its q, k and v than softmax(scale q kᵀ) v (talking heads, a second softmax, windows, channels).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifeops.hosts.host import pair
from lifeops.nn.grids import GridHolder
from lifeops.nn.life import LifeQKV


class LifeProjection(LifeQKV):
    """:class:`lifeops.nn.LifeQKV` called as a linear layer is: tokens (B, P + H*W, C), or maps (B, H, W, C), to q | k | v, 3 C channels."""

    needs_grid = True

    def __init__(self, dim: int, num_heads: int, num_prefix_tokens: int, *, block: nn.Module | None = None, **options):
        super().__init__(dim, num_heads, num_prefix_tokens, **options)
        self.grid_holder = GridHolder()
        self._block = (block,)  # not a part: it holds this module

    @property
    def window(self) -> tuple[int, int] | None:
        """(h, w) of the windows that its block cuts now; None where it cuts none."""
        return pair(getattr(self._block[0], "window_size", None) or None)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Maps tell their grid; that of tokens is the block's window, ``grid``, or the one that is bound."""
        if x.dim() == 4:
            size = tuple(x.shape[1:3])
            return self._joined(x.flatten(1, 2), size).unflatten(1, size)
        return self._joined(x, self.window or self.grid_holder.of("LifeProjection", grid))

    def _joined(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return torch.cat(super().forward(x, grid), -1)


class LifeInProjection(LifeProjection):
    """The same for a layer that also begins an MLP beside the attention: ``fc1``'s channels | q | k | v."""

    def __init__(self, dim: int, num_heads: int, num_prefix_tokens: int, hidden: int, bias: bool, **options):
        super().__init__(dim, num_heads, num_prefix_tokens, **options)
        dd = {name: options.get(name) for name in ("device", "dtype")}
        self.fc1 = nn.Linear(dim, hidden, bias=bias, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return torch.cat((self.fc1(x), super().forward(x, grid)), -1)


def projection_for(attn: nn.Module, path: str, heads: int, prefix: int, options: dict) -> LifeProjection | None:
    """What takes the place of the layer ``path`` of ``attn``, its MLP's weights kept; None where that makes no q, k and v of one width."""
    layer = attn.get_submodule(path)
    hidden = attn.in_split[0] if path == "in_proj" else 0
    dim, options = layer.in_features, {"device": layer.weight.device, "dtype": layer.weight.dtype, **options}
    if layer.out_features != hidden + 3 * dim or dim % heads:
        return None
    if not hidden:
        return LifeProjection(dim, heads, prefix, **options).train(layer.training)
    new = LifeInProjection(dim, heads, prefix, hidden, layer.bias is not None, **options)
    with torch.no_grad():
        for ours, theirs in zip(new.fc1.parameters(), layer.parameters(), strict=True):
            ours.copy_(theirs[:hidden]).requires_grad_(theirs.requires_grad)
    return new.train(layer.training)
