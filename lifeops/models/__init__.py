"""Hosts: small, readable models whose state dicts are timm's or the authors'."""

from lifeops.models.deit import VisionTransformer
from lifeops.models.localvit import localvit

__all__ = ["VisionTransformer", "localvit"]
