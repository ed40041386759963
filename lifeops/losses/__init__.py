"""Losses on tokens that know the grid of their patches."""

from lifeops.losses.distillation import FeatureHint, logit_distillation
from lifeops.losses.feature_recycling import feature_recycling_distillation
from lifeops.losses.relative_localization import RelativeLocalizationHead, dense_relative_localization, relative_localization_weight

__all__ = [
    "FeatureHint",
    "RelativeLocalizationHead",
    "dense_relative_localization",
    "feature_recycling_distillation",
    "logit_distillation",
    "relative_localization_weight",
]
