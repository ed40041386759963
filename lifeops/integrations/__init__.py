"""One line for models people already have: accelerate, convert, revert and the authors' checkpoints."""

from lifeops.integrations.accelerate import accelerate
from lifeops.integrations.convert import convert, revert
from lifeops.integrations.official import load_official

__all__ = ["accelerate", "convert", "load_official", "revert"]
