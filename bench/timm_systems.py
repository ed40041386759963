"""timm's own blocks with a depth-wise convolution over tokens, as they are (``eager``) and with lifeops inside (``lifeops``).

CoaT's ConvPosEnc (cls token beside the grid), PVTv2's MlpWithDepthwiseConv and Twins' PosConv (no prefix). The swap keeps every
weight and the state dict: only the view-conv-view around ``nn.Conv2d(groups=C)`` becomes one token_dwconv.
"""

from __future__ import annotations

import copy
import importlib
from types import MethodType

import torch

import lifeops
from bench import baselines
from bench.case import Case, of_module
from bench.op_systems import _view, _wide, tokens
from bench.problems import Problem

BLOCKS = {"coat_pos_enc": ("coat", "ConvPosEnc"), "pvt_mlp": ("pvt_v2", "MlpWithDepthwiseConv"), "twins_pos_conv": ("twins", "PosConv")}
_kept = []  # a torch.library.Library is undone when it is collected


def timm_class(system: str):
    """The class. torchvision beside a torch of another build lacks compiled operators that timm's import only mentions: declared."""
    file, name = BLOCKS[system]
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except (RuntimeError, AttributeError):
        if not _kept:
            _kept.append(torch.library.Library("torchvision", "FRAGMENT"))
            for op in ("nms", "qnms"):
                _kept[0].define(f"{op}(Tensor dets, Tensor scores, float t) -> Tensor")
    return getattr(importlib.import_module(f"timm.models.{file}"), name)


def _coat(self, x, size):
    conv = self.proj  # the prefix is zero plus the residual's: the cls token passes
    return lifeops.token_dwconv(x, conv.weight, conv.bias, grid=size, num_prefix_tokens=1, prefix="zero", residual=x)


def _pvt(self, x, feat_size):
    x = self.relu(self.fc1(x))
    x = lifeops.token_dwconv(x, self.dwconv.weight, self.dwconv.bias, grid=tuple(feat_size))
    return self.drop(self.fc2(self.drop(self.act(x))))


def _twins(self, x, size):
    conv = self.proj[0]
    return lifeops.token_dwconv(x, conv.weight, conv.bias, grid=tuple(size), residual=x if self.stride == 1 else None)


FORWARDS = {"coat_pos_enc": _coat, "pvt_mlp": _pvt, "twins_pos_conv": _twins}


def with_lifeops(system: str, block: torch.nn.Module) -> torch.nn.Module:
    """A copy of a timm block whose depth-wise convolution is lifeops.token_dwconv on the tokens, with the same weights."""
    new = copy.deepcopy(block)
    new.forward = MethodType(FORWARDS[system], new)
    return new


def block_of(system: str, channels: int) -> torch.nn.Module:
    make = timm_class(system)
    if system == "pvt_mlp":
        return make(channels, 4 * channels)
    return make(channels) if system == "coat_pos_enc" else make(channels, channels)


def timm_block(p: Problem, compile: bool) -> Case:
    eager = block_of(p.system, p.C).to(getattr(torch, p.dtype)).train(p.mode != "fwd")
    ours = with_lifeops(p.system, eager)

    def call(m, i):
        return m(_view(i["x"]), (p.H, p.W))

    oracle = _wide(eager, call)
    variants = {"lifeops": of_module(ours, call, truth=oracle), "eager": of_module(eager, call, truth=oracle)}
    if compile:
        module = baselines.compiled(eager)
        variants["compiled"] = of_module(module, lambda m, i: m(i["x"], (p.H, p.W)), truth=oracle, compiled=True)
    return Case(p, lambda: {"x": tokens(p), "dy": tokens(p)}, variants)


BUILDERS = dict.fromkeys(BLOCKS, timm_block)
