"""timm's and lifeops' own models: ``patch_embed`` (NaFlexViT: ``embeds``), and ``blocks``, or stages of blocks."""

from __future__ import annotations

from torch import nn

from lifeops.hosts.host import Host, block_of

LOOKED_FOR = "a timm model with one patch_embed and with blocks, or with layers or stages of blocks (NaFlexViT: embeds)"

ORDERS = {
    **dict.fromkeys(("Block", "RelPosBlock", "EvaBlock", "LayerScaleBlock", "LocalViTBlock", "SwinTransformerBlock"), "pre"),
    **dict.fromkeys(("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm", "SwinTransformerV2Block"), "post"),
    **dict.fromkeys(("ParallelScalingBlock", "DiffParallelScalingBlock", "ParallelThingsBlock"), "parallel"),
}
_STAGES = ("layers", "stages", "levels", "transformers")  # the last: PiT
LISTS = ("blocks", *(f"{name}.*.blocks" for name in _STAGES))
_LATE = ("blocks_token_only", "cls_attn_blocks")  # CaiT, XCiT: a class token joins behind the blocks


def _lists(trunk: nn.Module) -> tuple[str, ...]:
    """Where the blocks are."""
    if isinstance(getattr(trunk, "blocks", None), (nn.ModuleList, nn.Sequential)):
        return ("blocks",)
    for name in _STAGES:
        stages = getattr(trunk, name, None)
        if isinstance(stages, (nn.ModuleList, nn.Sequential)) and len(stages) and all(hasattr(s, "blocks") for s in stages):
            return tuple(f"{name}.{i}.blocks" for i in range(len(stages)))
    return ()


def _joins(trunk: nn.Module) -> bool:
    return any(hasattr(trunk, name) for name in _LATE)


def _embed(trunk: nn.Module) -> tuple[str, str | None] | None:
    """Where the patch embedding is, and what tells its grid if it does not."""
    if isinstance(getattr(trunk, "patch_embed", None), nn.Module):
        return "patch_embed", None
    embeds = getattr(trunk, "embeds", None)
    known = isinstance(getattr(embeds, "proj", None), nn.Module) and hasattr(embeds, "patch_size")
    return ("embeds.proj", "embeds") if known else None


def _prefix(trunk: nn.Module, staged: bool) -> int | None:
    """P in the blocks. CaiT's class token joins behind them, its ``num_prefix_tokens`` counts the result's; stages say nothing."""
    if _joins(trunk):
        return 0
    prefix = getattr(trunk, "num_prefix_tokens", None)
    if prefix is None and staged:
        cls_token = getattr(trunk, "cls_token", None)
        return 0 if cls_token is None else cls_token.shape[1]
    return prefix if isinstance(prefix, int) else None


def read(path: str, trunk: nn.Module) -> Host | str | None:
    """``trunk`` described; why not, or None where nothing of it is there."""
    found, lists = _embed(trunk), _lists(trunk)
    if found is None:
        return None
    (embed_path, teller), embed = found, trunk.get_submodule(found[0])
    if isinstance(embed, (nn.ModuleList, nn.ModuleDict)):
        return f"{type(trunk).__name__} has {len(embed)} patch embeddings"
    library = "lifeops" if type(trunk).__module__.startswith("lifeops.") else "timm"
    prefix, late = _prefix(trunk, len(lists) > 1), _joins(trunk)
    blocks = [block_of(f"{name}.{i}", b, ORDERS) for name in lists for i, b in enumerate(trunk.get_submodule(name))]
    has_cls = bool(prefix) and any(getattr(t, "cls_token", None) is not None for t in (trunk, getattr(trunk, "embeds", None)))
    return Host(library, path, trunk, embed_path, prefix, 0, has_cls, lists, blocks, int(late), late, teller)
