"""The autograd Functions of the ops.

Each is made of ops whose own gradients are these Functions again, so double backward, ``torch.func.grad`` and ``vmap`` work;
ChannelActivation, LocalAttention, LocalityFFN and TokenDWConvAct, which are not bilinear, are differentiable once. Only
``save_for_backward`` holds tensors, and only those a needed gradient reads.
"""

from lifeops.ops.dw_shortcut.function import DWShortcut, DWShortcutStep
from lifeops.ops.life_qkv.function import LifeQKV
from lifeops.ops.life_qkv.project_scales import ProjectScales
from lifeops.ops.local_attention.function import LocalAttention
from lifeops.ops.locality_ffn import LocalityFFN
from lifeops.ops.token_conv.function import TokenDWConvStrided, TokenDWConvStridedWeightGrad, TokenDWConvTranspose
from lifeops.ops.token_dwconv.act_function import ChannelActivation, TokenDWConvAct
from lifeops.ops.token_dwconv.function import TokenDWConv, TokenDWConvBiasGrad, TokenDWConvInputGrad, TokenDWConvWeightGrad
from lifeops.ops.token_pool.function import TokenPool, TokenPoolGrad

__all__ = [
    "ChannelActivation",
    "DWShortcut",
    "DWShortcutStep",
    "LifeQKV",
    "LocalAttention",
    "LocalityFFN",
    "ProjectScales",
    "TokenDWConv",
    "TokenDWConvAct",
    "TokenDWConvBiasGrad",
    "TokenDWConvInputGrad",
    "TokenDWConvStrided",
    "TokenDWConvStridedWeightGrad",
    "TokenDWConvTranspose",
    "TokenDWConvWeightGrad",
    "TokenPool",
    "TokenPoolGrad",
]
