"""Errors and warnings of the library that are more than a ValueError or TypeError."""

from __future__ import annotations

import os
import sys
import warnings

import torch

_OWN = os.path.dirname(__file__) + os.sep
_OTHERS = (  # where torch, timm and their like lie, the standard library, and code that torch wrote
    os.path.dirname(os.path.dirname(torch.__file__)) + os.sep,
    os.path.dirname(os.__file__) + os.sep,
    "<eval_with_key>",
    "<frozen ",
)


class NotSupported(RuntimeError):
    """No implementation of ``op`` can run this problem on the backend that was asked for.

    Attributes: ``op`` (str), ``backend`` (str), ``reasons`` (list of str, every reason, not the first).
    """

    def __init__(self, op: str, backend: str, reasons: list[str]):
        self.op, self.backend, self.reasons = op, backend, list(reasons)
        super().__init__(f"{op}: backend {backend!r} cannot run this problem: " + "; ".join(self.reasons))

    def __reduce__(self):
        return NotSupported, (self.op, self.backend, self.reasons)


class KernelNotBuilt(RuntimeError):
    """A kernel that this machine cannot build: nothing has run, so another implementation may."""


class FallbackWarning(UserWarning):
    """A slower implementation than the preferred one runs; ``LIFEOPS_STRICT=1`` makes it an error."""


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that cannot be read or does not fit: a ValueError as for other bad input, and load_state_dict's RuntimeError."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """``warnings.warn`` at the line of the user's that led here: the innermost that is neither the library's nor an installed package's;
    where there is none, at the innermost that is not the library's.
    """
    frame, behind = sys._getframe(1), None
    while frame is not None and (file := frame.f_code.co_filename).startswith((_OWN, *_OTHERS)):
        behind = frame if behind is None and not file.startswith((_OWN, "<frozen ")) else behind
        frame = frame.f_back
    frame = frame or behind or sys._getframe(1)
    seen = frame.f_globals.setdefault("__warningregistry__", {})  # not stacklevel=, which does not count importlib's frames
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__", "<string>"), seen)
