"""One entry per public callable: what a good call takes, and of what kind each parameter is. The bad values follow from the kinds."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import lifeops
from conftest import declare_torchvision_ops
from lifeops import ChannelAct

declare_torchvision_ops()

HUGE = 2**70


def tensors(good, other_sizes=True):
    """What is not the tensor ``good``."""
    t = good.detach()
    yield from {
        "int": 3, "str": "a", "list": [0.0], "dict": {}, "numpy": t.numpy(), "sparse": t.to_sparse(), "complex": t * 1j,
        "integer": t.int(), "bool": t > 0, "meta": t.to("meta"), "rank": t[None], "nested": torch.nested.nested_tensor([t]),
    }.items()  # fmt: skip
    if other_sizes:
        yield "sizes", t.repeat_interleave(2, -1)


GRIDS = {
    "int": 3, "str": "ab", "one": (2,), "three": (2, 3, 1), "strings": ("2", 3), "floats": (2.0, 3.0), "bools": (True, True),
    "nan": (math.nan, 2), "none": (None, 2), "negative": (-1, 3), "huge": (HUGE, 0), "numpy": np.array([2, 3]), "dict": {2: 3, 3: 2},
    "tensor": torch.tensor([2, 3]),
}  # fmt: skip
COUNTS = {
    "None": None, "bool": True, "float": 1.0, "str": "1", "list": [], "nan": math.nan, "negative": -1, "huge": HUGE,
    "tensor": torch.ones(1), "numpy": np.ones(2),
}  # fmt: skip
NUMBERS = {
    "None": None, "str": "a", "list": [], "bool": True, "nan": math.nan, "inf": math.inf, "tensor": torch.ones(2), "numpy": np.ones(2),
    "complex": 1j, "huge": 10**400,
}  # fmt: skip
NAMES = {"None": None, "int": 3, "list": [], "dict": {}, "misspelt": "nope", "numpy": np.array(["a", "b"]), "bytes": b"keep", "set": set()}
FLAGS = {"None": None, "str": "yes", "list": [], "int": 2, "tensor": torch.ones(2), "numpy": np.ones(2), "float": 0.5}
OTHERS = {"int": 3, "str": "a", "list": [1], "dict": {}, "numpy": np.ones(2), "tensor": torch.ones(2)}
SIZES = {"None": None, "float": 3.0, "str": "3", "dict": {}, "zero": 0, "even": 4, "negative": -3, "bool": True, "nan": math.nan}
MARGINS = {"float": 3.0, "str": "3", "dict": {}, "negative": -1, "bool": True, "three": (2, 3, 1), "floats": (2.0, 3.0)}

KINDS = {
    "grid": GRIDS, "count": COUNTS, "name": NAMES, "flag": FLAGS, "number": NUMBERS, "other": OTHERS,
    "count?": {k: v for k, v in COUNTS.items() if v is not None}, "number?": {k: v for k, v in NUMBERS.items() if v is not None},
    "size": COUNTS | {"zero": 0}, "size?": {k: v for k, v in COUNTS.items() if v is not None} | {"zero": 0},
    "positive": NUMBERS | {"zero": 0, "negative": -1.0}, "rate": NUMBERS | {"above": 1.5, "negative": -0.1},
    "backend": {k: v for k, v in NAMES.items() if v is not None}, "module": {"None": None, **OTHERS}, "odd": {**SIZES, "list": [3]},
    "odds": {**SIZES, "empty": [], "evens": [3, 4], "strings": ["3"]},
    "dtype": {**OTHERS, "integer": torch.int32, "complex": torch.complex64},
    "device": {"str": "nonsense", "list": [], "dict": {}, "float": 1.5, "numpy": np.ones(2)},
    "flag?": {k: v for k, v in FLAGS.items() if v is not None}, "kinds": {"int": 3, "misspelt": "nope", "ints": [3], "numpy": np.ones(2)},
    "key": {"int": 3, "list": [1], "dict": {}, "numpy": np.ones(2), "tensor": torch.ones(2), "bytes": b"a"},
    "file": {"None": None, "int": 3, "list": [1], "numpy": np.ones(2), "tensor": torch.ones(2)},
    "area": {"zero": 0, **MARGINS}, "stem": {"None": None, "bool": True, "float": 4.5, "str": "4", "list": [], "three": 3},
    "step": {"None": None, "zero": 0, **MARGINS}, "margin": MARGINS,
    "blocks": {"str": "3", "int": 3, "empty": (), "floats": (1.0, 2.0), "zero": (0, 1), "strings": ("a", "b")},
    "steps": {"str": "3", "floats": (1.0, 2.0), "three": (1, 2, 3), "negative": (-1, -1), "strings": ("a", "b")},
    "ints": {"int": 3, "str": "a", "None": None, "empty": (), "floats": (1.0, 2.0), "strings": ("a",), "negative": (-1, 2)},
    "ratios": {"int": 3, "str": "a", "None": None, "empty": (), "strings": ("a",), "negative": (-1.0, 2.0), "zero": (0, 1)},
}  # fmt: skip


class Case(NamedTuple):
    """A good call, and the kind of each of its parameters; None: a tensor."""

    call: object
    good: dict
    kinds: dict
    optional: tuple = ()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


PLACE = {"grid": (2, 3), "num_prefix_tokens": 1}
X, Q = draw(2, 7, 9), draw(2, 3, 7, 3)
PLACED = {"grid": "grid", "num_prefix_tokens": "count", "backend": "backend"}
DWCONV = {"x": X, "weight": draw(9, 1, 3, 3), "bias": draw(9), "residual": X, "prefix": "keep", "pool": False, "stats": False, **PLACE}
TRANSPOSED = {"x": X, "weight": draw(9, 1, 3, 3), "bias": draw(9), "stride": 2, **PLACE}
LIFE = {
    "x": X, "w1": draw(9, 9), "b1": draw(9), "dw2": draw(9, 1, 3, 3), "pw2": draw(9, 9), "dw3": draw(9, 1, 5, 5), "pw3": draw(9, 9),
    **PLACE,
}  # fmt: skip
LOCAL = {"q": Q, "k": Q, "v": Q, "weight": draw(9, 1, 3, 3), "bias": draw(9), "dropout_p": 0.5, "attn_mask": draw(7, 7), **PLACE}
DD = {"device": "device", "dtype": "dtype"}
TOKENS = {"x": None, "grid": "grid"}
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
VIT_KINDS = {
    "img_size": "size", "patch_size": "size", "in_chans": "size", "num_classes": "count", "embed_dim": "size", "depth": "count",
    "num_heads": "size", "mlp_ratio": "positive",
}  # fmt: skip
SWIN = {"img_size": 8, "patch_size": 2, "embed_dim": 6, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2}
CVT = {"img_size": 16, "embed_dims": (6, 6), "depths": (1, 1), "num_heads": (1, 2), "patch_size": (3, 3), "patch_stride": (2, 2)}
CVT |= {"patch_padding": (1, 1)}
EDGEVIT = {"img_size": 16, "embed_dims": (6, 6), "depths": (1, 1), "num_heads": (1, 2), "patch_size": (2, 2), "sr_ratios": (2, 1)}
STAGES = {"img_size": "size", "in_chans": "size", "num_classes": "count", "mlp_ratio": "positive", "drop_path_rate": "rate"}
STAGES |= dict.fromkeys(("embed_dims", "depths", "num_heads", "patch_size"), "ints")
PVT = {"img_size": 16, "embed_dims": (6, 6), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}
TNT = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "in_dim": 4, "depth": 1, "num_heads": 3, "in_num_heads": 2}
T2T = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 3, "token_dim": 4}
MVIT = {"img_size": 8, "embed_dim": 6, "depths": (1, 1), "num_heads": 1}
REGIONVIT = {"img_size": 8, "embed_dim": (4, 8), "depths": (1, 1), "num_heads": (1, 1), "window_size": 2}
SIT = {"img_size": 32, "embed_dim": 8, "num_heads": 2, "stage_blocks": (1, 1)}
SHORTCUTS = {"every": "size?", "kernel_sizes": "odds"}
E = draw(12, 16)
QK = {"position_embedding": E, "grid": (3, 4), "num_heads": 2, "head_dim": 4}
FILTERS = {"norm": "number", "num_filters": "size?", "assign": "name", "frozen": "flag", "generator": "other"}


def _filters(op, **more):
    return Case(op, {"weight": draw(4, 1, 3, 3), **more}, {"weight": None, **FILTERS})


def _entered(manager):
    with manager:
        pass


def _vit(**options):
    return lifeops.models.VisionTransformer(**{**VIT, **options})


def _converts(system, **options):
    return lifeops.convert(_vit(), system, **options)


def _forward(build, **options):
    module = build()
    return lambda **changes: module(**{**options, **changes})


def _attention(dim, heads):
    return lifeops.models.VisionTransformer(8, 4, embed_dim=dim, num_heads=heads, depth=1).blocks[0].attn


ATTENTION = {"x": X, "grid": (2, 3), "attn_mask": draw(7, 7), "is_causal": False}
ATTENDS = {**TOKENS, "attn_mask": None, "is_causal": "flag"}
ROPE = {**ATTENTION, "rope": draw(6, 6)}
IMAGES = {"x": draw(2, 3, 8, 8)}
CASES = {
    "token_dwconv": Case(lifeops.token_dwconv, DWCONV, dict.fromkeys(("x", "weight", "bias", "residual")) | PLACED
                         | {"prefix": "name", "pool": "flag", "stats": "flag", "prologue": "other", "epilogue": "other", "stride": "step",
                            "padding": "margin"},
                         ("bias", "residual")),
    "token_dwconv_transpose": Case(lifeops.token_dwconv_transpose, TRANSPOSED, dict.fromkeys(("x", "weight", "bias")) | PLACED
                                   | {"prefix": "name", "stride": "step", "padding": "margin", "output_padding": "margin",
                                      "multiplier": "size"}, ("bias",)),
    "token_dwconv_multi": Case(lifeops.token_dwconv_multi, {"x": X, "weights": [draw(9, 1, 3, 3)] * 2, **PLACE}, {"x": None} | PLACED
                               | {"prefix": "name", "weights": "other", "biases": "steps", "strides": "steps", "paddings": "steps"}),
    "token_pool": Case(lifeops.token_pool, {"x": X, "kernel_size": 2, **PLACE}, {"x": None} | PLACED | {
        "prefix": "name", "kernel_size": "step", "mode": "name", "stride": "area", "padding": "margin", "ceil_mode": "flag",
        "count_include_pad": "flag"}),
    "conv_grid": Case(lifeops.conv_grid, {"grid": (2, 3), "kernel_size": 2}, {
        "grid": "grid", "kernel_size": "step", "stride": "step", "padding": "margin", "ceil_mode": "flag"}),
    "life_qkv": Case(lifeops.life_qkv, LIFE, dict.fromkeys(("x", "w1", "b1", "dw2", "pw2", "dw3", "pw3")) | PLACED
                     | {"aux_key": "name", "layout": "name", "recompute": "flag"}, ("b1",)),
    "local_attention": Case(lifeops.local_attention, LOCAL, dict.fromkeys(("q", "k", "v", "weight", "bias", "attn_mask")) | PLACED
                            | {"scale": "number?", "dropout_p": "rate", "generator": "other", "key_mask": "other"},
                            ("weight", "bias", "attn_mask")),
    "rollout_step": Case(lifeops.rollout_step, {"r": draw(2, 1, 7).abs(), "q": Q, "k": Q}, {
        "r": None, "q": None, "k": None, "scale": "number?", "head_fusion": "name", "residual": "rate", "discard_ratio": "rate",
        "backend": "backend"}),
    "rollout": Case(lifeops.rollout, {"model": _vit(), "images": IMAGES["x"]}, {
        "model": "module", "images": None, "targets": "other", "classes": "other", "head_fusion": "name", "residual": "rate",
        "discard_ratio": "rate", "start_layer": "count", "prefix": "name", "num_prefix_tokens": "count?", "verify": "flag",
        "backend": "backend"}),
    "rollout ": Case(lifeops.rollout, {"model": _vit(), "images": IMAGES["x"], "targets": "soft"}, {"token_logits": "other"}),
    "use_backend": Case(lambda backend: _entered(lifeops.use_backend(backend)), {"backend": None}, {"backend": "backend"}),
    "use_grid": Case(lambda **o: _entered(lifeops.use_grid(**o)), {"model": lifeops.nn.DWShortcut(9), "grid": (2, 3)},
                     {"model": "module", "grid": "grid"}),
    "explain": Case(lifeops.explain, {"op": "token_dwconv"}, {"op": "name"}),
    "convert": Case(lambda **o: lifeops.convert(**{"model": _vit(), **o}), {}, {
        "model": "module", "system": "name", "probe": "flag", "start": "backend"}),
    "accelerate": Case(lifeops.accelerate, {"model": _vit()}, {"model": "module", "kinds": "kinds", "verify": "flag"}),
    "describe": Case(lifeops.describe, {}, {"model": "module"}),
    "load_official": Case(lifeops.load_official, {"checkpoint": {}}, {
        "checkpoint": "file", "key": "key", "num_heads": "size?", "aux_key": "key", "act": "key", "img_size": "area",
        "num_classes": "count?", "window_size": "size?", "stage_blocks": "blocks"}),
    "revert": Case(lifeops.revert, {"model": _vit()}, {"model": "module"}),
    "fuse_": Case(lifeops.fuse_, {}, {"module": "module"}),
    "convert ": Case(lambda **o: _converts("life", **o), {}, {
        "qkv_norm": "flag", "aux_key": "name", "recompute": "flag", "num_prefix_tokens": "count?"}),
    "convert  ": Case(lambda **o: _converts("localvit", **o), {}, {
        "act": "name", "reduction": "size?", "expand_ratio": "number?", "num_prefix_tokens": "count?"}),
    "convert   ": Case(lambda **o: _converts("dw_shortcut", **o), {}, {
        "every": "size", "kernel_sizes": "odds", "num_prefix_tokens": "count?"}),
    "DWShortcut": Case(lifeops.nn.DWShortcut, {"dim": 9}, {
        "dim": "size", "kernel_size": "odds", "num_prefix_tokens": "count", "grid": "grid", **DD}),
    "DWShortcut ": Case(_forward(lambda: lifeops.nn.DWShortcut(9)), {"x": X, "block_output": X, "grid": (2, 3)},
                        {**TOKENS, "block_output": None}),
    "LocalityFeedForward": Case(lifeops.nn.LocalityFeedForward, {"dim": 9}, {
        "dim": "size", "expand_ratio": "positive", "act": "name", "reduction": "count", "wo_dp_conv": "flag", "dp_first": "flag",
        "num_prefix_tokens": "count", "grid": "grid", **DD}),
    "LocalityFeedForward ": Case(_forward(lambda: lifeops.nn.LocalityFeedForward(9)), {"x": X, "grid": (2, 3)}, TOKENS),
    "LocalViTBlock": Case(lifeops.nn.LocalViTBlock, {n: nn.Identity() for n in ("norm1", "attn", "conv")}, {
        "norm1": "module", "attn": "module", "conv": "module", "drop_path1": "other", "ls1": "other"}),
    "LocalViTBlock ": Case(_forward(lambda: lifeops.nn.LocalViTBlock(nn.LayerNorm(9), nn.Identity(), lifeops.nn.LocalityFeedForward(9))),
                           {"x": X, "grid": (2, 3)}, TOKENS),
    "LifeQKV": Case(lifeops.nn.LifeQKV, {"dim": 9, "num_heads": 3}, {
        "dim": "size", "num_heads": "size", "num_prefix_tokens": "count", "qkv_norm": "flag", "aux_key": "name", "recompute": "flag",
        **DD}),
    "LifeQKV ": Case(_forward(lambda: lifeops.nn.LifeQKV(9, 3)), {"x": X, "grid": (2, 3)}, TOKENS),
    "LifeAttention": Case(lifeops.nn.LifeAttention, {"dim": 9, "num_heads": 3}, {
        "dim": "size", "num_heads": "size", "num_prefix_tokens": "count", "grid": "grid", "qkv_norm": "flag", "aux_key": "name",
        "attn_drop": "rate", "proj_drop": "rate", "proj_bias": "flag", "recompute": "flag", **DD}),
    "LifeAttention ": Case(_forward(lambda: lifeops.nn.LifeAttention(9, 3)), ROPE, {**ATTENDS, "rope": None}, ("attn_mask", "rope")),
    "LocalAttention": Case(lifeops.nn.LocalAttention, {"dim": 9, "num_heads": 3}, {
        "dim": "size", "num_heads": "size", "kernel_size": "odd", "num_prefix_tokens": "count", "grid": "grid", "attn_head_dim": "size?",
        "dim_out": "size?", "qkv_bias": "flag", "qk_norm": "flag", "scale_norm": "flag", "proj_bias": "flag", "gated": "flag",
        "attn_drop": "rate", "proj_drop": "rate", "norm_layer": "other", "local_bias": "flag", **DD}),
    "LocalAttention ": Case(_forward(lambda: lifeops.nn.LocalAttention(9, 3)), ATTENTION, ATTENDS, ("attn_mask",)),
    "ConvProjectionAttention": Case(lifeops.nn.ConvProjectionAttention, {"dim": 9, "num_heads": 3}, {
        "dim": "size", "num_heads": "size", "num_prefix_tokens": "count", "grid": "grid", "method": "name", "kernel_size": "odd",
        "stride_q": "size?", "stride_kv": "size?", "qkv_bias": "flag", "attn_drop": "rate", "proj_drop": "rate", **DD}),
    "ConvProjectionAttention ": Case(_forward(lambda: lifeops.nn.ConvProjectionAttention(9, 3)), {"x": X, "grid": (2, 3)}, TOKENS),
    "ConvFeedForward": Case(lifeops.nn.ConvFeedForward, {"dim": 9}, {
        "dim": "size", "mlp_ratio": "positive", "num_prefix_tokens": "count", "kernel_size": "odd", "grid": "grid", "extra_relu": "flag",
        "drop": "rate", **DD}),
    "ConvFeedForward ": Case(_forward(lambda: lifeops.nn.ConvFeedForward(9, 2.0, 1)), {"x": X, "grid": (2, 3)}, TOKENS),
    "OverlapPatchEmbed": Case(lifeops.nn.OverlapPatchEmbed, {}, {
        "in_chans": "size", "embed_dim": "size", "patch_size": "size", "stride": "size", "padding": "count?", **DD}),
    "OverlapPatchEmbed ": Case(_forward(lambda: lifeops.nn.OverlapPatchEmbed(3, 9, 3, 2)), {"maps": draw(2, 3, 8, 8)}, {"maps": None}),
    "LocalAgg": Case(lifeops.nn.LocalAgg, {"dim": 9}, {
        "dim": "size", "mlp_ratio": "positive", "num_prefix_tokens": "count", "grid": "grid", "kernel_size": "odd", "drop_path": "other",
        **DD}),
    "LocalAgg ": Case(_forward(lambda: lifeops.nn.LocalAgg(9, num_prefix_tokens=1)), {"x": X, "grid": (2, 3)}, TOKENS),
    "GlobalSparseAttention": Case(lifeops.nn.GlobalSparseAttention, {"dim": 9, "num_heads": 3}, {
        "dim": "size", "num_heads": "size", "sr_ratio": "size", "num_prefix_tokens": "count", "grid": "grid", "qkv_bias": "flag",
        "attn_drop": "rate", "proj_drop": "rate", **DD}),
    "GlobalSparseAttention ": Case(_forward(lambda: lifeops.nn.GlobalSparseAttention(9, 3, 1, 1)), {"x": X, "grid": (2, 3)}, TOKENS),
    "PoolingAttention": Case(lifeops.nn.PoolingAttention, {"dim": 9, "num_heads": 3}, {
        "dim": "size", "num_heads": "size", "num_prefix_tokens": "count", "dim_out": "size?", "grid": "grid", "mode": "name",
        "kernel_q": "step", "kernel_kv": "step", "stride_q": "step", "stride_kv": "step", "pool_first": "flag",
        "residual_pooling": "flag", "residual_prefix": "flag", "rel_pos": "area", "rel_pos_resize": "name", "qkv_bias": "flag",
        "norm_eps": "number", **DD}),
    "PoolingAttention ": Case(_forward(lambda: lifeops.nn.PoolingAttention(9, 3, 1)), {"x": X, "grid": (2, 3)}, TOKENS),
    "RegionalAttention": Case(lifeops.nn.RegionalAttention, {"dim": 9, "num_heads": 3, "window_size": 2}, {
        "dim": "size", "num_heads": "size", "window_size": "size", "qkv_bias": "flag", **DD}),
    "RegionalAttention ": Case(_forward(lambda: lifeops.nn.RegionalAttention(9, 3, 2)), {"x": draw(2, 5, 9), "windows": True}, {
        "x": None, "windows": "flag", "mask": "other"}),
    "TokenPyramid": Case(lifeops.nn.TokenPyramid, {"dim": 9, "patch_size": 4, "strides": (2, 4)}, {
        "dim": "size", "out_dim": "size", "num_prefix_tokens": "count", "patch_size": "size", "strides": "ints", "grid": "grid",
        "norm_eps": "number", **DD}),
    "TokenPyramid ": Case(_forward(lambda: lifeops.nn.TokenPyramid(9, 6, 1)), {"x": X, "grid": (2, 3)}, TOKENS),
    "TwoGridDownsampling": Case(lifeops.nn.TwoGridDownsampling, {"dim": 9, "dim_out": 18}, {"dim": "size", "dim_out": "size"}),
    "TwoGridDownsampling ": Case(
        _forward(lambda: lifeops.nn.TwoGridDownsampling(9, 18)),
        {"regions": draw(2, 2, 9), "region_grid": (1, 2), "x": draw(2, 8, 9), "grid": (2, 4)},
        {"regions": None, "region_grid": "area", "x": None, "grid": "area"}),
    "SharedConvAttention": Case(lifeops.nn.SharedConvAttention, {"mhsa": _attention(9, 1)}, {
        "mhsa": "module", "num_prefix_tokens": "count", "grid": "grid", "offsets": "blocks"}),
    "SharedConvAttention ": Case(_forward(lambda: lifeops.nn.SharedConvAttention(_attention(9, 9), 1)), {"x": X, "grid": (2, 3)}, TOKENS),
    "FeatureHint": Case(lifeops.losses.FeatureHint, {"dim": 9}, {"dim": "size", "num_prefix_tokens": "count", "resample": "flag", **DD}),
    "FeatureHint ": Case(_forward(lambda: lifeops.losses.FeatureHint(9, 0)), {"vit": X, "cnn": X}, {
        "vit": None, "cnn": None, "teacher": "name"}),
    "logit_distillation": Case(lifeops.losses.logit_distillation, {"student": draw(2, 3), "teacher": draw(2, 3)}, {
        "student": None, "teacher": None, "temperature": "positive"}),
    "TokenSmoothing": Case(lifeops.nn.TokenSmoothing, {}, {
        "sigma": "number", "kernel_size": "odd", "num_prefix_tokens": "count", "grid": "grid", "padding": "count?", "schedule": "other"}),
    "TokenSmoothing ": Case(_forward(lambda: lifeops.nn.TokenSmoothing(1, 3, 1)), {"x": X, "grid": (2, 3)}, TOKENS),
    "TokenSlimming": Case(lifeops.nn.TokenSlimming, {"dim": 9, "num_tokens": 2}, {
        "dim": "size", "num_tokens": "size", "num_prefix_tokens": "count", "hidden_ratio": "positive", **DD}),
    "TokenSlimming ": Case(_forward(lambda: lifeops.nn.TokenSlimming(9, 2)), {"x": X}, {"x": None}),
    "ReverseTokenSlimming": Case(lifeops.nn.ReverseTokenSlimming, {"dim": 9, "num_tokens": 2, "num_patches": 4}, {
        "dim": "size", "num_tokens": "size", "num_patches": "size", "ratio": "positive", **DD}),
    "ReverseTokenSlimming ": Case(_forward(lambda: lifeops.nn.ReverseTokenSlimming(9, 7, 8)), {"x": X}, {"x": None}),
    "wrap": Case(lifeops.nn.wrap, {"blocks": [nn.LayerNorm(9)]}, {
        "blocks": "module", "every": "size", "kernel_size": "odds", "num_prefix_tokens": "count", "dim": "size?", "grid": "grid"}),
    "VisionTransformer": Case(lifeops.models.VisionTransformer, VIT, {
        **VIT_KINDS, "class_token": "flag", "dist_token": "flag", "num_reg_tokens": "count", "attn": "other", "qkv_bias": "flag",
        "norm_eps": "number?", "drop_path_rate": "rate", "block": "other"}),
    "VisionTransformer ": Case(_forward(_vit), IMAGES, {"x": None}),
    "ViT": Case(lifeops.models.ViT, VIT, {**VIT_KINDS, "head_dim": "size?", "drop_rate": "rate", **SHORTCUTS}),
    "ViT ": Case(_forward(lambda: lifeops.models.ViT(**VIT)), IMAGES, {"x": None}),
    "CaiT": Case(lifeops.models.CaiT, VIT, {**VIT_KINDS, "cls_depth": "count", "head_dim": "size?", "drop_rate": "rate", **SHORTCUTS}),
    "CaiT ": Case(_forward(lambda: lifeops.models.CaiT(**VIT)), IMAGES, {"x": None}),
    "SwinTransformer": Case(lifeops.models.SwinTransformer, SWIN, {
        **{k: v for k, v in VIT_KINDS.items() if k not in ("depth", "num_heads")}, "depths": "ints", "num_heads": "ints",
        "window_size": "size", "qkv_bias": "flag", "drop_path_rate": "rate", **SHORTCUTS, "grad_checkpointing": "flag",
        "conv": "other"}),
    "SwinTransformer ": Case(_forward(lambda: lifeops.models.SwinTransformer(**{**SWIN, "depths": (1,), "num_heads": (1,)})), IMAGES,
                             {"x": None}),
    "SwinTransformerV2": Case(lifeops.models.SwinTransformerV2, SWIN, {
        **{k: v for k, v in VIT_KINDS.items() if k not in ("depth", "num_heads")}, "depths": "ints", "num_heads": "ints",
        "window_size": "size", "qkv_bias": "flag", "drop_path_rate": "rate", "life": "flag"}),
    "SwinTransformerV2 ": Case(_forward(lambda: lifeops.models.SwinTransformerV2(**SWIN)), IMAGES, {"x": None}),
    "life_swinv2": Case(lifeops.models.life_swinv2, {}, {"variant": "name"}),
    "life_t2t": Case(lifeops.models.life_t2t, {}, {"variant": "name"}),
    "CvT": Case(lifeops.models.CvT, CVT, {**STAGES, "patch_stride": "ints", "patch_padding": "ints", "class_token": "flag"}),
    "CvT ": Case(_forward(lambda: lifeops.models.CvT(**CVT)), {"x": draw(2, 3, 16, 16)}, {"x": None}),
    "cvt": Case(lifeops.models.cvt, {}, {"variant": "name"}),
    "EdgeViT": Case(lifeops.models.EdgeViT, EDGEVIT, {**STAGES, "sr_ratios": "ints", "qkv_bias": "flag"}),
    "EdgeViT ": Case(_forward(lambda: lifeops.models.EdgeViT(**EDGEVIT)), {"x": draw(2, 3, 16, 16)}, {"x": None}),
    "edgevit": Case(lifeops.models.edgevit, {}, {"variant": "name"}),
    "MViT": Case(lifeops.models.MViT, MVIT, {
        **{k: v for k, v in VIT_KINDS.items() if k not in ("patch_size", "depth")}, "depths": "ints", "class_token": "flag",
        "expand_attn": "flag", "mode": "name", "kernel": "step", "stride_kv": "size", "residual_pooling": "flag", "residual_prefix": "flag",
        "rel_pos": "flag", "rel_pos_resize": "name", "qkv_bias": "flag", "norm_eps": "number?", "drop_rate": "rate",
        "drop_path_rate": "rate"}),
    "MViT ": Case(_forward(lambda: lifeops.models.MViT(**MVIT)), IMAGES, {"x": None}),
    "mvitv2": Case(lifeops.models.mvitv2, {}, {"variant": "name"}),
    "RegionViT": Case(lifeops.models.RegionViT, REGIONVIT, {
        **{k: v for k, v in VIT_KINDS.items() if k not in ("depth", "embed_dim", "num_heads")}, "embed_dim": "ints",
        "depths": "ints", "num_heads": "ints", "window_size": "size", "stem": "name", "peg": "flag", "corner_mask": "name",
        "qkv_bias": "flag", "norm_eps": "number?", "drop_path_rate": "rate"}),
    "RegionViT ": Case(_forward(lambda: lifeops.models.RegionViT(**REGIONVIT)), IMAGES, {"x": None}),
    "PyramidVisionTransformer": Case(lifeops.models.PyramidVisionTransformer, PVT, {
        **{k: v for k, v in STAGES.items() if k not in ("mlp_ratio", "patch_size")}, "patch_size": "size", "mlp_ratios": "ratios",
        "sr_ratios": "ints", "qkv_bias": "flag", "norm_eps": "number?", "conv": "other"}),
    "PyramidVisionTransformer ": Case(_forward(lambda: lifeops.models.PyramidVisionTransformer(**PVT)), {"x": draw(2, 3, 16, 16)},
                                      {"x": None}),
    "TNT": Case(lifeops.models.TNT, TNT, {
        **VIT_KINDS, "in_dim": "size", "in_num_heads": "size", "qkv_bias": "flag", "norm_eps": "number?", "drop_path_rate": "rate",
        "conv": "other"}),
    "TNT ": Case(_forward(lambda: lifeops.models.TNT(**TNT)), IMAGES, {"x": None}),
    "T2T": Case(lifeops.models.T2T, T2T, {
        **{k: v for k, v in VIT_KINDS.items() if k != "patch_size"}, "token_dim": "size", "qkv_bias": "flag", "norm_eps": "number?",
        "token_drop": "rate", "drop_path_rate": "rate", "attn": "other", "conv": "other"}),
    "T2T ": Case(_forward(lambda: lifeops.models.T2T(**T2T)), {"x": draw(2, 3, 32, 32)}, {"x": None}),
    "regionvit": Case(lifeops.models.regionvit, {}, {"variant": "name", "w14": "flag", "peg": "flag"}),
    "SiT": Case(lifeops.models.SiT, SIT, {
        **{k: v for k, v in VIT_KINDS.items() if k not in ("patch_size", "depth")}, "stage_blocks": "blocks", "keep_ratio": "positive",
        "num_tokens": "blocks", "stem": "stem", "skip": "positive", "qkv_bias": "flag", "drop_path_rate": "rate", "distill": "flag"}),
    "SiT ": Case(_forward(lambda: lifeops.models.SiT(**SIT)), {"x": draw(2, 3, 32, 32)}, {"x": None}),
    "sit": Case(lifeops.models.sit, {}, {"variant": "name"}),
    "feature_recycling_distillation": Case(
        lifeops.losses.feature_recycling_distillation, {"student": (draw(2, 3), [X]), "teacher": (draw(2, 3), [X])}, {
            "student": "other", "teacher": "other", "token_weight": "number", "logit_weight": "number", "temperature": "positive"}),
    "localvit": Case(lifeops.models.localvit, {}, {
        "variant": "name", "embed_dim": "size?", "num_heads": "size?", "mlp_ratio": "number?", "act": "backend", "reduction": "size?",
        "qkv_bias": "flag", "norm_eps": "number?"}),
    "dw_shortcut": Case(lifeops.models.dw_shortcut, {}, {"variant": "name", **SHORTCUTS}),
    "named": Case(lifeops.models.named, {"name": "deit_tiny"}, {"name": "module", "system": "backend"}),
    "RelativeLocalizationHead": Case(lifeops.losses.RelativeLocalizationHead, {"dim": 9, "mode": "ce", "grid": (2, 3)}, {
        "dim": "size", "mode": "name", "signed": "flag", "grid": "grid", "hidden_dim": "size", **DD}),
    "RelativeLocalizationHead ": Case(_forward(lambda: lifeops.losses.RelativeLocalizationHead(9)), {"pairs": draw(2, 18)},
                                      {"pairs": None}),
    "dense_relative_localization": Case(
        lifeops.losses.dense_relative_localization,
        {"tokens": X, **PLACE, "head": lifeops.losses.RelativeLocalizationHead(9)}, {
            "tokens": None, "grid": "grid", "num_prefix_tokens": "count", "head": "module", "num_pairs": "size", "normalize": "backend",
            "pairs": "other", "generator": "other"}),
    "relative_localization_weight": Case(lifeops.losses.relative_localization_weight, {"epoch": 1, "epochs": 20}, {
        "epoch": "number", "epochs": "size", "weight": "number", "warmup_epochs": "count"}),
    "head_offsets": Case(lifeops.init.head_offsets, {"num_heads": 3}, {"num_heads": "count", "kernel_size": "odd"}),
    "impulse_qk": Case(lifeops.init.impulse_qk, {**QK, "noise": draw(2, 12, 12)}, {
        "position_embedding": None, "grid": "grid", "num_heads": "size", "head_dim": "size", "noise": None, "generator": "other",
        "kernel_size": "odd"}, ("noise",)),
    "optimised_qk": Case(lifeops.init.optimised_qk, QK, {
        "position_embedding": None, "grid": "grid", "num_heads": "size", "head_dim": "size", "kernel_size": "odd", "num_layers": "size",
        "offsets": "other", "steps": "count", "lr": "positive", "warm_start": "flag", "generator": "other", "progress": "flag"}),
    "sincos_position_embedding": Case(lifeops.init.sincos_position_embedding, {"grid": (2, 3), "dim": 8}, {"grid": "grid", "dim": "count"}),
    "structured_": Case(lifeops.init.structured_, {"model_or_blocks": _vit()}, {
        "model_or_blocks": "module", "method": "name", "version": "count", "kernel_size": "odd", "generator": "other",
        "position_scale": "number?", "qk_scale": "number?", "value_scale": "number?", "position_embedding": "other", "grid": "grid",
        "shared": "flag?", "steps": "count", "progress": "flag", "verify": "flag"}),
    "impulse_conv_": _filters(lifeops.init.impulse_conv_),
    "box_": _filters(lifeops.init.box_, taps=2),
    "gaussian_": _filters(lifeops.init.gaussian_, variance=1.0),
    "random_conv_": _filters(lifeops.init.random_conv_),
    "box_ ": Case(lifeops.init.box_, {"weight": draw(4, 1, 3, 3)}, {"taps": "size"}),
    "gaussian_ ": Case(lifeops.init.gaussian_, {"weight": draw(4, 1, 3, 3)}, {"variance": "positive"}),
    "token_dwconv ": Case(lambda **o: lifeops.token_dwconv(X, draw(9, 1, 3, 3), **PLACE, prologue=ChannelAct(**o)),
                          {"scale": draw(9), "shift": draw(9)}, {"scale": None, "shift": None, "act": "name"}, ("scale", "shift")),
    "token_dwconv  ": Case(lambda **o: lifeops.token_dwconv(X, draw(9, 1, 3, 3), **PLACE, epilogue=ChannelAct(**o)),
                           {"scale": draw(9), "shift": draw(9)}, {"scale": None, "shift": None, "act": "name"}, ("scale", "shift")),
}  # fmt: skip
