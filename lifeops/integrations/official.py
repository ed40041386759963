"""The authors' checkpoints, recognised by their keys, as models of this library; and checkpoints of this library's own DeiT models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from lifeops.arguments import check_int
from lifeops.errors import CheckpointError, warn
from lifeops.integrations import official_cvt as cvt
from lifeops.integrations import official_dw_shortcut as shortcut
from lifeops.integrations import official_edgevit as edgevit
from lifeops.integrations import official_life_swin as life_swin
from lifeops.integrations import official_localvit as localvit
from lifeops.integrations import official_mvit as mvit
from lifeops.integrations import official_regionvit as regionvit
from lifeops.integrations import official_sit as sit
from lifeops.integrations.checkpoint_states import choose, errors_of, load_strictly
from lifeops.integrations.official_facts import Facts, Given
from lifeops.integrations.official_fit import fit
from lifeops.options import AuxKey, GateAct

_LIFE_KEY = "blocks.0.attn.qkv.scale1.weight"
_LOCALVIT_KEY = "blocks.0.conv.conv.0.weight"
_PLAIN_KEY = "blocks.0.attn.qkv.weight"


class Family(NamedTuple):
    """Models with the same keys: the one that tells them, the number of its dimensions, and what builds one; ``keys``: what the tensors are
    called there, if not as they come; ``asks``: arguments of load_official that say what tensors may not tell.
    """

    name: str
    key: str
    dims: int
    build: Callable[[Facts], nn.Module]
    keys: Callable[[Facts], Mapping] | None = None
    asks: tuple[str, ...] = ()


def load_official(
    checkpoint: str | os.PathLike[str] | Mapping[str, object], *, key: str | None = None, num_heads: int | None = None,
    aux_key: AuxKey | None = None, act: GateAct | None = None, img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None, window_size: int | None = None, stage_blocks: tuple[int, ...] | None = None,
) -> nn.Module:  # fmt: skip
    """Build the model that an official checkpoint is for, at the sizes its tensors tell, and load it strictly; in eval mode.

    Args:
        checkpoint: a path (a torch or safetensors file; nothing but tensors and plain containers is built of it, foreign objects
            beside the model are passed over) or a loaded dict. The state dict may lie under any key, its names behind any prefix
            (``module.``, ``_orig_mod.``, ``model.`` …).
        key: which state dict, where there are several: "model_ema", …; default the model itself before averages of it.
        num_heads, aux_key: attention heads and, for LIFE, "scale1" or "multiscale" (:class:`lifeops.nn.LifeQKV`). The tensors do
            not tell them; state dicts of this library's models do, in their metadata, unless a script copied them into plain dicts.
            Else models of a published width (and heads) are taken for the authors' (LIFE: "scale1").
        act: LocalViT's activation; default "hs+se" with squeeze and excitation, else "hs+eca" with ECA or "relu6" (the authors'
            mlp6_act1).
        img_size: of the model, if not the checkpoint's: position embeddings are resampled bicubically, the prefix tokens' kept, as
            timm does it, MViTv2's tables linearly; and where the checkpoint does not tell its own (Swin without ``attn_mask``, grids
            that are no square).
        num_classes: of the model, if not the checkpoint's: then with a new, untrained head (truncated normal, std 0.02; zero bias).
        window_size: of Swin, if not the checkpoint's: tables are resampled. By default it stays, or where it does not divide every
            stage's grid at another ``img_size``, grows in proportion.
        stage_blocks: of SiT, blocks before each slimming and behind the last, where neither metadata nor ``rtsm`` tells them: of published
            models "xsmall" (1, 1, 1, 13) and "small" (9, 3, 2, 2) have the same tensors.

    Recognised: LIFE DeiT (``blocks.0.attn.qkv.scale1.weight``) and Swin V2 (``layers.0.blocks.0.attn.qkv.scale1.weight``); LocalViT DeiT
    (``blocks.0.conv.conv.0.weight``), PVT (``block1.0.conv.conv.0.weight``), TNT (``blocks.0.norm_in.weight``), T2T-ViT
    (``tokens_to_token.attention1.conv.conv.0.weight``) and Swin (``layers.0.blocks.0.conv.conv.0.weight``); the DW shortcut's ViT
    (``transformer.convs.0.weight``), CaiT (``patch_transformer.convs.0.weight``) and Swin (``layers.0.convs.0.weight``); MViTv2 in the
    authors' layout (``blocks.0.attn.norm_q.weight``; SlowFast's convolutions over one frame, too) and in timm's
    (``stages.0.blocks.0.attn.norm_q.weight``); RegionViT (``layers.0.block.1.attn.rel_pos``), with the authors' mask of padded corners
    unless metadata tells another. Buffers that can be computed (``attn_mask``, ``relative_position_index``, ``num_batches_tracked``) may
    be missing.

    CvT (``stage0.blocks.0.attn.conv_proj_q.conv.weight``), with the authors' strides where metadata does not tell others, and EdgeViT
    (``blocks1.0.SelfAttn.pos_embed.weight``); ``num_heads`` is the first stage's, those of the others are as wide. Self-slimmed ViT
    (``tsm.0.weight.1.weight``), with what training adds (``rtsm``) where the file has it.

    Warns (UserWarning) of every assumption: which of several state dicts, heads, ``aux_key``, activation, a new head.

    Raises:
        lifeops.errors.CheckpointError, a ValueError (and RuntimeError): a file that cannot be read (what was found is named), keys
        of no known family, missing or unexpected keys, sizes that do not fit, and what the checkpoint does not tell (the message
        names the argument). TypeError: neither a path nor a dict. FileNotFoundError: no such file.
    """
    given = _given("load_official", key, num_heads, aux_key, act, img_size, num_classes, window_size, stage_blocks)
    return _load("load_official", checkpoint, key, given, families())


def families() -> tuple[Family, ...]:
    """All that :func:`load_official` reads."""
    heads, swin, hosts = ("num_heads",), ("img_size", "window_size"), ("num_heads", "act")
    return (
        Family("LIFE DeiT", _LIFE_KEY, 2, lambda facts: _life_deit(facts, "scale1", published=True), asks=("num_heads", "aux_key")),
        Family("LIFE Swin V2", life_swin.KEY, 2, life_swin.life_swinv2, asks=swin),
        Family("LocalViT PVT", localvit.PVT_KEY, 4, localvit.pvt, asks=hosts),
        Family("LocalViT TNT", localvit.TNT_KEY, 1, localvit.tnt, asks=hosts),
        Family("LocalViT T2T", localvit.T2T_KEY, 4, localvit.t2t, asks=hosts),
        Family("LocalViT Swin", localvit.SWIN_KEY, 4, localvit.swin, asks=(*swin, "act")),
        Family("LocalViT DeiT", _LOCALVIT_KEY, 4, _localvit_deit, asks=hosts),
        Family("DW shortcut ViT", shortcut.VIT_KEY, 4, shortcut.vit, asks=heads),
        Family("DW shortcut CaiT", shortcut.CAIT_KEY, 4, shortcut.cait),
        Family("DW shortcut Swin", shortcut.SWIN_KEY, 4, shortcut.swin, asks=swin),
        Family("CvT", cvt.KEY, 4, cvt.cvt, asks=heads), Family("EdgeViT", edgevit.KEY, 4, edgevit.edgevit, asks=heads),
        Family("MViTv2", mvit.KEY, 1, mvit.mvit, mvit.timm_keys), Family("MViTv2", mvit.TIMM_KEY, 1, mvit.mvit),
        Family("RegionViT", regionvit.KEY, 2, regionvit.regionvit), Family("SiT", sit.KEY, 2, sit.sit, asks=(*heads, "stage_blocks")),
    )  # fmt: skip


def lifeops_deit(
    checkpoint, *, key: str | None = None, num_heads: int | None = None, aux_key: str | None = None, act: str | None = None,
    img_size: int | tuple[int, int] | None = None, num_classes: int | None = None,
) -> nn.Module:  # fmt: skip
    """A :class:`lifeops.models.VisionTransformer` that this library trained, plain, with LIFE or with LocalViT's feed-forward, at the
    sizes its tensors tell; in eval mode. Arguments, warnings and errors as :func:`load_official`'s, but ``aux_key`` is taken for
    "multiscale", this library's default, where neither metadata nor the caller says.
    """
    given = _given("lifeops_deit", key, num_heads, aux_key, act, img_size, num_classes)
    families = (
        Family("LocalViT DeiT", _LOCALVIT_KEY, 4, _localvit_deit),
        Family("LIFE DeiT", _LIFE_KEY, 2, lambda facts: _life_deit(facts, "multiscale", published=False)),
        Family("DeiT", _PLAIN_KEY, 2, lambda facts: _deit(facts, _heads(facts, "blocks.0.attn"))),
    )
    return _load("lifeops_deit", checkpoint, key, given, families)


def _given(caller, key, num_heads, aux_key, act, img_size, num_classes, window_size=None, stage_blocks=None) -> Given:
    """The arguments, checked."""
    from lifeops.models.inputs import check_stages, to_pair

    names = {"key": key, "aux_key": aux_key, "act": act}
    for name, value in names.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{caller}: {name} must be a str, got {value!r}")
    counts = {"num_heads": (num_heads, 1), "num_classes": (num_classes, 0), "window_size": (window_size, 1)}
    for name, (value, least) in counts.items():
        check_int(caller, name, value, least, optional=True)
    if img_size is not None and not isinstance(img_size, (int, tuple, list)):
        raise TypeError(f"{caller}: img_size must be an int or (height, width), got {img_size!r}")
    if stage_blocks is not None:
        check_stages(caller, stage_blocks=stage_blocks)
        stage_blocks = tuple(stage_blocks)
    pair = None if img_size is None else to_pair(caller, "img_size", img_size)
    return Given(num_heads, aux_key, act, pair, num_classes, window_size, stage_blocks)


def _load(caller: str, checkpoint, key: str | None, given: Given, families: tuple[Family, ...]) -> nn.Module:
    with errors_of(caller, checkpoint):
        looked_for = ", ".join(f"{family.name} ({family.key!r})" for family in families)
        chosen = choose(checkpoint, [family.key for family in families], looked_for, key)
        family = next(family for family in families if family.key in chosen.state)
        facts = Facts(family.name, chosen.state, given)
        facts.shape(family.key, family.dims)
        if not chosen.state[family.key].is_floating_point():
            raise CheckpointError(f"{family.key!r} must be floating point, got {chosen.state[family.key].dtype}")
        if family.keys is not None:
            facts.state = family.keys(facts)
        model = family.build(facts).to(chosen.state[family.key].dtype)
        load_strictly(model, fit(facts, model))
    for note in (*chosen.notes, *facts.warnings()):
        warn(f"{caller}: {note}")
    return model.eval()


# ------------------------------------------------------------------------------------------------ DeiT hosts


def _deit_heads() -> dict[int, int]:
    """Heads of DeiT, and of LIFE on it, by width."""
    from lifeops.models.named import DEIT

    return dict(DEIT.values())


def _heads(facts: Facts, module: str) -> int:
    return facts.heads(facts.shape("patch_embed.proj.weight", 4)[0], [module], _deit_heads())


def _sizes(facts: Facts, num_heads: int) -> dict:
    """A DeiT host's, read from its tensors."""
    state = facts.state
    dim, in_chans, *patch_size = facts.shape("patch_embed.proj.weight", 4)
    registers = facts.shape("reg_token", 3)[1] if "reg_token" in state else 0
    tokens = {"class_token": "cls_token" in state, "dist_token": "dist_token" in state, "num_reg_tokens": registers}
    patches = facts.shape("pos_embed", 3)[1] - sum(tokens.values())
    return {
        "img_size": facts.image_size("pos_embed", patches, tuple(patch_size)), "patch_size": tuple(patch_size), "in_chans": in_chans,
        "num_classes": facts.classes("head.weight", 0), "embed_dim": dim, "depth": facts.count("blocks."), "num_heads": num_heads, **tokens,
    }  # fmt: skip


def _deit(facts: Facts, num_heads: int, attn=None) -> nn.Module:
    from lifeops.models.deit import VisionTransformer

    sizes = _sizes(facts, num_heads)
    mlp_ratio = facts.shape("blocks.0.mlp.fc1.weight", 2)[0] / sizes["embed_dim"]
    return VisionTransformer(**sizes, mlp_ratio=mlp_ratio, attn=attn, qkv_bias="blocks.0.attn.qkv.bias" in facts.state)


def _life_deit(facts: Facts, aux_key: str, published: bool) -> nn.Module:
    """``aux_key`` where neither metadata nor the caller says, of a model of any width and heads or only of ``published`` ones."""
    from lifeops.nn.life import LifeAttention

    num_heads = _heads(facts, "blocks.0.attn.qkv")
    known = not published or (facts.shape(_LIFE_KEY, 2)[1], num_heads) in _deit_heads().items()
    aux_key = facts.tell("aux_key", ["blocks.0.attn.qkv"], aux_key if known else None)
    if aux_key is None:
        raise CheckpointError("the checkpoint does not tell LIFE's aux_key; pass aux_key='scale1' (the authors') or 'multiscale'")
    qkv_norm = "blocks.0.attn.qkv.norm.weight" in facts.state

    def attention(dim, num_heads, num_prefix_tokens):
        return LifeAttention(dim, num_heads, num_prefix_tokens, qkv_norm=qkv_norm, aux_key=aux_key)

    return _deit(facts, num_heads, attention)


def _localvit_deit(facts: Facts) -> nn.Module:
    from lifeops.models import localvit as build
    from lifeops.models.localvit import DEIT_VARIANTS

    dim, mlp_ratio, reduction = localvit.feed_forward(facts, "blocks.0")
    heads = facts.heads(dim, ["blocks.0.attn", "blocks.0"], {v.embed_dim: v.num_heads for v in DEIT_VARIANTS.values()})
    qkv_bias, act = "blocks.0.attn.qkv.bias" in facts.state, localvit.activation(facts, "blocks.0")
    return build(mlp_ratio=mlp_ratio, act=act, reduction=reduction, qkv_bias=qkv_bias, **_sizes(facts, heads))
