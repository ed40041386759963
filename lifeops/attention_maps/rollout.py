"""Dense attention roll-out of a whole model: ``lifeops.rollout``.

    Â_l = (1 - ρ) fuse_h(A_l) + ρ I          rows summing to 1 (see lifeops.rollout_step)
    M_c = π_cᵀ Â_L … Â_1                      restricted to the patches

π_c are weights of the output tokens that sum to 1: the cls token, one token, a mask, or for a class c the tokens predicted as c ("hard")
or every token by its probability of c ("soft"). The product is taken from the left, vector by matrix, layer by layer: nothing of the size
N x N exists. The result is our reading of "utilizing the attention maps of all tokens" (LIFE, arXiv 2305.08551): the paper's abstract
names a dense attention roll-out with class-specific maps for dense prediction, and neither its text nor code for it was at hand.
The roll-out itself is Abnar and Zuidema's (2020).
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops.arguments import check_choice, check_flags, check_int, check_module, check_tensor, got, under
from lifeops.attention_maps.layers import recorded
from lifeops.attention_maps.pool_heads import over_tokens, pool_head
from lifeops.attention_maps.vit_parts import Parts, parts_of, watched
from lifeops.attention_maps.windows import Options
from lifeops.config import requested_backend
from lifeops.hosts.attention import LOOKED_FOR
from lifeops.ops.rollout_step import _check_options

PREFIX = ("keep", "normalize")


class Rollout(NamedTuple):
    """What :func:`rollout` returns.

    Attributes:
        maps: (B, R, H, W), each map's weights of the patches.
        prefix: (B, R), what fell on no patch: on the prefix tokens, or on the padding of windows. 1 - maps.sum((2, 3)) unless
            ``prefix="normalize"``.
        labels: what each of the R maps is of.
        weights: (B, R, N), the output tokens' weights π the roll-out began with.
        output: what the model returned.
    """

    maps: Tensor
    prefix: Tensor
    labels: tuple[str, ...]
    weights: Tensor
    output: object


class _Tokens(NamedTuple):
    """Output tokens: where the prefix ends, the grid behind it, their features, and the parts of the model that classify them."""

    prefix: int
    grid: tuple[int, int]
    batch: int
    device: torch.device
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]


# ------------------------------------------------------------------------------------------------ what the maps are of


def _one(tokens: _Tokens, index: int, label: str) -> tuple[Tensor, tuple[str, ...]]:
    if not -tokens.count <= index < tokens.count:
        raise ValueError(f"rollout: the token must be one of {tokens.count}, got {index}")
    weights = torch.zeros(tokens.batch, 1, tokens.count, dtype=tokens.dtype, device=tokens.device)
    weights[:, :, index] = 1
    return weights, (label,)


def _mask(tokens: _Tokens, mask: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """(R, N), (B, R, N), or over the patches (H, W), (R, H, W), (B, R, H, W); divided by its sums."""
    check_tensor("rollout", "targets", mask)
    if mask.is_complex() or mask.is_quantized or mask.is_meta != (tokens.device.type == "meta"):
        raise TypeError(f"rollout: targets must be real weights with memory, got {mask.dtype} on {mask.device}")
    given, mask = tuple(mask.shape), mask.to(tokens.device, tokens.dtype)
    if tuple(mask.shape[-2:]) == tokens.grid and mask.dim() in (2, 3, 4):
        mask = torch.nn.functional.pad(mask.reshape(*mask.shape[:-2], -1), (tokens.prefix, 0))
        mask = mask[None] if mask.dim() == 1 else mask
    if mask.dim() == 2:
        mask = mask.expand(tokens.batch, *mask.shape)
    if mask.dim() != 3 or (mask.shape[0], mask.shape[2]) != (tokens.batch, tokens.count):
        grid = f"(…, {tokens.grid[0]}, {tokens.grid[1]})"
        raise ValueError(f"rollout: targets must be (B, R, N) or (R, N) with N = {tokens.count}, or {grid}, got {given}")
    if not bool((mask >= 0).all()):
        raise ValueError("rollout: targets must not be negative or NaN")
    return _normalised(mask), tuple(f"target {i}" for i in range(mask.shape[1]))


def _normalised(weights: Tensor) -> Tensor:
    """Rows divided by their sums; a row of zeros stays one."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)


def _is_int(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _by_class(tokens: _Tokens, how: str, logits: Tensor, classes: Sequence[int] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Patch tokens' logits (B, H*W, K) to weights of all tokens."""
    predicted, num_classes = logits.argmax(-1), logits.shape[-1]
    if classes is None:
        classes = predicted.unique().tolist()
    wrong = [c for c in classes if not 0 <= c < num_classes]
    if wrong or not len(classes):
        raise ValueError(f"rollout: classes must be some of 0 to {num_classes - 1}, got {list(classes)}")
    index = torch.tensor(list(classes), device=logits.device)
    chosen = predicted[:, None] == index[:, None] if how == "hard" else logits.to(tokens.dtype).softmax(-1)[..., index].transpose(1, 2)
    weights = torch.nn.functional.pad(chosen.to(tokens.dtype), (tokens.prefix, 0))
    return _normalised(weights), tuple(f"class {c}" for c in classes)


def _patch_logits(tokens: _Tokens, given, parts: Parts, output) -> Tensor:
    """(B, H*W, K): what was given, or the model's own head on every patch token."""
    logits = given(output) if callable(given) else parts.token_logits() if given is None else given
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


def _start(tokens: _Tokens, targets, classes, token_logits, parts: Parts, output, verify: bool) -> tuple[Tensor, tuple[str, ...]]:
    """π (B, R, N) and its labels."""
    if targets is None:
        targets = "cls" if parts.has_cls else "mean"
    if isinstance(targets, Tensor):
        return _mask(tokens, targets)
    known = "'cls', 'mean', 'pool', 'hard', 'soft', a token's index, a patch (row, column) or a tensor of weights"
    if not isinstance(targets, (str, tuple)) and not _is_int(targets):
        raise TypeError(f"rollout: targets must be {known}, got {got(targets)}")
    if targets in ("hard", "soft"):
        return _by_class(tokens, targets, _patch_logits(tokens, token_logits, parts, output), classes)
    if targets == "mean":
        patches = torch.ones(1, tokens.count, dtype=tokens.dtype)
        patches[:, : tokens.prefix] = 0
        return _mask(tokens, patches)[0], ("mean of the patch tokens",)
    if targets == "cls":
        if not parts.has_cls:
            raise ValueError("rollout: the model has no cls token; targets='mean' is what average pooling reads")
        return _one(tokens, 0, "cls token")
    if targets == "pool":
        weights = over_tokens(parts.pool.weights(verify), tokens.prefix, tokens.count - tokens.prefix, parts.pool.path)
        return weights.to(tokens.dtype), ("attention pooling",)
    if _is_int(targets):
        return _one(tokens, int(targets), f"token {targets}")
    if isinstance(targets, tuple) and len(targets) == 2 and all(map(_is_int, targets)):
        (row, column), (H, W) = targets, tokens.grid
        if not (0 <= row < H and 0 <= column < W):
            raise ValueError(f"rollout: the patch must lie on the {H} x {W} grid, got {targets}")
        return _one(tokens, tokens.prefix + row * W + column, f"patch ({row}, {column})")
    raise ValueError(f"rollout: targets must be {known}, got {got(targets)}")


# ------------------------------------------------------------------------------------------------ the roll-out


def _check(start_layer, prefix, classes, targets) -> None:
    check_choice("rollout", "prefix", prefix, PREFIX)
    if isinstance(start_layer, bool) or not isinstance(start_layer, int) or start_layer < 0:
        raise ValueError(f"rollout: start_layer must be an int of at least 0, got {got(start_layer)}")
    if classes is not None and not (isinstance(targets, str) and targets in ("hard", "soft")):
        raise ValueError("rollout: classes go with targets='hard' or 'soft'")
    if classes is not None and not (isinstance(classes, (tuple, list, range)) and all(map(_is_int, classes))):
        raise TypeError(f"rollout: classes must be ints in a list or tuple, or None, got {got(classes)}")


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts the buffers of a model in training back (batch norm's running statistics) and keeps autograd out."""
    training = any(m.training for m in model.modules())
    kept = [(b, b.clone()) for b in model.buffers()] if training else []
    with torch.no_grad():
        try:
            yield
        finally:
            for buffer, before in kept:
                buffer.copy_(before)


def _from_layer(records: list, start_layer: int, model: nn.Module) -> list:
    attending = [i for i, layer in enumerate(records) if layer.attends]
    if not attending:
        raise ValueError(f"rollout: no attention layer ran in {type(model).__name__}; looked for {LOOKED_FOR}")
    if start_layer >= len(attending):
        raise ValueError(f"rollout: start_layer must be below the {len(attending)} attention layers, got {start_layer}")
    return records[attending[start_layer] :]


def _tokens_of(records: list, parts: Parts) -> _Tokens:
    """Where the roll-out begins: the last layer's tokens."""
    last = records[-1]
    windowed = hasattr(last, "attention")
    grid, prefix = (last.grid, 0) if windowed else (parts.grid(), parts.num_prefix_tokens)
    tokens, expected = prefix + grid[0] * grid[1], last.tokens
    for other in () if windowed else reversed(records):
        if not other.attends:  # tokens that join on the way, a class token
            expected -= other.count
        elif other.tokens != expected:
            found = f"{other.path} has {other.tokens} tokens and {last.path} {last.tokens}"
            raise ValueError(f"rollout: {found}: tokens are dropped, joined or added on the way")
    if tokens != last.tokens:
        found = f"{prefix} prefix tokens and a {grid[0]} x {grid[1]} grid are {tokens} tokens, the layers have {last.tokens}"
        raise ValueError(f"rollout: {found} (give num_prefix_tokens=…; turn patch dropout off)")
    x = last.attention if windowed else last.x
    return _Tokens(prefix, grid, parts.batch, x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)


def rollout(
    model: nn.Module, images, targets=None, *, classes: Sequence[int] | None = None, token_logits: Tensor | Callable | None = None,
    head_fusion: str = "mean", residual: float = 0.5, discard_ratio: float = 0.0, start_layer: int = 0, prefix: str = "keep",
    num_prefix_tokens: int | None = None, verify: bool = True, backend: str | None = None,
) -> Rollout:  # fmt: skip
    """Which patches the output tokens of a Vision Transformer draw on: M = πᵀ Â_L … Â_1 on the patch grid, one map per π.

    Runs ``model(images)`` once, in the mode and under the autocast it is in, without gradient; parameters, buffers and hooks are as
    before. Fused attention may stay on. Memory: the layers' inputs, O(L N C), and O(N C + R N) for a layer, per image; a bias or mask that
    comes with a layer's call is kept, and such a layer's rows are computed in blocks of a fixed number of scores.

    Args:
        model: of timm a ViT, DeiT, DINOv2, DINOv3, EVA, BEiT, PE, rope, relative position or parallel ViT, CaiT, NaFlexViT (images, not
            packed patches), SAM, Swin (1 and 2); also after :func:`lifeops.convert`; a lifeops model; of transformers a
            ViT, DeiT, DINOv2, DINOv3, BEiT, Data2Vec, SAM, Swin (1 and 2), the vision model of CLIP, SigLIP, BLIP, AIMv2. Any other that
            attends in one of these ways is taken if it passes ``verify``. Windows are put back on the grid; merged patches share alike.
        images: what the model takes, (B, channels, height, width), or a mapping of keyword arguments with "pixel_values".
        targets: what π is.
            "cls" (default if there is a cls token), "mean" (default else: the mean of the patch tokens), an int (a token of the
            sequence), (row, column) (a patch);
            "pool": the tokens as the model's attention pooling weighs them (timm's global_pool="map", SigLIP, AIMv2), mean over its heads;
            "hard": for each class the patch tokens predicted as it, alike; "soft": every patch token by its probability of the class;
            a tensor of weights (R, N), (B, R, N), or over the patches (H, W), (R, H, W), (B, R, H, W): divided by their sums.
        classes: the classes of "hard" and "soft"; default: those that are predicted for at least one token of the batch. A class
            that no token is predicted as has a map of zeros.
        token_logits: the patch tokens' class scores for "hard" and "soft", (B, K, H, W), (B, H*W, K) or (B, N, K), or a function
            from the model's output to them; default: the model's classifier on every patch token.
        head_fusion, residual, discard_ratio, backend: see :func:`lifeops.rollout_step`.
        start_layer: the first attention layer that counts, from 0; the map is then of that layer's input tokens.
        prefix: "keep": a map sums to 1 minus what fell on the prefix tokens (``Rollout.prefix``); "normalize": to 1.
        num_prefix_tokens: P, if the model does not say it.
        verify: check on this very pass that the maps are the model's: each layer's real output is the attention we read from it times
            its values (a few query rows), each reads what the one before gave, the patches are the tokens they are taken for, and
            nothing else attends.
            Costs about a query, key and value projection of two images per layer.

    Returns:
        :class:`Rollout`. Maps are float32 (float64 for float64 models).

    Raises:
        ValueError: a model without known attention, with more than is known, or that does something else than what is checked
            (``verify``); options or targets that do not fit.
    """
    check_module("rollout", "model", model)
    _check(start_layer, prefix, classes, targets)
    check_int("rollout", "num_prefix_tokens", num_prefix_tokens, 0, optional=True)
    residual, discard_ratio = _check_options(head_fusion, residual, discard_ratio, "rollout")
    requested_backend("rollout", backend), check_flags("rollout", verify=verify)
    options = Options(head_fusion, residual, discard_ratio, backend)
    parts = parts_of(model, images, num_prefix_tokens)
    parts.pool = pool_head(model) if isinstance(targets, str) and targets == "pool" else None
    with _untouched(model):
        by_class = isinstance(targets, str) and targets in ("hard", "soft")
        with recorded(model, parts if verify else None) as records, watched(parts, by_class), under("rollout"):
            output = model(**images) if isinstance(images, Mapping) else model(images)
        records = _from_layer(records, start_layer, model)
        tokens = _tokens_of(records, parts)
        weights, labels = _start(tokens, targets, classes, token_logits, parts, output, verify)
        grid = next((layer.grid for layer in records[:1] if hasattr(layer, "attention")), tokens.grid)
        windowed = any(hasattr(layer, "attention") for layer in records)
        r = weights
        while records:
            r = records.pop().back(r, options)
    first = r.shape[-1] - grid[0] * grid[1]  # fewer than tokens.prefix where a class token joins late
    maps = r[..., first:].unflatten(-1, grid)
    lost = weights.sum(-1) - r.sum(-1) if windowed or first < tokens.prefix else 0  # in the padding of windows, on what joined
    on_prefix = r[..., :first].sum(-1) + lost
    if prefix == "normalize":
        total = maps.sum((2, 3), keepdim=True)
        maps = maps / torch.where(total > 0, total, 1)
    return Rollout(maps, on_prefix, labels, weights, output)
