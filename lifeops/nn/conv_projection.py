"""CvT's attention (arXiv 2103.15808): queries, keys and values from convolutions of the patch map; state-dict keys are the authors'."""

from __future__ import annotations

import torch
from torch import nn

from lifeops import config, geometry, torchlib
from lifeops.arguments import check_choice, check_factory, check_flags, check_int, check_rate
from lifeops.nn.attend import DROPOUT, attend_keys
from lifeops.nn.batch_norm import Fusible, check_constant, check_patches, check_readable, constants, folded, normalise, on_batch
from lifeops.nn.dense import multiplier
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_heads, check_input, check_kernel_size, check_like
from lifeops.nn.maps import on_patches
from lifeops.nn.plain import avg_pool, batch_norm, exactly, is_fused, strided_depthwise
from lifeops.nn.scripting import NotScripted
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.local_attention.formula import heads
from lifeops.ops.token_conv.multi import token_dwconv_multi
from lifeops.ops.token_pool.function import token_pool
from lifeops.options import Projection
from lifeops.told import ToldInMetadata

METHODS = ("dw_bn", "avg", "linear")
NAME = "ConvProjectionAttention"


class ConvBatchNorm(nn.Module):
    """``bn(conv(maps))``: a depth-wise convolution without bias, then a batch norm."""

    def __init__(self, dim: int, kernel_size: int, stride: int, **dd):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=False, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        return self.bn(self.conv(maps))


class AveragePool(nn.Module):
    """An average over windows of the map; padding counts in the divisor, what ``ceil_mode`` adds to the map does not."""

    def __init__(self, kernel_size: int, stride: int):
        super().__init__()
        self.avg = nn.AvgPool2d(kernel_size, stride, kernel_size // 2, ceil_mode=True)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.avg(maps)


class ConvProjectionAttention(Fusible, NotScripted, ToldInMetadata):
    """softmax(q kᵀ / sqrt(C)) v and ``proj``, where q, k, v = Linear([prefix ; projection of the patch map]): CvT's attention.

    C is all channels, not those of a head. Each of q, k and v has a projection of its own, k and v usually on a coarser grid:

        "dw_bn"     batch norm of a depth-wise convolution, padding K // 2
        "avg"       of k and v the average over windows, padding K // 2, ceil_mode; of q nothing
        "linear"    nothing

    On the fast path the three convolutions read the tokens once and in place, no map is made, and constant batch norms are part of the
    filters. Where a layer was exchanged, hooked or wrapped, and under torch.func, the layers are called on (B, C, H, W) maps instead
    (``lifeops.explain(module)`` says why).

    Args:
        dim, num_heads: C and h, C % h == 0.
        num_prefix_tokens: P >= 0; prefix tokens go to the three Linears as they are.
        grid: (H, W) for every call, or None: then ``forward`` must be given it.
        method: "dw_bn", "avg" or "linear". kernel_size: K, odd.
        stride_q, stride_kv: None is 1 and, where there is a projection of k and v, 2. With stride_q s the result has the tokens of
            ``lifeops.conv_grid(grid, K, s)``.
        qkv_bias: biases of the three Linears. attn_drop, proj_drop: dropout rates.

    Raises ValueError for an unknown method, a stride of what is not projected, sizes that do not fit, and a training batch of one value
    per channel.
    """

    needs_grid = True
    no_rollout = "whose keys and values are convolutions of the tokens on a grid of their own: what a token draws on is not its attention"
    told = "num_heads", "method", "stride_q", "stride_kv"

    def __init__(
        self, dim: int, num_heads: int = 8, num_prefix_tokens: int = 1, *, grid: tuple[int, int] | None = None,
        method: Projection = "dw_bn", kernel_size: int = 3, stride_q: int | None = None, stride_kv: int | None = None,
        qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dim, num_heads = check_heads(NAME, dim, num_heads)
        num_prefix_tokens, kernel_size = check_int(NAME, "num_prefix_tokens", num_prefix_tokens, 0), check_kernel_size(NAME, kernel_size)
        check_choice(NAME, "method", method, METHODS), check_flags(NAME, qkv_bias=qkv_bias)
        check_rate(NAME, "attn_drop", attn_drop), check_rate(NAME, "proj_drop", proj_drop, one=True)
        grid, dd = geometry.fixed_grid(NAME, grid, num_prefix_tokens), check_factory(NAME, device, dtype)
        self.dim, self.num_heads, self.num_prefix_tokens, self.method, self.scale = dim, num_heads, num_prefix_tokens, method, dim**-0.5
        self.stride_q = _stride("stride_q", stride_q, 1, method, method == "dw_bn")
        self.stride_kv = _stride("stride_kv", stride_kv, 2, method, method != "linear")

        def projection(stride, averaged):
            if method == "dw_bn":
                return ConvBatchNorm(dim, kernel_size, stride, **dd)
            return AveragePool(kernel_size, stride) if averaged and method == "avg" else None

        self.conv_proj_q = projection(self.stride_q, averaged=False)
        self.conv_proj_k, self.conv_proj_v = (projection(self.stride_kv, averaged=True) for _ in range(2))
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(dim, dim, bias=qkv_bias, **dd) for _ in range(3))
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(attn_drop), nn.Linear(dim, dim, **dd), nn.Dropout(proj_drop)
        self.grid_holder = GridHolder(grid)

    def _projections(self) -> dict[str, nn.Module]:
        """By name, those that there are."""
        found = {f"conv_proj_{part}": self._modules.get(f"conv_proj_{part}") for part in "qkv"}
        return {name: module for name, module in found.items() if module is not None}

    def fused_layers(self):
        kinds = {
            "dw_bn": [("", exactly(ConvBatchNorm)), (".conv", strided_depthwise), (".bn", batch_norm)],
            "avg": [("", exactly(AveragePool)), (".avg", avg_pool)],
        }
        layers = [(f"{name}{path}", rule) for name in self._projections() for path, rule in kinds.get(self.method, [])]
        return [*layers, *((f"proj_{part}", exactly(nn.Linear)) for part in "qkv"), ("attn_drop", DROPOUT), ("proj", exactly(nn.Linear))]

    # ------------------------------------------------------------------------------------------------ the projections

    def _by_layer(self, x, grid):
        """Every projection called on the map of the patches: by name its tokens behind the prefix."""
        check_patches(NAME, self.modules(), x, grid)
        P = self.num_prefix_tokens
        return {name: on_patches(f"{NAME}: {name}", layer, x, grid, P) for name, layer in self._projections().items()}

    def _convolved(self, x, grid):
        convs, norms = zip(*((p.conv, p.bn) for p in self._projections().values()), strict=True)
        place = {"grid": grid, "num_prefix_tokens": self.num_prefix_tokens}
        place.update(strides=[conv.stride for conv in convs], paddings=[conv.padding for conv in convs])
        batch = [on_batch(norm) for norm in norms]
        filters = [(conv.weight, conv.bias) if b else _filter(conv, norm) for conv, norm, b in zip(convs, norms, batch, strict=True)]
        found = token_dwconv_multi(x, *(list(column) for column in zip(*filters, strict=True)), **place)
        backend, P = config.requested_backend(NAME, None), self.num_prefix_tokens
        return {
            name: normalise(NAME, norm, y, y.shape[1] - P, backend) if b else y
            for name, norm, b, y in zip(self._projections(), norms, batch, found, strict=True)
        }

    def _averaged(self, x, grid):
        """One pooling for all layers that are alike."""
        found = {}
        for name, layer in self._projections().items():
            options = {option: getattr(layer.avg, option) for option in ("stride", "padding", "ceil_mode", "count_include_pad")}
            found[name] = layer.avg.kernel_size, options
        first, *others = found.values()
        place = {"mode": "avg", "grid": grid, "num_prefix_tokens": self.num_prefix_tokens}
        if all(other == first for other in others):
            return dict.fromkeys(found, token_pool(x, first[0], **first[1], **place))
        return {name: token_pool(x, size, **options, **place) for name, (size, options) in found.items()}

    def projected(self, x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, P + H*W, C) -> what the Linears of q, k and v read, each (B, P + H'*W', C) on its own grid."""
        fast = not torchlib.calls_layers() and x.shape[0] * grid[0] * grid[1] > 0
        step = {"dw_bn": self._convolved, "avg": self._averaged}.get(self.method, self._by_layer)
        found = (step if fast and is_fused(self) else self._by_layer)(x, grid)
        return tuple(found.get(f"conv_proj_{part}", x) for part in "qkv")

    # ------------------------------------------------------------------------------------------------ forward

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """x (B, P + H*W, C), grid (H, W) -> (B, P + H'*W', C), H' x W' the grid of the queries: with stride_q 1 that of x."""
        grid = check_input(NAME, x, self.dim, self.grid_holder.of(NAME, grid), self.num_prefix_tokens)
        check_like(NAME, "x", x, self.proj_q)
        fused, multiply = is_fused(self), multiplier(self)
        layers = self.proj_q, self.proj_k, self.proj_v
        q, k, v = (heads(multiply(t, layer), self.num_heads) for t, layer in zip(self.projected(x, grid), layers, strict=True))
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"{NAME}: conv_proj_k and conv_proj_v must make equally many tokens, got {k.shape[2]} and {v.shape[2]}")
        y = attend_keys(self, q, k, v, scale=self.scale, fused=fused)
        return self.proj_drop(multiply(y, self.proj))

    def norm_elements(self, grid: tuple[int, int]) -> int:
        """How many numbers of an image go through the batch norms."""
        found = [p.conv for p in self._projections().values() if isinstance(getattr(p, "bn", None), nn.modules.batchnorm._BatchNorm)]
        grids = [geometry.conv_grid(grid, conv.kernel_size, conv.stride, conv.padding) for conv in found]
        return sum(self.dim * H * W for H, W in grids)

    def fold_batch_norms_(self, check: bool) -> None:
        """Put folded convolutions and ``nn.Identity`` in place of convolutions and norms, or only ``check`` that it can be done."""
        for name, module in self._projections().items():
            norm = getattr(module, "bn", None)
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                check_constant(f"{name}.bn", norm)
                check_readable(f"{name}.conv", module.conv, exactly(nn.Conv2d))
                check_readable(f"{name}.bn", norm, batch_norm)
                if not check:
                    module.conv, module.bn = folded(module.conv, norm), nn.Identity()

    def extra_repr(self) -> str:
        strides = f"stride_q={self.stride_q}, stride_kv={self.stride_kv}"
        return f"num_heads={self.num_heads}, num_prefix_tokens={self.num_prefix_tokens}, method={self.method!r}, {strides}"


def _stride(name: str, stride, default: int, method: str, projected: bool) -> int:
    """Of what is ``projected``; else there is none but 1."""
    stride = check_int(NAME, name, stride, 1, optional=True)
    if not projected and stride not in (None, 1):
        raise ValueError(f"{NAME}: {name} must be 1 or None with method {method!r}, which does not project it, got {stride}")
    return (default if projected else 1) if stride is None else stride


def _filter(conv, norm):
    """Weight and bias of a convolution and the constant norm behind it, in the kernels' precision."""
    if isinstance(norm, nn.Identity):
        return conv.weight, conv.bias
    wide = accumulate_dtype(conv.weight.dtype)
    scale, shift = constants(norm, wide)
    bias = shift if conv.bias is None else torch.addcmul(shift, conv.bias.to(wide), scale)
    return conv.weight.to(wide) * scale[:, None, None, None], bias
