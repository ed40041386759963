"""Solving on one thread: the same weights at any thread count, and no threads that wait for each other over small matrices."""

from __future__ import annotations

import contextlib

import torch


@contextlib.contextmanager
def one_thread():
    """PyTorch's CPU operators run on one thread; usable as a decorator.

    A ViT-Tiny's SVDs take 0.2 s so, and up to 20 times that on two threads of a machine whose cores are busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
