"""One forward pass of a model whose attention ``structured_`` is about to set: what each layer computes and what the first one reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lifeops.hosts.images import USUAL, first_conv, image_sizes
from lifeops.init.projections import OP, Projections
from lifeops.integrations.attention_check import LayerCheck, attended
from lifeops.integrations.pass_watch import Watch
from lifeops.integrations.token_place import Place, tokens_of
from lifeops.integrations.undisturbed import forward_of
from lifeops.nn.life import LifeAttention


class _Stop(Exception):
    pass


def images(model: nn.Module) -> list[Tensor]:
    """Random images of the sizes that the model may have been built for."""
    conv = first_conv(model)
    channels, like = (3, next(model.parameters())) if conv is None else (conv.in_channels, conv.weight)
    generator = torch.Generator().manual_seed(0)
    sizes = image_sizes(model) or [USUAL]
    return [torch.randn(1, channels, *size, generator=generator).to(like.device, like.dtype) for size in sizes]


# ------------------------------------------------------------------------------------------------ reading a layer


def _out(p: Projections) -> nn.Module | None:
    """The output projection where it is called as a module."""
    return None if isinstance(p.module, (LifeAttention, nn.MultiheadAttention)) else p.module.get_submodule(p.layout.out)


def _qkv(p: Projections, x: Tensor, args: tuple) -> tuple[Tensor, ...]:
    """q, k and v (B, h, N, d) of x (B, N, C)."""
    if isinstance(p.module, LifeAttention):
        return p.module.qkv_heads(x, *args[1:2])
    return tuple(t.unflatten(-1, (p.num_heads, -1)).transpose(1, 2) for t in p.layout.qkv(p.module, x))


def _beside(p: Projections, args: tuple, kwargs: dict) -> str:
    """Which tensors a layer is called with beside its tokens, for messages."""
    named = {**{f"argument {i + 1}": a for i, a in enumerate(args)}, **kwargs}
    flat = {name: a[0] if isinstance(a, (tuple, list)) and a else a for name, a in named.items()}
    found = [] if isinstance(p.module, nn.MultiheadAttention) else [name for name, a in flat.items() if isinstance(a, Tensor)][1:]
    return f"; it is called with {', '.join(found)} beside its tokens" if found else ""


def _tokens(p: Projections, x):
    """What a layer reads or gives as (B, N, C): maps are flattened, tokens before the batch, as torch's attention may have them, turned."""
    if not isinstance(x, Tensor):
        return x
    turned = isinstance(p.module, nn.MultiheadAttention) and not p.module.batch_first
    return x.transpose(0, 1) if turned else x.flatten(1, 2) if x.dim() == 4 else x


# ------------------------------------------------------------------------------------------------ the pass


class Pass:
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
            x = _tokens(p, given)
            if not isinstance(x, Tensor) or x.dim() != 3:
                raise ValueError(f"{OP}: {p.path} is given {tuple(getattr(x, 'shape', ()))}, looked for tokens (B, N, C)")
            self._begin(p, given, x, place)
            with place.watch.quiet():
                try:
                    check = LayerCheck(f"{OP}: {p.path}", p.module, attended(*_qkv(p, x[:1], args), None, [0]), x)
                except RuntimeError as error:
                    raise ValueError(f"{OP}: {p.path} cannot be read as plain attention: {error}") from error
            hook = out and out.register_forward_pre_hook(lambda m, args: check.merged(_tokens(p, args[0])))
            try:
                output = own(*args, **kwargs)
                with place.watch.quiet():
                    check.ended(_tokens(p, tokens_of(output)))
            except ValueError as error:
                raise ValueError(f"{error}{_beside(p, args, kwargs)}") from error
            finally:
                if hook:
                    hook.remove()
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
            self.first, self.rows = x, None if shadow is None else _tokens(p, shadow)[0].isnan().any(-1)
        self.sizes.setdefault(p.path, tuple(x.shape[:2]))


def run(model: nn.Module, image: Tensor, seen: Pass, embed: nn.Module | None) -> Place:
    watch = Watch({id(m): path for path, m in model.named_modules()}, {id(p.module) for p in seen.layers})
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
    for event in (e for e in watch.events if e.queries > 1):
        raise ValueError(f"{OP}: {event.path} attends or mixes tokens in a way that is not known: {event.what}; it would be left as it is")
    return place


def first_input(model: nn.Module, image: Tensor, layer: Projections, embed: nn.Module) -> Tensor | None:
    """(N, C) of the first layer, the patches' own contents left out; (None where it does not run)."""
    found, own = [], embed.forward

    def stop(*args, **kwargs):
        x = args[0] if args else next(a for a in kwargs.values() if isinstance(a, Tensor))
        found.append(_tokens(layer, x)[0])
        raise _Stop

    def blank(*args, **kwargs):
        output = own(*args, **kwargs)
        return tuple(torch.zeros_like(t) if isinstance(t, Tensor) else t for t in output) if isinstance(output, tuple) else output * 0

    with forward_of(embed, blank), forward_of(layer.module, stop), contextlib.suppress(_Stop):
        model.forward(image)
    return found[0] if found else None
