"""Modules: thin, state-dict compatible with the official checkpoints."""

from lifeops.nn.life import LifeAttention, LifeQKV

__all__ = ["LifeAttention", "LifeQKV"]
