"""A model by its name and the system built into it: what the command line offers."""

from __future__ import annotations

import functools

import torch
from torch import nn

from lifeops.arguments import check_choice, got, under
from lifeops.models.cvt import VARIANTS as CVT_VARIANTS
from lifeops.models.cvt import cvt
from lifeops.models.deit import VisionTransformer
from lifeops.models.dw_shortcut import VARIANTS as SHORTCUT_VARIANTS
from lifeops.models.dw_shortcut import dw_shortcut
from lifeops.models.edgevit import VARIANTS as EDGEVIT_VARIANTS
from lifeops.models.edgevit import edgevit
from lifeops.models.localvit import VARIANTS as LOCALVIT_VARIANTS
from lifeops.models.localvit import localvit
from lifeops.models.localvit import plain as plain_localvit
from lifeops.models.mvit import VARIANTS as MVIT_VARIANTS
from lifeops.models.mvit import mvitv2
from lifeops.models.regionvit import VARIANTS as REGIONVIT_VARIANTS
from lifeops.models.regionvit import regionvit
from lifeops.models.sit import VARIANTS as SIT_VARIANTS
from lifeops.models.sit import sit
from lifeops.models.swin_v2 import VARIANTS as SWINV2_VARIANTS
from lifeops.models.swin_v2 import life_swinv2
from lifeops.models.t2t import VARIANTS as T2T_VARIANTS
from lifeops.models.t2t import life_t2t
from lifeops.nn.conv_projection import ConvProjectionAttention
from lifeops.nn.dw_shortcut import ShortcutModule
from lifeops.nn.global_sparse import GlobalSparseAttention
from lifeops.nn.life import LifeAttention, LifeQKV
from lifeops.nn.localvit import LocalityFeedForward
from lifeops.nn.pooling_attention import PoolingAttention
from lifeops.nn.regional_attention import RegionalAttention
from lifeops.nn.shortcut_blocks import wrap
from lifeops.nn.token_slimming import TokenSlimming

HOST_SYSTEMS = ("plain", "life", "localvit", "dw_shortcut")
"""What is built into a host, as far as the host takes it."""
WHOLE = {  # models that are a system of their own: the system, what builds it, which variant
    **{f"cvt_{variant}": ("cvt", cvt, variant) for variant in CVT_VARIANTS},
    **{f"edgevit_{variant}": ("edgevit", edgevit, variant) for variant in EDGEVIT_VARIANTS},
    **{f"mvitv2_{variant}": ("mvit", mvitv2, variant) for variant in MVIT_VARIANTS},
    **{f"regionvit_{variant}": ("regionvit", regionvit, variant) for variant in REGIONVIT_VARIANTS},
    **{f"regionvit_{variant}_w14": ("regionvit", functools.partial(regionvit, w14=True), variant) for variant in ("small", "base")},
    **{f"regionvit_{variant}_w14_peg": ("regionvit", functools.partial(regionvit, w14=True, peg=True), variant)
       for variant in ("small", "base")},
    **{f"sit_{variant}": ("sit", sit, variant) for variant in SIT_VARIANTS},
}
SYSTEMS = (*HOST_SYSTEMS, *dict.fromkeys(system for system, *_ in WHOLE.values()))
DEIT = {"deit_tiny": (192, 3), "deit_small": (384, 6), "deit_base": (768, 12)}
HOSTED = {  # hosts of one system: what builds each, by the systems it can have
    **{f"localvit_{variant}": {"plain": functools.partial(plain_localvit, variant), "localvit": functools.partial(localvit, variant)}
       for variant in LOCALVIT_VARIANTS},
    **{f"swinv2_{variant}": {"plain": functools.partial(life_swinv2, variant, life=False), "life": functools.partial(life_swinv2, variant)}
       for variant in SWINV2_VARIANTS},
    **{f"t2t_{variant}": {"plain": functools.partial(life_t2t, variant, attn=None), "life": functools.partial(life_t2t, variant)}
       for variant in T2T_VARIANTS},
}  # fmt: skip
NAMES = (*DEIT, *HOSTED, *SHORTCUT_VARIANTS, *WHOLE)


def systems_of(name: str, **host) -> tuple[str, ...]:
    """The systems that the model ``name`` can have; of a timm model all are tried, but only its own where it comes with one."""
    if name in HOSTED:
        return tuple(HOSTED[name])
    if name in SHORTCUT_VARIANTS:
        return "plain", "dw_shortcut"
    if name in WHOLE:
        return (WHOLE[name][0],)
    if name in DEIT:
        return HOST_SYSTEMS
    with torch.device("meta"):
        own = system_in(_timm_model(name, host))
    return HOST_SYSTEMS if own == "plain" else (own,)


def system_in(model: nn.Module) -> str:
    """The system built into ``model``, converted or made with it: one of SYSTEMS, or several joined by " + "."""
    built = {
        "life": lambda m: isinstance(m, LifeQKV),
        "localvit": lambda m: isinstance(m, LocalityFeedForward),
        "dw_shortcut": lambda m: isinstance(m, ShortcutModule) and len(m.convs) > 0,
        "cvt": lambda m: isinstance(m, ConvProjectionAttention),
        "edgevit": lambda m: isinstance(m, GlobalSparseAttention),
        "mvit": lambda m: isinstance(m, PoolingAttention),
        "regionvit": lambda m: isinstance(m, RegionalAttention),
        "sit": lambda m: isinstance(m, TokenSlimming),
    }
    return " + ".join(name for name, has in built.items() if any(has(m) for m in model.modules())) or "plain"


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



def _timm_model(name: str, host: dict) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"named: the model must be one of {', '.join(NAMES)} or a timm model, got {name!r}")
    try:
        with under("named"):
            return timm.create_model(name, **host)
    except TypeError as error:
        raise ValueError(f"named: {name} does not take all of {', '.join(host)}: {error}") from error


def _timm(name: str, system: str, host: dict) -> nn.Module:
    from lifeops.integrations import convert

    model = _timm_model(name, host)
    own = system_in(model)
    if own not in ("plain", system):
        raise ValueError(f"named: {name} comes with the system {own!r}, so its system must be that, got {system!r}")
    return model if own == system else convert(model, system)


@under("named")
def _own(name: str, system: str, host: dict) -> nn.Module:
    if name in DEIT:
        return _deit(name, system, host)
    if name in HOSTED:
        return HOSTED[name][system](**host)
    if name in WHOLE:
        _, build, variant = WHOLE[name]
        return build(variant, **host)
    return dw_shortcut(name, every=None if system == "plain" else 1, **host)


def named(name: str, system: str | None = None, **host: object) -> nn.Module:
    """The model ``name`` with ``system`` built in, on the current default device.

    Args:
        name: "deit_tiny", "deit_small", "deit_base"; "localvit_" and a variant of :func:`lifeops.models.localvit`, "swinv2_" and one of
            :func:`lifeops.models.life_swinv2`, "t2t_" and one of :func:`lifeops.models.life_t2t`; a variant of
            :func:`lifeops.models.dw_shortcut`; "cvt_", "edgevit_", "mvitv2_", "regionvit_", "sit_" and one of theirs ("regionvit_small" and
            "regionvit_base" with "_w14" or "_w14_peg" behind it, too); or a timm name, whose model :func:`lifeops.convert` then changes.
        system: "plain", "life", "localvit" (h-swish, squeeze and excitation to one channel, as the authors' tiny and small), "dw_shortcut";
            of a model that is a system of its own ("cvt", …), or of a timm model that comes with one, that. None: its own, else "plain".
        host: img_size, patch_size, num_classes, ….

    Raises ValueError for an unknown name or system, and where the model cannot have the system.
    """
    if not isinstance(name, str):
        raise TypeError(f"named: name must be a str, got {got(name)}")
    if system is None:
        system = WHOLE[name][0] if name in WHOLE else "plain"
    if not isinstance(system, str) or set(system.split(" + ")) - set(SYSTEMS):
        check_choice("named", "system", system, SYSTEMS)
    if name in NAMES and system not in systems_of(name):
        raise ValueError(f"named: the system of {name} must be one of {', '.join(map(repr, systems_of(name)))}, got {system!r}")
    if name not in NAMES:
        return _timm(name, system, host)
    try:
        return _own(name, system, host)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"named: {name} does not take all of {', '.join(host)}: {error}") from error


def _own_size(name: str) -> tuple[int, int]:
    if name not in WHOLE and name not in HOSTED:
        return 224, 224
    with torch.device("meta"):
        return getattr(named(name), "img_size", (224, 224))


def image_size(name: str, img_size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """(channels, height, width) of the images of the model ``name``."""
    if img_size is not None:
        return 3, *img_size
    if name in NAMES:
        return 3, *_own_size(name)
    import timm

    with torch.device("meta"):
        model = _timm_model(name, {})
    embed = getattr(model, "patch_embed", None)
    if not getattr(model, "pretrained_cfg", None) and hasattr(embed, "img_size"):  # a model that somebody registered
        return (embed.proj.in_channels, *embed.img_size)
    return timm.data.resolve_model_data_config(model)["input_size"]
