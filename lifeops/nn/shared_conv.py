"""Bootstrapping ViTs' agent (arXiv 2112.03552): attention's value and output weights as a convolution, which trains them beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lifeops import geometry, torchlib
from lifeops.arguments import check_int, check_module, got
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_input, check_like
from lifeops.nn.plain import exactly, is_fused
from lifeops.nn.scripting import NotScripted
from lifeops.ops.token_dwconv.public import token_dwconv
from lifeops.pointwise import multiply, product

NAME = "SharedConvAttention"
LAYERS = ("qkv", "proj"), ("linear_qkv", "linear_out")  # timm's and this library's names, the authors'


class SharedConvAttention(NotScripted, nn.Module):
    """An attention module's weights as a convolution over the patches: head h looks at one fixed neighbour, δ_h rows and columns away.

        v = x W_Vᵀ          y_i = Σ_h W_O,h v_h[i + δ_h] + b_O          0 outside the grid

    as a dense K x K convolution whose tap δ_h is W_O,h W_V,h would give it, but as one product, a shift of each head's channels in place
    of attention, and another product: C² + C² multiplications a token, not C² for every tap. The queries' and keys' weights have zero
    gradients, the bias of ``qkv`` has none: the authors leave that of the values out. Prefix tokens look at themselves. A NaN reaches
    all of the K x K patches around it, as it does in that convolution.

    The module holds ``mhsa`` itself, not copies: what one trains, the other has.

    Args:
        mhsa: an attention module with layers ``qkv`` (C -> 3 h d) and ``proj`` (or the authors' ``linear_qkv`` and ``linear_out``) and
            ``num_heads``, as timm's and this library's.
        num_prefix_tokens: P >= 0. grid: (H, W) for every call, or None: then ``forward`` must be given it.
        offsets: (dy, dx) of each head. None has the authors': with K = ceil(sqrt(h)), which must be odd (h is 1, 5 to 9, 17 to 25, …), the
            first h taps of the K x K kernel row by row; 6 heads look at the two upper rows. For other numbers of heads the authors have
            none, and they must be given, as ``lifeops.init.head_offsets(h)``.

    Where a layer was exchanged, hooked or wrapped it is called (``lifeops.explain(module)`` says why), and what it adds to a zero token
    is taken for the bias. Raises ValueError for a module without such layers, and for heads without offsets.
    """

    needs_grid = True

    def __init__(
        self, mhsa: nn.Module, num_prefix_tokens: int = 0, *, grid: tuple[int, int] | None = None,
        offsets: Sequence[tuple[int, int]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_module(NAME, "mhsa", mhsa)
        self.layers = next((names for names in LAYERS if all(isinstance(getattr(mhsa, n, None), nn.Module) for n in names)), None)
        heads = getattr(mhsa, "num_heads", None)
        if self.layers is None or not isinstance(heads, int):
            raise ValueError(f"{NAME}: mhsa must have layers qkv and proj (or linear_qkv and linear_out) and num_heads, got {got(mhsa)}")
        self.num_prefix_tokens = check_int(NAME, "num_prefix_tokens", num_prefix_tokens, 0)
        self.mhsa, self.num_heads, self.offsets = mhsa, heads, _checked(heads, offsets)
        self.grid_holder = GridHolder(geometry.fixed_grid(NAME, grid, num_prefix_tokens))
        made, width = getattr(self._qkv, "out_features", None), getattr(self._out, "in_features", None)
        if not isinstance(width, int) or width % heads or made != 3 * width:
            reads = f"as wide together as {self.layers[1]} reads, {width}"
            raise ValueError(f"{NAME}: mhsa must project to q, k and v of {heads} heads, {reads}, got {made}")
        self.register_buffer("taps", _taps(self.offsets, width, self._out.weight.device), persistent=False)

    @property
    def _qkv(self) -> nn.Module:
        return self.mhsa._modules[self.layers[0]]

    @property
    def _out(self) -> nn.Module:
        return self.mhsa._modules[self.layers[1]]

    def fused_layers(self):
        return [(f"mhsa.{name}", exactly(nn.Linear)) for name in self.layers]

    def _apply(self, fn, recurse=True):
        """The shifts are filled anew: ``to_empty`` loses their values."""
        super()._apply(fn, recurse)
        with torch.no_grad():
            self.taps.copy_(_taps(self.offsets, self.taps.shape[0], "cpu"))
        return self

    def _values(self, x: Tensor, fused: bool) -> Tensor:
        """x W_Vᵀ (B, P + N, h d), without a bias."""
        width = self.taps.shape[0]
        if fused:
            return multiply(x, self._qkv.weight[2 * width :], None)
        zero = x.new_zeros(1, 1, x.shape[2])
        return (self._qkv(x) - self._qkv(zero))[..., 2 * width :]

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """x (B, P + H*W, C), grid (H, W) -> (B, P + H*W, C)."""
        fused = is_fused(self)
        dim = self._qkv.in_features if fused else None
        grid = check_input(NAME, x, dim, self.grid_holder.of(NAME, grid), self.num_prefix_tokens)
        check_like(NAME, "x", x, self._qkv)
        v = self._values(x, fused)
        if self.taps.shape[-1] > 1:
            taps = self.taps.to(torchlib.autocast_dtype(v) or v.dtype)
            v = token_dwconv(v, taps, grid=grid, num_prefix_tokens=self.num_prefix_tokens)
        return product(v, self._out) if fused else self._out(v)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_prefix_tokens={self.num_prefix_tokens}, offsets={self.offsets}"


def _checked(heads: int, offsets) -> tuple[tuple[int, int], ...]:
    """An offset for every head."""
    if offsets is None:
        K = math.isqrt(max(heads - 1, 0)) + 1
        if K % 2 == 0:
            said = f"the kernel of {heads} heads, {K} x {K}, has no centre"
            raise ValueError(f"{NAME}: offsets must be given where ceil(sqrt(num_heads)) is even: {said}")
        return tuple((tap // K - K // 2, tap % K - K // 2) for tap in range(heads))
    if not isinstance(offsets, (tuple, list)) or len(offsets) != heads or not all(_is_offset(o) for o in offsets):
        raise ValueError(f"{NAME}: offsets must be (dy, dx) for each of the {heads} heads, got {got(offsets)}")
    return tuple((int(dy), int(dx)) for dy, dx in offsets)


def _is_offset(value) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in value)


def _taps(offsets: tuple[tuple[int, int], ...], width: int, device) -> Tensor:
    """(h d, 1, K, K): of each channel the one tap that its head looks through."""
    reach = max(max(abs(dy), abs(dx)) for dy, dx in offsets)
    taps = torch.zeros(len(offsets), 2 * reach + 1, 2 * reach + 1, device="cpu")
    for head, (dy, dx) in enumerate(offsets):
        taps[head, reach + dy, reach + dx] = 1
    return taps.repeat_interleave(width // len(offsets), 0)[:, None].to(device)
