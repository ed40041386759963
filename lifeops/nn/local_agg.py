"""EdgeViT's local aggregation (arXiv 2205.03436): a convolution, and a feed-forward around it; state-dict keys are the authors'."""

from __future__ import annotations

import torch
from torch import nn

from lifeops import config, geometry, torchlib
from lifeops.arguments import check_factory, check_int, check_module
from lifeops.nn.batch_norm import Fusible, check_constant, check_patches, check_readable, folded_into, normalise
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_input, check_kernel_size, check_like
from lifeops.nn.localvit import hidden_width
from lifeops.nn.maps import call, to_maps, to_tokens
from lifeops.nn.plain import batch_norm, depthwise, exactly, gelu, is_fused, pointwise
from lifeops.nn.scripting import NotScripted
from lifeops.ops.feed_forward import feed_forward
from lifeops.ops.token_dwconv.public import token_dwconv
from lifeops.pointwise import multiply

NAME = "LocalAgg"


class ConvMlp(nn.Module):
    """1x1, GELU, 1x1 on maps (B, C, H, W)."""

    def __init__(self, dim: int, hidden_dim: int, **dd):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(dim, hidden_dim, 1, **dd), nn.GELU(), nn.Conv2d(hidden_dim, dim, 1, **dd)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(maps)))


class LocalAgg(Fusible, NotScripted, nn.Module):
    """EdgeViT's local aggregation on (B, P + H*W, C) tokens:

        x = x + DW3(x)                          position, ``pos_embed``
        x = x + PW(DW_K(PW(BN(x))))             ``norm1``, ``conv1``, ``attn``, ``conv2``
        x = x + PW(GELU(PW(BN(x))))             ``norm2``, ``mlp``

    on the patches; prefix tokens pass untouched. All convolutions have a bias. ``drop_path`` is on the last two.

    On the fast path the tokens are never rearranged to maps. Where a layer was exchanged, hooked or wrapped, and under torch.func, the
    layers are called on (B, C, H, W) maps instead (``lifeops.explain(module)`` says why).

    Args:
        dim: C. mlp_ratio: hidden width of the last / C. kernel_size: K, odd.
        num_prefix_tokens: P >= 0. grid: (H, W) for every call, or None: then ``forward`` must be given it.
        drop_path: a module called on both branches, by default none.

    Raises ValueError for sizes that do not fit, and a training batch of one value per channel.
    """

    needs_grid = True

    def __init__(
        self, dim: int, mlp_ratio: float = 4.0, num_prefix_tokens: int = 0, *, grid: tuple[int, int] | None = None, kernel_size: int = 5,
        drop_path: nn.Module | None = None, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dim, hidden = hidden_width(NAME, dim, mlp_ratio, "mlp_ratio")
        kernel_size, num_prefix_tokens = check_kernel_size(NAME, kernel_size), check_int(NAME, "num_prefix_tokens", num_prefix_tokens, 0)
        check_module(NAME, "drop_path", drop_path, optional=True)
        grid, dd = geometry.fixed_grid(NAME, grid, num_prefix_tokens), check_factory(NAME, device, dtype)
        self.dim, self.num_prefix_tokens = dim, num_prefix_tokens
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1, self.conv1, self.conv2 = nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, dim, 1, **dd), nn.Conv2d(dim, dim, 1, **dd)
        self.attn = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
        self.drop_path = nn.Identity() if drop_path is None else drop_path
        self.norm2, self.mlp = nn.BatchNorm2d(dim, **dd), ConvMlp(dim, hidden, **dd)
        self.grid_holder = GridHolder(grid)

    def fused_layers(self):
        first = [("pos_embed", depthwise), ("norm1", batch_norm), ("conv1", pointwise), ("attn", depthwise), ("conv2", pointwise)]
        mlp = [("", exactly(ConvMlp)), (".fc1", pointwise), (".act", gelu), (".fc2", pointwise)]
        return [*first, ("norm2", batch_norm), *((f"mlp{path}", rule) for path, rule in mlp)]

    def _norms(self):
        return [norm for norm in (self.norm1, self.norm2) if isinstance(norm, nn.modules.batchnorm._BatchNorm)]

    def _composed(self, x, grid):
        """Layer by layer on the map of the patches."""
        check_patches(NAME, self._norms(), x, grid)
        rules = dict(self.fused_layers())

        def run(t, *names):
            maps = to_maps(t, grid)
            for name in names:
                maps = call(f"{NAME}: {name}", getattr(self, name), maps, rules[name])
            return to_tokens(maps)

        x = x + run(x, "pos_embed")
        x = x + self.drop_path(run(x, "norm1", "conv1", "attn", "conv2"))
        return x + self.drop_path(run(x, "norm2", "mlp"))

    def _run(self, x, grid):
        backend = config.requested_backend(NAME, None)

        def depth_wise(t, conv, **options):
            return token_dwconv(t, conv.weight, conv.bias, grid=grid, **options)

        def dense(t, conv):
            return multiply(t, conv.weight.flatten(1), conv.bias)

        x = depth_wise(x, self.pos_embed, residual=x)
        t = dense(normalise(NAME, self.norm1, x, x.shape[1], backend), self.conv1)
        x = x + self.drop_path(dense(depth_wise(t, self.attn), self.conv2))
        t, first, second = normalise(NAME, self.norm2, x, x.shape[1], backend), self.mlp.fc1, self.mlp.fc2
        t = feed_forward(t, first.weight.flatten(1), first.bias, second.weight.flatten(1), second.bias, "gelu", backend)
        return x + self.drop_path(t)

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """x (B, P + H*W, C), grid (H, W) -> (B, P + H*W, C)."""
        P = self.num_prefix_tokens
        grid = check_input(NAME, x, self.dim, self.grid_holder.of(NAME, grid), P)
        check_like(NAME, "x", x, self.pos_embed)
        fast = not torchlib.calls_layers() and x.shape[0] * grid[0] * grid[1] > 0
        y = (self._run if fast and is_fused(self) else self._composed)(x[:, P:], grid)
        return torch.cat((x[:, :P].to(y.dtype), y), 1) if P else y

    def norm_elements(self, grid: tuple[int, int]) -> int:
        """How many numbers of an image go through the batch norms."""
        return len(self._norms()) * self.dim * grid[0] * grid[1]

    def fold_batch_norms_(self, check: bool) -> None:
        """Put folded convolutions and ``nn.Identity`` in place of convolutions and norms, or only ``check`` that it can be done."""
        for name, owner, conv in (("norm1", self, "conv1"), ("norm2", self.mlp, "fc1")):
            norm, layer = getattr(self, name), getattr(owner, conv)
            if norm in self._norms():
                check_constant(name, norm)
                check_readable(conv, layer, pointwise)
                check_readable(name, norm, batch_norm)
                if not check:
                    setattr(owner, conv, folded_into(norm, layer))
                    setattr(self, name, nn.Identity())

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_prefix_tokens={self.num_prefix_tokens}"
