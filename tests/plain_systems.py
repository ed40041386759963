"""The three systems in plain PyTorch, on tokens (B, P + H*W, C) of a known grid and prefix P, from the weights of lifeops' modules."""

import torch
import torch.nn.functional as F


def maps(x, P, grid):
    """(B, C, H, W) of the patches."""
    return x[:, P:].transpose(1, 2).unflatten(2, grid)


def tokens(x, patches, P):
    """The prefix tokens' rows are ``x``."""
    return torch.cat((x, patches.flatten(2).transpose(1, 2)), 1) if P else patches.flatten(2).transpose(1, 2)


def life_qkv(life, x, P, grid):
    """LIFE's q, k and v (B, N, C): of each scale a third, the deeper ones convolved."""
    z, scales = F.linear(x, life.scale1.weight, life.scale1.bias), []
    for scale in (None, life.scale2, life.scale3):
        if scale is not None:
            w = scale.depthwise.weight
            z = tokens(z[:, :P], F.conv2d(maps(z, P, grid), w, padding=w.shape[-1] // 2, groups=w.shape[0]), P)
            z = F.linear(z, scale.pointwise.weight.flatten(1))
        scales.append(z.chunk(3, -1))
    return [torch.cat(parts, -1) for parts in zip(*scales, strict=True)]


def _norm(n, x):
    return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)


def locality(module, x, P, grid):
    """What LocalViT's feed-forward ("hs+se", evaluation) adds to its tokens."""
    expand, n1, _, local, n2, _, se, project, n3 = module.conv
    h = F.hardswish(_norm(n1, F.conv2d(maps(x, P, grid), expand.weight)))
    h = F.hardswish(_norm(n2, F.conv2d(h, local.weight, padding=1, groups=h.shape[1])))
    first, second = (m for m in se.modules() if isinstance(m, torch.nn.Linear))
    gate = F.hardsigmoid(F.linear(F.relu(F.linear(h.mean((2, 3)), first.weight, first.bias)), second.weight, second.bias))
    return tokens(torch.zeros_like(x[:, :P]), _norm(n3, F.conv2d(h * gate[..., None, None], project.weight)), P)


def shortcut(module, x, P, grid):
    """What a shortcut of one kernel (evaluation) adds to the output of the blocks that were given ``x``."""
    (conv,), (norm,) = module.convs, module.batchnorms
    h = F.conv2d(_norm(norm, F.gelu(maps(x, P, grid))), conv.weight, conv.bias, padding=conv.kernel_size[0] // 2, groups=x.shape[2])
    return tokens(torch.zeros_like(x[:, :P]), h, P)
