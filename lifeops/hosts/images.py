"""What a model takes its images with, any model's: its patch embedding, and the sizes it may have been built for."""

from __future__ import annotations

from torch import nn

from lifeops.hosts.host import Host, pair

_EMBEDDINGS = ("patch_embed", "patch_embeddings", "patch_embedding", "conv_proj", "to_patch_embedding")
_SIZES = ("img_size", "image_size", "default_img_size")
_TABLE = "pos_embed_grid_size"  # NaFlexViT, which takes images of any size
USUAL = (224, 224)
_OBLONG, _GRID = (64, 96), (4, 4)  # for stages, which end on a fraction of the image, and for one grid


def first_conv(module: nn.Module) -> nn.Conv2d | None:
    """What an image is read by first."""
    return next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)


def embedding_of(model: nn.Module, host: Host | None) -> nn.Module | None:
    """The host's, or the module called a patch embedding that holds the first convolution, or else that convolution itself."""
    if host is not None:
        return host.embed
    first = first_conv(model)
    named = (m for path, m in model.named_modules() if path.rpartition(".")[2] in _EMBEDDINGS and not isinstance(m, nn.ModuleList))
    return next((m for m in named if first is None or any(part is first for part in m.modules())), first)


def image_size(host: Host) -> tuple[int, int]:
    """(H, W) of images for ``host``: as its patch embedding or its configuration says it, else by the size of its patches."""
    embed = host.teller
    holders = embed, getattr(host.trunk, "embeddings", None), getattr(host.trunk, "config", None)
    told = next(filter(None, (pair(getattr(holder, name, None)) for holder in holders for name in _SIZES)), None)
    if told is not None or host.staged:
        return told or _OBLONG
    patch = pair(getattr(embed, "patch_size", None)) or first_conv(embed).stride
    return tuple(g * p for g, p in zip(getattr(embed, "grid_size", None) or _GRID, patch, strict=True))


def image_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """(H, W) of images, by what the model's modules and configurations say, and then what its weights are published for (timm); none
    where nothing says it.
    """
    holders = [h for m in model.modules() for h in (m, getattr(m, "config", None))]
    found = [pair(getattr(holder, name, None)) for holder in holders for name in _SIZES]
    tables = [(pair(getattr(m, _TABLE, None)), pair(getattr(m, "patch_size", None))) for m in model.modules()]
    found += [(grid[0] * patch[0], grid[1] * patch[1]) for grid, patch in tables if grid and patch]
    published = getattr(model, "pretrained_cfg", None)
    found += [pair(published.get("input_size", ())[1:])] if isinstance(published, dict) else []
    return list(dict.fromkeys(size for size in found if size and all(isinstance(n, int) for n in size)))
