"""transformers' models: ``embeddings`` with a patch embedding inside, and a list of layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lifeops.hosts.host import Host, block_of, pair

LOOKED_FOR = "a transformers model with embeddings.patch_embeddings (or patch_embedding, patch_embed) and a list of layers"

EMBEDS = ("patch_embeddings", "patch_embedding", "patch_embed")
LISTS = ("layers", "layer", "encoder.layer", "encoder.layers", "model.layer", "model.layers")
CLS = ("cls_token", "class_embedding")
_PREFIX = (*CLS, "distillation_token", "register_tokens")
_SUFFIX = ("detection_tokens",)
_PRE = (
    "ViTLayer", "DeiTLayer", "Dinov2Layer", "Dinov2WithRegistersLayer", "DINOv3ViTLayer", "CLIPEncoderLayer", "SiglipEncoderLayer",
    "BlipEncoderLayer", "Aimv2EncoderLayer", "ViTMAELayer", "ViTMSNLayer", "IJepaLayer", "BeitLayer", "Data2VecVisionLayer", "YolosLayer",
    "DPTViTLayer", "EomtLayer", "VitDetLayer", "VitPoseBackboneLayer", "SamVisionLayer", "Siglip2EncoderLayer", "MetaClip2EncoderLayer",
)  # fmt: skip
ORDERS = dict.fromkeys(_PRE, "pre")


def _list(trunk: nn.Module) -> str | None:
    """Where the layers are: directly, or inside an encoder."""
    for name in LISTS:
        found = trunk
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList) and len(found):
            return name
    return None


def _count(embeddings: nn.Module, names: tuple[str, ...]) -> int:
    """Tokens that the embeddings put beside the patches; class_embedding may be a vector."""
    tokens = [t for t in (getattr(embeddings, name, None) for name in names) if t is not None]
    return sum(1 if t.dim() == 1 else t.shape[-2] for t in tokens)


def prefix_of(embeddings: nn.Module) -> int:
    """How many tokens the embeddings put before the patches."""
    return _count(embeddings, _PREFIX)


def read(path: str, trunk: nn.Module) -> Host | str | None:
    """``trunk`` described; why not, or None where nothing of it is there."""
    embeddings = getattr(trunk, "embeddings", None)
    name = next((n for n in EMBEDS if isinstance(getattr(embeddings, n, None), nn.Module)), None)
    if name is None:
        return None
    layers = _list(trunk)
    lists = () if layers is None else (layers,)
    blocks = [block_of(f"{layers}.{i}", layer, ORDERS) for i, layer in enumerate(trunk.get_submodule(layers) if lists else ())]
    late = getattr(getattr(trunk, "query", None), "num_embeddings", 0)  # EoMT
    has_cls = any(getattr(embeddings, n, None) is not None for n in CLS)
    counts = prefix_of(embeddings), _count(embeddings, _SUFFIX)
    return Host("transformers", path, trunk, f"embeddings.{name}", *counts, has_cls, lists, blocks, late)


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
