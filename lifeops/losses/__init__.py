"""Losses on tokens that know the grid of their patches."""

from lifeops.losses.relative_localization import RelativeLocalizationHead, dense_relative_localization, relative_localization_weight

__all__ = ["RelativeLocalizationHead", "dense_relative_localization", "relative_localization_weight"]
