"""Which patch grid the tokens of a converted model have: bound to the forward pass that runs, never left on the model.

timm's blocks hand no grid down. So a converted model has hooks, and each thread keeps a stack of scopes for it:

* the model opens a scope, its patch embedding fills in the grid, the scope ends with the call;
* a block opens a scope of its own with the grid of its tokens: the enclosing scope's, or the one its tokens' storage carries. The
  storage carries it because activation checkpointing calls a block again, during backward, with the same tokens and nothing else.

A scope belongs to the Python frame that opened it and counts only while that frame runs, so that one which an exception or Ctrl-C
left behind cannot be read. Compilers see plain ints or SymInts: they trace the hooks of the model and of the embedding, and what they
read is the thread's own.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from lifeops import geometry
from lifeops.arguments import check_module
from lifeops.nn.embedded_grid import Grid, embedded_grid, plain
from lifeops.nn.grid_copies import Copied

_CARRIED = "lifeops_grids"
_NONE = ()  # a program whose embedding has not run yet; tokens that were called on several grids
_MODULE_FILE = torch.nn.modules.module.__file__


class _Scope(NamedTuple):
    """``frame``: the Python frame in which it holds, None where a ``with`` ends it. ``waits``: the grid is still to come from the patch
    embedding. A method's scope is closed by nothing: its frame is kept until the thread's next call of the model looks at the scopes.
    """

    opener: object
    grid: Grid | tuple[()] | None
    frame: object = None
    waits: bool = False


class _Thread(threading.local):
    """``scopes``: the open ones. ``traced``: the grid of the program that a compiler traces in this thread, () before it is known.

    Set in __init__, not as class attributes: torch.compile (2.13) reads those also where a thread has set its own.
    """

    def __init__(self):
        self.scopes: tuple[_Scope, ...] = ()
        self.traced: Grid | tuple[()] | None = None
        self.outside: tuple | None = None  # what it was before the block that runs, which sees maps
        self.fresh = False  # no block has been called since the last embedding
        self.embedder = None  # the frame that called it


def _caller(skip: int, past: str | None):
    """The frame that called the module whose hook this is, past torch's own and the method ``past``, which ends before the blocks run."""
    frame = sys._getframe(skip)
    while frame.f_back is not None and frame.f_code.co_filename == _MODULE_FILE:
        frame = frame.f_back
    return frame.f_back if frame.f_code.co_name == past else frame


def _runs(scope: _Scope) -> bool:
    if scope.frame is None:
        return True
    frame = sys._getframe(1)
    while frame is not None:
        if frame is scope.frame:
            return True
        frame = frame.f_back
    return False


class GridHolder(Copied):
    """The grid of a module: the one it was built with, or that of the forward pass that runs now in this thread.

    A converted model's modules share one, whose methods are the hooks.
    """

    def __init__(self, grid: Grid | None = None):
        self.fixed = None if grid is None else tuple(grid)
        self._thread = _Thread()
        self._seen: set[Grid] = set()  # the first two: whether there was more than one
        self.handles: list = []  # of the patch embeddings that were hooked, the last one is the model's
        self.hook_id: int | None = None  # its number, which compilers can read
        self.embed_path = "patch_embed"  # inside the model
        self.embed_method: str | None = None  # of the model's, which calls the embedding and ends before the blocks run

    # -------------------------------------------------------------------------------------------- reading

    @property
    def grid(self) -> Grid | None:
        """The grid that a module has to use now; None if there is none."""
        if self.fixed is not None:
            return self.fixed
        if torch.compiler.is_compiling():
            found = self._traced()
        else:
            scope = self._scope()
            found = None if scope is None else scope.grid or None
        return self._origin.grid if found is None and self._origin is not None else found

    def _traced(self) -> Grid | None:
        """What a compiler reads: the traced program's own, an enclosing eager call's, or the only one there ever was, which is what a
        recomputation of a compiled block can know.
        """
        thread = self._thread
        if thread.traced is not None:
            return thread.traced or None
        if thread.scopes:
            return thread.scopes[-1].grid
        return next(iter(self._seen)) if len(self._seen) == 1 and self._hooked() else None

    def _hooked(self) -> bool:
        """Whether the model's patch embedding is the one that was hooked."""
        model = self._model and self._model()
        return model is None or self.hook_id in self._embed(model)._forward_hooks

    def _embed(self, model: nn.Module) -> nn.Module:
        """Its patch embedding."""
        for name in self.embed_path.split("."):
            model = getattr(model, name)
        return model

    def of(self, module: str, grid: Grid | None) -> Grid:
        """``grid``, or else the one that is bound. Raises ValueError if there is neither."""
        grid = self.grid if grid is None else grid
        if grid is None:
            raise ValueError(
                f"{module}: the grid is unknown: give forward(…, grid=(H, W)) or {module}(…, grid=(H, W)). A converted model knows it while"
                " model(images), forward_features or forward_intermediates runs; for blocks called on their own say it with"
                " `with lifeops.use_grid(model, (H, W)):`. If it was compiled before it was converted"
                " or reverted, torch._dynamo.reset() first"
            )
        return grid

    def _saw(self, grid: Grid) -> None:
        if len(self._seen) < 2:
            self._seen.add(grid)

    # -------------------------------------------------------------------------------------------- scopes

    def _scope(self) -> _Scope | None:
        """The innermost scope whose frame runs."""
        thread = self._thread
        while thread.scopes:
            scope = thread.scopes[-1]
            if _runs(scope):
                return scope
            thread.scopes = thread.scopes[:-1]
        return None

    def _open(self, opener, grid: Grid | None, frame=None, **options) -> None:
        self._scope()  # forgets those that an exception has left behind
        self._thread.scopes = (*self._thread.scopes, _Scope(opener, grid, frame, **options))

    def _close(self, opener) -> _Scope | None:
        scopes = self._thread.scopes
        for i in range(len(scopes) - 1, -1, -1):
            if scopes[i].opener is opener:
                self._thread.scopes = scopes[:i]
                return scopes[i]
        return None

    @contextlib.contextmanager
    def use(self, grid: Grid) -> Iterator[None]:
        """Bind ``grid`` in this thread, for blocks that are called on their own."""
        opener = object()
        self._saw(grid)
        self._open(opener, grid)
        try:
            yield
        finally:
            self._close(opener)

    # -------------------------------------------------------------------------------------------- hooks

    def enter_model(self, model, args):
        compiling = torch.compiler.is_compiling()
        self._thread.traced = _NONE if compiling else None
        if compiling:
            return
        self.belongs_to(model)
        if not self._hooked():  # the embedding was exchanged
            self.watch(self._embed(model))
        self._open(model, None, sys._getframe(1), waits=True)

    def leave_model(self, model, args, output):
        if torch.compiler.is_compiling():
            self._thread.traced = None
        else:
            self._close(model)
            self._thread.embedder = None

    def embedded(self, embed, args, output):
        grid = embedded_grid(embed, args, output)
        thread = self._thread
        if torch.compiler.is_compiling():
            thread.traced = grid
            return
        self._saw(grid)
        scope, frame = self._scope(), _caller(2, self.embed_method)
        if scope is not None and scope.waits and (scope.grid is None or self._thread.embedder is frame):
            here, opener = scope.frame, scope.opener
        else:  # forward_features and the like, called past model(images): the grid is that of the method that runs
            here, opener = frame, embed
        if scope is not None and scope.frame is here:
            if thread.fresh and scope.grid not in (None, grid):  # two images before any block: whose tokens come first?
                grid = _NONE
            thread.scopes = (*thread.scopes[:-1], scope._replace(grid=grid))
        else:
            self._open(opener, grid, here)
        thread.fresh, thread.embedder = True, frame

    def enter_stage(self, stage, args):
        """Before a stage that is given maps (B, C, H, W), first of a tuple: what checkpointing of a whole stage runs again."""
        if not torch.compiler.is_compiling():
            self._open(stage, plain(args[0][0].shape[2:]), sys._getframe(1))

    def enter_block(self, block, args):
        x = args[0] if args else None
        maps = tuple(x.shape[1:3]) if isinstance(x, torch.Tensor) and x.dim() == 4 else None  # (B, H, W, C): these tell their own
        if torch.compiler.is_compiling():
            if maps is not None:
                self._thread.outside, self._thread.traced = (self._thread.traced,), maps
            return
        self._thread.fresh = False
        grid = self.grid if maps is None else maps
        if maps is None and torch._C._current_graph_task_id() != -1:  # inside backward: a recomputation
            carried = _carried(x, self)
            if carried is not None:
                grid = carried or None
            elif grid is None and len(self._seen) == 1:  # tokens that went to another memory and back
                grid = next(iter(self._seen))
        _carry(x, self, grid)
        self._open(block, grid, sys._getframe(1))

    def leave_block(self, block, args, output):
        if torch.compiler.is_compiling():
            if self._thread.outside is not None:  # a checkpoint's region has to leave everything as it was
                self._thread.outside, (self._thread.traced,) = None, self._thread.outside
            return
        scope = self._close(block)
        if scope is not None:
            _carry(output, self, scope.grid)

    def watch(self, embed: nn.Module) -> None:
        """Hook the patch embedding."""
        self.handles.append(embed.register_forward_hook(self.embedded))
        self.hook_id = self.handles[-1].id


# ------------------------------------------------------------------------------------------------ grids that tokens carry


def _has_memory(x) -> bool:
    return type(x) is torch.Tensor and not torch._C._are_functorch_transforms_active()


def _carried(x, holder: GridHolder) -> Grid | None:
    return getattr(x.untyped_storage(), _CARRIED, {}).get(holder) if _has_memory(x) else None


def _carry(x, holder: GridHolder, grid: Grid | None) -> None:
    if grid is None or not _has_memory(x):
        return
    storage = x.untyped_storage()
    if not hasattr(storage, _CARRIED):
        setattr(storage, _CARRIED, {})
    grids = getattr(storage, _CARRIED)
    grids[holder] = grid if grids.get(holder, grid) == grid else _NONE


def holders(module: nn.Module) -> list[GridHolder]:
    """The holders of the modules inside ``module``, each once."""
    found = [m.__dict__.get("grid_holder") for m in module.modules()]
    return list({id(h): h for h in found if h is not None}.values())


def use_grid(model: nn.Module, grid: Grid) -> contextlib.AbstractContextManager[None]:
    """Inside the ``with``, in this thread, the tokens given to lifeops' modules in ``model`` lie on ``grid`` (H, W).

    For parts of a converted model that are called on their own: ``with lifeops.use_grid(model, (14, 14)): model.blocks[0](tokens)``.
    A grid given to ``forward`` or at construction, and that of a forward pass of the model inside the ``with``, come first.

    Raises ValueError if no module of ``model`` asks for a grid, TypeError or ValueError for what is no grid.
    """
    check_module("use_grid", "model", model)
    g = geometry.to_grid("use_grid", grid, 0)
    found = holders(model)
    if not found:
        raise ValueError(f"use_grid: {type(model).__name__} has no module of lifeops that asks for a grid")
    return _use(found, (g.height, g.width))


@contextlib.contextmanager
def _use(found: list[GridHolder], grid: Grid) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for holder in found:
            stack.enter_context(holder.use(grid))
        yield
