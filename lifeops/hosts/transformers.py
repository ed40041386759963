"""transformers' models: ``embeddings`` with a patch embedding inside, and a list of layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lifeops.hosts.host import Host, block_of, pair

LOOKED_FOR = (
    "a transformers model with embeddings.patch_embeddings (or patch_embedding, patch_embed) and a list of layers, or stages, or with"
    " patch_embed and layers that have attn and a window_size (SAM)"
)

_EMBEDS = ("patch_embeddings", "patch_embedding", "patch_embed")
LISTS = ("layers", "layer", "encoder.layer", "encoder.layers", "model.layer", "model.layers")
_STAGES = ("encoder.layers", "stages")
_CLS = ("cls_token", "class_embedding")
_PREFIX = (*_CLS, "distillation_token", "register_tokens")
SUFFIX = ("detection_tokens",)
_PRE = (
    "ViTLayer", "DeiTLayer", "Dinov2Layer", "Dinov2WithRegistersLayer", "DINOv3ViTLayer", "CLIPEncoderLayer", "SiglipEncoderLayer",
    "BlipEncoderLayer", "Aimv2EncoderLayer", "ViTMAELayer", "ViTMSNLayer", "IJepaLayer", "BeitLayer", "Data2VecVisionLayer", "YolosLayer",
    "DPTViTLayer", "EomtLayer", "VitDetLayer", "VitPoseBackboneLayer", "SamVisionLayer", "Siglip2EncoderLayer", "MetaClip2EncoderLayer",
    "SamHQVisionLayer", "ChineseCLIPVisionLayer", "CLIPSegEncoderLayer", "AltCLIPEncoderLayer", "MLCDEncoderLayer", "OwlViTEncoderLayer",
    "Owlv2EncoderLayer", "Blip2EncoderLayer", "InstructBlipEncoderLayer", "GitVisionEncoderLayer", "FlavaLayer", "PixioLayer",
    "InternVLVisionLayer", "Idefics2EncoderLayer", "Idefics3EncoderLayer", "SmolVLMEncoderLayer", "InstructBlipVideoEncoderLayer",
    "JanusVisionEncoderLayer", "Kosmos2VisionEncoderLayer", "Ovis2VisionEncoderLayer", "Phi4MultimodalVisionEncoderLayer",
    "Sapiens2Layer", "Step3p7VisionEncoderLayer", "Tipsv2VisionLayer", "GotOcr2VisionLayer", "DeepseekOcr2SamVisionLayer",
    "UnlimitedOcrSamVisionLayer", "SLANeXtVisionLayer", "PPFormulaNetVisionLayer", "Sam3ViTLayer",
)  # fmt: skip
_ORDERS = dict.fromkeys(_PRE, "pre")


def _list(trunk: nn.Module) -> str | None:
    """Where the layers are: directly, or inside an encoder."""
    return next((name for name in LISTS if _filled(trunk, name)), None)


def _filled(trunk: nn.Module, name: str) -> nn.ModuleList | None:
    found = _at(trunk, name)
    return found if isinstance(found, nn.ModuleList) and len(found) else None


def _at(trunk: nn.Module, path: str):
    """What is there, or None."""
    for part in path.split("."):
        trunk = getattr(trunk, part, None)
    return trunk


def _stages(trunk: nn.Module) -> tuple[str, tuple[str, ...]] | None:
    """Where patch embedding and lists of blocks are in a model of stages, whose blocks are told their grid: Swin, PVT, SegFormer."""
    if _filled(trunk, "encoder.patch_embeddings") and (lists := _filled(trunk, "encoder.block")):  # PVT
        return "encoder.patch_embeddings.0", tuple(f"encoder.block.{i}" for i in range(len(lists)))
    for name in _STAGES:
        stages = _filled(trunk, name) or ()
        inside = [f"{holder}.{n}" for holder in ("embeddings", f"{name}.0") for n in _EMBEDS]
        embed = next((place for place in inside if isinstance(_at(trunk, place), nn.Module)), None)
        if stages and embed and all(hasattr(stage, "blocks") for stage in stages):
            return embed, tuple(f"{name}.{i}.blocks" for i in range(len(stages)))
    return None


def _count(embeddings: nn.Module, names: tuple[str, ...]) -> int:
    """Tokens that the embeddings put beside the patches; class_embedding may be a vector."""
    tokens = [t for t in (getattr(embeddings, name, None) for name in names) if t is not None]
    return sum(1 if t.dim() == 1 else t.shape[-2] for t in tokens)


def read(path: str, trunk: nn.Module) -> Host | str | None:
    """``trunk`` described; why not, or None where nothing of it is there."""
    staged = _stages(trunk)
    if staged is not None:
        embed, lists = staged
        blocks = [block_of(f"{name}.{i}", layer, _ORDERS) for name in lists for i, layer in enumerate(trunk.get_submodule(name))]
        embeddings = _filled(trunk, "encoder.patch_embeddings") or ()  # PVT's class token joins in the last stage
        prefixes = tuple(_count(e, _CLS) for e in embeddings)
        return Host("transformers", path, trunk, embed, 0, 0, any(prefixes), lists, blocks, grid_from="call", prefixes=prefixes)
    embeddings = getattr(trunk, "embeddings", None)
    name = next((n for n in _EMBEDS if isinstance(getattr(embeddings, n, None), nn.Module)), None)
    if name is None:
        return _maps(path, trunk)
    layers = _list(trunk)
    lists = () if layers is None else (layers,)
    blocks = [block_of(f"{layers}.{i}", layer, _ORDERS) for i, layer in enumerate(trunk.get_submodule(layers) if lists else ())]
    late = getattr(getattr(trunk, "query", None), "num_embeddings", 0)  # EoMT
    has_cls = any(getattr(embeddings, n, None) is not None for n in _CLS)
    counts = _count(embeddings, _PREFIX), _count(embeddings, SUFFIX)
    picks = ("embeddings",) if hasattr(embeddings, "random_masking") else ()
    return Host("transformers", path, trunk, f"embeddings.{name}", *counts, has_cls, lists, blocks, late=late, picks=picks)


def _maps(path: str, trunk: nn.Module) -> Host | None:
    """SAM and its kin, whose layers, some of them windowed, see maps and nothing beside them: an encoder with patch_embed and layers."""
    layers = getattr(trunk, "layers", None)
    known = isinstance(layers, nn.ModuleList) and isinstance(getattr(trunk, "patch_embed", None), nn.Module)
    if not known or not all(hasattr(layer, "window_size") and hasattr(layer, "attn") for layer in layers):
        return None
    blocks = [block_of(f"layers.{i}", layer, _ORDERS) for i, layer in enumerate(layers)]
    return Host("transformers", path, trunk, "patch_embed", 0, 0, False, ("layers",), blocks)


def resized_positions(host: Host | None, grid: tuple[int, int]) -> Callable[[], Tensor] | None:
    """Gives (H*W, C), the patches' position embeddings for ``grid`` as the host's own method resizes its table; None without one."""
    embeddings = getattr(host and host.trunk, "embeddings", None)
    patch = pair(getattr(embeddings and host.embed, "patch_size", None))
    if not hasattr(embeddings, "interpolate_pos_encoding") or patch is None:
        return None
    (H, W), (height, width) = grid, patch

    def resized() -> Tensor:
        like = next(embeddings.parameters())
        tokens = like.new_empty(1, (host.prefix > 0) + H * W, 1).expand(-1, -1, embeddings.position_embeddings.shape[-1])
        return embeddings.interpolate_pos_encoding(tokens, H * height, W * width)[0, -H * W :]

    return resized
