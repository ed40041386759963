"""What each system must not change, compared: the new block with the old one, given what the model gives it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lifeops.hosts.host import Block
from lifeops.hosts.projections import projected
from lifeops.integrations.attention_check import attention_tolerance, off
from lifeops.integrations.convert_probe import Call, call
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
        return _first(own(*(() if named else (tokens,)), *args[1:], **rest, **dict.fromkeys(named, tokens)))

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
        if x.dim() != 3 or x.shape[:2] != given.x.shape[:2]:
            raise ValueError(f"convert: {path} is handed {tuple(x.shape)}, looked for its block's tokens {tuple(given.x.shape)}")
        output = own(*args, **kwargs)
        runs.append(x)
        if _looks_around(own, args, kwargs):
            q, k, v = _projections(path, attn, x)
            with forward_of(new.qkv, lambda x, grid: (q, k, v)), new.grid_holder.use(grid):
                got = _first(new(*args, **kwargs))
            found, allowed = off(_first(output), got), attention_tolerance(q, k, new.num_heads)
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


def _first(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


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


def check_last_branch(path: str, block: Block, new: nn.Module, branch: nn.Module, given: Call) -> None:
    """``new`` is z + branch(z), where z is what ``block`` makes of its tokens without its MLP."""
    told, old = [], block.module
    muted = [block.part("mlp")] + ([block.part("norm2")] if block.order == "post" else [])
    muted = [m for part in muted for m in (part if isinstance(part, nn.ModuleList) else [part])]

    def read(z):
        told.append(z)
        return (2 * z.roll(1, 1).flip(-1) + 1).sin()

    with contextlib.ExitStack() as stack:
        for m in muted:
            stack.enter_context(forward_of(m, lambda x, *args, **kwargs: torch.zeros_like(x)))
        z = call(f"{path} without its mlp", old, given)
    with forward_of(branch, read):
        got = call(path, new, given)
    if not isinstance(z, Tensor) or len(told) != 1:
        what = f"gives {type(z).__name__}" if not isinstance(z, Tensor) else f"calls its MLP {len(told)} times"
        raise ValueError(f"convert: {path} is {type(old).__name__}, which {what}, looked for tokens of one MLP")
    rounding = 1e-3 + _rounding(given.x, z, got)
    if max(off(told[0], z), off(got - z, read(z))) > rounding:
        raise ValueError(
            f"convert: {path} is {type(old).__name__}, which is not z + mlp(z) for what its attention makes of its tokens, z"
            " (an MLP beside the attention, a scale of its own)"
        )


def check_wrapped(path: str, block: nn.Module, new: nn.Module, given: Call, grid: tuple[int, int]) -> None:
    """``new`` is ``block`` and its shortcut, which takes the tokens; the block gives tokens."""
    told = []

    def beside(x, y, grid):
        told.append((x, y))
        return y + 1

    expected = call(path, block, given)
    if not isinstance(expected, Tensor):
        raise ValueError(f"convert: {path} is {type(block).__name__}, which gives {type(expected).__name__}, looked for tokens")
    with forward_of(new.shortcut, beside):
        got = call(path, new, given)
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
