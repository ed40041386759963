"""lifeops: fused ops that give Vision Transformers local structure."""

import lifeops.ops as _ops  # noqa: F401  (defines the torch operators)
from lifeops import autograd, init, losses, models, nn
from lifeops.attention_maps.rollout import Rollout, rollout
from lifeops.config import use_backend
from lifeops.cost.fvcore import fvcore_handles
from lifeops.errors import FallbackWarning, NotSupported
from lifeops.explain import explain
from lifeops.geometry import conv_grid
from lifeops.hosts.describe import Description, describe
from lifeops.integrations import accelerate, convert, load_official, revert
from lifeops.nn.batch_norm import fuse_
from lifeops.nn.grids import use_grid
from lifeops.ops.life_qkv.function import life_qkv
from lifeops.ops.local_attention.function import local_attention
from lifeops.ops.rollout_step import rollout_step
from lifeops.ops.token_conv.multi import token_dwconv_multi
from lifeops.ops.token_conv.public import token_dwconv_transpose
from lifeops.ops.token_dwconv.act_function import ChannelAct
from lifeops.ops.token_dwconv.public import token_dwconv
from lifeops.ops.token_pool.function import token_pool

__version__ = "0.1.0"
__all__ = [
    "ChannelAct",
    "Description",
    "FallbackWarning",
    "NotSupported",
    "Rollout",
    "accelerate",
    "autograd",
    "conv_grid",
    "convert",
    "describe",
    "explain",
    "fuse_",
    "fvcore_handles",
    "init",
    "life_qkv",
    "load_official",
    "local_attention",
    "losses",
    "models",
    "nn",
    "revert",
    "rollout",
    "rollout_step",
    "token_dwconv",
    "token_dwconv_multi",
    "token_dwconv_transpose",
    "token_pool",
    "use_backend",
    "use_grid",
]
