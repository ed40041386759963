"""Whether a conversion does what it says on that very model: each block is called once as the model calls it, before anything is changed.

The model runs on one image with every block passing its tokens on: that shows what each is given. Then the new block is compared with
the old one, the new branch left out where there is one. No hook runs, and modes, random numbers and buffers are as before.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops.integrations.attention_check import LayerCheck, attended, merge_point, off
from lifeops.integrations.pass_watch import Watch
from lifeops.integrations.token_place import Place
from lifeops.integrations.undisturbed import can_run, forward_of, of_several_precisions, undisturbed
from lifeops.nn.embedded_grid import embedded_grid


class Call(NamedTuple):
    args: tuple
    kwargs: dict

    @property
    def x(self) -> Tensor:
        return self.args[0]


class Probed(NamedTuple):
    """What the model gave each block (by id, at its first call), and the patch grid it had."""

    calls: dict[int, Call]
    grid: tuple[int, int]


def _image(model: nn.Module) -> Tensor:
    """One random image of the size the patch embedding was built for."""
    embed = model.patch_embed
    conv = next((m for m in embed.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        raise ValueError(f"{type(embed).__name__}, the patch embedding, has no Conv2d")
    size = getattr(embed, "img_size", None)
    if size is None:
        patch, grid = getattr(embed, "patch_size", conv.stride), embed.grid_size or (4, 4)
        size = [g * p for g, p in zip(grid, (patch, patch) if isinstance(patch, int) else patch, strict=True)]
    image = torch.randn(1, conv.in_channels, *((size, size) if isinstance(size, int) else size), generator=torch.Generator().manual_seed(0))
    return image.to(conv.weight.device, conv.weight.dtype)


def can_try(model: nn.Module) -> bool:
    """Whether the model has numbers and, if it has several precisions, which autocast may be there for, runs as it is."""
    if not can_run(model):
        return False
    if not of_several_precisions(model):
        return True
    try:
        with undisturbed(model):
            model.forward(_image(model))
    except Exception:
        return False
    return True


def probe(model: nn.Module, blocks: dict[str, nn.Module], prefix: int) -> Probed:
    """Run ``model`` on an image, ``blocks`` (by path) passing on what they are given; inside :func:`undisturbed`.

    Raises ValueError if it does not run or if a block does not read ``prefix`` tokens and then the grid's patches in their order.
    """
    calls: dict[int, Call] = {}
    watch, grids, embed, own = Watch({}, set()), [], model.patch_embed, model.patch_embed.forward
    place = Place("convert", watch, embed)

    def embedded(*args, **kwargs):
        output = own(*args, **kwargs)
        with watch.quiet():
            grids.append(embedded_grid(embed, args, output))
        place.embedded(embed, args, output)
        return output

    def passing(path, block):
        def forward(x, *args, **kwargs):
            if not calls and grids:
                place.check(path, x, prefix, grids[-1])
            calls.setdefault(id(block), Call((x, *args), kwargs))
            return x

        return forward

    with contextlib.ExitStack() as stack:
        stack.enter_context(forward_of(embed, embedded))
        for path, block in blocks.items():
            stack.enter_context(forward_of(block, passing(path, block)))
        try:
            image = _image(model)
            with watch:
                model.forward(image)
        except Exception as error:
            if str(error).startswith("convert:"):
                raise
            raise _failed(model, error) from error
    if not grids or not calls:
        raise ValueError(f"convert: {type(model).__name__} ran without {'its patch_embed' if not grids else 'its blocks'} (probe=False)")
    found = Probed(calls, grids[0])
    for path, block in blocks.items():
        if id(block) in calls:
            _check_tokens(path, calls[id(block)].x, prefix, found.grid)
    return found


def _failed(model: nn.Module, error: Exception) -> ValueError:
    why = f"{type(error).__name__}: {error}"
    return ValueError(f"convert: {type(model).__name__} cannot be tried on one image ({why}); probe=False converts it untried")


def _check_tokens(path: str, x: Tensor, prefix: int, grid: tuple[int, int]) -> None:
    H, W = grid
    maps = not prefix and tuple(x.shape[1:3]) == grid
    if (x.dim() == 3 and x.shape[1] == prefix + H * W) or (x.dim() == 4 and maps):
        return
    has = f"{x.shape[1]} tokens" if x.dim() == 3 else f"{tuple(x.shape)}"
    raise ValueError(f"convert: {path} is given {has}, looked for {prefix} prefix tokens and a {H} x {W} grid, {prefix + H * W} tokens")


def sequence(path: str, x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"convert: {path} is given maps {tuple(x.shape)}, looked for tokens (B, P + H*W, C)")


def call(path: str, block: nn.Module, given: Call) -> Tensor:
    """What the new block gives; whatever it raises is a reason to refuse."""
    try:
        return block(*given.args, **given.kwargs)
    except Exception as error:
        if str(error).startswith("convert:"):
            raise
        raise ValueError(f"convert: {path} cannot be called as the model calls it: {type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------------------------ the systems


def _said(args: tuple, kwargs: dict) -> dict:
    """What is said beside the tokens, by name or place."""
    return {**{f"argument {i + 2}": a for i, a in enumerate(args[1:])}, **kwargs}


def _matters(value) -> bool:
    return isinstance(value, Tensor) or bool(value)


def _looks_around(own, x, args, kwargs) -> bool:
    """Whether what a token becomes depends on the others: a stand-in that does not attend has no attention to differ in."""
    y = own(x, *args[1:], **kwargs)
    for end in (0, -1):  # of a causal one the first token sees itself alone
        others = 2 * x + 1
        others[:, end] = x[:, end]
        if not torch.equal(own(others, *args[1:], **kwargs)[:, end], y[:, end]):
            return True
    return False


def check_attention(path: str, block: nn.Module, attn: nn.Module, given: Call, takes: tuple[str, ...]) -> None:
    """``attn`` is softmax(q kᵀ / √d) v over all tokens of the block, told nothing but what ``takes`` names."""
    runs = []
    own, point, handles = attn.forward, merge_point(attn), []

    def forward(*args, **kwargs):
        unknown = [name for name in _said(args, kwargs) if name not in takes]
        if unknown:
            raise ValueError(f"convert: {path} hands its attention {', '.join(unknown)}, which LIFE's does not take")
        x = args[0]
        if x.dim() != 3 or x.shape[:2] != given.x.shape[:2]:
            raise ValueError(f"convert: {path} hands its attention {tuple(x.shape)}, looked for its tokens {tuple(given.x.shape)}")
        try:
            q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        except RuntimeError as error:
            raise ValueError(f"convert: {path}.attn.qkv cannot be read as q, k and v of {attn.num_heads} heads: {error}") from error
        if not _looks_around(own, x, args, kwargs):
            runs.append(None)
            return own(*args, **kwargs)
        runs.append(LayerCheck(f"convert: {path}.attn", attn, attended(q, k, v, getattr(attn, "scale", None), [0]), x))
        output = own(*args, **kwargs)
        runs[-1].ended(output)
        return output

    if point is not None:
        handles.append(point.register_forward_pre_hook(lambda m, args: runs[-1].merged(args[0]) if runs and runs[-1] else None))
    try:
        with forward_of(attn, forward):
            call(path, block, given)
    finally:
        for handle in handles:
            handle.remove()
    if len(runs) != 1:
        raise ValueError(f"convert: {path} calls its attention {len(runs)} times, looked for once")


def check_branch(path: str, old: nn.Module, new: nn.Module, given: Call) -> None:
    """``new`` without its ``conv`` is ``old`` without its ``mlp``, whatever the attention: it is a fixed function of its tokens here."""
    told = []

    def attention(x, *args, **kwargs):
        told.append({name: value for name, value in _said((x, *args), kwargs).items() if _matters(value)})
        return (2 * x.roll(1, 1).flip(-1) + 1).sin()  # neither scaled nor centred as its tokens are

    with forward_of(old.attn, attention):
        with forward_of(old.mlp, lambda x, *args, **kwargs: torch.zeros_like(x)):
            expected = call(f"{path} without its mlp", old, given)
        with forward_of(new.conv, lambda x, *args, **kwargs: x):
            got = call(path, new, given)
    if len(told) != 2 or told[0].keys() != told[1].keys() or any(told[0][name] is not told[1][name] for name in told[0]):
        names = [", ".join(t) or "nothing" for t in told]
        raise ValueError(f"convert: {path} tells its attention {names[:1]}, {type(new).__name__} would tell it {names[1:]}")
    difference = off(got - given.x, expected - given.x)
    if difference > 1e-3 + _rounding(given.x, expected, got):
        raise ValueError(
            f"convert: {path} is {type(old).__name__}, whose attention branch is not x + ls1(attn(norm1(x))): it is off by"
            f" {difference:.2g} of its largest entry (another order of the norms, a scale of its own, parallel branches)"
        )


def _rounding(x: Tensor, *outputs: Tensor) -> float:
    """What is lost of a small branch beside large tokens."""
    branch = max((y - x).abs().max().item() for y in outputs)
    return 8 * torch.finfo(x.dtype).eps * x.abs().max().item() / max(branch, 1e-30)


def check_shortcut(path: str, group: nn.Module, given: Call, grid: tuple[int, int]) -> None:
    """The shortcut takes the tokens; the blocks, which stay what they are, pass them on."""
    with contextlib.ExitStack() as stack:
        for block in group.blocks:
            stack.enter_context(forward_of(block, lambda x, *args, **kwargs: x))
        stack.enter_context(group.shortcut.grid_holder.use(grid))
        call(path, group, given)
