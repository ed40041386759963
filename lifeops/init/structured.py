"""``structured_``: one call that gives a ViT the structured, mimetic or default initialisation, in place."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lifeops import geometry
from lifeops.arguments import check_choice, check_flags, check_int, check_number, got
from lifeops.errors import warn
from lifeops.init import positions, projections
from lifeops.init.closed_form import (
    check_embedding,
    check_generator,
    check_numbers,
    mimetic_qk,
    normalised,
    row_space,
    solve_impulse,
    value_projection,
)
from lifeops.init.offsets import check_kernel_size, head_offsets
from lifeops.init.optimised import STEPS, optimised_qk, sincos_position_embedding
from lifeops.init.positions import Positions
from lifeops.init.projections import OP, Projections
from lifeops.init.report import Report, add_layer
from lifeops.init.threads import one_thread
from lifeops.init.verified import taken, verified
from lifeops.options import Initialisation

METHODS = ("impulse", "mimetic", "default")
VERSIONS = (2024, 2025)
_EXPECTED_STD = 0.15  # fresh embeddings have 0.02 (timm, transformers); trained or scaled ones about 0.1 to 0.4


class Scales(NamedTuple):
    position: float
    qk: float
    value: float


_AUTHORS = {"impulse": Scales(18.0, 7.0, 1.0), "mimetic": Scales(1.0, 1.0, 1.0), "default": Scales(1.0, 1.0, 1.0)}


@one_thread()
def structured_(
    model_or_blocks: nn.Module | Iterable[nn.Module], method: Initialisation = "impulse", *, version: Literal[2024, 2025] = 2025,
    kernel_size: int = 3, generator: torch.Generator | None = None, position_scale: float | None = None, qk_scale: float | None = None,
    value_scale: float | None = None, position_embedding: Tensor | None = None, grid: tuple[int, int] | None = None,
    shared: bool | None = None, steps: int = STEPS, progress: bool = True, verify: bool = True,
) -> Report:  # fmt: skip
    """Initialise the attention of every block in place and say what came of it.

    ``"impulse"``, 2025 (arXiv 2505.19985): q and k of each head so that its attention starts as a shift by a few patches
    (:func:`lifeops.init.impulse_qk`, scale 7), v and proj with proj∘v = 0.4 noise - 0.4 I, position embedding times 18 in place
    (all zeros, as transformers' DeiT has it, are drawn with std 0.02 first).
    ``"impulse"``, 2024 (arXiv 2404.01139): q and k by optimisation on a fixed sine-cosine embedding, which replaces a learned one
    (and is frozen); v and proj are left as they are. No prefix tokens, as the authors. ``"mimetic"`` (arXiv 2305.09828): of each head
    q k is the part of rank d of 0.7 noise + 0.7 I, and v·proj = 0.4 noise - 0.4 I as the impulse authors write it: what attention then
    applies, proj∘v, has the same trace. ``"default"`` keeps the weights and applies the scales. Biases are never touched.

    Args:
        model_or_blocks: a ViT of timm, transformers, torchvision or this library (LIFE, LocalViT, DW shortcut), or a list of its
            blocks (then with ``position_embedding`` and ``grid``). In ``LifeAttention`` the heads of scale 1 are set, the rest
            keeps its values and magnitude.
        kernel_size: 3 or 5: the offsets the heads take, in turn (2025) or at random (2024).
        generator: a CPU generator that everything is drawn from; weights on any device and of any dtype get the same numbers.
        position_scale, qk_scale, value_scale: instead of the authors' (impulse 2025: 18, 7, 1; else 1). ``value_scale`` multiplies
            both v and proj.
        position_embedding: where the model does not show it: a Parameter is scaled in place, a plain tensor is used as it is.
        grid: (H, W) where the model does not say it.
        shared: one q, k solution for all layers (default: 2024 True, 2025 False; values are drawn per layer in any case).
        steps, progress: of the 2024 optimisation.
        verify: run a model once on an image, before anything is changed: every layer must be softmax(q kᵀ / √d) v of its projections,
            over all tokens, with the position embedding's rows where they are taken to belong; and afterwards, where everything is put
            back otherwise, the first layer's mass on blank patches must be the report's. Pooling heads are left alone. Where "mimetic"
            finds other positions, the report has no mass. A list of blocks is taken as it is.

    Returns:
        :class:`lifeops.init.Report`: per layer and head the offset, the attention mass on the impulse and the hit rate, measured on
        the written weights and the position embedding alone; ``print`` it.

    Raises ValueError, TypeError: unknown method, no attention or position embedding found, head width >= number of patches, prefix
        tokens where 2024 forbids them, attention that is more than softmax(q kᵀ) of its projections, windows, tokens behind the
        patches, a model that does not run. Nothing is changed then.
    """
    _check_arguments(method, version, kernel_size, generator)
    _check_values(position_scale, qk_scale, value_scale, position_embedding, grid, shared, steps, progress, verify)
    layers = projections.find(model_or_blocks, with_heads=method != "default")
    tries = verify and method != "default" and isinstance(model_or_blocks, torch.nn.Module)
    try:
        embedding = _embedding(model_or_blocks, layers, method, version, grid, position_embedding)
    except ValueError:
        if tries:
            verified(model_or_blocks, layers, None, False, False)  # what is wrong with the attention itself comes first
        raise
    defaults = _AUTHORS[method] if version == 2025 else _AUTHORS["default"]
    given = Scales(position_scale, qk_scale, value_scale)
    scales = Scales(*(d if g is None else g for d, g in zip(defaults, given, strict=True)))
    checked = before = None
    if tries:
        checked = verified(model_or_blocks, layers, embedding, position_embedding is None, method == "impulse")
        layers, embedding = checked.layers, checked.positions
        before = taken(layers, embedding) if method == "impulse" else None
    report = Report(method, version if method == "impulse" else None)
    if method == "impulse" and version == 2024:
        offsets = _write_2024(layers, embedding, scales, kernel_size, generator, shared is None or shared, steps, progress, report)
    elif method == "impulse":
        offsets = _write_2025(layers, embedding, scales, kernel_size, generator, bool(shared))
    else:
        offsets = (_write_mimetic if method == "mimetic" else _write_default)(layers, embedding, scales, generator, bool(shared))
    for i, layer in enumerate(layers):
        add_layer(report, i, layer, None if embedding is None else embedding.used, embedding and embedding.grid, offsets and offsets[i])
    if checked is not None:
        checked.settle(report, before)
    return report


def _check_arguments(method, version, kernel_size, generator) -> None:
    check_choice(OP, "method", method, METHODS)
    if not isinstance(version, numbers.Integral) or version not in VERSIONS:
        raise ValueError(f"{OP}: version must be 2024 or 2025, got {got(version)}")
    check_kernel_size(OP, kernel_size)
    check_generator(OP, generator)


def _check_values(position_scale, qk_scale, value_scale, position_embedding, grid, shared, steps, progress, verify) -> None:
    scales = {"position_scale": position_scale, "qk_scale": qk_scale, "value_scale": value_scale}
    for name, value in scales.items():
        check_number(OP, name, value, optional=True)
    if position_embedding is not None:
        check_numbers(OP, "position_embedding", position_embedding)
    if grid is not None:
        geometry.to_grid(OP, grid, 0)
    check_int(OP, "steps", steps, 0)
    check_flags(OP, shared=shared is not None and shared, progress=progress, verify=verify)


def _embedding(model, layers: list[Projections], method, version, grid, given) -> Positions | None:
    """The position embedding, checked for what the method needs."""
    sizes = sorted({(layer.dim, layer.num_heads, layer.head_dim) for layer in layers})
    if len(sizes) > 1:
        if method == "impulse":
            found = ", ".join(f"{dim} in {heads} heads of {width}" for dim, heads, width in sizes)
            hint = "pass a list of blocks that have it, with position_embedding= and grid="
            raise ValueError(f"{OP}: impulses need the same width, heads and head width in all blocks, got {found}: {hint}")
        return None
    try:
        found = positions.find(model, layers[0].dim, grid, given)
    except ValueError:
        if method == "impulse":
            raise
        return None  # the others only scale and measure with it
    if method != "impulse":
        return found
    if found is None:
        raise ValueError(
            f"{OP}: no position embedding found in {type(model).__name__} (looked for pos_embed, pos_embedding, position_embedding(s)"
            f" of width {layers[0].dim}); pass position_embedding= and grid=, or use method='mimetic', which needs none"
        )
    if version == 2024 and positions.num_prefix_tokens(model, found):
        raise ValueError(
            f"{OP}: version=2024 is for models without prefix tokens (class token, registers), got"
            f" {positions.num_prefix_tokens(model, found)}: build the model with class_token=False, or use version=2025"
        )
    for layer in layers:
        check_embedding(OP, found.patches, found.grid, layer.head_dim)
    return found


def _warn_if_scaled(embedding: Positions, scale: float) -> None:
    std = embedding.used.float().std().item()
    if scale != 1 and std > _EXPECTED_STD:
        warn(
            f"{OP}: the position embedding has std {std:.2g} before it is multiplied by {scale:g} (0.02 is usual): initialised before?"
            f" position_scale={0.36 / std:.2g} leads to the authors' 0.36"
        )


def _write_2025(layers, embedding, scales, kernel_size, generator, shared):
    if embedding.learned:
        positions.draw_if_zero_(embedding, generator)
    factor = scales.position if embedding.learned else 1.0
    space = row_space(OP, normalised(embedding.used * factor), layers[0].head_dim)  # may refuse: nothing is changed then
    _warn_if_scaled(embedding, factor)
    positions.scale_(embedding, factor)
    chosen, solution = [], None
    for layer in layers:
        offsets = head_offsets(layer.num_heads, kernel_size)
        if solution is None or not shared:
            solution = solve_impulse(space, embedding.grid, offsets, None, generator)
        values = value_projection(layer.dim, len(layer.v), True, generator)
        layer.write(*(scales.qk * t for t in solution), *(scales.value * t for t in values))
        chosen.append(offsets)
    return chosen


def _write_2024(layers, embedding, scales, kernel_size, generator, shared, steps, progress, report):
    heads, head_dim = layers[0].num_heads, layers[0].head_dim
    patches = sincos_position_embedding(embedding.grid, layers[0].dim) if embedding.learned else embedding.patches
    patches = patches * scales.position
    fitted = optimised_qk(
        patches, grid=embedding.grid, num_heads=heads, head_dim=head_dim, kernel_size=kernel_size, steps=steps,
        num_layers=1 if shared else len(layers), generator=generator, progress=progress,
    )  # fmt: skip
    if embedding.learned:
        with torch.no_grad():
            embedding.patches.copy_(patches)
        embedding.tensor.requires_grad_(False)
    for i, layer in enumerate(layers):
        solution = 0 if shared else i
        layer.write(scales.qk * fitted.Q[solution], scales.qk * fitted.K[solution], layer.v * scales.value, layer.proj * scales.value)
    report.loss = fitted.loss.tolist()
    return fitted.offsets * len(layers) if shared else fitted.offsets


def _write_mimetic(layers, embedding, scales, generator, shared):
    _scale_position(embedding, scales.position)
    solution = None
    for layer in layers:
        if solution is None or not shared:
            solution = mimetic_qk(layer.dim, layer.num_heads, layer.head_dim, generator)
        values = value_projection(layer.dim, len(layer.v), False, generator)
        layer.write(*(scales.qk * t for t in solution), *(scales.value * t for t in values))
    return [[(0, 0)] * layer.num_heads for layer in layers]  # q k ~ I: a patch's own position scores highest


def _write_default(layers, embedding, scales, generator, shared):
    _scale_position(embedding, scales.position)
    for layer in layers:
        with torch.no_grad():
            for weight, factor in ((layer.q, scales.qk), (layer.k, scales.qk), (layer.v, scales.value), (layer.proj, scales.value)):
                weight.mul_(factor)
    return None


def _scale_position(embedding: Positions | None, factor: float) -> None:
    if embedding is not None and embedding.learned:
        positions.scale_(embedding, factor)
