"""Formulas that torch's autocast must leave alone: it would cast their products down, and their results with them."""

from __future__ import annotations

import functools

import torch


def full_precision(fn):
    """``fn`` with autocast off on the device of its first argument, a tensor."""

    @functools.wraps(fn)
    def run(*args, **kwargs):
        device = args[0].device.type
        if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know meta
            return fn(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return run
