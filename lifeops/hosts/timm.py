"""timm's and lifeops' own models: ``patch_embed``, and ``blocks``, or stages of blocks."""

from __future__ import annotations

from torch import nn

from lifeops.hosts.host import Host, block_of

LOOKED_FOR = "a timm model with one patch_embed and with blocks, or with layers or stages of blocks"

ORDERS = {
    **dict.fromkeys(("Block", "RelPosBlock", "EvaBlock", "LayerScaleBlock", "LocalViTBlock", "SwinTransformerBlock"), "pre"),
    **dict.fromkeys(("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm", "SwinTransformerV2Block"), "post"),
    **dict.fromkeys(("ParallelScalingBlock", "DiffParallelScalingBlock", "ParallelThingsBlock"), "parallel"),
}
_LISTS = nn.ModuleList, nn.Sequential
_EMBEDS = ("patch_embed", "patch_embeds", "patch_embed1", "pixel_embed", "embeds")  # Twins, CoaT, TNT, NaFlexViT
_STAGES = ("layers", "stages", "levels", "transformers")  # the last: PiT
_BLOCKS = ("blocks", "transformer_encoder")  # of a stage; NesT
_SCALES = ("serial_blocks1", "serial_blocks2", "serial_blocks3", "serial_blocks4", "parallel_blocks")  # CoaT
_FLOWS = {"pixel_embed": "pixels", "transformer_encoder": "squares", "parallel_blocks": "scales"}


def _embed(trunk: nn.Module) -> str | None:
    """Where the patch embedding is; the first one's."""
    name = next((n for n in _EMBEDS if isinstance(getattr(trunk, n, None), nn.Module)), None)
    return "patch_embeds.0" if name == "patch_embeds" else name


def _lists(trunk: nn.Module) -> tuple[str, ...]:
    """Where the blocks are."""
    blocks = getattr(trunk, "blocks", None)
    if isinstance(blocks, _LISTS):
        nested = hasattr(trunk, "patch_embeds") and all(isinstance(stage, _LISTS) for stage in blocks)
        return tuple(f"blocks.{i}" for i in range(len(blocks))) if nested else ("blocks",)
    if hasattr(trunk, _SCALES[0]):
        return tuple(name for name in _SCALES if isinstance(getattr(trunk, name, None), _LISTS))
    for name in _STAGES:
        stages = getattr(trunk, name, None)
        inner = next((n for n in _BLOCKS if isinstance(stages, _LISTS) and len(stages) and all(hasattr(s, n) for s in stages)), None)
        if inner is not None:
            return tuple(f"{name}.{i}.{inner}" for i in range(len(stages)))
    return ()


def _prefix(trunk: nn.Module, staged: bool) -> int | None:
    """P in the blocks. CaiT's class token joins behind them, its ``num_prefix_tokens`` counts the result's; stages say nothing."""
    if hasattr(trunk, "blocks_token_only") or hasattr(trunk, "cls_attn_blocks"):
        return 0
    prefix = getattr(trunk, "num_prefix_tokens", None)
    if prefix is None and staged:
        cls_token = getattr(trunk, "cls_token", getattr(trunk, "cls_token1", None))
        return 0 if cls_token is None else cls_token.shape[1]
    return prefix if isinstance(prefix, int) else None


def _grid_from(trunk: nn.Module, embed: str, lists: tuple[str, ...], blocks: list[nn.Module]) -> str:
    """Where the blocks' grid comes from: see :data:`lifeops.hosts.host.GRIDS`."""
    if embed == "pixel_embed":
        return "model"
    if len(lists) > 1:
        return "pools" if lists[0].startswith("transformers.") else "call"
    return "call" if {type(b).__name__ for b in blocks} == {"XCABlock"} else "embedding"


def read(path: str, trunk: nn.Module) -> Host | str | None:
    """``trunk`` described; why not, or None where nothing of it is there."""
    embed, lists = _embed(trunk), _lists(trunk)
    if embed is None or not lists:
        return None
    if isinstance(trunk.get_submodule(embed), (nn.ModuleList, nn.ModuleDict)):
        return f"{type(trunk).__name__} has {len(trunk.get_submodule(embed))} patch embeddings"
    library = "lifeops" if type(trunk).__module__.startswith("lifeops.") else "timm"
    prefix = _prefix(trunk, len(lists) > 1)
    modules = {f"{name}.{i}": b for name in lists for i, b in enumerate(trunk.get_submodule(name))}
    flows = {name: _FLOWS.get(embed, _FLOWS.get(name.rpartition(".")[2], "tokens")) for name in lists}
    blocks = [block_of(place, b, ORDERS, flows[place.rpartition(".")[0]]) for place, b in modules.items()]
    has_cls = bool(prefix) and any(getattr(trunk, name, None) is not None for name in ("cls_token", "cls_token1"))
    grid_from = _grid_from(trunk, embed, lists, list(modules.values()))
    return Host(library, path, trunk, embed, prefix, 0, has_cls, lists, blocks, grid_from, apart=embed == "patch_embeds.0")
