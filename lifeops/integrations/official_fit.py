"""A checkpoint's tensors for a model of another image size or number of classes, and without what can be computed again."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.integrations.official_facts import Facts
from lifeops.nn.relative import resized as resized_axis

_COMPUTED = "attn_mask", "relative_position_index", "num_batches_tracked"
_POSITIONS = "pos_embed", "pos_embedding"
_AXES = "rel_pos_h", "rel_pos_w"
_HEADS = "head.", "head_dist.", "mlp_head.1.", "aux_head."


def _resample(maps: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """(1, C, H, W) maps at another size."""
    t = maps if maps.dtype == torch.float64 else maps.float()
    return F.interpolate(t, size=size, mode="bicubic", align_corners=False, antialias=antialias).to(maps.dtype)


def resample_positions(t: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, P + H*W, C) position embedding to another grid: bicubic with antialiasing, the P prefix tokens kept, as timm does it."""
    prefix, patches = t.split((t.shape[1] - old[0] * old[1], old[0] * old[1]), 1)
    maps = _resample(patches.unflatten(1, old).permute(0, 3, 1, 2), new, antialias=True)
    return torch.cat((prefix, maps.flatten(2).transpose(1, 2)), 1)


def resample_table(t: Tensor, rows: int) -> Tensor:
    """((2w - 1)², heads) relative position table to another window: bicubic, as Swin's authors and timm do it."""
    old, new = math.isqrt(t.shape[0]), math.isqrt(rows)
    if old == new:
        return t
    maps = _resample(t.T.unflatten(1, (old, old))[None], (new, new), antialias=False)
    return maps[0].flatten(1).T.contiguous()


def _is_table(t: Tensor | None, heads: int) -> bool:
    return t is not None and t.ndim == 2 and t.shape[1] == heads and t.shape[0] == math.isqrt(t.shape[0]) ** 2 > 0


def _positions(t: Tensor, own: Tensor, grid: tuple[int, int]) -> Tensor:
    prefix = own.shape[1] - grid[0] * grid[1]
    side = math.isqrt(max(t.shape[1] - prefix, 0))
    fits = t.shape == own.shape and (grid[0] == grid[1] or side * side + prefix != t.shape[1])
    return t if fits else resample_positions(t, (side, side), grid)


def _new_head(state: dict, model: nn.Module, classes: int) -> bool:
    """Put a new head into ``state`` where it has another number of classes; whether it did."""
    own = {name: t for name, t in model.state_dict().items() if name.startswith(_HEADS)}
    names = [name for name in state if name.startswith(_HEADS)]
    if own and all(name in state and state[name].shape == t.shape for name, t in own.items()):
        return False
    for name in names:
        del state[name]
    for name, t in own.items():
        state[name] = torch.zeros_like(t) if t.ndim == 1 else nn.init.trunc_normal_(torch.empty_like(t), std=0.02)
    return bool(own)


def _position_grids(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The grid of every position embedding that is resampled."""
    if hasattr(model, "position_grids"):
        return model.position_grids()
    return dict.fromkeys(_POSITIONS, getattr(getattr(model, "patch_embed", model), "grid_size", None))


def fit(facts: Facts, model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state dict of ``facts`` as ``model`` takes it; whatever else does not fit stays, for load_state_dict to name."""
    state, own = OrderedDict(facts.state), model.state_dict()
    resized = facts.given.img_size is not None or facts.given.window_size is not None
    grids = _position_grids(model) if resized else {}
    for name, t in own.items():
        last = name.rpartition(".")[2]
        if last in _COMPUTED and (name not in state or (resized and state[name].shape != t.shape)):
            state[name] = t
        elif name in grids and name in state:
            state[name] = _positions(state[name], t, grids[name])
        elif resized and last == "relative_position_bias_table" and _is_table(state.get(name), t.shape[1]):
            state[name] = resample_table(state[name], t.shape[0])
        elif resized and last in _AXES and name in state and state[name].shape[1:] == t.shape[1:]:
            state[name] = resized_axis(state[name], t.shape[0], "interpolate")
    for name in [name for name in state if resized and name.rpartition(".")[2] == "attn_mask" and name not in own]:
        del state[name]  # of windows that this image size has no second of
    if facts.given.num_classes is not None and _new_head(state, model, facts.given.num_classes):
        facts.notes.append(f"a new head for {facts.given.num_classes} classes, untrained: truncated normal weights (std 0.02), zero bias")
    state._metadata = getattr(facts.state, "_metadata", OrderedDict())
    return state
