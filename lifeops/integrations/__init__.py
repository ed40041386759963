"""One line for models people already have: convert, revert and the authors' checkpoints."""

from lifeops.integrations.convert import convert, revert
from lifeops.integrations.official import load_official

__all__ = ["convert", "load_official", "revert"]
