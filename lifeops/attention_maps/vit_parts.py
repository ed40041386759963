"""Where a Vision Transformer keeps its patch grid, its prefix tokens, its last tokens and its classifier: timm, lifeops, transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lifeops.arguments import check_floating, got, is_dense
from lifeops.attention_maps.pool_heads import PoolHead
from lifeops.hosts.host import pair
from lifeops.hosts.transformers import CLS, EMBEDS, prefix_of
from lifeops.nn.embedded_grid import embedded_grid
from lifeops.nn.inputs import check_like


class Parts:
    """What :func:`lifeops.rollout` asks of a model."""

    def __init__(self, model: nn.Module, host: nn.Module, embed: nn.Module, images: Tensor, num_prefix_tokens: int | None):
        self.model, self.host, self.embed = model, host, embed
        self.batch, self.image_size = images.shape[0], tuple(images.shape[-2:])
        self.embedded, self.features = None, None
        self.holder = getattr(host, "embeddings", getattr(host, "embeds", None))  # of the embedding, where it is not the host
        self.pool: PoolHead | None = None
        self.num_prefix_tokens = _num_prefix_tokens(host) if num_prefix_tokens is None else num_prefix_tokens

    @property
    def has_cls(self) -> bool:
        owner = self.host if self.holder is None else self.holder
        return self.num_prefix_tokens > 0 and any(getattr(owner, name, None) is not None for name in CLS)

    @property
    def first_prefix(self) -> int:
        """How many prefix tokens the first layer sees: CaiT's class token joins late."""
        return 0 if hasattr(self.host, "blocks_token_only") else self.num_prefix_tokens

    def grid(self) -> tuple[int, int]:
        """(H, W) of the patches of the forward pass."""
        if self.holder is not None:
            told = self.embed.stride if isinstance(self.embed, nn.Conv2d) else getattr(self.holder, "patch_size", None)
            patch = pair(getattr(self.embed, "patch_size", told))
            if patch is None:
                raise ValueError(f"rollout: {type(self.embed).__name__}, the patch embedding, does not say its patch_size")
            return self.image_size[0] // patch[0], self.image_size[1] // patch[1]
        if self.embedded is None:
            raise ValueError(f"rollout: {type(self.embed).__name__}, the patch embedding of {type(self.host).__name__}, has not run")
        return tuple(self.embedded)

    def norm(self) -> nn.Module:
        """The module whose output the classifier reads."""
        for name in ("layernorm", "norm"):
            if isinstance(getattr(self.host, name, None), nn.Module):
                return getattr(self.host, name)
        raise ValueError(f"rollout: {type(self.host).__name__} has no final norm whose tokens could be classified; give token_logits=…")

    def token_logits(self) -> Tensor:
        """(B, H*W, K): the model's classifiers on its last patch tokens, their mean where there are two (DeiT)."""
        x = self.features
        x = x.flatten(1, 2) if x.dim() == 4 else x[:, self.num_prefix_tokens :]
        fc_norm = getattr(self.host, "fc_norm", None)
        x = fc_norm(x) if isinstance(fc_norm, nn.Module) else x
        heads = _classifiers(self.model, self.host)
        wrong = [h for h in heads if h.in_features != x.shape[-1]]
        if not heads or wrong:
            why = "it has no linear classifier"
            why = f"its classifier reads {wrong[0].in_features} features, a token has {x.shape[-1]}" if wrong else why
            raise ValueError(f"rollout: {type(self.model).__name__} cannot classify its tokens one by one: {why}; give token_logits=…")
        return torch.stack([head(x) for head in heads]).mean(0)


def _classifiers(model: nn.Module, host: nn.Module) -> list[nn.Linear]:
    names = ("head", "head_dist", "classifier", "cls_classifier", "distillation_classifier")
    found = {id(m): m for owner in (model, host) for m in (getattr(owner, name, None) for name in names) if m is not None}
    inner = [getattr(m, "fc", m) for m in found.values()]  # timm's ClassifierHead
    return [m for m in inner if isinstance(m, nn.Linear)]


def _num_prefix_tokens(host: nn.Module) -> int:
    if hasattr(host, "embeddings"):
        return prefix_of(host.embeddings)
    return getattr(host, "num_prefix_tokens", 0)


def parts_of(model: nn.Module, images, num_prefix_tokens: int | None) -> Parts:
    """Raises ValueError if there is no patch embedding or no image."""
    images = images.get("pixel_values") if isinstance(images, Mapping) else images
    if not is_dense(images) or images.dim() != 4:
        expected = "dense (B, channels, height, width) or a mapping with such pixel_values"
        raise ValueError(f"rollout: images must be {expected}, got {got(images)}")
    for host in model.modules():
        if isinstance(getattr(host, "patch_embed", None), (nn.ModuleList, nn.ModuleDict)):
            found = f"{len(host.patch_embed)} patch embeddings"
            raise ValueError(f"rollout: {type(host).__name__} has {found}, so no grid holds its tokens; looked for a single patch_embed")
        if isinstance(getattr(host, "patch_embed", None), nn.Module):
            return Parts(model, host, host.patch_embed, images, num_prefix_tokens)
        inner = (getattr(getattr(host, "embeddings", None), name, None) for name in EMBEDS)
        if (embed := next((m for m in inner if isinstance(m, nn.Module)), None)) is not None:
            return Parts(model, host, embed, images, num_prefix_tokens)
        if isinstance(getattr(getattr(host, "embeds", None), "proj", None), nn.Module) and hasattr(host.embeds, "patch_size"):
            return Parts(model, host, host.embeds.proj, images, num_prefix_tokens)
    looked_for = f"patch_embed (timm, lifeops) or embeddings with {' or '.join(EMBEDS)} (transformers) or embeds (NaFlexViT)"
    raise ValueError(f"rollout: {type(model).__name__} has no {looked_for}")


def _check_embedded(embed: nn.Module, args: tuple) -> None:
    """What reaches the patch embedding: a model may have made floats of its images before."""
    x = args[0] if args else None
    if isinstance(x, Tensor):
        check_floating("rollout", "images", x)
        check_like("rollout", "images", x, getattr(embed, "proj", None))


@contextlib.contextmanager
def watched(parts: Parts, features: bool) -> Iterator[None]:
    """Notes the grid of the forward pass and, if asked for, the last tokens."""
    def embedded(module, args, output):
        parts.embedded = embedded_grid(module, args, output)

    handles = [parts.embed.register_forward_pre_hook(_check_embedded)]
    handles += [] if parts.holder is not None else [parts.embed.register_forward_hook(embedded)]
    handles += [] if parts.pool is None else parts.pool.hooks()
    if features:
        handles.append(parts.norm().register_forward_hook(lambda module, args, output: setattr(parts, "features", output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
