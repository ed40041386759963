"""RegionViT's step to a coarser grid (arXiv 2106.02689): norm, GELU and a strided convolution that doubles the channels, on two grids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops import geometry
from lifeops.arguments import check_int
from lifeops.nn.inputs import check_like, check_sequence
from lifeops.nn.maps import to_maps, to_tokens
from lifeops.nn.plain import exactly, gelu, is_fused, multiplying, sequence_of
from lifeops.nn.scripting import NotScripted
from lifeops.ops.token_dwconv.public import token_dwconv


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of maps (B, C, H, W); weight and bias (1, C, 1, 1) as the authors' state dicts have them."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(1, dim, 1, 1)), nn.Parameter(torch.zeros(1, dim, 1, 1))

    def of_tokens(self, x: Tensor) -> Tensor:
        """The same of (…, C)."""
        return F.layer_norm(x, x.shape[-1:], self.weight.flatten(), self.bias.flatten(), self.eps)

    def forward(self, maps: Tensor) -> Tensor:
        return self.of_tokens(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TwoGridDownsampling(NotScripted, nn.Module):
    """conv(GELU(norm(x))) of the regions' tokens and of the patches': K 3, stride 2, ``dim_out`` a multiple of ``dim`` channels.

    One set of weights, ``proj``, which state dicts hold twice, as ``proj_cls``, too: the authors' do.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        name = "TwoGridDownsampling"
        self.dim, self.dim_out = dim, dim_out = check_int(name, "dim", dim, 1), check_int(name, "dim_out", dim_out, 1)
        if dim_out % dim:
            raise ValueError(f"{name}: dim_out must be a multiple of dim {dim}, got {dim_out}")
        conv = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1, groups=dim)
        self.proj = nn.Sequential(LayerNorm2d(dim), nn.GELU(), conv)

    # a module under two names would do, but torch.func.functional_call (2.13) leaves its tensors behind in one

    @property
    def proj_cls(self) -> nn.Module:
        """``proj``: torch.distributed.checkpoint looks up what the names in state dicts stand for."""
        return self.proj

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.proj.state_dict(destination=destination, prefix=f"{prefix}proj_cls.", keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        second = f"{prefix}proj_cls."
        for name in [name for name in state_dict if name.startswith(second)]:
            t, twin = state_dict.pop(name), state_dict.get(f"{prefix}proj.{name.removeprefix(second)}")
            if twin is None or t.shape != twin.shape or not (t.is_meta or twin.is_meta or torch.equal(t.to(twin), twin)):
                error_msgs.append(f"TwoGridDownsampling: {name} must be the tensor that proj has there, too: one weight serves both grids.")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def fused_layers(self):
        inner = enumerate((exactly(LayerNorm2d), gelu, multiplying))
        return [("proj", sequence_of(3)), *((f"proj.{i}", rule) for i, rule in inner)]

    def _step(self, x: Tensor, grid: tuple[int, int], fused: bool) -> tuple[Tensor, tuple[int, int]]:
        if not fused:
            maps = self.proj(to_maps(x, grid))
            return to_tokens(maps), tuple(maps.shape[2:])
        norm, _, conv = self.proj
        place = {"stride": conv.stride, "padding": conv.padding}
        y = token_dwconv(F.gelu(norm.of_tokens(x)), conv.weight, conv.bias, grid=grid, **place)
        return y, geometry.conv_grid(grid, conv.kernel_size, **place)

    def forward(
        self, regions: Tensor, region_grid: tuple[int, int], x: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, tuple[int, int], Tensor, tuple[int, int]]:
        """regions (B, gh * gw, dim), x (B, H * W, dim) and their grids -> the same, coarser, with dim_out channels."""
        name, first = "TwoGridDownsampling", next(self.proj.children(), None)
        region_grid, grid = geometry.pair(name, "region_grid", region_grid, 1), geometry.pair(name, "grid", grid, 1)
        for what, tokens, place in (("regions", regions, region_grid), ("x", x, grid)):
            check_sequence(name, what, tokens, self.dim)
            geometry.check_tokens(name, what, tokens.shape[1], *place, 0)
            check_like(name, what, tokens, first)
        fused = is_fused(self)
        return *self._step(regions, region_grid, fused), *self._step(x, grid, fused)
