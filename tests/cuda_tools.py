# SPDX-License-Identifier: Apache-2.0
"""Compilers and argument structures shared by the CUDA tests and the budget table. No GPU is needed."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "cuda_shim"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # order of csrc/params.h
ACTS = ("none", "relu", "relu6", "hardswish", "gelu", "gelu_first")  # order of csrc/params.h


class FwdParams(ctypes.Structure):
    """TokenDWConvParams of csrc/params.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "residual", "y")]
        + [(name, ctypes.c_int64) for name in ("B", "H", "W", "C")]
        + [(f"{t}_stride_{d}", ctypes.c_int64) for t in "xyr" for d in "bn"]
        + [(name, ctypes.c_int32) for name in ("K", "x_prefix", "y_prefix", "prefix")]
        + [("flip", ctypes.c_bool)]
        + [(name, ctypes.c_int32) for name in ("dtype", "weight_dtype", "bias_dtype")]
    )


class GradWeightParams(ctypes.Structure):
    """TokenDWConvGradWeightParams of csrc/params.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("dy", "x", "dw", "db")]
        + [(name, ctypes.c_int64) for name in ("B", "H", "W", "C")]
        + [(f"{t}_stride_{d}", ctypes.c_int64) for t in ("x", "dy") for d in "bn"]
        + [(name, ctypes.c_int32) for name in ("K", "x_prefix", "dy_prefix", "dtype", "weight_dtype", "bias_dtype")]
    )


class ConvShape(ctypes.Structure):
    """TokenConvShape of csrc/cuda/token_conv_plan.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("H", "W", "rows", "columns")] + [
        (name, ctypes.c_int32) for name in ("Kh", "Kw", "sh", "sw", "ph", "pw")
    ]


class ConvParams(ctypes.Structure):
    """TokenConvParams of csrc/cuda/token_conv_plan.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")]
        + [(name, ctypes.c_int64) for name in ("B", "C", "m")]
        + [("shape", ConvShape)]
        + [(f"{t}_stride_{d}", ctypes.c_int64) for t in "xy" for d in "bn"]
        + [(name, ctypes.c_int32) for name in ("x_prefix", "y_prefix", "prefix")]
        + [(name, ctypes.c_bool) for name in ("transpose", "flip")]
        + [(name, ctypes.c_int32) for name in ("dtype", "weight_dtype", "bias_dtype")]
    )


class ConvGradWeightParams(ctypes.Structure):
    """TokenConvGradWeightParams of csrc/cuda/token_conv_plan.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("dy", "x", "dw", "db")]
        + [(name, ctypes.c_int64) for name in ("B", "C", "m")]
        + [("shape", ConvShape)]
        + [(f"{t}_stride_{d}", ctypes.c_int64) for t in ("x", "dy") for d in "bn"]
        + [(name, ctypes.c_int32) for name in ("x_prefix", "dy_prefix", "dtype", "weight_dtype", "bias_dtype")]
    )


class AffineAct(ctypes.Structure):
    """AffineAct of csrc/cuda/activations.cuh; acts are numbered as Python lists them, gelu_first last."""

    _fields_ = (("scale", ctypes.c_void_p), ("shift", ctypes.c_void_p), ("act", ctypes.c_int32))


class ChannelRows(ctypes.Structure):
    """Rows of csrc/cpu/channel_act.h."""

    _fields_ = (("data", ctypes.c_void_p), ("stride_b", ctypes.c_int64), ("stride_n", ctypes.c_int64))


class ChannelActParams(ctypes.Structure):
    """ChannelActParams of csrc/cpu/channel_act.h."""

    _fields_ = (
        [("channel_pass", ctypes.c_int32)]
        + [(name, ChannelRows) for name in ("x", "dy", "residual", "y")]
        + [(name, ctypes.c_int64) for name in ("B", "n", "C")]
        + [(name, ctypes.c_int32) for name in ("dtype", "act")]
        + [(name, ctypes.c_void_p) for name in ("scale", "shift", "gate", "pool_grad", "a", "b")]
        + [(name, ctypes.c_int64) for name in ("gate_stride", "pool_grad_stride")]
    )


def cuda_folders() -> list[Path]:
    """Where a CUDA toolkit, or the part of it inside Triton's wheel, may lie."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends" / "nvidia")
    except ImportError:
        pass
    return folders


def find_tool(name: str) -> str | None:
    """nvcc, cuobjdump: on the PATH, in the toolkit or in Triton's wheel."""
    found = [shutil.which(name), *(shutil.which(name, path=str(f / "bin")) for f in cuda_folders())]
    return next((f for f in found if f), None)


def compile_for_host(out: Path, *arguments: str) -> str | None:
    """g++ on a file of tests/cuda_shim; -> why it cannot be done here, or None."""
    include = next((f / "include" for f in cuda_folders() if (f / "include" / "cuda_bf16.h").exists()), None)
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if include is None:
        return "cuda_bf16.h not found: neither a CUDA toolkit nor Triton is installed"
    command = ["g++", "-std=c++20", "-pthread", "-Wall", "-Wno-unknown-pragmas", f"-I{include}", *arguments]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, cwd=SHIM)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return None
