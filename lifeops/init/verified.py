"""Whether the attention that ``structured_`` is about to set is the model's own: one forward pass, before anything is changed.

Each layer must be softmax(q kᵀ / √d) v of its projections, over all tokens where impulses are asked for. The position embedding's rows
must be added to the patches they are taken for, and the first layer must read them layer-normed: the report measures on that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lifeops.init.closed_form import normalised
from lifeops.init.positions import Positions
from lifeops.init.projections import OP, Projections
from lifeops.integrations.attention_check import LayerCheck, attended
from lifeops.integrations.pass_watch import Watch
from lifeops.integrations.token_place import Place, chosen, rows_at
from lifeops.integrations.undisturbed import can_run, forward_of, undisturbed
from lifeops.nn.life import LifeAttention

_EMBEDDINGS = ("patch_embed", "patch_embeddings", "patch_embedding", "conv_proj", "to_patch_embedding")
_CLOSE = 0.1  # of the first layer's input to the normalised position embedding; at twice that the attention mass moves by some percent


class _Stop(Exception):
    pass


def _embedding_module(model: nn.Module) -> nn.Module | None:
    """The patch embedding by name, or else the first convolution."""
    named = [m for name, m in model.named_modules() if name.rpartition(".")[2] in _EMBEDDINGS and not isinstance(m, nn.ModuleList)]
    return next(iter(named or [m for m in model.modules() if isinstance(m, nn.Conv2d)]), None)


def _images(model: nn.Module, embed: nn.Module | None) -> list[Tensor]:
    """Blank images of the sizes that the model may have been built for."""
    conv = next((m for m in (embed or model).modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        return []
    found = [getattr(m, name, None) for m in model.modules() for holder in (m, getattr(m, "config", None)) for name in ("img_size", "image_size")
             for m in (holder,)]  # fmt: skip
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in found if isinstance(size, (int, tuple, list))]
    sizes = dict.fromkeys(size for size in pairs if len(size) == 2 and all(isinstance(n, int) for n in size))
    return [torch.zeros(1, conv.in_channels, *size, device=conv.weight.device, dtype=conv.weight.dtype) for size in (sizes or {(224, 224): None})]


# ------------------------------------------------------------------------------------------------ reading a layer


def _out(p: Projections) -> nn.Module | None:
    """The output projection where it is called as a module."""
    m = p.module
    if isinstance(m, (LifeAttention, nn.MultiheadAttention)):
        return None
    if hasattr(m, "to_out"):
        return m.to_out[0] if isinstance(m.to_out, nn.Sequential) else m.to_out
    if isinstance(getattr(getattr(m, "output", None), "dense", None), nn.Linear):
        return m.output.dense
    return next(getattr(m, n) for n in ("o_proj", "out_proj", "proj") if isinstance(getattr(m, n, None), nn.Linear))


def _fused(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """timm's qkv, in BEiT with biases of its own."""
    qkv = m.qkv(x)
    if isinstance(getattr(m, "q_bias", None), Tensor):
        k_bias = m.k_bias if isinstance(getattr(m, "k_bias", None), Tensor) else torch.zeros_like(m.q_bias)
        qkv = qkv + torch.cat((m.q_bias, k_bias, m.v_bias))
    return qkv.chunk(3, -1)


def _qkv(p: Projections, x: Tensor, args: tuple) -> tuple[Tensor, ...]:
    """q, k and v (B, h, N, d) of x (B, N, C)."""
    m, inner = p.module, getattr(p.module, "attention", None)
    if isinstance(m, LifeAttention):
        return m.qkv_heads(x, *args[1:2])
    if isinstance(m, nn.MultiheadAttention):
        flat = torch.nn.functional.linear(x, m.in_proj_weight, m.in_proj_bias).chunk(3, -1)
    elif hasattr(m, "to_qkv"):
        flat = m.to_qkv(x).chunk(3, -1)
    elif isinstance(getattr(m, "qkv", None), nn.Linear):
        flat = _fused(m, x)
    elif isinstance(getattr(m, "q_proj", None), nn.Linear):
        flat = m.q_proj(x), m.k_proj(x), m.v_proj(x)
    else:
        flat = inner.query(x), inner.key(x), inner.value(x)
    return tuple(t.unflatten(-1, (p.num_heads, -1)).transpose(1, 2) for t in flat)


def _flat(x):
    """Maps as tokens."""
    return x.flatten(1, 2) if isinstance(x, Tensor) and x.dim() == 4 else x


# ------------------------------------------------------------------------------------------------ the pass


class _Pass:
    """What one forward pass told: the first layer's input, the tokens of every layer, layers that attend from elsewhere."""

    def __init__(self, layers: list[Projections]):
        self.layers, self.sizes, self.pools = layers, {}, set()
        self.first: Tensor | None = None
        self.rows: Tensor | None = None  # of the first layer's input, which of them are followed patches

    def forward(self, p: Projections, place: Place) -> Callable:
        own, out = p.module.forward, _out(p)

        def forward(*args, **kwargs):
            if isinstance(p.module, nn.MultiheadAttention) and self._pool(p, args, kwargs):
                return own(*args, **kwargs)
            given = args[0] if args else next((a for a in kwargs.values() if isinstance(a, Tensor)), None)
            turned = isinstance(p.module, nn.MultiheadAttention) and not p.module.batch_first
            x = _flat(given.transpose(0, 1) if turned else given)
            if not isinstance(x, Tensor) or x.dim() != 3:
                raise ValueError(f"{OP}: {p.path} is given {tuple(getattr(x, 'shape', ()))}, looked for tokens (B, N, C)")
            self._begin(p, given, x, place)
            with place.watch.quiet():
                try:
                    check = LayerCheck(f"{OP}: {p.path}", p.module, attended(*_qkv(p, x, args), None, [0]), x)
                except RuntimeError as error:
                    raise ValueError(f"{OP}: {p.path} cannot be read as plain attention: {error}") from error
            hook = out and out.register_forward_pre_hook(lambda m, args: check.merged(_flat(args[0])))
            try:
                output = own(*args, **kwargs)
            finally:
                if hook:
                    hook.remove()
            with place.watch.quiet():
                joined = output[0] if isinstance(output, tuple) else output
                check.ended(_flat(joined.transpose(0, 1) if turned else joined))
            return output

        return forward

    def _pool(self, p: Projections, args, kwargs) -> bool:
        """Whether a torch attention's queries come from elsewhere: a pooling head is no layer."""
        query, key = (args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(("query", "key")))
        if query is not key:
            self.pools.add(p.path)
        return query is not key

    def _begin(self, p: Projections, given: Tensor, x: Tensor, place: Place) -> None:
        if self.first is None:
            shadow = place.watch.shadow_of(given)
            self.first, self.rows = x, None if shadow is None else _flat(shadow)[0].isnan().any(-1)
        self.sizes.setdefault(p.path, tuple(x.shape[:2]))


def _run(model: nn.Module, image: Tensor, seen: _Pass, embed: nn.Module | None) -> Place:
    watch = Watch({}, set())
    place = Place(OP, watch, embed)
    with contextlib.ExitStack() as stack:
        for p in seen.layers:
            stack.enter_context(forward_of(p.module, seen.forward(p, place)))
        if embed is not None:
            own = embed.forward

            def embedded(*args, **kwargs):
                output = own(*args, **kwargs)
                place.embedded(embed, args, output)
                return output

            stack.enter_context(forward_of(embed, embedded))
        with watch:
            model.forward(image)
    return place


def _first_input(model: nn.Module, image: Tensor, layer: Projections, embed: nn.Module) -> Tensor | None:
    """(N, C) of the first layer, the patches' own contents left out; (None where it does not run)."""
    found, own = [], embed.forward

    def stop(*args, **kwargs):
        x = args[0] if args else next(a for a in kwargs.values() if isinstance(a, Tensor))
        turned = isinstance(layer.module, nn.MultiheadAttention) and not layer.module.batch_first
        found.append(_flat(x.transpose(0, 1) if turned else x)[0])
        raise _Stop

    def blank(*args, **kwargs):
        output = own(*args, **kwargs)
        return tuple(torch.zeros_like(t) if isinstance(t, Tensor) else t for t in output) if isinstance(output, tuple) else output * 0

    with forward_of(embed, blank), forward_of(layer.module, stop), contextlib.suppress(_Stop):
        model.forward(image)
    return found[0] if found else None


@contextlib.contextmanager
def _rows_as(positions: Positions, rows: Tensor):
    """The patches' rows of the position embedding for a while."""
    before = positions.patches.clone()
    positions.patches.copy_(rows)
    try:
        yield
    finally:
        positions.patches.copy_(before)


def _check_positions(model, image, seen: _Pass, place: Place, positions: Positions, factor: float) -> None:
    (H, W), first = positions.grid, seen.layers[0]
    starts = [] if seen.rows is None or place.mask is None else rows_at(seen.rows, place.mask)
    if not starts or len(place.mask) != H * W:
        n = 0 if place.mask is None else len(place.mask)
        raise ValueError(f"{OP}: the {n} patches of the embedding do not reach {first.path} as the {H} x {W} grid in its order")
    mask = chosen(H * W)
    marked = positions.patches.clone()
    marked[mask.to(marked.device)] = float("nan")
    with _rows_as(positions, marked):
        found = _first_input(model, image, first, place.embed)
    at = rows_at(found.isnan().any(-1), mask.to(found.device))
    if starts[0] not in at:
        where = f"tokens {at[0]} to {at[0] + H * W - 1}" if at else "no such tokens"
        raise ValueError(
            f"{OP}: the last {H * W} rows of the position embedding must belong to the patches, tokens {starts[0]} to"
            f" {starts[0] + H * W - 1} of {first.path}; they belong to {where} (tokens behind the patches? another order?)"
        )
    rows = positions.patches.clone() if positions.rows.any() else torch.randn_like(positions.patches) * 0.02
    with _rows_as(positions, rows * factor):
        found = _first_input(model, image, first, place.embed)[starts[0] : starts[0] + H * W].double().cpu()
    expected = normalised(rows * factor)
    difference = ((found - expected).norm() / expected.norm()).item()
    if difference > _CLOSE:
        raise ValueError(
            f"{OP}: {first.path} does not read the layer-normed position embedding of blank patches, on which the report would measure:"
            f" it differs by {difference:.2g} of its norm"
        )


def verified(
    model, layers: list[Projections], positions: Positions | None, own_table: bool, impulse: bool, factor: float
) -> tuple[list[Projections], Positions | None]:
    """The layers without pooling heads, and ``positions``, or None where impulses are not asked for and they are not the patches'.

    Raises ValueError: the model cannot run on a blank image, a layer did not run or is not plain attention, or what impulses need.
    """
    if not can_run(model):
        return layers, positions
    embed = _embedding_module(model)
    with undisturbed(model):
        images, error = _images(model, embed), None
        for image in images:
            seen = _Pass(layers)
            try:
                place = _run(model, image, seen, embed)
                break
            except Exception as e:
                if str(e).startswith(f"{OP}:"):
                    raise
                error = e
        else:
            why = "it has no convolution" if error is None else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{OP}: {type(model).__name__} cannot be tried on a blank image ({why}); verify=False leaves that out, or pass its blocks"
            )
        kept = [p for p in layers if p.path not in seen.pools]
        missing = [p.path for p in kept if p.path not in seen.sizes]
        if missing or not kept:
            raise ValueError(f"{OP}: {', '.join(missing) or 'no attention'} did not run in {type(model).__name__} on a blank image")
        if positions is None:
            return kept, None
        try:
            _check_sizes(seen.sizes, positions.grid)
            if own_table:
                _check_positions(model, image, seen, place, positions, factor)
        except ValueError:
            if impulse:
                raise
            return kept, None
    return kept, positions


def _check_sizes(sizes: dict[str, tuple[int, int]], grid: tuple[int, int]) -> None:
    """All layers attend over all tokens of the one image."""
    first = next(iter(sizes.values()))
    for path, (batch, tokens) in sizes.items():
        if batch != 1 or tokens < grid[0] * grid[1] or tokens != first[1]:
            found = f"{batch} groups of {tokens} tokens" if batch != 1 else f"{tokens} tokens"
            raise ValueError(f"{OP}: {path} attends inside {found}, looked for all tokens of a {grid[0]} x {grid[1]} grid (windows?)")
