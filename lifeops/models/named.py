"""A model by its name and the system built into it: what the command line offers."""

from __future__ import annotations

import torch
from torch import nn

from lifeops.arguments import check_choice, got, under
from lifeops.models.deit import VisionTransformer
from lifeops.models.dw_shortcut import VARIANTS as SHORTCUT_VARIANTS
from lifeops.models.dw_shortcut import dw_shortcut
from lifeops.models.localvit import VARIANTS as LOCALVIT_VARIANTS
from lifeops.models.localvit import localvit
from lifeops.nn.dw_shortcut import wrap
from lifeops.nn.life import LifeAttention

SYSTEMS = ("plain", "life", "localvit", "dw_shortcut")
DEIT = {"deit_tiny": (192, 3), "deit_small": (384, 6), "deit_base": (768, 12)}
LOCALVIT = {f"localvit_{variant}": variant for variant in LOCALVIT_VARIANTS}
NAMES = (*DEIT, *LOCALVIT, *SHORTCUT_VARIANTS)


def systems_of(name: str) -> tuple[str, ...]:
    """The systems that the model ``name`` can have; of a timm model all are tried."""
    if name in LOCALVIT:
        return "plain", "localvit"
    return ("plain", "dw_shortcut") if name in SHORTCUT_VARIANTS else SYSTEMS


def _deit(name: str, system: str, host: dict) -> nn.Module:
    dim, heads = DEIT[name]
    sizes = {"embed_dim": dim, "num_heads": heads, **host}
    if system == "localvit":
        return localvit(reduction=dim, **sizes)
    if system == "life":
        return VisionTransformer(attn=lambda dim, heads, prefix: LifeAttention(dim, heads, prefix), **sizes)
    model = VisionTransformer(**sizes)
    if system == "dw_shortcut":
        model.blocks = wrap(model.blocks, num_prefix_tokens=model.num_prefix_tokens)
    return model


def _localvit(name: str, system: str, host: dict) -> nn.Module:
    if system == "localvit":
        return localvit(LOCALVIT[name], **host)
    v = LOCALVIT_VARIANTS[LOCALVIT[name]]
    return VisionTransformer(embed_dim=v.embed_dim, num_heads=v.num_heads, mlp_ratio=v.mlp_ratio, **host)


def _timm(name: str, system: str, host: dict) -> nn.Module:
    import timm

    from lifeops.integrations import convert

    if not timm.is_model(name):
        raise ValueError(f"named: the model must be one of {', '.join(NAMES)} or a timm model, got {name!r}")
    with under("named"):
        model = timm.create_model(name, **host)
    return model if system == "plain" else convert(model, system)


@under("named")
def _own(name: str, system: str, host: dict) -> nn.Module:
    if name in DEIT:
        return _deit(name, system, host)
    if name in LOCALVIT:
        return _localvit(name, system, host)
    return dw_shortcut(name, every=None if system == "plain" else 1, **host)


def named(name: str, system: str = "plain", **host) -> nn.Module:
    """The model ``name`` with ``system`` built in, on the current default device.

    Args:
        name: "deit_tiny", "deit_small", "deit_base"; "localvit_" and a variant of :func:`lifeops.models.localvit`; a variant of
            :func:`lifeops.models.dw_shortcut`; or a timm name, whose model :func:`lifeops.convert` then changes.
        system: "plain", "life", "localvit" (h-swish, squeeze and excitation to one channel, as the authors' tiny and small), "dw_shortcut".
        host: img_size, patch_size, num_classes, ….

    Raises ValueError for an unknown name or system, and where the model cannot have the system.
    """
    check_choice("named", "system", system, SYSTEMS)
    if not isinstance(name, str):
        raise TypeError(f"named: name must be a str, got {got(name)}")
    if system not in systems_of(name):
        raise ValueError(f"named: the system of {name} must be one of {', '.join(map(repr, systems_of(name)))}, got {system!r}")
    return _own(name, system, host) if name in NAMES else _timm(name, system, host)


def image_size(name: str, img_size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """(channels, height, width) of the images of the model ``name``."""
    if img_size is not None:
        return 3, *img_size
    if name in NAMES:
        return 3, 224, 224
    import timm

    with torch.device("meta"):
        return timm.data.resolve_model_data_config(timm.create_model(name))["input_size"]
