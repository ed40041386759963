"""What each system must not change, compared: the new block with the old one, given what the model gives it."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lifeops.hosts.host import Block
from lifeops.hosts.projections import projected
from lifeops.integrations.attention_check import attention_tolerance, off
from lifeops.integrations.convert_probe import Call, call
from lifeops.integrations.token_place import tokens_of
from lifeops.integrations.undisturbed import forward_of


def _said(args: tuple, kwargs: dict) -> dict:
    """What is said beside the tokens, by name or place."""
    return {**{f"argument {i + 2}": a for i, a in enumerate(args[1:])}, **kwargs}


def _matters(value) -> bool:
    return isinstance(value, Tensor) or bool(value)


def _looks_around(own, args, kwargs) -> bool:
    """Whether what a token becomes depends on the others: a stand-in that does not attend has no attention to differ in."""
    x, named = (args[0], {}) if args else (kwargs["hidden_states"], {"hidden_states"})
    rest = {name: value for name, value in kwargs.items() if name not in named}

    def run(tokens):
        return tokens_of(own(*(() if named else (tokens,)), *args[1:], **rest, **dict.fromkeys(named, tokens)))

    y = run(x)
    for end in (0, -1):  # of a causal one the first token sees itself alone
        others = 2 * x + 1
        others[:, end] = x[:, end]
        if not torch.equal(run(others)[:, end], y[:, end]):
            return True
    return False


def check_attention(path: str, attn: nn.Module, new: nn.Module, run: Callable[[], Tensor], given: Call, grid: tuple[int, int]) -> None:
    """``new``, given the q, k and v of ``attn``, is ``attn``, as the block calls it when it does ``run``: only these change."""
    runs, own, name = [], attn.forward, type(attn).__name__

    def forward(*args, **kwargs):
        _check_arguments(path, new, args, kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        window = getattr(new, "window", None)
        if x.dim() != 3 or (x.shape[:2] != given.x.shape[:2] if window is None else x.shape[1] != math.prod(window)):
            what = f"its block's tokens {tuple(given.x.shape)}" if window is None else f"windows of {window}"
            raise ValueError(f"convert: {path} is handed {tuple(x.shape)}, looked for {what}")
        output = own(*args, **kwargs)
        runs.append(x)
        if _looks_around(own, args, kwargs):
            q, k, v = _projections(path, attn, x)
            with forward_of(new.qkv, lambda x, grid: (q, k, v)), new.grid_holder.use(grid):
                got = tokens_of(new(*args, **kwargs))
            found, allowed = off(tokens_of(output), got), attention_tolerance(q, k, new.num_heads)
            if found > allowed:
                raise ValueError(
                    f"convert: {path} is {name}, which does not compute softmax(scale q kᵀ) v of its own q, k and v"
                    f" over all tokens: its output is off by {found:.2g} of its largest entry"
                )
        return output

    with forward_of(attn, forward):
        run()
    if len(runs) != 1:
        raise ValueError(f"convert: the block of {path} calls its attention {len(runs)} times, looked for once")


def _check_arguments(path: str, new: nn.Module, args: tuple, kwargs: dict) -> None:
    """Raise if ``new`` does not know what its block says."""
    signature = inspect.signature(new.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        said = [name for name in _said(args, kwargs) if name not in signature.parameters]
        raise ValueError(f"convert: {path} is handed {', '.join(said)}, which LIFE's attention does not take ({error})") from error


def _projections(path: str, attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        q, k, v = projected(attn, x)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"convert: {path} cannot be read as q, k and v: {error}") from error
    if not q.shape == k.shape == v.shape == x.shape:
        raise ValueError(f"convert: {path} makes q, k and v {[tuple(t.shape) for t in (q, k, v)]}, looked for three of {tuple(x.shape)}")
    return q, k, v


def check_projections(path: str, layers: dict, run: Callable[[], Tensor], expected, given: Call) -> None:
    """The block with new ``layers`` {path: (old, new)} in it, which give what the old ones give, gives what it gave: it goes by them."""
    seen = {where: [] for where in layers}
    with contextlib.ExitStack() as stack:
        for where, (old, new) in layers.items():
            stack.enter_context(forward_of(new, lambda x, o=old, s=seen[where]: (s.append(x), o(x))[1]))
        got = run()
    for where, tokens in seen.items():
        if len(tokens) != 1:
            raise ValueError(f"convert: the block of {where} calls it {len(tokens)} times, looked for once")
        shape, window = tuple(tokens[0].shape), layers[where][1].window
        wanted = (None if window else given.x.shape[0], math.prod(window or given.x.shape[1:-1]))
        if len(shape) == 3 and (shape[0] != (wanted[0] or shape[0]) or shape[1] != wanted[1]):
            what = f"windows of {window}" if window else f"its block's tokens {tuple(given.x.shape)}"
            raise ValueError(f"convert: {where} is handed {shape}, looked for {what} or maps")
    if off(tokens_of(got), tokens_of(expected)) > 1e-3:
        raise ValueError(f"convert: {path} gives something else with another layer in the place of {', '.join(layers)} that gives the same")


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


def check_last_branch(path: str, block: Block, new: nn.Module, branch: nn.Module, given: Call, grid: tuple[int, int] | None) -> None:
    """``new`` is z + branch(z), where z is what ``block`` makes of its tokens without its MLP; z may lie flat there, or as maps."""
    told, old = [], block.module
    muted = [block.part("mlp" if block.out is None else "out")] + ([block.part("norm2")] if block.order == "post" else [])
    muted = [m for part in muted for m in (part if isinstance(part, nn.ModuleList) else [part])]

    def mute(x, tokens=None, *args, **kwargs):
        return x.new_zeros(*x.shape[:-1], given.x.shape[-1]) if block.out is None or tokens is None else tokens

    def response(z):
        return (2 * z.flip(-1) + 1).sin()

    def read(z, *args):
        told.append(z)
        return response(z)

    with contextlib.ExitStack() as stack:
        for m in muted:
            stack.enter_context(forward_of(m, mute))
        z = tokens_of(call(f"{path} without its mlp", old, given))
    with forward_of(branch, read):
        got = tokens_of(call(path, new, given))
    if len(told) != 1:
        raise ValueError(f"convert: {path} is {type(old).__name__}, which calls its MLP {len(told)} times, looked for tokens of one MLP")
    rounding = 1e-3 + _rounding(given.x, z, got)
    if told[0].numel() != z.numel() or max(off(told[0].reshape(z.shape), z), off(got - z, response(z))) > rounding:
        raise ValueError(
            f"convert: {path} is {type(old).__name__}, which is not z + mlp(z) for what its attention makes of its tokens, z"
            " (an MLP beside the attention, a scale of its own)"
        )
    with contextlib.nullcontext() if grid is None else branch.grid_holder.use(grid):
        call(path, new, given)


def check_wrapped(path: str, block: nn.Module, new: nn.Module, given: Call, grid: tuple[int, int]) -> None:
    """``new`` is ``block`` and its shortcut, which takes the tokens; the block gives tokens, alone or first."""
    told = []

    def beside(x, y, grid):
        told.append((x, y))
        return y + 1

    expected = tokens_of(call(path, block, given))
    if not isinstance(expected, Tensor):
        raise ValueError(f"convert: {path} is {type(block).__name__}, which gives {type(expected).__name__}, looked for tokens")
    with forward_of(new.shortcut, beside):
        got = tokens_of(call(path, new, given))
    if len(told) != 1 or told[0][0] is not given.x or off(got - 1, expected) > 1e-3 + _rounding(given.x, expected):
        raise ValueError(f"convert: {path} is {type(block).__name__}, which a shortcut cannot be put around")
    with new.shortcut.grid_holder.use(grid):
        call(path, new.shortcut, Call((given.x, expected), {}))


def check_shortcut(path: str, group: nn.Module, given: Call, grid: tuple[int, int]) -> None:
    """The shortcut takes the tokens; the blocks, which stay what they are, pass them on."""
    with contextlib.ExitStack() as stack:
        for block in group.blocks:
            stack.enter_context(forward_of(block, lambda x, *args, **kwargs: x))
        stack.enter_context(group.shortcut.grid_holder.use(grid))
        call(path, group, given)
