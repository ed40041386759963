"""RegionViT's regional-to-local attention (arXiv 2106.02689): one set of weights for the regions of an image and for their windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.arguments import check_factory, check_flags, check_int, check_tensor
from lifeops.nn.attend import attend_biased, split_heads
from lifeops.nn.inputs import check_heads, check_like, check_sequence
from lifeops.nn.scripting import NotScripted
from lifeops.told import ToldInMetadata

CORNER_MASKS = ("fixed", "authors")


def padding_mask(regions: tuple[int, int], window: int, grid: tuple[int, int], corner_mask: str = "fixed", device=None) -> Tensor | None:
    """(gh * gw, 1 or 1 + window², 1 + window²) bool, True where a query of a window attends to a key, the region's token first; None
    where the map ``grid`` fills the windows of all ``regions`` (gh, gw), which begin at its top left.

    ``corner_mask`` "fixed": no query attends to padding. "authors": as the authors' code has it, whose weights were trained so: in the last
    window of the last row, rows that are padded below and columns that are padded on the right are hidden only from each other's rest, so
    that padding is attended to there; and padding attends to nothing, which leaves the mean of all.
    """
    (gh, gw), (H, W) = regions, grid
    below, beside = gh * window - H, gw * window - W
    if below < 0 or beside < 0:
        raise ValueError(f"padding_mask: the map must fit {gh} x {gw} windows of {window} x {window} patches, got {H} x {W}")
    if below == beside == 0:
        return None
    if corner_mask == "authors":
        return _authors(regions, window, below, beside, device)
    inside = (torch.arange(gh * window, device=device) < H)[:, None] & (torch.arange(gw * window, device=device) < W)
    inside = inside.view(gh, window, gw, window).transpose(1, 2).flatten(2).flatten(0, 1)
    return F.pad(inside, (1, 0), value=True)[:, None]


def _authors(regions, window, below, beside, device):
    if max(below, beside) > window:
        raise ValueError(f"padding_mask: the authors' code pads by one window at most, got {below} rows and {beside} columns")
    (gh, gw), place = regions, torch.arange(window, device=device)
    rows, columns = ((place < window - more).expand(window, window) for more in (below, beside))
    real = [F.pad(t.flatten(), (1, 0), value=True) for t in (rows.T, columns)]
    bottom, right = (t[:, None] & t for t in real)
    mask = torch.ones(gh, gw, *bottom.shape, dtype=torch.bool, device=device)
    mask[:-1, -1], mask[-1], mask[-1, -1] = right, bottom, bottom | right
    return mask.flatten(0, 1)


class RegionalAttention(NotScripted, ToldInMetadata):
    """softmax(q kᵀ / sqrt(d) + bias) v, then ``proj``: of sequences (B, N, C) without a bias, or of windows (B, 1 + w*w, C) with one.

    A window is its region's token and the w x w patches of it, row-major. ``rel_pos`` (h, (2 w - 1)²) holds the bias between patches: of
    query (y, x) and key (y', x') the entry of row (y' - y + w // 2) mod (2 w - 1) and that column, as the authors read it; the region's
    token has none.

    Args:
        dim, num_heads: C and h. window_size: w. qkv_bias: as usual.
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int, qkv_bias: bool = True, *, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        name = "RegionalAttention"
        dim, num_heads = check_heads(name, dim, num_heads)
        window_size, dd = check_int(name, "window_size", window_size, 1), check_factory(name, device, dtype)
        check_flags(name, qkv_bias=qkv_bias)
        self.dim, self.num_heads, self.window_size, self.scale = dim, num_heads, window_size, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.rel_pos = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, (2 * window_size - 1) ** 2, **dd), std=0.02))

    def bias(self) -> Tensor:
        """(h, 1 + w*w, 1 + w*w)"""
        w = self.window_size
        at = torch.arange(w, device=self.rel_pos.device)
        place = (at - at[:, None] + w // 2) % (2 * w - 1)  # of a query's row or column (first) and a key's
        table = self.rel_pos.unflatten(1, (2 * w - 1, 2 * w - 1))
        return F.pad(table[:, place[:, None, :, None], place[:, None]].flatten(3).flatten(1, 2), (1, 0, 1, 0))

    def forward(self, x: Tensor, windows: bool = False, mask: Tensor | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C). ``windows``: x is windows of images one after another, and there is a bias; ``mask`` then says where
        the windows of an image attend (:func:`padding_mask`); a query that it leaves no key has the mean of all values.
        """
        name = "RegionalAttention"
        check_sequence(name, "x", x, self.dim)
        check_like(name, "x", x, self.qkv)
        check_flags(name, windows=windows)
        if windows and x.shape[1] != 1 + self.window_size**2:
            raise ValueError(f"{name}: x must be windows (B, 1 + {self.window_size}*{self.window_size}, C), got {tuple(x.shape)}")
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        bias = self.bias().to(q.dtype)[None] if windows else None
        if mask is not None:
            check_tensor(name, "mask", mask)
            if not windows or mask.dtype != torch.bool or mask.dim() != 3 or x.shape[0] % mask.shape[0]:
                raise ValueError(f"{name}: mask must be bool (windows of an image, n, n), got {mask.dtype} {tuple(mask.shape)}")
            q, k, v = (t.unflatten(0, (-1, mask.shape[0])) for t in (q, k, v))
            seen = mask.any(-1, keepdim=True)[:, None]  # a query that sees nothing has the same score with all keys, whatever it is
            q = torch.where(seen, q, 0)
            bias = torch.where(seen, torch.where(mask[:, None], bias, torch.finfo(bias.dtype).min), 0)
        y = attend_biased(q, k, v, bias, self.scale).flatten(0, -4)
        return self.proj(y.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}"

