"""Self-slimmed ViT's modules (arXiv 2111.12624): many tokens joined to few, and back for distillation; state-dict keys are the authors'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.arguments import check_factory, check_int, check_positive
from lifeops.config import requested_backend
from lifeops.nn.feed_forward import FeedForward
from lifeops.nn.inputs import check_like, check_sequence
from lifeops.nn.localvit import hidden_width
from lifeops.nn.plain import exactly, gelu, is_fused, sequence_of
from lifeops.nn.scripting import NotScripted
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.feed_forward import feed_forward

NAME, REVERSE = "TokenSlimming", "ReverseTokenSlimming"
LINEAR, LAYER_NORM = exactly(nn.Linear), exactly(nn.LayerNorm)


class TokenSlimming(NotScripted, nn.Module):
    """K tokens, weighted sums over all N patches of an image, in the place of the N; prefix tokens pass untouched.

        S = softmax over the N patches of scale * MLP(LN(x))        (B, N, K)       y = Sᵀ x        of x itself, not of LN(x)

    ``weight`` is LN, Linear, GELU, Linear, ``scale`` a learnt number, 1 at first. N may be any, K is the module's: the grid ends here,
    and no token convolution can follow. The bias of the last Linear is the same for all patches: it changes nothing, its gradient is 0.

    Softmax is computed in float32 at least, whatever the tokens are: scores of half precision times a large ``scale`` would overflow.
    As every output token is a sum over all patches, **one patch token that is not finite makes all K tokens of its image NaN**; prefix
    tokens and the other images keep their values.

    Args:
        dim: C. num_tokens: K >= 1. num_prefix_tokens: P >= 0. hidden_ratio: width of the hidden layer / C.

    Raises ValueError for sizes that do not fit, and for an image without patches, of which there is no weighted sum.
    """

    no_rollout = "behind which a token is a sum of patches with weights of its own: the maps that follow are not of patches"

    def __init__(
        self, dim: int, num_tokens: int, num_prefix_tokens: int = 1, *, hidden_ratio: float = 0.5,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dim, hidden = hidden_width(NAME, dim, hidden_ratio, "hidden_ratio")
        self.dim, self.num_tokens = dim, check_int(NAME, "num_tokens", num_tokens, 1)
        self.num_prefix_tokens, dd = check_int(NAME, "num_prefix_tokens", num_prefix_tokens, 0), check_factory(NAME, device, dtype)
        layers = nn.LayerNorm(dim, **dd), nn.Linear(dim, hidden, **dd), nn.GELU(), nn.Linear(hidden, self.num_tokens, **dd)
        self.weight, self.scale = nn.Sequential(*layers), nn.Parameter(torch.ones(1, 1, 1, **dd))

    def fused_layers(self):
        rules = sequence_of(4), LAYER_NORM, LINEAR, gelu, LINEAR
        return [(path, rule) for path, rule in zip(("weight", *(f"weight.{i}" for i in range(4))), rules, strict=True)]

    def shares(self, patches: Tensor) -> Tensor:
        """S (B, N, K) for the patches (B, N, C): of each token of the result what it has of every patch."""
        wide = patches.dtype in (torch.float32, torch.float64) and torchlib.autocast_dtype(patches) is None
        if not wide or torchlib.calls_layers() or not is_fused(self):
            scores = self.weight(patches)
            dtype = accumulate_dtype(scores.dtype)
            return (scores.to(dtype) * self.scale.to(dtype)).softmax(1)
        norm, first, _, second = self.weight
        t = F.layer_norm(patches, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        bias = None if second.bias is None else second.bias * self.scale[0, 0]
        backend = requested_backend("channel_act", None)
        return feed_forward(t, first.weight, first.bias, second.weight * self.scale[0], bias, "gelu", backend).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, P + N, C) -> (B, P + K, C)."""
        P = self.num_prefix_tokens
        check_sequence(NAME, "x", x, self.dim)
        if x.shape[1] <= P:
            raise ValueError(f"{NAME}: x must have patches behind its {P} prefix tokens, got {tuple(x.shape)}")
        check_like(NAME, "x", x, self.weight[1])
        patches = x[:, P:]
        y = torch.bmm(self.shares(patches).to(x.dtype).mT, patches)
        return torch.cat((x[:, :P].to(y.dtype), y), 1) if P else y

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_tokens={self.num_tokens}, num_prefix_tokens={self.num_prefix_tokens}"


class ReverseTokenSlimming(NotScripted, nn.Module):
    """N patch tokens made of K joined ones, to be held against a teacher's in training; inference has no use for it.

        t = MLP1(LN1(x)ᵀ)ᵀ      over tokens, K -> ratio * N -> N, without a residual            y = t + MLP2(LN2(t))

    Args:
        dim: C. num_tokens: K >= 1. num_patches: N >= 1. ratio: hidden width of MLP1 / N and of MLP2 / C.

    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self, dim: int, num_tokens: int, num_patches: int, ratio: float = 4.0, *, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dim, num_tokens = check_int(REVERSE, "dim", dim, 1), check_int(REVERSE, "num_tokens", num_tokens, 1)
        num_patches, ratio = check_int(REVERSE, "num_patches", num_patches, 1), check_positive(REVERSE, "ratio", ratio)
        hidden, over_tokens, dd = int(dim * ratio), int(num_patches * ratio), check_factory(REVERSE, device, dtype)
        if not hidden or not over_tokens:
            raise ValueError(f"{REVERSE}: ratio must leave {dim} channels and {num_patches} patches a hidden unit, got {ratio}")
        self.dim, self.num_tokens, self.num_patches = dim, num_tokens, num_patches
        self.norm1, self.mlp1 = nn.LayerNorm(dim, **dd), FeedForward(num_tokens, over_tokens, dim_out=num_patches, **dd)
        self.norm2, self.mlp2 = nn.LayerNorm(dim, **dd), FeedForward(dim, hidden, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, K, C) -> (B, N, C)."""
        check_sequence(REVERSE, "x", x, self.dim)
        if x.shape[1] != self.num_tokens:
            raise ValueError(f"{REVERSE}: x must be (B, {self.num_tokens}, {self.dim}), without prefix tokens, got {tuple(x.shape)}")
        check_like(REVERSE, "x", x, self.mlp1.fc1)
        t = self.mlp1(self.norm1(x).mT).mT
        return t + self.mlp2(self.norm2(t))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_tokens={self.num_tokens}, num_patches={self.num_patches}"
