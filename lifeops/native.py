"""The compiled kernels: loads the extension if it is there and registers backends "cpu" and "cuda".

The stable ABI checks no argument types (a wrong order would kill the process), so the schemas that the library defines are
compared with the ones this file was written for; that also finds a stale library.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lifeops import config, registry
from lifeops.ops.token_dwconv import DTYPES, Problem

_HERE = Path(__file__).parent
SCHEMAS = {
    "token_dwconv": "lifeops_native::token_dwconv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) y, int H,"
    " int W, int x_prefix, int y_prefix, int prefix_mode, bool flip, int isa) -> ()",
    "token_dwconv_grad_weight": "lifeops_native::token_dwconv_grad_weight(Tensor dy, Tensor? x, Tensor(a!)? dw, Tensor(b!)? db,"
    " int K, int H, int W, int dy_prefix, int x_prefix, int isa) -> ()",
}
_ISA = {"auto": 0, "baseline": 1, "avx2": 2, "avx512": 3}
MAX_KERNEL = 15


def build_notes() -> dict[str, str]:
    """Why a backend was left out of this installation, as setup.py noted it."""
    try:
        notes = json.loads((_HERE / "_build.json").read_text())
    except FileNotFoundError:
        return {}
    return {backend: f"{reason}; to build it: {notes['how']}" for backend, reason in notes["left_out"].items()}


def _find() -> Path:
    files = sorted(_HERE.glob("_ops*.so"))
    if files:
        return files[-1]
    if (_HERE.parent / "setup.py").exists():
        raise ImportError(
            f"no compiled kernels in {_HERE}: this is the source tree; if lifeops is installed elsewhere, the folder you"
            " run from shadows it (run from another folder), otherwise run `pip install --no-build-isolation -e .`"
        )
    raise ImportError("this installation has no compiled kernels")


def _stale(path: Path) -> str | None:
    for name, expected in SCHEMAS.items():
        op = getattr(torch.ops.lifeops_native, name, None)
        found = str(op.default._schema) if op is not None else "nothing"
        if found != expected:
            return f"{path.name} is stale: expected {expected!r}, found {found!r}; rebuild it with `pip install --no-build-isolation .`"
    return None


def _load() -> str | None:
    """None if the library is loaded and fits, else why not."""
    try:
        path = _find()
        torch.ops.load_library(str(path))
    except (ImportError, OSError) as error:
        return str(error)
    return _stale(path)


_fwd = _grad_weight = None


def _isa() -> int:
    return _ISA[config.settings.cpu_isa]


def _rows(P, prefix):
    return 0 if prefix == "drop" else P


def _token_dwconv(x, weight, bias, residual, H, W, P, prefix, backend):
    rows = _rows(P, prefix)
    y = x.new_empty((x.shape[0], rows + H * W, x.shape[2]))
    _fwd(x, weight.contiguous(), bias, residual, y, H, W, P, rows, int(prefix != "keep"), False, _isa())
    return y


def _token_dwconv_bwd_dx(dy, weight, H, W, P, prefix, backend):
    dx = dy.new_empty((dy.shape[0], P + H * W, dy.shape[2]))
    _fwd(dy, weight.contiguous(), None, None, dx, H, W, _rows(P, prefix), P, int(prefix != "keep"), True, _isa())
    return dx


def _token_dwconv_bwd_dw(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, backend):
    dw = x.new_empty((x.shape[2], 1, K, K), dtype=weight_dtype)
    db = None if bias_dtype is None else x.new_empty((x.shape[2],), dtype=bias_dtype)
    _grad_weight(dy, x, dw, db, K, H, W, _rows(P, prefix), P, _isa())
    return dw, x.new_empty((0,)) if db is None else db


def _token_dwconv_bwd_db(dy, H, W, P, prefix, bias_dtype, backend):
    db = dy.new_empty((dy.shape[2],), dtype=bias_dtype)
    _grad_weight(dy, None, None, db, 1, H, W, _rows(P, prefix), 0, _isa())
    return db


_IMPLEMENTATIONS = {
    "token_dwconv": _token_dwconv,
    "token_dwconv_bwd_dx": _token_dwconv_bwd_dx,
    "token_dwconv_bwd_dw": _token_dwconv_bwd_dw,
    "token_dwconv_bwd_db": _token_dwconv_bwd_db,
}


def _supports(device: str):
    def reasons(problem: Problem) -> list[str]:
        found = []
        if problem.device.type != device:
            found.append(f"tensors are on {problem.device.type}")
        if problem.dtype not in DTYPES or problem.weight_dtype not in (None, *DTYPES):
            found.append(f"dtypes {problem.dtype}, {problem.weight_dtype}")
        if problem.K > MAX_KERNEL:
            found.append(f"K = {problem.K} is larger than {MAX_KERNEL}")
        return found

    return reasons


def _has(device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("lifeops_native::token_dwconv", device.upper())


def _register() -> None:
    global _fwd, _grad_weight
    error, notes = _load(), build_notes()
    for device in ("cpu", "cuda"):
        if error is not None:
            registry.set_unavailable(device, notes.get(device, error))
        elif not _has(device):
            registry.set_unavailable(device, notes.get(device, "the extension was built without it"))
        else:
            for name, fn in _IMPLEMENTATIONS.items():
                registry.register(name, device, fn, supports=_supports(device), priority=registry.BACKEND_PRIORITY[device])
    if error is None:
        _fwd = torch.ops.lifeops_native.token_dwconv.default
        _grad_weight = torch.ops.lifeops_native.token_dwconv_grad_weight.default


_register()
