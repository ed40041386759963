"""LocalViT's locality feed-forward (arXiv 2104.05707) on token sequences; state-dict keys are the authors'."""

from __future__ import annotations

import torch
from torch import nn

from lifeops import config, geometry, torchlib
from lifeops.arguments import LARGEST, check_choice, check_factory, check_flags, check_int, check_module, check_number
from lifeops.nn.batch_norm import (
    Fusible,
    check_constant,
    check_patches,
    check_readable,
    folded,
    on_batch,
    sync_group,
    update_running_all,
)  # fmt: skip
from lifeops.nn.channel_attention import ECALayer, SELayer
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_input, check_like, check_sequence
from lifeops.nn.maps import call, to_maps, to_tokens
from lifeops.nn.plain import batch_norm, depthwise, exactly, is_fused, is_plain, pointwise, reasons, relu6, sequence_of
from lifeops.nn.scripting import NotScripted
from lifeops.ops import locality_ffn as chain
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.channel.gate import GATES
from lifeops.options import GateAct
from lifeops.told import ToldInMetadata

ACTS = {"relu6": ("relu6", "")} | {"hs" + f"+{kind}" * bool(kind): ("hardswish", kind) for kind in GATES}
"""The authors' names: activation and channel attention."""


def hidden_width(op: str, dim, expand_ratio, name: str = "expand_ratio") -> tuple[int, int]:
    """(C, H_), checked."""
    dim, ratio = check_int(op, "dim", dim, 1), check_number(op, name, expand_ratio)
    hidden = dim * ratio
    if not 1 <= hidden < LARGEST:
        raise ValueError(f"{op}: dim * {name} must be at least 1, got {dim} * {expand_ratio}")
    return dim, int(hidden)


class LocalityFeedForward(Fusible, NotScripted, ToldInMetadata):
    """x + [0 for the prefix tokens | conv(patch tokens)]: LocalViT's inverted-residual feed-forward on (B, P + H*W, C) tokens.

    ``conv``: 1x1 C -> H_, BN, f, depth-wise 3x3, BN, f, channel attention, 1x1 H_ -> C, BN; H_ = int(C * expand_ratio), f = ReLU6
    or h-swish, no biases. On the fast path no normalised or activated hidden tensor is stored; batch statistics, running
    statistics, ``momentum``, ``track_running_stats``, evaluation mode and SyncBatchNorm are as in ``nn.BatchNorm2d``. Where a layer of
    ``conv`` was exchanged, hooked or wrapped, and under torch.func, the layers are called on (B, channels, H, W) maps instead
    (``lifeops.explain(module)`` says why).

    Args:
        dim: C. expand_ratio: H_ / C.
        act: "relu6", "hs", "hs+se", "hs+eca" or "hs+ecah" (+ the channel attention).
        reduction: of "hs+se": its width is H_ // reduction.
        wo_dp_conv: leave the depth-wise convolution out. dp_first: put it, on C channels, before the expansion (the ablations of
            the paper's table; the authors' class fails on the second). Both run on the plain path.
        num_prefix_tokens: P >= 0; prefix tokens pass untouched.
        grid: (H, W) for every call, or None: then ``forward`` must be given it.

    Raises ValueError for an unknown ``act``, sizes that do not fit, and a training batch of one value per channel.
    """

    needs_grid = True
    told = ("act",)

    def __init__(
        self, dim: int, expand_ratio: float = 4.0, act: GateAct = "hs+se", reduction: int = 4, wo_dp_conv: bool = False,
        dp_first: bool = False, num_prefix_tokens: int = 1, *, grid: tuple[int, int] | None = None,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        name = "LocalityFeedForward"
        check_choice(name, "act", act, ACTS)
        dim, hidden = hidden_width(name, dim, expand_ratio)
        reduction, num_prefix_tokens = check_int(name, "reduction", reduction), check_int(name, "num_prefix_tokens", num_prefix_tokens, 0)
        check_flags(name, wo_dp_conv=wo_dp_conv, dp_first=dp_first)
        grid, dd = geometry.fixed_grid(name, grid, num_prefix_tokens), check_factory(name, device, dtype)
        self.dim, self.hidden_dim, self.num_prefix_tokens = dim, hidden, num_prefix_tokens
        self.act, (self.activation, self.attention) = act, ACTS[act]

        def activation():
            return nn.ReLU6() if self.activation == "relu6" else nn.Hardswish()

        def product(inputs, outputs):
            return [nn.Conv2d(inputs, outputs, 1, bias=False, **dd), nn.BatchNorm2d(outputs, **dd)]

        def local(channels):
            conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False, **dd)
            return [conv, nn.BatchNorm2d(channels, **dd), activation()]

        layers = [*product(dim, hidden), activation()]
        if not wo_dp_conv:
            layers = [*local(dim), *layers] if dp_first else [*layers, *local(hidden)]
        if self.attention == "se" and not 1 <= reduction <= hidden:
            raise ValueError(f"{name}: reduction must be between 1 and the {hidden} hidden channels, got {reduction}")
        if self.attention == "se":
            layers.append(SELayer(hidden, reduction, **dd))
        elif self.attention:
            layers.append(ECALayer(hidden, self.attention == "ecah", **dd))
        self.conv = nn.Sequential(*layers, *product(hidden, dim))
        self.grid_holder = GridHolder(grid)

    # ------------------------------------------------------------------------------------------------ the composed path

    def _composed(self, x, grid):
        """Layer by layer: what transforms see, and what runs where a layer is not the one that the fast path computes."""
        P = self.num_prefix_tokens
        check_patches("LocalityFeedForward", self.conv, x, grid)
        one_by_one = 1 in grid and is_plain(self.conv, exactly(nn.Sequential))  # each of them needs call()
        layers = [(f"conv.{name}", layer) for name, layer in self.conv.named_children()] if one_by_one else [("conv", self.conv)]
        maps = to_maps(x[:, P:], grid)
        for name, layer in layers:
            maps = call(f"LocalityFeedForward: {name}", layer, maps, lambda _: reasons(self))
        return torch.cat((x[:, :P], x[:, P:] + to_tokens(maps)), 1)

    # ------------------------------------------------------------------------------------------------ the fast path

    def fused_layers(self):
        """The layers say which activation and which gate it is."""
        layers, gated = self.conv._modules, len(self.conv._modules) == 9
        act = relu6 if self._activation() == "relu6" else exactly(nn.Hardswish)
        kinds = [pointwise, batch_norm, act, depthwise, batch_norm, act, *[_CHANNEL_ATTENTION] * gated, pointwise, batch_norm]
        rules = [("conv", sequence_of(len(kinds))), *((f"conv.{i}", rule) for i, rule in enumerate(kinds))]
        inner = getattr(layers.get("6"), "fused_layers", list) if gated else list
        return [*rules, *((f"conv.6.{path}", rule) for path, rule in inner())]

    def _activation(self) -> str:
        return "relu6" if isinstance(self.conv._modules.get("2"), nn.ReLU6) else "hardswish"

    def _norms(self):
        return self.conv[1], self.conv[4], self.conv[-1]

    def _fast(self, x, grid) -> bool:
        return not torchlib.calls_layers() and x.shape[0] * grid[0] * grid[1] > 0 and is_fused(self)

    def _config(self, dtype, grid, norms, backend) -> chain.Config:
        groups = tuple(sync_group(n) for n in norms)
        eps = tuple(getattr(n, "eps", 0.0) for n in norms)
        kind = self.conv[6].kind if len(self.conv) == 9 else ""
        return chain.Config(dtype, self._activation(), kind, *grid, self.num_prefix_tokens, eps, groups, backend)

    def _run(self, x, grid):
        dtype = torchlib.autocast_dtype(x) or x.dtype
        wide = accumulate_dtype(dtype)
        expand, local, project, norms = self.conv[0], self.conv[3], self.conv[-2], self._norms()
        cfg = self._config(dtype, grid, norms, config.requested_backend("LocalityFeedForward", None))
        values = [_norm_values(n, wide) for n in norms]
        if any(chain.on_batch(v) for v in values):
            _check_batch(x.shape[0] * chain.patches(cfg), x, cfg)
        gates = tuple(p.to(wide) for p in self.conv[6].gate_params()) if cfg.gate else ()

        parts = [(conv.weight, conv.bias, value) for conv, value in zip((expand, local, project), values, strict=True)]
        if not torch.is_grad_enabled() and not any(chain.on_batch(v) for v in values):
            return chain.infer(x, *parts[0], *parts[1], gates, *parts[2], cfg)
        (w1, b1, n1), (dw, bd, n2), (w2, b2, n3) = parts
        gates = (*gates, None, None, None, None)[:4]
        y, *batch = chain.LocalityFFN.apply(cfg, x, w1, b1, *n1, dw, bd, *n2, *gates, w2, b2, *n3, x[:0].clone())
        update_running_all([(norm, *pair) for norm, *pair in zip(norms, batch[0::2], batch[1::2], strict=True) if pair[0] is not None])
        return y

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """x (B, P + H*W, C), grid (H, W) -> (B, P + H*W, C)."""
        grid = self.grid_holder.of("LocalityFeedForward", grid)
        grid = check_input("LocalityFeedForward", x, self.dim, grid, self.num_prefix_tokens)
        check_like("LocalityFeedForward", "x", x, next(self.conv.children(), None))
        return self._run(x, grid) if self._fast(x, grid) else self._composed(x, grid)

    def fold_batch_norms_(self, check: bool) -> None:
        """Put folded convolutions and ``nn.Identity`` in place of convolutions and norms, or only ``check`` that it can be done."""
        for i, norm in enumerate(self.conv):
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                check_constant(f"conv.{i}", norm)
                check_readable(f"conv.{i - 1}", self.conv[i - 1], exactly(nn.Conv2d))
                check_readable(f"conv.{i}", norm, batch_norm)
                if not check:
                    self.conv[i - 1], self.conv[i] = folded(self.conv[i - 1], norm), nn.Identity()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden_dim={self.hidden_dim}, num_prefix_tokens={self.num_prefix_tokens}"


class LocalViTBlock(ToldInMetadata):
    """x + drop_path(attn(norm1(x))), then the locality feed-forward ``conv``, which has its own residual and no drop_path.

    There is no second LayerNorm. ``attn`` gets the grid if it asks for it (``needs_grid``); other arguments of ``forward``, such as
    timm's ``attn_mask``, go to it too.
    """

    def __init__(
        self, norm1: nn.Module, attn: nn.Module, conv: LocalityFeedForward, drop_path1: nn.Module | None = None,
        ls1: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, module in (("norm1", norm1), ("attn", attn), ("conv", conv)):
            check_module("LocalViTBlock", name, module)
        for name, module in (("drop_path1", drop_path1), ("ls1", ls1)):
            check_module("LocalViTBlock", name, module, optional=True)
        self.norm1, self.attn, self.conv = norm1, attn, conv
        self.ls1 = nn.Identity() if ls1 is None else ls1
        self.drop_path1 = nn.Identity() if drop_path1 is None else drop_path1

    @property
    def num_heads(self) -> int | None:
        """Of ``attn``, which its tensors do not tell."""
        return getattr(self.attn, "num_heads", None)

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None, **options) -> torch.Tensor:
        check_sequence("LocalViTBlock", "x", x, getattr(self.conv, "dim", None))
        check_like("LocalViTBlock", "x", x, self.norm1, any_dtype=True)
        if grid is not None:
            geometry.to_grid("LocalViTBlock", grid, 0)
        if getattr(self.attn, "needs_grid", False) and grid is not None:
            options["grid"] = grid
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **options)))
        return self.conv(x, grid)


_CHANNEL_ATTENTION = exactly(SELayer, ECALayer)


def _norm_values(norm, dtype) -> chain.Norm:
    """gamma, beta and, unless the batch is to be used, the running statistics, in the accumulation dtype."""
    if isinstance(norm, nn.Identity):
        return chain.Norm(None, None, None, None)
    gamma, beta = norm.weight.to(dtype), norm.bias.to(dtype)
    if on_batch(norm):
        return chain.Norm(gamma, beta, None, None)
    return chain.Norm(gamma, beta, norm.running_mean.to(dtype), norm.running_var.to(dtype))


def _check_batch(count, x, cfg):
    if count < 2 and all(group is None for group in cfg.groups):
        got = f"{tuple(x.shape)} with a {cfg.H}x{cfg.W} grid"
        raise ValueError(f"LocalityFeedForward: expected more than 1 value per channel when training, got {got}")
