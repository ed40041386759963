"""What options may be, for type checkers and editors; tests compare these types with what is checked at run time."""

from __future__ import annotations

from typing import Literal, TypeAlias

Backend: TypeAlias = Literal["reference", "cpu", "cuda", "triton"]
Prefix: TypeAlias = Literal["keep", "zero", "drop"]  # of token ops: what becomes of the prefix tokens
MapPrefix: TypeAlias = Literal["keep", "normalize"]  # of roll-out maps
PoolMode: TypeAlias = Literal["max", "avg", "subsample"]
HeadFusion: TypeAlias = Literal["mean", "max", "min"]
AuxKey: TypeAlias = Literal["multiscale", "scale1"]
Act: TypeAlias = Literal["none", "relu", "relu6", "hardswish", "gelu", "gelu_first"]
GateAct: TypeAlias = Literal["relu6", "hs", "hs+se", "hs+eca", "hs+ecah"]  # of LocalViT
Projection: TypeAlias = Literal["dw_bn", "avg", "linear"]  # of CvT
Pooling: TypeAlias = Literal["conv", "max", "avg", "conv_unshared"]  # of MViT
System: TypeAlias = Literal["life", "localvit", "dw_shortcut"]
Initialisation: TypeAlias = Literal["impulse", "mimetic", "default"]
Assign: TypeAlias = Literal["random", "groups"]
Pair: TypeAlias = int | tuple[int, int]
Resize: TypeAlias = Literal["interpolate", "middle"]  # of tables of relative positions
Stem: TypeAlias = Literal["3conv", "1conv"]  # of RegionViT
CornerMask: TypeAlias = Literal["fixed", "authors"]
