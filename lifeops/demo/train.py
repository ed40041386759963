"""One training run of the demo: a small DeiT, plain or with local structure, from scratch, on few images.

How the settings were chosen (``Recipe``). Patch 2 gives 4 x 4 patches: four times cheaper than patch 1, and the plain model
learns faster with it. Width 48 is 16 per head. Depth 2 does as well as depth 3 and 4 did within the same time. Learning rate
and weight decay were tuned for the *plain* model alone, on validation images (what a training set leaves of the pool) with
training sets of 100 and 1000: rates 1 to 10e-3, decays 0.05 to 2, 500 and 800 steps; rate 6e-3 with decay 1 was best, or
level with the best, for both lengths. The customary decay of 0.05 costs the plain model some 15 points at 100 images. Shifting
images by a pixel at random never helped and cost the plain model points, so there is no augmentation. LIFE has the same
settings; they are about as good for it as any that were tried. The other systems have them too, untuned. There is
no teacher: both heads learn the labels.

500 steps keep the demo near two minutes; part of what it shows is that LIFE learns faster. Accuracy after 800 steps (3 seeds,
training sets of 50, 100, 300, 1000): plain 53.8, 70.8, 89.9, 94.9 and LIFE 66.0, 79.1, 90.7, 95.0, so that the advantage at
50 and 100 images stays and the one at 300 and 1000 does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from lifeops.demo import data
from lifeops.demo.data import Images
from lifeops.init import structured_
from lifeops.models.deit import Attention, Block, VisionTransformer
from lifeops.models.edgevit import LGLBlock
from lifeops.models.regionvit import RegionViT, regionvit
from lifeops.models.swin_v2 import SwinTransformerV2, life_swinv2
from lifeops.nn import (
    ConvFeedForward,
    ConvProjectionAttention,
    DWShortcut,
    LifeAttention,
    LocalityFeedForward,
    LocalViTBlock,
    PoolingAttention,
)
from lifeops.nn.eager_conv_ffn import EagerConvFeedForward
from lifeops.nn.eager_cvt import EagerConvProjectionAttention
from lifeops.nn.eager_dw_shortcut import EagerDWShortcut
from lifeops.nn.eager_edgevit import EagerLGLBlock
from lifeops.nn.eager_hosts import EagerCosineWindowAttention
from lifeops.nn.eager_life import EagerLifeAttention
from lifeops.nn.eager_localvit import EagerLocalityFeedForward
from lifeops.nn.eager_mvit import EagerPoolingAttention
from lifeops.nn.eager_regionvit import EagerRegionStage
from lifeops.nn.shortcut_blocks import ShortcutBlocks


def _localvit_block(feed_forward):
    """A block factory for the host: plain attention and a feed-forward whose squeeze is as wide as the MLP ratio, 4."""

    def block(dim, num_heads, num_prefix_tokens, drop_path):
        conv = feed_forward(dim, reduction=dim, num_prefix_tokens=num_prefix_tokens)
        return LocalViTBlock(nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads), conv, drop_path)

    return block


def _shortcut_block(shortcut):
    """A block factory for the host: its plain block and a shortcut around it."""

    def block(dim, num_heads, num_prefix_tokens, drop_path):
        plain = Block(dim, Attention(dim, num_heads), 4.0, 1e-6, drop_path)
        return ShortcutBlocks([plain], shortcut(dim, num_prefix_tokens=num_prefix_tokens))

    return block


def _conv_ffn_block(feed_forward):
    """A block factory for the host: a plain block with PVTv2's feed-forward, or the authors'."""

    def block(dim, num_heads, num_prefix_tokens, drop_path):
        def mlp(dim, hidden_dim):
            return feed_forward(dim, hidden_dim / dim, num_prefix_tokens)

        return Block(dim, Attention(dim, num_heads), 4.0, 1e-6, drop_path, mlp)

    return block


def _sparse_block(block):
    """A block factory for the host: EdgeViT's, which attends from every second token of a row and of a column."""
    return lambda dim, num_heads, num_prefix_tokens, drop_path: block(dim, num_heads, 2, num_prefix_tokens)


def _pooling_attention(dim, num_heads, num_prefix_tokens):
    """MViT's, with keys and values on half the grid."""
    return PoolingAttention(dim, num_heads, num_prefix_tokens, stride_kv=2)


def _stages_as_authors(model):
    model.layers = nn.ModuleList(map(EagerRegionStage, model.layers))
    return model


def _windows_as_authors(model):
    for block in (block for stage in model.layers for block in stage.blocks):
        block.attn = EagerCosineWindowAttention(block.attn)
    return model


class System(NamedTuple):
    """What the demo compares with the plain model: ``name``, and ``eager``, the same as its authors run it."""

    name: str
    label: str
    eager: str

    @property
    def trained(self) -> tuple[str, str]:
        return "plain", self.name

    @property
    def tiny(self) -> str:
        """The models of published sizes."""
        return f"{WHOLE[self.name].published} and DeiT-Tiny" if self.name in WHOLE else "DeiT-Tiny"

    @property
    def labels(self) -> dict[str, str]:
        """Every model that is measured."""
        return {"plain": "plain", self.eager: f"{self.label} (authors)", self.name: f"{self.label} (lifeops)"}


SYSTEMS = {
    s.name: s
    for s in (
        System("life", "LIFE", "eager"),
        System("localvit", "LocalViT", "eager_localvit"),
        System("dw_shortcut", "DW shortcut", "eager_dw_shortcut"),
        System("cvt", "CvT", "eager_cvt"),
        System("edgevit", "EdgeViT", "eager_edgevit"),
        System("mvit", "MViT", "eager_mvit"),
        System("regionvit", "RegionViT", "eager_regionvit"),
        System("conv_ffn", "PVTv2's feed-forward", "eager_conv_ffn"),
        System("life_swinv2", "LIFE in Swin V2", "eager_life_swinv2"),
    )
}

INITIALISATIONS = {
    "default": {"method": "default"},
    "position x18": {"method": "default", "position_scale": 18},
    "mimetic": {"method": "mimetic"},
    "impulse": {"method": "impulse"},
}
"""The plain model from another initialisation of its attention (lifeops.demo.impulse), as options of ``structured_``."""

MODELS = {
    "plain": {},
    "eager": {"attn": EagerLifeAttention},
    "life": {"attn": LifeAttention},
    "eager_localvit": {"block": _localvit_block(EagerLocalityFeedForward)},
    "localvit": {"block": _localvit_block(LocalityFeedForward)},
    "eager_dw_shortcut": {"block": _shortcut_block(EagerDWShortcut)},
    "dw_shortcut": {"block": _shortcut_block(DWShortcut)},
    "eager_cvt": {"attn": EagerConvProjectionAttention},
    "cvt": {"attn": ConvProjectionAttention},
    "eager_edgevit": {"block": _sparse_block(EagerLGLBlock)},
    "edgevit": {"block": _sparse_block(LGLBlock)},
    "eager_mvit": {"attn": lambda *sizes: EagerPoolingAttention(_pooling_attention(*sizes))},
    "mvit": {"attn": _pooling_attention},
    "eager_conv_ffn": {"block": _conv_ffn_block(EagerConvFeedForward)},
    "conv_ffn": {"block": _conv_ffn_block(ConvFeedForward)},
    **{name: {} for name in INITIALISATIONS},
}
"""What makes each model, as options of the host."""


@dataclass(frozen=True)
class Recipe:
    """Model and training settings, the same for every model and every training-set size."""

    patch_size: int = 2
    embed_dim: int = 48
    depth: int = 2
    num_heads: int = 3
    lr: float = 6e-3
    weight_decay: float = 1.0
    batch_size: int = 32
    steps: int = 500
    epochs: int | None = None  # passes over the training set instead of ``steps``
    evaluations: int = 10

    def num_steps(self, size: int) -> int:
        return self.steps if self.epochs is None else self.epochs * -(-size // self.batch_size)


@dataclass
class Run:
    """What a training run leaves: ``losses`` of every step, ``accuracies`` on the test images after the steps ``at``."""

    model: str
    size: int
    seed: int
    losses: list[float] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    weights: dict[str, np.ndarray] | None = None  # NumPy: travels between processes by value


class Whole(NamedTuple):
    """A model of its own: one of the demo's size, for images of ``host``, and one of the size that is ``published`` under a name."""

    small: Callable[..., nn.Module]
    tiny: Callable[[], nn.Module]
    published: str

    def changed(self, change: Callable[[nn.Module], nn.Module]) -> Whole:
        return Whole(lambda recipe, **host: change(self.small(recipe, **host)), lambda: change(self.tiny()), self.published)


def _regionvit(recipe: Recipe, **host) -> RegionViT:
    """As wide as the host with as many blocks, of regions of 2 x 2 patches; twice as wide on the coarser of its two grids."""
    dim, heads, depth = recipe.embed_dim, recipe.num_heads, recipe.depth - recipe.depth // 2
    sizes = {"embed_dim": (dim, 2 * dim), "depths": (depth, recipe.depth // 2), "num_heads": (heads, 2 * heads)}
    return RegionViT(patch_size=recipe.patch_size, **sizes, window_size=2, stem="1conv", **host)


def _life_swinv2(recipe: Recipe, **host) -> SwinTransformerV2:
    """As wide as the host with as many blocks, on patches half as wide, in windows of 4 x 4; every second block's are shifted."""
    sizes = {"embed_dim": recipe.embed_dim, "depths": (recipe.depth,), "num_heads": (recipe.num_heads,)}
    return SwinTransformerV2(patch_size=max(1, recipe.patch_size // 2), **sizes, window_size=4, life=True, **host)


_REGIONVIT = Whole(_regionvit, lambda: regionvit("tiny"), "RegionViT-Ti")
_LIFE_SWINV2 = Whole(_life_swinv2, lambda: life_swinv2("tiny", img_size=224, window_size=7), "Swin V2-T with LIFE")
WHOLE = {
    "regionvit": _REGIONVIT,
    "eager_regionvit": _REGIONVIT.changed(_stages_as_authors),
    "life_swinv2": _LIFE_SWINV2,
    "eager_life_swinv2": _LIFE_SWINV2.changed(_windows_as_authors),
}
"""What has no place in the host, and is a model of its own."""


def tiny(model: str) -> nn.Module:
    """The model at a published size: DeiT-Tiny with what makes it, or the tiny one of ``WHOLE``."""
    return WHOLE[model].tiny() if model in WHOLE else VisionTransformer(dist_token=True, **MODELS[model])


def build(model: str, recipe: Recipe, seed: int = 0, **host) -> nn.Module:
    """An untrained model of the demo, one of ``MODELS`` and ``WHOLE``: "plain", a system with lifeops or as its authors run it, an
    initialisation. ``host``: for other images than the demo's (img_size, in_chans, num_classes), drop_path_rate.
    """
    torch.manual_seed(seed)
    host = {"img_size": data.IMG_SIZE, "in_chans": 1, "num_classes": data.NUM_CLASSES, **host}
    if model in WHOLE:
        return WHOLE[model].small(recipe, **host)
    sizes = {"patch_size": recipe.patch_size, "embed_dim": recipe.embed_dim, "depth": recipe.depth, "num_heads": recipe.num_heads}
    vit = VisionTransformer(**sizes, dist_token=True, **host, **MODELS[model])
    if model in INITIALISATIONS:
        structured_(vit, **INITIALISATIONS[model], generator=torch.Generator().manual_seed(seed))
    return vit


def training_loss(model: nn.Module, images: Images) -> Tensor:
    """Mean of the heads' cross-entropies: of two, or of the one that models of their own have."""
    logits = model(images.x)
    losses = [F.cross_entropy(t, images.y) for t in (logits if isinstance(logits, tuple) else (logits,))]
    return sum(losses) / len(losses)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    # fused: at this size an unfused AdamW costs as much as the backward pass
    return torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def batches(images: Images, steps: int, recipe: Recipe, seed: int):
    """``steps`` batches in an order that depends on ``seed`` alone, so that all models see the same."""
    generator, order = torch.Generator().manual_seed(seed), iter(())
    for _ in range(steps):
        index = next(order, None)
        if index is None:
            order = iter(torch.randperm(len(images), generator=generator).split(recipe.batch_size))
            index = next(order)
        yield images.take(index)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Fraction of ``images`` classified correctly; leaves the model in training mode."""
    model.eval()
    predicted = torch.cat([model(x).argmax(dim=-1) for x in images.x.split(256)])
    model.train()
    return (predicted == images.y).float().mean().item()


def fit(
    model: nn.Module, images: Images, recipe: Recipe, seed: int, run: Run, test: Images | None = None,
    loss_of: Callable[[nn.Module, Images], Tensor] = training_loss,
) -> None:  # fmt: skip
    """Train ``model`` on ``images``; losses and, if ``test`` is given, accuracies are appended to ``run``. ``loss_of`` a batch."""
    steps = recipe.num_steps(len(images))
    optimizer = make_optimizer(model, recipe)
    warmup = 0.1 if steps != 10 else 0.2  # a warm-up of one step, its first and last, is a division by zero in OneCycleLR
    schedule = OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=warmup, cycle_momentum=False)
    evaluate_at = {round(steps * (i + 1) / recipe.evaluations) for i in range(recipe.evaluations)} if test is not None else ()
    model.train()
    for step, batch in enumerate(batches(images, steps, recipe, seed), start=1):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
        if step in evaluate_at:
            run.at.append(step)
            run.accuracies.append(accuracy(model, test))


def trained(run: Run, recipe: Recipe) -> torch.nn.Module:
    """The model of a run whose weights were kept."""
    model = build(run.model, recipe)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in run.weights.items()})
    return model


def run_one(name: str, size: int, seed: int, recipe: Recipe, keep_weights: bool = False) -> Run:
    """One training run of the demo, start to end, in this process."""
    pool, test = data.load()
    images, _ = data.draw(pool, size, seed)
    model, run = build(name, recipe, seed), Run(name, size, seed)
    fit(model, images, recipe, seed, run, test)
    if keep_weights:
        run.weights = {k: v.numpy() for k, v in model.state_dict().items()}
    return run
