"""Formulas that torch's autocast must leave alone: it would cast their products down, and their results with them."""

from __future__ import annotations

import functools

from lifeops import torchlib


def full_precision(fn):
    """``fn`` with autocast off on the device of its first argument, a tensor."""

    @functools.wraps(fn)
    def run(*args, **kwargs):
        with torchlib.without_autocast(args[0]):
            return fn(*args, **kwargs)

    return run
