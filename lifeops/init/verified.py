"""Whether the attention that ``structured_`` is about to set is the model's own: one forward pass, before anything is changed.

Each layer must be softmax(q kᵀ / √d) v of its projections, over all tokens where impulses are asked for, and the position embedding's
rows must be added to the patches they are taken for. Afterwards the first layer's attention on blank patches must be what is reported.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from lifeops.hosts.host import Host
from lifeops.hosts.images import embedding_of, image_sizes
from lifeops.hosts.positions import host_or_none
from lifeops.hosts.transformers import resized_positions
from lifeops.init.model_pass import Pass, first_input, images, run
from lifeops.init.optimised import attention_of
from lifeops.init.positions import Positions
from lifeops.init.projections import OP, Projections
from lifeops.init.report import HeadReport, Report, measure
from lifeops.integrations.token_place import Place, chosen, rows_at
from lifeops.integrations.undisturbed import can_run, of_several_precisions, undisturbed

_CLOSE = 0.05  # the report's mean mass on the impulse to the model's


@contextlib.contextmanager
def _rows_as(positions: Positions, rows: Tensor):
    """The patches' rows of the position embedding for a while."""
    before = positions.patches.clone()
    positions.patches.copy_(rows)
    try:
        yield
    finally:
        positions.patches.copy_(before)


class Verified:
    """``layers`` without pooling heads. ``positions``: None where they are not the patches' and impulses are not asked for.

    ``start``: the token that the first patch is; None where nothing was run or the position embedding is not the model's.
    """

    def __init__(self, model, layers: list[Projections], positions: Positions | None):
        self.model, self.layers, self.positions = model, layers, positions
        self.start: int | None = None
        self.image: Tensor | None = None
        self.embed: nn.Module | None = None

    @torch.no_grad()
    def off(self, report: Report) -> float:
        """How far the first layer's mean mass in ``report`` is from that of the attention on blank patches, biases left out."""
        heads = [h for h in report.layer(0) if h.mass is not None and h.mass == h.mass]
        if self.start is None or not heads:
            return 0.0
        p, (H, W) = self.layers[0], self.positions.grid
        with undisturbed(self.model):
            x = first_input(self.model, self.image, p, self.embed)[self.start : self.start + H * W].float().cpu()
        q, k = (w.detach().float().cpu().unflatten(0, (p.num_heads, p.head_dim)) for w in (p.q, p.k))
        attention = attention_of(x, q.transpose(-1, -2), k)
        real = [measure(attention[h.head], (H, W), h.offset)[0] for h in heads]
        return abs(sum(real) - sum(h.mass for h in heads)) / len(heads)

    def settle(self, report: Report, before: list[tuple[Tensor, Tensor]] | None) -> None:
        """Raise, everything put back from ``before``, if the report is not the model's; without ``before`` it loses its masses."""
        off = self.off(report)
        if off <= _CLOSE:
            return
        if before is None:
            report.heads[:] = [HeadReport(h.layer, h.path, h.head, None, None, None) for h in report.heads]
            return
        put_back(before)
        if self.positions.learned:  # version=2024 freezes it
            self.positions.tensor.requires_grad_(True)
        raise ValueError(
            f"{OP}: {self.layers[0].path} does not read the layer-normed position embedding of blank patches: the attention mass on its"
            f" impulses would be off by {off:.2g} from the report; nothing was changed"
        )


@torch.no_grad()
def put_back(before: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in before:
        tensor.copy_(value)


def taken(layers: list[Projections], positions: Positions | None) -> list[tuple[Tensor, Tensor]]:
    """What is going to be written, with copies."""
    tensors = [t for p in layers for t in (p.q, p.k, p.v, p.proj, p.deeper) if t is not None]
    tensors += [] if positions is None else [positions.tensor.detach()]
    return [(t, t.clone()) for t in tensors]


def _start(model, image, seen: Pass, place: Place, positions: Positions) -> tuple[int, Positions]:
    """The token that the first patch is, and the position embedding whose last rows are added to the patches, as they are or resized."""
    (H, W), first = positions.grid, seen.layers[0]
    starts = [] if seen.rows is None or place.mask is None else rows_at(seen.rows, place.mask)
    if not starts or len(place.mask) != H * W:
        n = 0 if place.mask is None else len(place.mask)
        where = f"as the {H} x {W} grid in its order (shuffled, dropped or mixed before it?)"
        raise ValueError(f"{OP}: the {n} patches of the embedding do not reach {first.path} {where}; 'mimetic' does not need them to")
    mask = chosen(H * W)
    marked = positions.patches.clone()
    marked[mask.to(marked.device)] = float("nan")
    with _rows_as(positions, marked):
        found = first_input(model, image, first, place.embed)
    at = rows_at(found.isnan().any(-1), mask.to(found.device))
    resized = resized_positions(host_or_none(OP, model), positions.grid)
    if resized is not None and found.isnan().any(-1)[starts[0] : starts[0] + H * W].all():
        return starts[0], positions._replace(made=resized)  # each token draws on several rows: whether so shows in Verified.off
    if starts[0] not in at:
        where = f"tokens {at[0]} to {at[0] + H * W - 1}" if at else "no such tokens"
        raise ValueError(
            f"{OP}: the last {H * W} rows of the position embedding must belong to the patches, tokens {starts[0]} to"
            f" {starts[0] + H * W - 1} of {first.path}; they belong to {where} (tokens behind the patches? another order?)"
        )
    return starts[0], positions


def _try(model: nn.Module, layers: list[Projections], embed: nn.Module | None) -> tuple[Tensor, Pass, Place] | None:
    """The first image that the model takes; None for a model of several precisions that does not run as it is."""
    failed: dict[str, Exception] = {}
    for image in images(model):
        seen = Pass(layers)
        try:
            return image, seen, run(model, image, seen, embed)
        except Exception as e:
            if str(e).startswith(f"{OP}:"):
                raise
            failed[" x ".join(map(str, image.shape[2:]))] = e
    if of_several_precisions(model):
        return None
    error = list(failed.values())[-1]
    sizes = f"{' or '.join(failed)}{'' if image_sizes(model) else ', which is a guess: it says no img_size or image_size'}"
    raise ValueError(
        f"{OP}: {type(model).__name__} cannot be tried on an image of {sizes} ({type(error).__name__}: {error}): pass a list of its blocks,"
        " position_embedding= and grid=, or verify=False"
    ) from error


def _runs(model: nn.Module, host: Host | None, layers: list[Projections]) -> nn.Module:
    """The part of ``model`` that embeds the image and holds all the layers; itself where that is none that an entry knows."""
    inside = set() if host is None else set(host.trunk.modules())
    return host.trunk if host is not None and all(p.module in inside for p in layers) else model


def verified(model, layers: list[Projections], positions: Positions | None, own_table: bool, impulse: bool) -> Verified:
    """Raises ValueError: the model cannot run, a layer did not run or is not plain attention, or what impulses need is not so."""
    host = host_or_none(OP, model)
    model = _runs(model, host, layers)
    found = Verified(model, layers, positions)
    if not can_run(model):
        return found
    embed = embedding_of(model, host)
    with undisturbed(model):
        tried = _try(model, layers, embed)
        if tried is None:
            return found
        found.image, seen, place = tried
        found.embed, found.layers = embed, [p for p in layers if p.path not in seen.pools]
        missing = [p.path for p in found.layers if p.path not in seen.sizes]
        if missing or not found.layers:
            raise ValueError(f"{OP}: {', '.join(missing) or 'no attention'} did not run in {type(model).__name__} on an image")
        if positions is None:
            return found
        try:
            _check_sizes(seen.sizes, positions.grid)
            if own_table:
                found.start, found.positions = _start(model, found.image, seen, place, positions)
        except ValueError:
            if impulse:
                raise
            found.positions = None
    return found


def _check_sizes(sizes: dict[str, tuple[int, int]], grid: tuple[int, int]) -> None:
    """All layers attend over all tokens of the one image."""
    first = next(iter(sizes.values()))
    for path, (batch, tokens) in sizes.items():
        if batch != 1 or tokens < grid[0] * grid[1] or tokens != first[1]:
            found = f"in {batch} groups of {tokens} tokens" if batch != 1 else f"over {tokens} tokens"
            wanted = f"one group of the {grid[0]} x {grid[1]} grid's {grid[0] * grid[1]} patches and the prefix"
            raise ValueError(f"{OP}: {path} attends {found}, looked for {wanted} (windows, patches left out, images of another size?)")
