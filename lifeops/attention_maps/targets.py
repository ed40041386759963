"""What the maps of a roll-out are of: the weights π of a model's output tokens that it begins with."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lifeops.arguments import check_tensor, got
from lifeops.attention_maps.host_pass import HostPass
from lifeops.attention_maps.pool_heads import over_tokens


class OutputTokens(NamedTuple):
    """Output tokens: ``prefix`` of them, then the patches of ``grid``; ``late`` of the prefix joined on the way, in front of the others.

    ``grids``: those of packed images, whose patches and padding lie in the one row of ``grid``.
    """

    prefix: int
    late: int
    grid: tuple[int, int]
    batch: int
    device: torch.device
    dtype: torch.dtype
    grids: tuple[tuple[int, int], ...] | None = None

    @property
    def there(self) -> Tensor:
        """(B, 1, N): 1 for a token, 0 for the padding of a packed image."""
        if self.grids is None:
            return torch.ones(1, 1, self.count, dtype=self.dtype, device=self.device)
        counts = torch.tensor([self.prefix + H * W for H, W in self.grids], device=self.device)
        return (torch.arange(self.count, device=self.device) < counts[:, None])[:, None].to(self.dtype)

    @property
    def count(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]


def _one(tokens: OutputTokens, index: int, label: str | None = None) -> tuple[Tensor, tuple[str, ...]]:
    if not -tokens.count <= index < tokens.count:
        raise ValueError(f"rollout: the token must be one of {tokens.count}, got {index}")
    weights = torch.zeros(tokens.batch, 1, tokens.count, dtype=tokens.dtype, device=tokens.device)
    weights[:, :, index] = 1
    return weights, (label or f"token {index % tokens.count}",)


def _mask(tokens: OutputTokens, mask: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """(R, N), (B, R, N), or over the patches (H, W), (R, H, W), (B, R, H, W); divided by its sums."""
    check_tensor("rollout", "targets", mask)
    if mask.is_complex() or mask.is_quantized or mask.is_meta != (tokens.device.type == "meta"):
        raise TypeError(f"rollout: targets must be real weights with memory, got {mask.dtype} on {mask.device}")
    given, mask = tuple(mask.shape), mask.to(tokens.device, torch.float64 if mask.dtype == torch.float64 else tokens.dtype)
    if tuple(mask.shape[-2:]) == tokens.grid and mask.dim() in (2, 3, 4):
        mask = torch.nn.functional.pad(mask.reshape(*mask.shape[:-2], -1), (tokens.prefix, 0))
        mask = mask[None] if mask.dim() == 1 else mask
    if mask.dim() == 2:
        mask = mask.expand(tokens.batch, *mask.shape)
    if mask.dim() != 3 or (mask.shape[0], mask.shape[2]) != (tokens.batch, tokens.count):
        grid = f"(…, {tokens.grid[0]}, {tokens.grid[1]})"
        raise ValueError(f"rollout: targets must be (B, R, N) or (R, N) with N = {tokens.count}, or {grid}, got {given}")
    if not bool(((mask >= 0) & mask.isfinite()).all()):
        raise ValueError("rollout: targets must be finite and not negative")
    return _normalised(mask).to(tokens.dtype), tuple(f"target {i}" for i in range(mask.shape[1]))


def _normalised(weights: Tensor) -> Tensor:
    """Rows divided by their sums, which may be larger than their dtype holds; a row of zeros stays one."""
    largest = weights.amax(-1, keepdim=True)
    weights = weights / torch.where(largest > 0, largest, 1)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1)


def is_int(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _by_class(tokens: OutputTokens, how: str, logits: Tensor, classes: Sequence[int] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Patch tokens' logits (B, H*W, K) to weights of all tokens."""
    predicted, num_classes, there = logits.argmax(-1), logits.shape[-1], tokens.there
    if classes is None:
        classes = predicted[(there[:, 0, tokens.prefix :] > 0).expand_as(predicted)].unique().tolist()
    wrong = [c for c in classes if not 0 <= c < num_classes]
    if wrong or not len(classes):
        raise ValueError(f"rollout: classes must be some of 0 to {num_classes - 1}, got {list(classes)}")
    index = torch.tensor(list(classes), device=logits.device)
    chosen = predicted[:, None] == index[:, None] if how == "hard" else logits.to(tokens.dtype).softmax(-1)[..., index].transpose(1, 2)
    weights = torch.nn.functional.pad(chosen.to(tokens.dtype), (tokens.prefix, 0))
    return _normalised(weights * there), tuple(f"class {c}" for c in classes)


def _patch_logits(tokens: OutputTokens, given, host_pass: HostPass, output) -> Tensor:
    """(B, H*W, K): what was given, or the model's own head on every patch token."""
    logits = given(output) if callable(given) else host_pass.token_logits(tokens.prefix) if given is None else given
    H, W = tokens.grid
    if isinstance(logits, Tensor) and logits.dim() == 4:
        logits = logits.flatten(2).transpose(1, 2) if tuple(logits.shape[2:]) == (H, W) else logits
    if isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[1] == tokens.count:
        logits = logits[:, tokens.prefix :]
    if not isinstance(logits, Tensor) or logits.dim() != 3 or tuple(logits.shape[:2]) != (tokens.batch, H * W):
        expected = f"(B, K, {H}, {W}), (B, {H * W}, K) or (B, {tokens.count}, K) with B = {tokens.batch}"
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"rollout: token_logits must be {expected}, got {got}")
    if logits.is_complex() or logits.is_sparse:
        raise TypeError(f"rollout: token_logits must be real and dense, got {logits.dtype}, layout {logits.layout}")
    return logits.to(tokens.device)


def _default(host_pass: HostPass, output) -> str:
    """What the model's own output reads: its class token, else what its attention pooling weighs, else the mean."""
    pooled = any(host_pass.reads(pool, output) for pool in host_pass.pools)
    return "cls" if host_pass.has_cls else "pool" if pooled else "mean"


def begin(tokens: OutputTokens, *given) -> tuple[Tensor, tuple[str, ...]]:
    """π (B, R, N) and its labels; ``given`` as :func:`_begin` takes it. ValueError for weight on the padding of packed images."""
    weights, labels = _begin(tokens, *given)
    if tokens.grids is not None and bool((weights * (1 - tokens.there)).any()):
        grids = ", ".join(f"{H} x {W}" for H, W in tokens.grids)
        raise ValueError(f"rollout: {labels[0]} lies on padding: the images have {grids} patches")
    return weights, labels


def _patch(tokens: OutputTokens, row: int, column: int) -> tuple[Tensor, tuple[str, ...]]:
    """One patch, of packed images by the grid of each."""
    grids = tokens.grids or [tokens.grid]
    for H, W in grids:
        if not (0 <= row < H and 0 <= column < W):
            raise ValueError(f"rollout: the patch must lie on the {H} x {W} grid, got {(row, column)}")
    at = torch.tensor([tokens.prefix + row * W + column for _, W in grids], device=tokens.device)
    weights = torch.nn.functional.one_hot(at, tokens.count).to(tokens.dtype)[:, None]
    return weights.expand(tokens.batch, -1, -1), (f"patch ({row}, {column})",)


def _begin(
    tokens: OutputTokens, targets, classes, token_logits, host_pass: HostPass, output, verify: bool
) -> tuple[Tensor, tuple[str, ...]]:  # fmt: skip
    """π (B, R, N) and its labels."""
    if targets is None:
        targets = _default(host_pass, output)
    if isinstance(targets, Tensor):
        return _mask(tokens, targets)
    known = "'cls', 'mean', 'pool', 'hard', 'soft', a token's index, a patch (row, column) or a tensor of weights"
    if not isinstance(targets, (str, tuple)) and not is_int(targets):
        raise TypeError(f"rollout: targets must be {known}, got {got(targets)}")
    if targets in ("hard", "soft"):
        return _by_class(tokens, targets, _patch_logits(tokens, token_logits, host_pass, output), classes)
    if targets == "mean":
        patches = torch.ones(1, tokens.count, dtype=tokens.dtype)
        patches[:, : tokens.prefix] = 0
        return _normalised(_mask(tokens, patches)[0] * tokens.there), ("mean of the patch tokens",)
    if targets == "cls":
        if not host_pass.has_cls:
            raise ValueError("rollout: the model has no cls token; targets='mean' is what average pooling reads")
        return _one(tokens, 0 if host_pass.host.late_cls else tokens.late, "cls token")
    if targets == "pool":
        [pool] = host_pass.pools
        weights = over_tokens(pool.weights(verify), tokens.prefix, tokens.count - tokens.prefix, pool.path)
        return weights.to(tokens.dtype), ("attention pooling",)
    if is_int(targets):
        return _one(tokens, int(targets))
    if isinstance(targets, tuple) and len(targets) == 2 and all(map(is_int, targets)):
        return _patch(tokens, *map(int, targets))
    raise ValueError(f"rollout: targets must be {known}, got {got(targets)}")
