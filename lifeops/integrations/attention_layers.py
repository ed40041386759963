"""The attention layers of a model as roll-out needs them: recorded during one forward pass, walked back afterwards.

A layer is recognised by what it has, and refused where it has more than is known (relative positions, a rotary embedding, a mask): its
attention would then be another one. Only a layer's input is kept, (B, N, C); q and k are computed again when roll-out gets there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.integrations.attention_check import merge_point
from lifeops.integrations.pass_check import PassCheck
from lifeops.ops.channel_act import accumulate_dtype
from lifeops.ops.rollout_step import roll, rollout_step

LOOKED_FOR = (
    "attention with qkv and num_heads (timm, lifeops), q_proj/k_proj or query/key and num_attention_heads (transformers),"
    " qkv_heads (LIFE), or timm's Swin blocks"
)
_FUSED = {"qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop", "norm", "gate"}
_SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "dropout"}


class Options(NamedTuple):
    """How a layer's heads become one matrix: see :func:`lifeops.rollout_step`."""

    head_fusion: str
    residual: float
    discard_ratio: float
    backend: str | None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class GlobalLayer:
    """Attention of all tokens to all tokens."""

    attends = True

    def __init__(self, path: str, read: Callable, module: nn.Module, x: Tensor, grid):
        self.path, self.read, self.module, self.x, self.grid = path, read, module, x, grid
        self.tokens, self.version = x.shape[1], _version(x)

    def back(self, r: Tensor, options: Options) -> Tensor:
        """r (B, R, N) of the layer's output to that of its input."""
        if _version(self.x) != self.version:
            raise ValueError(f"rollout: the input of {self.path} was overwritten after the layer had read it")
        q, k, _, scale = self.read(self.module, self.x, self.grid, False)
        fusion, residual, discard_ratio, backend = options
        return rollout_step(r.to(accumulate_dtype(q.dtype)), q, k, scale=scale, head_fusion=fusion, residual=residual,
                            discard_ratio=discard_ratio, backend=backend)  # fmt: skip


class WindowLayer:
    """Attention inside shifted windows of a grid: small matrices, (B * windows, h, n, n), taken as the model computed them."""

    attends = True

    def __init__(self, block: nn.Module, grid: tuple[int, int]):
        self.window, self.shift, self.grid = tuple(block.window_size), tuple(block.shift_size), grid
        self.tokens, self.attention = grid[0] * grid[1], None

    def _windows(self, r: Tensor) -> Tensor:
        """(B, R, H, W) to (B * windows, R, n), rolled and padded as the block does it."""
        (H, W), (h, w) = self.grid, self.window
        r = F.pad(r.roll((-self.shift[0], -self.shift[1]), (2, 3)), (0, -W % w, 0, -H % h))
        return r.unflatten(3, (-1, w)).unflatten(2, (-1, h)).permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(0, 2)

    def _grid(self, r: Tensor, batch: int) -> Tensor:
        """The way back; what fell on padding is lost."""
        (H, W), (h, w) = self.grid, self.window
        r = r.unflatten(0, (batch, -(-H // h), -(-W // w))).unflatten(4, (h, w)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return r[:, :, :H, :W].roll(self.shift, (2, 3))

    def back(self, r: Tensor, options: Options) -> Tensor:
        own = self._windows(r.unflatten(2, self.grid))
        out = roll(own, self.attention.to(r.dtype), 0, *options[:3])
        return self._grid(out, len(r)).flatten(2)


class MergeLayer:
    """A 2 x 2 patch merging: a token's weight goes to its parts alike."""

    attends = False

    def __init__(self, grid: tuple[int, int]):
        self.grid = grid

    def back(self, r: Tensor, options: Options) -> Tensor:
        H, W = self.grid
        coarse = r.unflatten(2, (-(-H // 2), -(-W // 2)))
        fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :H, :W]
        parts = [torch.tensor([2] * (n - n % 2) + [1] * (n % 2), dtype=r.dtype, device=r.device) for n in (H, W)]  # an odd edge
        return (fine / (parts[0][:, None] * parts[1])).flatten(2)


# ------------------------------------------------------------------------------------------------ q and k of a layer


def _read_life(module, x, grid, values):
    return *module.qkv_heads(x, grid), module.scale


def _read_fused(module, x, grid, values):
    q, k, v = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = (getattr(module, name, nn.Identity())(t) for name, t in (("q_norm", q), ("k_norm", k)))
    return q, k, v, getattr(module, "scale", None)


def _read_separate(module, x, grid, values):
    names = ("q_proj", "k_proj", "v_proj") if hasattr(module, "q_proj") else ("query", "key", "value")
    heads = [getattr(module, name)(x).unflatten(2, (module.num_attention_heads, -1)).transpose(1, 2) for name in names[: 2 + values]]
    return *heads[:2], heads[2] if values else None, getattr(module, "scaling", None)


def _reader(path: str, module: nn.Module) -> Callable | None:
    """How to get q and k of ``module``; None if it does not attend. ValueError if it does in a way that is not known."""
    if hasattr(module, "qkv_heads"):
        return _read_life
    if hasattr(module, "qkv") and hasattr(module, "num_heads"):
        known, reader = _FUSED, _read_fused
    elif hasattr(module, "num_attention_heads") and (hasattr(module, "q_proj") or (hasattr(module, "query") and hasattr(module, "key"))):
        known, reader = _SEPARATE, _read_separate
    else:
        return None
    has = {name for named in (module.named_children(), module.named_parameters(recurse=False)) for name, _ in named}
    if has - known:
        extra = ", ".join(sorted(has - known))
        raise ValueError(f"rollout: {path} is {type(module).__name__} with {extra}, which roll-out does not know; looked for {LOOKED_FOR}")
    return reader


# ------------------------------------------------------------------------------------------------ recording


def _tensors(value) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_tensors, value)))


def _check_call(path: str, args: tuple, kwargs: dict) -> None:
    """A mask or a rotary embedding that comes with the call would be missed."""
    given = [f"argument {i + 2}" for i, a in enumerate(args[1:]) if _tensors(a)]
    given += [name for name, a in kwargs.items() if (_tensors(a) and name != "hidden_states") or (name == "is_causal" and a)]
    if given:
        raise ValueError(f"rollout: {path} was called with {', '.join(given)} beside the tokens, which roll-out does not know")


def _hook_global(records: list, path: str, module: nn.Module, read: Callable, check: PassCheck | None, handles: list) -> None:
    def enter(module, args, kwargs):
        _check_call(path, args, kwargs)
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.dim() != 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"rollout: {path} is given {got}, looked for tokens (B, N, C)")
        grid = None
        if read is _read_life:
            given = (*args[1:2], kwargs.get("grid"))
            grid = next((g for g in given if g is not None), module.grid_holder.grid)  # known while the model runs
        records.append(GlobalLayer(path, read, module, x, grid))
        if check is not None:
            check.enter(path, module, x, check.parts.num_prefix_tokens)
            check.begin(path, module, x, lambda some: read(module, some, grid, True))

    handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
    if check is not None:

        def leave(module, args, output):
            check.end(module, output)
            check.leave(records[-1].x, output)

        handles.append(module.register_forward_hook(leave))
        if (point := merge_point(module)) is not None:
            handles.append(point.register_forward_pre_hook(check.merged))


def _is_window_block(module: nn.Module) -> bool:
    has = all(hasattr(module, name) for name in ("window_size", "shift_size", "attn"))
    return has and isinstance(getattr(module.attn, "softmax", None), nn.Module)


def _window_checks(records: list, path: str, block: nn.Module, check: PassCheck, seen: dict[str, Tensor]) -> list:
    """Hooks that compare what the attention is given with the windows of the block's input, normed before (Swin) or after (Swin 2)."""

    def attend(module, args):
        check.windows(path, records[-1], args[0], seen.pop("normed", None), seen["x"])

    def leave(module, args, output):
        check.leave(seen.pop("x"), output)

    hooks = [block.attn.register_forward_pre_hook(attend), block.register_forward_hook(leave)]
    if isinstance(getattr(block, "norm1", None), nn.Module):
        hooks.append(block.norm1.register_forward_hook(lambda module, args, output: seen.update(normed=output)))
    return hooks


@contextlib.contextmanager
def _window_hooks(records: list, path: str, block: nn.Module, check: PassCheck | None, handles: list) -> Iterator[None]:
    """Takes the block's attention behind its softmax, which a fused kernel would skip."""
    seen: dict[str, Tensor] = {}

    def enter(module, args):
        seen.clear()
        records.append(WindowLayer(module, tuple(args[0].shape[1:3])))
        if check is not None:
            seen["x"] = args[0]
            check.enter(path, module, args[0], 0)

    def softmax(module, args, output):
        records[-1].attention = output

    handles += [block.register_forward_pre_hook(enter), block.attn.softmax.register_forward_hook(softmax)]
    if check is not None:
        handles += _window_checks(records, path, block, check, seen)
    fused = getattr(block.attn, "fused_attn", None)
    if fused:
        block.attn.fused_attn = False
    try:
        yield
    finally:
        if fused:
            block.attn.fused_attn = fused


def _is_merge(module: nn.Module) -> bool:
    return type(module).__name__ == "PatchMerging" and hasattr(module, "reduction")


def _layers(model: nn.Module) -> list[tuple[str, nn.Module, object]]:
    """(path, module, its reader, "window" or "merge"), outermost first, each module once."""
    found, inside = [], set()
    for path, module in model.named_modules():
        if module in inside:
            continue
        if _is_window_block(module):
            inside.update(module.attn.modules())
            found.append((path, module, "window"))
        elif _is_merge(module):
            found.append((path, module, "merge"))
        elif read := _reader(path, module):
            inside.update(module.modules())
            found.append((path, module, read))
    return found


@contextlib.contextmanager
def recorded(model: nn.Module, parts=None) -> Iterator[list]:
    """The layers that run inside the ``with``, in order; every hook is gone afterwards. With ``parts`` the pass is checked."""
    records, handles, layers = [], [], _layers(model)
    check = None if parts is None else PassCheck(model, parts, [module for _, module, _ in layers])
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in handles])
        for path, module, kind in layers:
            if kind == "window":
                stack.enter_context(_window_hooks(records, path, module, check, handles))
            elif kind == "merge":
                handles.append(module.register_forward_pre_hook(lambda m, args: records.append(MergeLayer(tuple(args[0].shape[1:3])))))
            else:
                _hook_global(records, path, module, kind, check, handles)
        if check is not None:
            handles.append(parts.embed.register_forward_hook(check.place.embedded))
            stack.enter_context(check.watch)
        yield records
        if check is not None:
            check.finish()
