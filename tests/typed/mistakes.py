"""Right and wrong calls: what `mypy --strict` must find stands behind each line, and nothing else; see tests/test_typing.py. Never run."""

import torch
from torch import Tensor, nn

import lifeops
from lifeops.models import VisionTransformer

x, weight = torch.randn(2, 18, 48), torch.randn(48, 1, 3, 3)
model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)

y: Tensor = lifeops.token_dwconv(x, weight, grid=(4, 4), num_prefix_tokens=2, prefix="drop", backend="cpu")
sums = lifeops.token_dwconv(x, weight, grid=(4, 4), num_prefix_tokens=2, stats=True).mean
q, k, v = lifeops.token_dwconv_multi(x, [weight] * 3, strides=[1, 2, 2], grid=(4, 4), num_prefix_tokens=2)
finer: Tensor = lifeops.token_dwconv_transpose(x, weight, grid=(4, 4), num_prefix_tokens=2, stride=2)
pooled: Tensor = lifeops.token_pool(x, 3, mode="avg", stride=2, grid=(4, 4), num_prefix_tokens=2)
height, width = lifeops.conv_grid((14, 14), 3, stride=2)
same: VisionTransformer = lifeops.fuse_(lifeops.revert(lifeops.convert(model, "life", qkv_norm=True)))
maps = lifeops.rollout(model, torch.randn(2, 3, 32, 32), "cls").maps
layer = lifeops.nn.LifeAttention(48, 3, grid=(4, 4), dtype=torch.float64)
conv: nn.Conv2d = lifeops.init.impulse_conv_(nn.Conv2d(8, 8, 3, groups=8))

lifeops.token_dwconv(x, weight)  # error: call-overload
lifeops.token_dwconv(x, weight, grid=4)  # error: call-overload
lifeops.token_dwconv(x, weight, grid=(4, 4), prefix="bypass")  # error: call-overload
lifeops.token_dwconv(x, weight, grid=(4, 4), backend="gpu")  # error: call-overload
lifeops.token_dwconv(x, weight, grid=(4, 4)).mean.item()  # error: attr-defined
lifeops.token_dwconv_multi(x, weight[0], grid=(4, 4), strides="2")  # error: arg-type
lifeops.token_dwconv_transpose(x, weight, grid=(4, 4))  # error: call-arg
lifeops.token_pool(x, 3, mode="mean", grid=(4, 4))  # error: arg-type
lifeops.local_attention(x, x, x, grid=(4, 4), dropout=0.1)  # error: call-arg
lifeops.life_qkv(x, weight, None, weight, weight, weight, weight, grid=(4, 4), aux_key="first")  # error: arg-type
lifeops.rollout_step(x, x, x, head_fusion="median")  # error: arg-type
lifeops.conv_grid(14, 3)  # error: arg-type
lifeops.convert(model, "lief")  # error: call-overload
lifeops.convert(model, "life", every=2)  # error: call-overload
lifeops.convert(model, "life", start="identity")  # error: call-overload
lifeops.convert(model, "localvit", act="gelu")  # error: call-overload
lifeops.convert(model, "dw_shortcut", kernel_sizes="3")  # error: call-overload
lifeops.convert("vit")  # error: call-overload
wrong: nn.Linear = lifeops.revert(model)  # error: assignment
lifeops.rollout(model, x, prefix="drop")  # error: arg-type
lifeops.use_backend("gpu")  # error: arg-type
lifeops.load_official(3)  # error: arg-type
lifeops.init.structured_(model, "random")  # error: arg-type
lifeops.nn.LifeAttention(48, 3, grid=4)  # error: arg-type
lifeops.nn.LocalityFeedForward(48, act="gelu")  # error: arg-type
lifeops.nn.ConvProjectionAttention(48, method="conv")  # error: arg-type
lifeops.nn.PoolingAttention(48, mode="mean")  # error: arg-type
lifeops.nn.DWShortcut(48, kernal_size=3)  # error: call-arg
lifeops.models.RegionViT(stem="2conv")  # error: arg-type
lifeops.ChannelAct(act="swish")  # error: arg-type
