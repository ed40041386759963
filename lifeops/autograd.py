"""The autograd Functions of the ops.

Each is made of ops whose own gradients are these Functions again, so double backward, ``torch.func.grad`` and ``vmap`` work;
ChannelActivation, LocalAttention, LocalityFFN and TokenDWConvAct, which are not bilinear, are differentiable once. Only
``save_for_backward`` holds tensors, and only those a needed gradient reads.
"""

from lifeops.ops.dw_shortcut import DWShortcut, DWShortcutStep
from lifeops.ops.life_qkv_function import LifeQKV
from lifeops.ops.local_attention_function import LocalAttention
from lifeops.ops.locality_ffn import LocalityFFN
from lifeops.ops.project_scales import ProjectScales
from lifeops.ops.token_dwconv_act_function import ChannelActivation, TokenDWConvAct
from lifeops.ops.token_dwconv_function import TokenDWConv, TokenDWConvBiasGrad, TokenDWConvInputGrad, TokenDWConvWeightGrad

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
    "TokenDWConvWeightGrad",
]
