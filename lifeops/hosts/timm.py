"""timm's and lifeops' own models: ``patch_embed`` (NaFlexViT: ``embeds``), and ``blocks``, or stages of blocks."""

from __future__ import annotations

from torch import nn

from lifeops.hosts.host import Host, block_of

LOOKED_FOR = "a timm model with one patch_embed and with blocks, or with layers or stages of blocks (NaFlexViT: embeds)"

_ORDERS = {
    **dict.fromkeys(("Block", "RelPosBlock", "EvaBlock", "LayerScaleBlock", "LocalViTBlock", "SwinTransformerBlock", "XCABlock"), "pre"),
    **dict.fromkeys(("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm"), "post"),
    **dict.fromkeys(("SwinTransformerV2Block", "SwinTransformerV2CrBlock"), "post"),
    **dict.fromkeys(("ParallelScalingBlock", "DiffParallelScalingBlock", "ParallelThingsBlock"), "parallel"),
}
_KINDS = nn.ModuleList, nn.Sequential
_EMBEDS = {"patch_embed": "", "patch_embeds": ".0", "patch_embed1": "", "pixel_embed": ""}  # the first one's: Twins, CoaT, TNT
_STAGES = ("layers", "stages", "levels", "transformers")  # the last: PiT
_LATE = ("blocks_token_only", "cls_attn_blocks")  # CaiT, XCiT: a class token joins behind the blocks
_BLOCKS = ("blocks", "transformer_encoder")  # of a stage; NesT
_SCALES = ("serial_blocks1", "serial_blocks2", "serial_blocks3", "serial_blocks4", "parallel_blocks")  # CoaT
LISTS = ("blocks", *(f"{name}.*.blocks" for name in _STAGES), *_SCALES[::4])
_EMBEDS_IN = "_forward_embeds"  # NaFlexViT
_FLOWS = {"pixel_embed": "pixels", "transformer_encoder": "squares", "parallel_blocks": "scales"}


def _lists(trunk: nn.Module) -> tuple[str, ...]:
    """Where the blocks are."""
    blocks = getattr(trunk, "blocks", None)
    if isinstance(blocks, _KINDS):
        nested = hasattr(trunk, "patch_embeds") and all(isinstance(stage, _KINDS) for stage in blocks)
        return tuple(f"blocks.{i}" for i in range(len(blocks))) if nested else ("blocks",)
    if hasattr(trunk, _SCALES[0]):
        return tuple(name for name in _SCALES if isinstance(getattr(trunk, name, None), _KINDS))
    for name in _STAGES:
        stages = getattr(trunk, name, None)
        inner = next((n for n in _BLOCKS if isinstance(stages, _KINDS) and len(stages) and all(hasattr(s, n) for s in stages)), None)
        if inner is not None:
            return tuple(f"{name}.{i}.{inner}" for i in range(len(stages)))
    return ()


def _joins(trunk: nn.Module) -> bool:
    return any(hasattr(trunk, name) for name in _LATE)


def _embed(trunk: nn.Module) -> tuple[str, str | None] | None:
    """Where the patch embedding is, and what tells its grid if it does not."""
    for name, first in _EMBEDS.items():
        if isinstance(getattr(trunk, name, None), nn.Module):
            return name + first, None
    embeds = getattr(trunk, "embeds", None)  # NaFlexViT
    known = isinstance(getattr(embeds, "proj", None), nn.Module) and hasattr(embeds, "patch_size")
    return ("embeds.proj", "embeds") if known else None


def _has_cls(trunk: nn.Module) -> bool:
    holders = trunk, getattr(trunk, "embeds", None)
    return any(getattr(holder, name, None) is not None for holder in holders for name in ("cls_token", "cls_token1"))


def _prefix(trunk: nn.Module, staged: bool) -> int | None:
    """P in the blocks. CaiT's class token joins behind them, its ``num_prefix_tokens`` counts the result's; stages say nothing."""
    if _joins(trunk):
        return 0
    if type(trunk).__name__ == "VisionTransformerSAM":  # which has no tokens beside the patches, and does not say it
        return 0
    prefix = getattr(trunk, "num_prefix_tokens", None)
    if prefix is None and staged:
        cls_token = getattr(trunk, "cls_token", getattr(trunk, "cls_token1", None))
        return 0 if cls_token is None else cls_token.shape[1]
    return prefix if isinstance(prefix, int) else None


def _grid_from(embed: str, lists: tuple[str, ...], blocks: list[nn.Module]) -> str:
    """Where the blocks' grid comes from: see :data:`lifeops.hosts.host.GRIDS`."""
    if embed == "pixel_embed":
        return "model"
    if len(lists) > 1:
        return "pools" if lists[0].startswith("transformers.") else "call"
    return "call" if {type(b).__name__ for b in blocks} == {"XCABlock"} else "embedding"


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
    modules = {f"{name}.{i}": b for name in lists for i, b in enumerate(trunk.get_submodule(name))}
    flows = {name: _FLOWS.get(embed_path, _FLOWS.get(name.rpartition(".")[2], "tokens")) for name in lists}
    blocks = [block_of(place, b, _ORDERS, flows[place.rpartition(".")[0]]) for place, b in modules.items()]
    picks = ("patch_drop",) if hasattr(getattr(trunk, "patch_drop", None), "prob") else ()
    return Host(
        library, path, trunk, embed_path, prefix, 0, bool(prefix) and _has_cls(trunk), lists, blocks, late=int(late), late_cls=late,
        teller_path=teller, grid_from=_grid_from(embed_path, lists, list(modules.values())), apart=embed_path == "patch_embeds.0",
        embeds_in=_EMBEDS_IN if hasattr(trunk, _EMBEDS_IN) else None, picks=picks,
    )  # fmt: skip
