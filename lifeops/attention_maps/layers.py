"""The attention layers of a model as roll-out needs them: recorded during one forward pass, walked back afterwards.

How a layer is read is told by :mod:`lifeops.hosts.attention`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lifeops.attention_maps.global_layers import ClassLayer, GlobalLayer, JoinLayer
from lifeops.attention_maps.pass_check import PassCheck
from lifeops.attention_maps.pooled_layers import PooledLayer
from lifeops.attention_maps.windows import merge_hook, window_hooks
from lifeops.hosts.attention import Kind, call_of, kind_of, side_by_side
from lifeops.hosts.heads import Call, tokens_given
from lifeops.hosts.projections import merge_point
from lifeops.hosts.windows import Windows, merges, windows_of

_LAYERS = {"class": ClassLayer, "pooled": PooledLayer}  # by the kind of attention


def _record(records: list, path: str, kind: Kind, call: Call, block: nn.Module, late: int) -> bool:
    """Note a run; True if it stands beside the last one."""
    last = records[-1] if records else None
    if isinstance(last, GlobalLayer) and last.takes(block):
        last.add(call)
        return True
    if late and last is not None and last.gives.total + late == call.x.shape[1]:
        records.append(JoinLayer(path, last.gives, late))
    records.append(_LAYERS.get(kind.name, GlobalLayer)(path, kind, call, block))
    return False


def _hook_global(records: list, path: str, module: nn.Module, kind: Kind, block, host_pass, check: PassCheck | None) -> list:
    def enter(module, args, kwargs):
        call = call_of("rollout", path, kind, module, args, kwargs)
        beside = _record(records, path, kind, call, block, host_pass.host.late)
        if check is not None:
            check.enter(path, module, tokens_given(args, kwargs), beside, tuple(call.tensors()[1:]))
            check.begin(path, call, kind.read)

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True)]
    if check is None:
        return handles

    def leave(module, args, kwargs, output):
        check.end(module, output)
        check.leave(tokens_given(args, kwargs), output)

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
        if why := getattr(module, "no_rollout", None):
            raise ValueError(f"rollout: {path} is {type(module).__name__}, {why}")
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
    watch = host_pass.follow_pools(None if check is None else check.watch)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in handles])
        for path, module, windows, kind in layers:
            if windows is not None:
                stack.enter_context(window_hooks(records, path, windows, kind, check))
            elif kind is None:
                handles.append(module.register_forward_pre_hook(merge_hook(records, path), with_kwargs=True))
            else:
                block = blocks.get(module, model.get_submodule(path.rpartition(".")[0]))
                handles += _hook_global(records, path, module, kind, block, host_pass, check)
        if check is not None:
            handles.append(host_pass.host.embed.register_forward_hook(check.place.embedded))
            for pool in host_pass.pools:
                handles.append(pool.module.register_forward_pre_hook(lambda module, args, path=pool.path: check.pooled(path, args)))
        if watch is not None:
            stack.enter_context(watch)
        yield records
        if check is not None:
            check.finish()
