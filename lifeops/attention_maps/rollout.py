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
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops.arguments import check_choice, check_flags, check_int, check_module, got, under
from lifeops.attention_maps.host_pass import HostPass, pass_of
from lifeops.attention_maps.layers import JoinLayer, recorded
from lifeops.attention_maps.pool_heads import PoolHead, one_pool_head, pool_heads
from lifeops.attention_maps.protocol import Options
from lifeops.attention_maps.targets import OutputTokens, begin, is_int
from lifeops.config import requested_backend
from lifeops.hosts.attention import LOOKED_FOR
from lifeops.hosts.layouts import called_attention
from lifeops.ops.rollout_step import _check_options
from lifeops.options import Backend, HeadFusion, MapPrefix

PREFIX = ("keep", "normalize")


class Rollout(NamedTuple):
    """What :func:`rollout` returns.

    Attributes:
        maps: (B, R, H, W), each map's weights of the patches; of packed images a tuple of (R, H, W), each on its own grid.
        prefix: (B, R), what fell on no patch: on the prefix tokens, or on the padding of windows. 1 - maps.sum((2, 3)) unless
            ``prefix="normalize"``, and never anything on the padding of packed images.
        labels: what each of the R maps is of.
        weights: (B, R, N), the output tokens' weights π the roll-out began with.
        output: what the model returned.
    """

    maps: Tensor | tuple[Tensor, ...]
    prefix: Tensor
    labels: tuple[str, ...]
    weights: Tensor
    output: object


# ------------------------------------------------------------------------------------------------ the roll-out


def _check(start_layer, prefix, classes, targets) -> None:
    check_choice("rollout", "prefix", prefix, PREFIX)
    if isinstance(start_layer, bool) or not isinstance(start_layer, int) or start_layer < 0:
        raise ValueError(f"rollout: start_layer must be an int of at least 0, got {got(start_layer)}")
    if classes is not None and not (isinstance(targets, str) and targets in ("hard", "soft")):
        raise ValueError("rollout: classes go with targets='hard' or 'soft'")
    if classes is not None and not (isinstance(classes, (tuple, list, range)) and all(map(is_int, classes))):
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


def _first(records: list, start_layer: int, model: nn.Module) -> int:
    """Which record the attention layer ``start_layer`` is."""
    attending = [i for i, layer in enumerate(records) if layer.attends]
    if not attending:
        found = f"found {called_attention(model)}; looked for {LOOKED_FOR}"
        raise ValueError(f"rollout: no attention layer ran in {type(model).__name__} that is known: {found}")
    if start_layer >= len(attending):
        raise ValueError(f"rollout: start_layer must be below the {len(attending)} attention layers, got {start_layer}")
    return attending[start_layer]


def _tokens_of(records: list, host_pass: HostPass) -> OutputTokens:
    """Where the roll-out begins: the last layer's tokens."""
    last, late = records[-1], sum(layer.count for layer in records if isinstance(layer, JoinLayer))
    for before, after in itertools.pairwise(records):
        if before.gives.total != after.reads.total:
            found = f"{before.path} has {before.gives.total} tokens and {after.path} {after.reads.total}"
            raise ValueError(f"rollout: {found}: tokens are dropped, joined or added on the way")
    grid, prefix = last.gives.grid or host_pass.grid, host_pass.prefix + late
    if prefix + grid[0] * grid[1] != last.gives.total:
        tokens = prefix + grid[0] * grid[1]
        found = f"{prefix} prefix tokens and a {grid[0]} x {grid[1]} grid are {tokens} tokens, the layers have {last.gives.total}"
        raise ValueError(f"rollout: {found} (give num_prefix_tokens=…; turn patch dropout off)")
    dtype, packed = torch.float64 if last.dtype == torch.float64 else torch.float32, host_pass.packed
    return OutputTokens(prefix, late, grid, host_pass.batch, last.device, dtype, packed and packed.grids)


def _pools(model: nn.Module, targets) -> list[PoolHead]:
    """The pooling head that is asked for, or that may be what the maps are of."""
    if isinstance(targets, str) and targets == "pool":
        return [one_pool_head(model)]
    found = pool_heads(model) if targets is None else []
    return found if len(found) == 1 else []


def _back(records: list, weights: Tensor, grid: tuple[int, int], options: Options, prefix: str) -> tuple[Tensor, Tensor]:
    """(maps, what fell on no patch) of weights π (B, R, N), from the last layer to the first; ``records`` are used up on the way."""
    loses, r = any(layer.loses for layer in records), weights
    while records:
        r = records.pop().back(r, options)
    first = r.shape[-1] - grid[0] * grid[1]
    maps = r[..., first:].unflatten(-1, grid)
    on_prefix = r[..., :first].sum(-1) + (weights.sum(-1) - r.sum(-1) if loses else 0)
    if prefix == "normalize":
        total = maps.sum((2, 3), keepdim=True)
        maps = maps / torch.where(total > 0, total, 1)
    return maps, on_prefix


def _back_alone(records: list, image: int, weights: Tensor, tokens: OutputTokens, options: Options, prefix: str) -> tuple[Tensor, Tensor]:
    """The same of one packed image, without its padding."""
    grid = tokens.grids[image]
    count = tokens.prefix + grid[0] * grid[1]
    alone = [layer.alone(image, count) for layer in records]
    return _back(alone, weights[image : image + 1, :, :count], grid, options, prefix)


def rollout(
    model: nn.Module, images: Tensor | Mapping[str, Tensor], targets: str | int | tuple[int, int] | Tensor | None = None, *,
    classes: Sequence[int] | None = None, token_logits: Tensor | Callable | None = None, head_fusion: HeadFusion = "mean",
    residual: float = 0.5, discard_ratio: float = 0.0, start_layer: int = 0, prefix: MapPrefix = "keep",
    num_prefix_tokens: int | None = None, verify: bool = True, backend: Backend | None = None,
) -> Rollout:  # fmt: skip
    """Which patches the output tokens of a Vision Transformer draw on: M = πᵀ Â_L … Â_1 on the patch grid, one map per π.

    Runs ``model(images)`` once, in the mode and under the autocast it is in, without gradient; parameters, buffers and hooks are as
    before. Fused attention may stay on. Memory: the layers' inputs, O(L N C), and O(N C + R N) for a layer, per image; a bias or mask that
    comes with a layer's call is kept, and such a layer's rows are computed in blocks of a fixed number of scores.

    Args:
        model: of timm a ViT, DeiT, DINOv2, DINOv3, EVA, BEiT, PE, rope, relative position or parallel ViT, CaiT, NaFlexViT, MViTv2,
            SAM, Swin (1 and 2); also after :func:`lifeops.convert`; a lifeops model; of transformers a ViT, DeiT, DINOv2, DINOv3, BEiT,
            Data2Vec, SAM, Swin (1 and 2), EoMT, MAE, the vision model of CLIP, SigLIP (1 and 2), BLIP, AIMv2. Any other that attends in
            one of these ways is taken if it passes ``verify``. Windows are put back on the grid; merged and pooled patches share alike;
            shuffled ones (MAE) are put in order, also in ``Rollout.output``.
        images: what the model takes, (B, channels, height, width), or a mapping of keyword arguments with "pixel_values"; or packed
            patches of several grids: NaFlexViT's {"patches", "patch_coord", "patch_valid"}, SigLIP 2's {"pixel_values",
            "pixel_attention_mask", "spatial_shapes"}. Patches must come row by row, padding behind them and hidden from them; each image's
            map is then what it is without padding and alone.
        targets: what π is.
            "cls" (default if there is a cls token);
            "pool" (default without one, if the output depends on such a head): the tokens as the model's attention pooling weighs them
            (timm's global_pool="map", SigLIP, AIMv2), mean over its heads;
            "mean" (default else): the mean of the patch tokens; an int (a token of the sequence, -1 the last); (row, column) (a patch);
            "hard": for each class the patch tokens predicted as it, alike; "soft": every patch token by its probability of the class;
            a tensor of weights (R, N), (B, R, N), or over the patches (H, W), (R, H, W), (B, R, H, W): divided by their sums; a row
            of zeros has a map of zeros.
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
    host_pass = pass_of(model, images, num_prefix_tokens, _pools(model, targets))
    with _untouched(model):
        by_class = isinstance(targets, str) and targets in ("hard", "soft")
        with recorded(model, host_pass, verify) as records, host_pass.watched(by_class), under("rollout"):
            output = model(**images) if isinstance(images, Mapping) and "patches" not in images else model(images)
        first = _first(records, start_layer, model)
        tokens, records = _tokens_of(records, host_pass), records[first:]
        weights, labels = begin(tokens, targets, classes, token_logits, host_pass, output, verify)
        if tokens.grids is None:
            maps, on_prefix = _back(records, weights, records[0].reads.grid or host_pass.grid, options, prefix)
        else:
            found = [_back_alone(records, image, weights, tokens, options, prefix) for image in range(tokens.batch)]
            maps, on_prefix = tuple(m[0] for m, _ in found), torch.cat([p for _, p in found])
    return Rollout(maps, on_prefix, labels, weights, output)
