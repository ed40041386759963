"""timm VisionTransformer models. timm itself is not imported: the modules are recognised by what they have."""

from __future__ import annotations

import torch
from torch import nn

from lifeops.nn.dw_shortcut import ShortcutModule, wrap
from lifeops.nn.life import GridHolder, LifeAttention
from lifeops.nn.localvit import LocalityFeedForward, LocalViTBlock

_LOOKED_FOR = "a timm VisionTransformer: patch_embed with grid_size, num_prefix_tokens, and blocks[i].attn with qkv, proj, num_heads"


class GridHook:
    """Forward hook of the patch embedding: leaves each forward's grid where the attention modules find it."""

    def __init__(self, holder: GridHolder):
        self.holder = holder

    def __call__(self, module, args, output):
        if output.dim() == 4:  # dynamic_img_size: NHWC unless told otherwise
            nchw = str(getattr(module, "output_fmt", "NHWC")).endswith("NCHW")
            height, width = output.shape[2:4] if nchw else output.shape[1:3]
        elif hasattr(module, "dynamic_feat_size"):
            height, width = module.dynamic_feat_size(tuple(args[0].shape[-2:]))
        else:
            height, width = module.grid_size
        # torch.jit.trace gives sizes as tensors; int() would fix a compiler's symbolic ones
        self.holder.grid = tuple(int(n) if isinstance(n, torch.Tensor) else n for n in (height, width))


def _check_attention(path: str, attn: nn.Module) -> None:
    missing = [name for name in ("qkv", "proj", "num_heads") if not hasattr(attn, name)]
    if missing or not isinstance(attn.qkv, nn.Linear):
        lacks = ", ".join(missing) or "a Linear qkv"
        raise ValueError(f"convert: {path} is {type(attn).__name__} without {lacks}; looked for {_LOOKED_FOR}")
    odd = [n for n in ("q_norm", "k_norm", "norm") if not isinstance(getattr(attn, n, nn.Identity()), nn.Identity)]
    odd += [n for n in ("gate", "rope") if getattr(attn, n, None) is not None]
    if odd:
        raise ValueError(f"convert: {path} has {', '.join(odd)}, which LIFE's attention does not know (use qkv_norm=True for its own norm)")
    dim = attn.proj.in_features
    if (attn.qkv.in_features, attn.proj.out_features) != (dim, dim):
        raise ValueError(f"convert: {path} must map {dim} channels to {dim}, got {attn.qkv.in_features} to {attn.proj.out_features}")


def _replacement(attn: nn.Module, num_prefix_tokens: int, options: dict) -> LifeAttention:
    weight = attn.proj.weight
    new = LifeAttention(
        attn.proj.in_features, attn.num_heads, num_prefix_tokens, attn_drop=attn.attn_drop.p, proj_drop=attn.proj_drop.p,
        proj_bias=attn.proj.bias is not None, device=weight.device, dtype=weight.dtype, **options,
    )  # fmt: skip
    with torch.no_grad():
        for ours, theirs in zip(new.proj.parameters(), attn.proj.parameters(), strict=True):
            ours.copy_(theirs)
    for parameter in new.proj.parameters():
        parameter.requires_grad_(attn.proj.weight.requires_grad)
    return new.train(attn.training)


def _options(options: dict, known: tuple[str, ...]) -> None:
    unknown = options.keys() - set(known)
    if unknown:
        raise TypeError(f"convert: unknown options {', '.join(sorted(unknown))}; known: {', '.join(known)}, num_prefix_tokens")


def _prefix_tokens(model: nn.Module, num_prefix_tokens: int | None) -> int:
    """P of a model that looks like a ViT."""
    if not (hasattr(model, "blocks") and hasattr(getattr(model, "patch_embed", None), "grid_size")):
        raise ValueError(f"convert: {type(model).__name__} is not a known ViT; looked for {_LOOKED_FOR}")
    prefix = getattr(model, "num_prefix_tokens", None) if num_prefix_tokens is None else num_prefix_tokens
    if prefix is None:
        raise ValueError(f"convert: {type(model).__name__} does not say num_prefix_tokens; pass num_prefix_tokens=…")
    return prefix


def _replace(model: nn.Module, record, replacements: list[tuple[str, nn.Module]], with_grid: list[nn.Module]) -> None:
    """Put the new modules in place and let those of ``with_grid`` know the grid; ``record`` keeps what revert needs."""
    holder = GridHolder()
    for path, new in replacements:
        parent, _, name = path.rpartition(".")
        record.replaced.append((path, model.get_submodule(path)))
        setattr(model.get_submodule(parent), name, new)
    for module in with_grid:
        module.grid_holder = holder
    record.hook_id = model.patch_embed.register_forward_hook(GridHook(holder)).id


def convert_life(model: nn.Module, record, *, num_prefix_tokens: int | None = None, **options) -> None:
    """Replace the attention of every block; ``record`` keeps what revert needs."""
    _options(options, ("qkv_norm", "aux_key", "recompute"))
    prefix = _prefix_tokens(model, num_prefix_tokens)
    found = [(f"blocks.{i}.attn", getattr(block, "attn", None)) for i, block in enumerate(model.blocks)]
    for path, attn in found:
        _check_attention(path, attn)
    news = [(path, _replacement(attn, prefix, options)) for path, attn in found]
    _replace(model, record, news, [new for _, new in news])


def _localvit_block(path: str, block: nn.Module, prefix: int, act: str, reduction: int | None, expand_ratio: float | None) -> LocalViTBlock:
    missing = [name for name in ("norm1", "attn", "norm2", "mlp") if not hasattr(block, name)]
    if missing or not isinstance(getattr(block.mlp, "fc1", None), nn.Linear):
        lacks = ", ".join(missing) or "a Linear mlp.fc1"
        raise ValueError(f"convert: {path} is {type(block).__name__} without {lacks}; looked for a timm Block with norm1, attn, norm2, mlp")
    weight = block.mlp.fc1.weight
    hidden, dim = weight.shape
    conv = LocalityFeedForward(
        dim, hidden / dim if expand_ratio is None else expand_ratio, act, dim if reduction is None else reduction,
        num_prefix_tokens=prefix, device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    new = LocalViTBlock(block.norm1, block.attn, conv, getattr(block, "drop_path1", None), getattr(block, "ls1", None))
    new.conv.train(block.training)
    new.training = block.training
    return new


def convert_localvit(
    model: nn.Module, record, *, num_prefix_tokens: int | None = None, act: str = "hs+se", reduction: int | None = None,
    expand_ratio: float | None = None, **options,
) -> None:  # fmt: skip
    """Replace every block by one with the same attention and LocalViT's feed-forward instead of LayerNorm and MLP."""
    _options(options, ("act", "reduction", "expand_ratio"))
    prefix = _prefix_tokens(model, num_prefix_tokens)
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    news = [(path, _localvit_block(path, block, prefix, act, reduction, expand_ratio)) for path, block in blocks]
    _replace(model, record, news, [new.conv for _, new in news])


def _stages(model: nn.Module, num_prefix_tokens: int | None) -> tuple[list[str], int]:
    """Where the blocks are that shortcuts go around, and P: a ViT's, CaiT's patch blocks (no prefix there), each Swin stage's."""
    if any(isinstance(m, ShortcutModule) for m in model.modules()):
        raise ValueError(f"convert: {type(model).__name__} has DW shortcuts of its own")
    stages = list(getattr(model, "layers", ()))
    if stages and hasattr(model, "patch_embed") and all(hasattr(stage, "blocks") for stage in stages):
        return [f"layers.{i}.blocks" for i in range(len(stages))], num_prefix_tokens or 0
    if hasattr(model, "blocks_token_only"):
        num_prefix_tokens = num_prefix_tokens or 0
    return ["blocks"], _prefix_tokens(model, num_prefix_tokens)


def convert_dw_shortcut(
    model: nn.Module, record, *, num_prefix_tokens: int | None = None, every: int = 1, kernel_sizes: int | tuple[int, ...] = 3, **options
) -> None:
    """Put a shortcut around every ``every`` blocks, which stay what they are."""
    _options(options, ("every", "kernel_sizes"))
    paths, prefix = _stages(model, num_prefix_tokens)
    news = []
    for path in paths:
        blocks = model.get_submodule(path)
        wrapped = wrap(blocks, every, kernel_size=kernel_sizes, num_prefix_tokens=prefix)
        news.append((path, nn.Sequential(*wrapped) if isinstance(blocks, nn.Sequential) else wrapped))
        news[-1][1].training = blocks.training
    _replace(model, record, news, [group.shortcut for _, new in news for group in new])
