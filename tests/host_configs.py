"""Small configurations of timm's and transformers' vision models: what docs/hosts.md is the table of. Nothing is downloaded."""

from collections.abc import Callable
from typing import NamedTuple

import torch

SCALES = ("relative", "rel_pos", "gamma", "lambda", "layer_scale", "layerscale", "ls1", "ls2")
TOKENS = ("bias", "pos_embed", "position_embed", "cls_token", "reg_token")

HOSTS: dict[str, "HostConfig"] = {}


class HostConfig(NamedTuple):
    """``size``: (H, W) of the images; ``own``: of those that its position table is for. ``patch``: their patches, None where no block sees
    patches as tokens; ``prefix``: the tokens before them. Known from the configuration, not asked of the library. ``chain``: how the
    attention of its layers makes a roll-out (see host_attention.CHAINS). ``grids``: of its stages, where they have not
    the proportions of the image."""

    library: str
    family: str
    name: str
    build: Callable
    size: tuple[int, int]
    own: tuple[int, int]
    patch: tuple[int, int] | None
    prefix: int
    chain: str
    grids: tuple[tuple[int, int], ...] = ()

    def grid_at(self, size) -> tuple[int, int] | None:
        """Patches of an image, those that padding completes too."""
        return self.patch and tuple(-(-length // side) for length, side in zip(size, self.patch, strict=True))

    @property
    def grid(self):
        return self.grid_at(self.size)


def _pair(value):
    return value if isinstance(value, (tuple, list)) else value and (value, value)


def add(library, family, name, build, size, patch, prefix=0, chain="plain", own=None, grids=()) -> None:
    assert name not in HOSTS, name
    HOSTS[name] = HostConfig(library, family, name, build, size, tuple(_pair(own or size)), _pair(patch), prefix, chain, grids)


def made(host: HostConfig) -> torch.nn.Module:
    """In evaluation mode, everything that starts as a constant or tiny random, so that it shows."""
    torch.manual_seed(0)
    model = host.build().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if any(part in name for part in SCALES):
                p.copy_(torch.randn_like(p) * 0.5)
            elif any(part in leaf for part in TOKENS):
                p.copy_(torch.randn_like(p) * 0.1)
            elif p.dim() == 1 and leaf == "weight":
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif p.dim() == 2 and leaf == "weight":
                p.copy_(torch.randn_like(p) * p.shape[1] ** -0.5)
    return model
