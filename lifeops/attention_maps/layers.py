"""The attention layers of a model as roll-out needs them: recorded during one forward pass, walked back afterwards.

How a layer is read is told by :mod:`lifeops.hosts.attention`. Of a layer only what it was given is kept, its input (B, N, C) and, where
one comes with the call, its rotation or bias; q and k are computed again when roll-out gets there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.attention_maps.windows import (
    Options,
    hook_windows,
    is_merge,
    is_window_block,
    merge_hook,
    window_attention,
    window_hooks,
)
from lifeops.hosts.attention import Kind, call_of, kind_of
from lifeops.hosts.heads import Call, Heads
from lifeops.integrations.attention_check import merge_point
from lifeops.integrations.pass_check import PassCheck
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.rollout_step import fuse, roll, roll_blocks, rollout_step


def _versions(call: Call) -> list[int]:
    return [0 if t.is_inference() else t._version for t in call.tensors()]


class GlobalLayer:
    """Attention of all tokens to all tokens; several of them where they stand side by side and are summed."""

    attends = True

    def __init__(self, path: str, kind: Kind, call: Call, block: nn.Module | None = None):
        self.path, self.kind, self.block, self.calls, self.x = path, kind, block, [], call.x
        self.tokens, self.versions = call.x.shape[1], []
        self.add(call)

    def add(self, call: Call) -> None:
        self.calls.append(call)
        self.versions.append(_versions(call))

    def heads(self) -> list[Heads]:
        """One for each attention of the layer."""
        if any(_versions(call) != before for call, before in zip(self.calls, self.versions, strict=True)):
            raise ValueError(f"rollout: the input of {self.path} was overwritten after the layer had read it")
        return [self.kind.read(call, False) for call in self.calls]

    def back(self, r: Tensor, options: Options) -> Tensor:
        """r (B, R, N) of the layer's output to that of its input."""
        heads, (fusion, residual, discard_ratio, backend) = self.heads(), options
        r = r.to(accumulate_dtype(heads[0].q.dtype))
        if all(h.plain for h in heads) and (len(heads) == 1 or (fusion == "mean" and discard_ratio == 0)):
            steps = [rollout_step(r, h.q, h.k, scale=h.scale, head_fusion=fusion, residual=residual, discard_ratio=discard_ratio,
                                  backend=backend) for h in heads]  # fmt: skip
            return sum(steps) / len(steps)
        with torchlib.without_autocast(r):
            mixed, count = any(h.mix is not None for h in heads), heads[0].q.shape[1]
            step = "max" if mixed else fusion  # of one matrix, which is what "max" leaves it; rows are divided by their sums
            return roll_blocks(r, count, lambda rows: _fused(heads, rows, fusion), step, residual, discard_ratio)


def _fused(heads: list[Heads], rows: slice, head_fusion: str) -> Tensor:
    """(B, 1, n, N): the mean over the attentions of their fused heads, negative weights (of talking heads) as zero."""
    fused = [fuse(h.weights(h.scores(rows)), head_fusion).clamp_min(0) for h in heads]
    return torch.stack(fused).mean(0)[:, None]


class ClassLayer(GlobalLayer):
    """Attention of the class token to all tokens; the others stay as they are."""

    def back(self, r: Tensor, options: Options) -> Tensor:
        [heads] = self.heads()
        r = r.to(accumulate_dtype(heads.q.dtype))
        with torchlib.without_autocast(r):
            out = roll(r, heads.weights(heads.scores(slice(0, 1))), 0, *options[:3])
        out[..., 1:] += r[..., 1:]
        return out


class JoinLayer:
    """Tokens that join in front of the others: what falls on them has come from no patch."""

    attends = False

    def __init__(self, count: int):
        self.count = count

    def back(self, r: Tensor, options: Options) -> Tensor:
        return r[..., self.count :]


# ------------------------------------------------------------------------------------------------ recording


def _record(records: list, path: str, kind: Kind, call: Call, block: nn.Module | None) -> bool:
    """Note a run; True if it stands beside the last one."""
    last = records[-1] if records else None
    if block is not None and getattr(last, "block", None) is block and len(last.calls) < len(block.attns):
        last.add(call)
        return True
    if kind.name == "class" and last is not None and not isinstance(last, ClassLayer):
        records.append(JoinLayer(call.x.shape[1] - last.tokens))
    records.append((ClassLayer if kind.name == "class" else GlobalLayer)(path, kind, call, block))
    return False


def _hook_global(records: list, path: str, module: nn.Module, kind: Kind, block, check: PassCheck | None, handles: list) -> None:
    def enter(module, args, kwargs):
        call = call_of("rollout", path, kind, module, args, kwargs)
        beside = _record(records, path, kind, call, block)
        if check is not None:
            x = args[0] if args else kwargs["hidden_states"]
            check.enter(path, module, x, check.parts.first_prefix, beside)
            check.begin(path, call, kind.read)

    handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
    if check is not None:

        def leave(module, args, kwargs, output):
            check.end(module, output)
            check.leave(args[0] if args else kwargs["hidden_states"], output)

        handles.append(module.register_forward_hook(leave, with_kwargs=True))
        if (point := merge_point(module)) is not None:
            handles.append(point.register_forward_pre_hook(check.merged))


def _side_by_side(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The parallel blocks by the modules of their attentions."""
    lists = lambda m: [getattr(m, name, None) for name in ("attns", "ffns")]  # noqa: E731
    blocks = [m for m in model.modules() if all(isinstance(found, nn.ModuleList) and len(found) > 1 for found in lists(m))]
    return {part: block for block in blocks for attn in block.attns for part in attn.modules()}


def _layers(model: nn.Module) -> list[tuple[str, nn.Module, object]]:
    """(path, module, its kind, "window" or "merge"), outermost first, each module once."""
    found, inside = [], set()
    for path, module in model.named_modules():
        if module in inside:
            continue
        if is_window_block(module):
            inside.update(module.attn.modules())
            found.append((path, module, "window"))
        elif is_merge(module):
            found.append((path, module, "merge"))
        elif kind := kind_of("rollout", path, window_attention(module) or module):
            inside.update(module.modules())
            found.append((path, module, kind))
    return found


@contextlib.contextmanager
def recorded(model: nn.Module, parts=None) -> Iterator[list]:
    """The layers that run inside the ``with``, in order; every hook is gone afterwards. With ``parts`` the pass is checked."""
    records, handles, layers, blocks = [], [], _layers(model), _side_by_side(model)
    check = None if parts is None else PassCheck(model, parts, [module for _, module, _ in layers])
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in handles])
        for path, module, kind in layers:
            if kind == "window":
                stack.enter_context(window_hooks(records, path, module, check, handles))
            elif kind == "merge":
                handles.append(module.register_forward_pre_hook(merge_hook(records), with_kwargs=True))
            elif window_attention(module) is not None:
                hook_windows(records, path, module, kind, check, handles)
            else:
                _hook_global(records, path, module, kind, blocks.get(module), check, handles)
        if check is not None:
            handles.append(parts.embed.register_forward_hook(check.place.embedded))
            if parts.pool is not None:
                handles.append(parts.pool.module.register_forward_pre_hook(lambda module, args: check.pooled(parts.pool.path, args[0])))
            stack.enter_context(check.watch)
        yield records
        if check is not None:
            check.finish()
