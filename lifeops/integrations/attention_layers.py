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
from lifeops.hosts.attention import Kind, call_of, kind_of
from lifeops.hosts.heads import Call, Heads
from lifeops.hosts.projections import merge_point
from lifeops.hosts.windows import Windows, merges, side_by_side, windows_of
from lifeops.integrations.pass_check import PassCheck
from lifeops.integrations.rollout_layer import Options, Tokens
from lifeops.integrations.window_layers import merge_hook, window_hooks
from lifeops.ops.channel_act import accumulate_dtype
from lifeops.ops.rollout_step import fuse, roll, roll_blocks, rollout_step


def _versions(call: Call) -> list[int]:
    return [0 if t.is_inference() else t._version for t in call.tensors()]


class GlobalLayer:
    """Attention of all tokens to all tokens; several of them where they stand side by side and are summed."""

    attends, loses = True, False

    def __init__(self, path: str, kind: Kind, call: Call, block: nn.Module | None = None):
        self.path, self.kind, self.block, self.calls, self.versions = path, kind, block, [], []
        self.reads = self.gives = Tokens(call.x.shape[1])
        self.device, self.dtype = call.x.device, call.x.dtype
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
    """``count`` tokens that join in front of the others: what falls on them has come from no patch."""

    attends, loses = False, True

    def __init__(self, path: str, before: Tokens, count: int):
        self.path, self.count, self.reads, self.gives = path, count, before, before._replace(count=before.count + count)

    def back(self, r: Tensor, options: Options) -> Tensor:
        return r[..., self.count :]


# ------------------------------------------------------------------------------------------------ recording


def _record(records: list, path: str, kind: Kind, call: Call, block: nn.Module | None, late: int) -> bool:
    """Note a run; True if it stands beside the last one."""
    last = records[-1] if records else None
    if block is not None and getattr(last, "block", None) is block and len(last.calls) < len(block.attns):
        last.add(call)
        return True
    if late and last is not None and last.gives.total + late == call.x.shape[1]:
        records.append(JoinLayer(path, last.gives, late))
    records.append((ClassLayer if kind.name == "class" else GlobalLayer)(path, kind, call, block))
    return False


def _hook_global(records: list, path: str, module: nn.Module, kind: Kind, block, host_pass, check: PassCheck | None) -> list:
    def enter(module, args, kwargs):
        call = call_of("rollout", path, kind, module, args, kwargs)
        beside = _record(records, path, kind, call, block, host_pass.host.late)
        if check is not None:
            check.enter(path, module, args[0] if args else kwargs["hidden_states"], host_pass.prefix, beside)
            check.begin(path, call, kind.read)

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True)]
    if check is None:
        return handles

    def leave(module, args, kwargs, output):
        check.end(module, output)
        check.leave(args[0] if args else kwargs["hidden_states"], output)

    handles.append(module.register_forward_hook(leave, with_kwargs=True))
    if (point := merge_point(module)) is not None:
        handles.append(point.register_forward_pre_hook(check.merged))
    return handles


def _layers(model: nn.Module) -> list[tuple[str, nn.Module, Windows | None, Kind | None]]:
    """(path, module, its windows, how its attention is read), outermost first, each module once; neither: it merges patches."""
    found, inside = [], set()
    for path, module in model.named_modules():
        if module in inside:
            continue
        windows = windows_of(module)
        if windows is not None and windows.softmax is not None:
            inside.update(windows.attention.modules())
            found.append((path, module, windows, None))
        elif merges(module):
            found.append((path, module, None, None))
        elif kind := kind_of("rollout", path, module if windows is None else windows.attention):
            inside.update(module.modules())
            found.append((path, module, windows, kind))
    return found


@contextlib.contextmanager
def recorded(model: nn.Module, host_pass, verify: bool) -> Iterator[list]:
    """The layers that run inside the ``with``, in order; every hook is gone afterwards. ``verify``: the pass is checked."""
    records, handles, layers, blocks = [], [], _layers(model), side_by_side(model)
    check = PassCheck(model, host_pass, [module for _, module, *_ in layers]) if verify else None
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in handles])
        for path, module, windows, kind in layers:
            if windows is not None:
                stack.enter_context(window_hooks(records, path, windows, kind, check))
            elif kind is None:
                handles.append(module.register_forward_pre_hook(merge_hook(records, path), with_kwargs=True))
            else:
                handles += _hook_global(records, path, module, kind, blocks.get(module), host_pass, check)
        if check is not None:
            handles.append(host_pass.host.embed.register_forward_hook(check.place.embedded))
            for pool in host_pass.pools:
                handles.append(pool.module.register_forward_pre_hook(lambda module, args, path=pool.path: check.pooled(path, args[0])))
            stack.enter_context(check.watch)
        yield records
        if check is not None:
            check.finish()
