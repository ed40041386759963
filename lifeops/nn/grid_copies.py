"""Copies and pickles of what tells modules their grid: of a whole model, whose hooks come along, or of one module alone."""

from __future__ import annotations

import copy
import weakref

from torch import nn

_HOOKED = "hook_id", "embed_path", "embed_method"  # what a holder knows of the patch embedding


def living(handles: list) -> list:
    """Hook handles without those of modules that are gone: torch can neither copy nor pickle them."""
    return [handle for handle in handles if handle.hooks_dict_ref() is not None]


class Copied:
    """Copies and pickles start without open scopes. A copy of a module alone, put into the same model (peft's ``modules_to_save``), has
    no hooks that tell it: it asks the holder that it was copied from.
    """

    _model = None  # a weak reference to the model whose hooks tell it
    _origin = None  # who is asked instead

    def __getstate__(self):
        kept = {name: getattr(self, name) for name in ("fixed", "_origin", *_HOOKED)}
        return {**kept, "handles": living(self.handles)}

    def __setstate__(self, state):
        self.__init__()
        self.__dict__.update(state)

    def __deepcopy__(self, memo):
        memo[id(self)] = new = type(self)(self.fixed)
        model = self._model and self._model()
        if self._origin is not None:
            new._origin = copy.deepcopy(self._origin, memo)
        elif model is None or id(model) in memo:
            new.handles = copy.deepcopy(living(self.handles), memo)
            new.__dict__.update({name: getattr(self, name) for name in _HOOKED})
            new.belongs_to(memo.get(id(model)))
        else:
            new._origin = self
        return new

    def belongs_to(self, model: nn.Module | None) -> None:
        """Its hooks are on ``model``."""
        self._model = None if model is None else weakref.ref(model)
