"""A Vision Transformer as conversion, roll-out and initialisation need to know it: its patch embedding, its prefix tokens, its blocks.

Each library has a file of entries (:mod:`timm`, :mod:`transformers`), which go by the classes and attributes that are there; nothing is
imported from them. What a description says is checked on the model by those who rely on it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

CONVERSION = "_lifeops_conversion"
"""The attribute of a converted model that holds what ``revert`` needs."""

PARTS = {
    "norm1": ("norm1", "layernorm_before", "layer_norm1", "rms_norm1"),
    "attn": ("attn", "attns", "attention", "self_attn"),
    "ls1": ("ls1", "gamma_1", "gamma1", "layer_scale1", "lambda_1"),
    "drop_path1": ("drop_path1", "drop_path"),
    "norm2": ("norm2", "layernorm_after", "layer_norm2", "rms_norm2"),
    "mlp": ("mlp", "ffns", "ffn", "intermediate"),
    "ls2": ("ls2", "gamma_2", "gamma2", "layer_scale2", "lambda_2"),
    "out": ("output",),
}
"""What the parts of a block are called, in the order of timm's own names first."""


FLOWS = {
    "tokens": "tokens (B, P + H*W, C), or maps (B, H, W, C)",
    "pixels": "pixels inside the patches and tokens (B, P + H*W, C), both given back",
    "squares": "tokens of square parts of the grid (B, T, N, C)",
    "scales": "tokens of several scales, all given back, those of the first as they came",
}

GRIDS = {
    "embedding": "of the patch embedding",
    "pools": "of the patch embedding, and behind it of each stage's pool",
    "call": "told in the call, or seen in maps",
    "model": "the same for every image",
}


class Block(NamedTuple):
    """One block: where it is and what its parts are called, None for a part that it does not have.

    ``order``: "pre": x + ls1(attn(norm1(x))); "post": x + ls1(norm1(attn(x))); "parallel": several branches read the same tokens; None:
    not known, the class is in no entry. ``out``: the second half of an MLP in two. ``flow``: what it is given first and gives back, a
    key of :data:`FLOWS`.
    """

    path: str
    module: nn.Module
    order: str | None
    norm1: str | None
    attn: str | None
    ls1: str | None
    drop_path1: str | None
    norm2: str | None
    mlp: str | None
    ls2: str | None
    out: str | None
    flow: str = "tokens"

    def part(self, name: str):
        """The module, or parameter, that plays ``name``; None if there is none."""
        found = getattr(self, name)
        return None if found is None else getattr(self.module, found)


class Host(NamedTuple):
    """``trunk`` holds the patch embedding and the blocks, at ``path`` inside the model.

    ``embed``: the patch embedding, at ``embed_path`` inside ``trunk``. ``prefix``: how many tokens come before the patches in the blocks;
    None where the model does not say it. ``suffix``: how many come behind them. ``has_cls``: the first prefix token is a class token.
    ``blocks_path``: of the blocks' list inside ``trunk``, of several stages one each; none where no list of blocks is known.
    ``late``: how many tokens join in front of all others behind the first blocks; ``late_cls``: they are a class token. ``teller_path``: of
    the module whose output tells the grid of a pass, where that is not the patch embedding. ``grid_from``: where the grid that
    a block's tokens lie on comes from, a key of :data:`GRIDS`. ``apart``: the model runs something of its own between the blocks of a list,
    so that several are no module of their own. ``prefixes``: P of each list, where they differ. ``embeds_in``: the method of ``trunk`` that
    calls the patch embedding, where it ends before the blocks run. ``picks``: the paths inside ``trunk`` of modules that may leave patches
    out or shuffle them before the blocks: :mod:`patch_order`.
    """

    library: str
    path: str
    trunk: nn.Module
    embed_path: str
    prefix: int | None
    suffix: int
    has_cls: bool
    blocks_path: tuple[str, ...]
    blocks: list[Block]
    late: int = 0
    late_cls: bool = False
    teller_path: str | None = None
    grid_from: str = "embedding"
    apart: bool = False
    prefixes: tuple[int, ...] = ()
    embeds_in: str | None = None
    picks: tuple[str, ...] = ()

    @property
    def embed(self) -> nn.Module:
        return self.trunk.get_submodule(self.embed_path)

    @property
    def pickers(self) -> list[nn.Module]:
        return [self.trunk.get_submodule(path) for path in self.picks]

    @property
    def teller(self) -> nn.Module:
        return self.embed if self.teller_path is None else self.trunk.get_submodule(self.teller_path)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(H, W) of the patches that the model was built for; None where nothing tells it."""
        config = getattr(self.trunk, "config", None)
        return next(filter(None, (grid_size_of(m) for m in (self.embed, self.trunk, config) if m is not None)), None)

    @property
    def staged(self) -> bool:
        """Whether several stages, each on a grid of its own, hold the blocks."""
        return len(self.blocks_path) > 1


def pair(value) -> tuple[int, int] | None:
    """A size, given as one number or as two; None for anything else."""
    if isinstance(value, int):
        return value, value
    return tuple(value) if isinstance(value, (tuple, list)) and len(value) == 2 else None


def grid_size_of(holder) -> tuple[int, int] | None:
    """(H, W) by ``grid_size``, or by ``image_size`` and ``patch_size``, of a module or a configuration."""
    grid = getattr(holder, "grid_size", None)
    if isinstance(grid, (tuple, list)) and len(grid) == 2:
        return tuple(grid)
    image, patch = pair(getattr(holder, "image_size", None)), pair(getattr(holder, "patch_size", None))
    return (image[0] // patch[0], image[1] // patch[1]) if image and patch else None


def block_of(path: str, module: nn.Module, orders: dict[str, str], flow: str = "tokens") -> Block:
    """``module`` described by its attributes; ``orders``: of the classes that are known."""
    names = {part: next((n for n in known if getattr(module, n, None) is not None), None) for part, known in PARTS.items()}
    if names["mlp"] != "intermediate":
        names["out"] = None
    order = orders.get(type(module).__name__) if flow == "tokens" else None
    return Block(path, module, order, **names, flow=flow)
