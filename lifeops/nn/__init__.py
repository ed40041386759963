"""Modules: thin, state-dict compatible with the official checkpoints."""

from lifeops.nn.conv_ffn import ConvFeedForward, OverlapPatchEmbed
from lifeops.nn.conv_projection import ConvProjectionAttention
from lifeops.nn.downsampling import TwoGridDownsampling
from lifeops.nn.dw_shortcut import DWShortcut
from lifeops.nn.global_sparse import GlobalSparseAttention
from lifeops.nn.life import LifeAttention, LifeQKV
from lifeops.nn.local_agg import LocalAgg
from lifeops.nn.local_attention import LocalAttention
from lifeops.nn.localvit import LocalityFeedForward, LocalViTBlock
from lifeops.nn.pooling_attention import PoolingAttention
from lifeops.nn.regional_attention import RegionalAttention
from lifeops.nn.shared_conv import SharedConvAttention
from lifeops.nn.shortcut_blocks import wrap
from lifeops.nn.smoothing import TokenSmoothing
from lifeops.nn.token_pyramid import TokenPyramid
from lifeops.nn.token_slimming import ReverseTokenSlimming, TokenSlimming

__all__ = [
    "ConvFeedForward",
    "ConvProjectionAttention",
    "DWShortcut",
    "GlobalSparseAttention",
    "LifeAttention",
    "LifeQKV",
    "LocalAgg",
    "LocalAttention",
    "LocalViTBlock",
    "LocalityFeedForward",
    "OverlapPatchEmbed",
    "PoolingAttention",
    "RegionalAttention",
    "ReverseTokenSlimming",
    "SharedConvAttention",
    "TokenPyramid",
    "TokenSlimming",
    "TokenSmoothing",
    "TwoGridDownsampling",
    "wrap",
]
