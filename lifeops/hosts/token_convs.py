"""Modules of timm and transformers that hold a depth-wise convolution of tokens, or of maps that are tokens in memory."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn


class Entry(NamedTuple):
    """One kind of module.

    ``cls``: the class's name. ``children``: the names of all its layers. ``form``: which of the forms in
    :mod:`lifeops.integrations.token_convs` computes it. ``layers``: what it calls its layers, by role. ``pays``: whether it is taken
    unless asked otherwise, ``least``: from which kernel size on; both measured, see docs/accelerate.md. ``at``: what its path must end
    in, a regular expression.
    """

    cls: str
    children: tuple[str, ...]
    form: str
    layers: dict[str, str]
    pays: bool = True
    least: int = 1
    at: str = ""

    def fits(self, path: str, module: nn.Module) -> bool:
        named = type(module).__name__ == self.cls and tuple(module._modules) == self.children
        return named and re.search(rf"(^|\.){self.at}$" if self.at else "", path) is not None


ENTRIES = {
    "twins_peg": Entry("PosConv", ("proj",), "peg", {"conv": "proj.0", "list": "proj"}),
    "coat_cpe": Entry("ConvPosEnc", ("proj",), "cpe", {"conv": "proj"}),
    "coat_crpe": Entry("ConvRelPosEnc", ("conv_list",), "crpe", {"convs": "conv_list"}),
    "pvt_v2_ffn": Entry(
        "MlpWithDepthwiseConv", ("fc1", "relu", "dwconv", "act", "fc2", "drop"), "ffn",
        {"fc1": "fc1", "relu": "relu", "conv": "dwconv", "act": "act", "fc2": "fc2", "drop": "drop"},
    ),
    "pvt_v2_ffn_hf": Entry(
        "PvtV2ConvFeedForwardNetwork", ("dense1", "dwconv", "intermediate_act_fn", "dense2", "dropout", "relu"), "ffn_hf",
        {
            "fc1": "dense1", "relu": "relu", "holder": "dwconv", "conv": "dwconv.dwconv", "act": "intermediate_act_fn", "fc2": "dense2",
            "drop": "dropout",
        },
    ),
    "segformer_ffn": Entry(
        "SegformerMixMLP", ("fc1", "dwconv", "activation_fn", "fc2", "dropout"), "ffn_hf",
        {"fc1": "fc1", "holder": "dwconv", "conv": "dwconv.dwconv", "act": "activation_fn", "fc2": "fc2", "drop": "dropout"},
    ),
    "xcit_lpi": Entry("LPI", ("conv1", "act", "bn", "conv2"), "lpi", {"conv": "conv1", "act": "act", "norm": "bn", "conv2": "conv2"}),
    "davit_cpe": Entry("ConvPosEnc", ("proj", "act"), "map_cpe", {"conv": "proj", "act": "act"}, pays=False),
    "edgenext_block": Entry(
        "ConvBlock", ("conv_dw", "norm", "mlp", "drop_path"), "map_block",
        {"conv": "conv_dw", "norm": "norm", "mlp": "mlp", "drop_path": "drop_path"}, least=5,
    ),
    "focalnet_level": Entry("Sequential", ("0", "1"), "map_act", {"conv": "0", "act": "1"}, least=5, at=r"focal_layers\.\d+"),
    "tiny_vit_conv": Entry("ConvNorm", ("conv", "bn"), "map_norm", {"conv": "conv", "norm": "bn"}, pays=False, at="local_conv"),
}  # fmt: skip
"""By the name that a user asks for it with."""

STRIDED = {
    "Pooling": "its convolution has stride 2 and two outputs for a channel",
    "MultiScaleAttention": "its pooling convolutions have a stride, and one weight for all heads",
    "CvtSelfAttentionConvProjection": "its convolution of keys and values has stride 2",
}
"""Classes whose depth-wise convolutions are not taken, and why."""

GELUS = ("GELUActivation",)
"""Classes, beside torch's, that compute ``act(v)``, the exact GELU where ``act`` is torch's function."""


def entry_of(path: str, module: nn.Module) -> str | None:
    """The name of the entry that ``module``, at ``path``, is one of."""
    return next((name for name, entry in ENTRIES.items() if entry.fits(path, module)), None)
