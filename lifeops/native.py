"""The compiled kernels: loads the extension if it is there and registers backends "cpu" and "cuda".

The stable ABI checks no argument types (a wrong order would kill the process), so the schemas that the library defines are
compared with the ones this file was written for; that also finds a stale library.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lifeops import built, native_attention, native_windows, registry
from lifeops.errors import warn
from lifeops.native_args import contiguous as _contiguous
from lifeops.native_args import isa as _isa
from lifeops.native_args import mode as _mode
from lifeops.native_args import rows as _rows
from lifeops.ops.channel import norm
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.channel.activations import ACTS, PROLOGUES
from lifeops.ops.rollout_step import FUSIONS, dropped_entries
from lifeops.ops.token_dwconv.spec import DTYPES

SCHEMAS = {
    "token_dwconv": "lifeops_native::token_dwconv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) y, int H,"
    " int W, int x_prefix, int y_prefix, int prefix_mode, bool flip, int isa) -> ()",
    "token_dwconv_grad_weight": "lifeops_native::token_dwconv_grad_weight(Tensor dy, Tensor? x, Tensor(a!)? dw, Tensor(b!)? db,"
    " int K, int H, int W, int dy_prefix, int x_prefix, int isa) -> ()",
    "token_dwconv_act": "lifeops_native::token_dwconv_act(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, int act,"
    " Tensor? out_scale, Tensor? out_shift, int out_act, Tensor? residual, Tensor(a!) y, Tensor(b!)? pool, Tensor(c!)? stats, int H, int W,"
    " int x_prefix, int y_prefix, int prefix_mode, int isa) -> ()",
    "token_dwconv_act_grad_input": "lifeops_native::token_dwconv_act_grad_input(Tensor dy, Tensor x, Tensor weight, Tensor? scale,"
    " Tensor? shift, int act, Tensor? a, Tensor? b, Tensor(a!) dx, Tensor(b!) sums, int H, int W, int dy_prefix, int x_prefix,"
    " int prefix_mode, int isa) -> ()",
    "token_dwconv_act_grad_weight": "lifeops_native::token_dwconv_act_grad_weight(Tensor dy, Tensor x, Tensor? scale, Tensor? shift,"
    " int act, Tensor(a!) dw, Tensor(b!)? db, int K, int H, int W, int dy_prefix, int x_prefix, int isa) -> ()",
    "token_dwconv_act_backward": "lifeops_native::token_dwconv_act_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, int act,"
    " Tensor(a!) dx, Tensor(b!) dw, Tensor(c!)? db, int H, int W, int dy_prefix, int x_prefix, int prefix_mode, int isa) -> ()",
    "channel_act": "lifeops_native::channel_act(int channel_pass, Tensor x, Tensor? dy, Tensor? scale, Tensor? shift, Tensor? gate,"
    " Tensor? pool_grad, Tensor? a, Tensor? b, Tensor? residual, Tensor(a!)? y, Tensor(b!)? sums, int act, int patches, int isa) -> ()",
    "dw_shortcut": "lifeops_native::dw_shortcut(Tensor x, Tensor block_output, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta,"
    " float eps, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) var, Tensor(d!) affine, int H, int W, int P, int isa) -> ()",
    "dw_shortcut_bwd": "lifeops_native::dw_shortcut_bwd(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor affine,"
    " Tensor(a!)? dx, Tensor(b!) dw, Tensor(c!) dbias, Tensor(d!) dgamma, Tensor(e!) dbeta, int H, int W, int P, int isa) -> ()",
    "dw_shortcut_eval": "lifeops_native::dw_shortcut_eval(Tensor x, Tensor block_output, Tensor weight, Tensor? bias, Tensor? mean,"
    " Tensor? var, Tensor? gamma, Tensor? beta, float eps, Tensor(a!) y, int H, int W, int P, int isa) -> ()",
    "rollout_step": "lifeops_native::rollout_step(Tensor r, Tensor q, Tensor k, float scale, int fusion, float residual, int dropped,"
    " Tensor(a!) out, int isa) -> ()",
    **native_windows.SCHEMAS,
    **native_attention.SCHEMAS,
}
MAX_KERNEL = 15


def build_notes() -> dict[str, str]:
    """Why a backend was left out of this installation, as setup.py noted it, or that its notes cannot be read."""
    try:
        notes = built.notes()
    except ValueError as error:
        return dict.fromkeys(("cpu", "cuda"), str(error))
    return {backend: f"{reason}; to build it: {notes['how']}" for backend, reason in notes.get("left_out", {}).items()}


def _find() -> Path:
    files = sorted(built.FOLDER.glob("_ops*.so"))
    if files:
        return files[-1]
    if (built.FOLDER.parent / "setup.py").exists():
        raise ImportError(
            f"no compiled kernels in {built.FOLDER}: this is the source tree; if lifeops is installed elsewhere, the folder you"
            " run from shadows it (run from another folder), otherwise run `pip install --no-build-isolation -e .`"
        )
    raise ImportError("this installation has no compiled kernels")


def _stale(path: Path) -> str | None:
    for name, expected in SCHEMAS.items():
        op = getattr(torch.ops.lifeops_native, name, None)
        found = str(op.default._schema) if op is not None else "nothing"
        if found != expected:
            return f"{path.name} is stale: expected {expected!r}, found {found!r}; {built.REBUILD}"
    return None


def _load() -> str | None:
    """None if the library is loaded and fits, else why not."""
    try:
        path = _find()
        damage = built.damage(path)
        if damage is not None:
            return damage
        torch.ops.load_library(str(path))
    except (ImportError, OSError) as error:
        return f"{error}: {error.__cause__}" if error.__cause__ else str(error)  # torch's own message lacks the loader's reason
    stale = _stale(path)
    if stale is None and built.changed_sources():
        warn(f"lifeops: csrc/ has changed since {path.name} was built; {built.REBUILD}")
    return stale


_fwd = _grad_weight = _channel = None


def _token_dwconv(x, weight, bias, residual, H, W, P, prefix, backend):
    rows = _rows(P, prefix)
    y = x.new_empty((x.shape[0], rows + H * W, x.shape[2]))
    _fwd(x, weight.contiguous(), _contiguous(bias), residual, y, H, W, P, rows, _mode(prefix), False, _isa())
    return y


def _token_dwconv_bwd_dx(dy, weight, H, W, P, prefix, backend):
    dx = dy.new_empty((dy.shape[0], P + H * W, dy.shape[2]))
    _fwd(dy, weight.contiguous(), None, None, dx, H, W, _rows(P, prefix), P, _mode(prefix), True, _isa())
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


def _token_dwconv_act(x, weight, bias, scale, shift, act, out_scale, out_shift, out_act, residual, H, W, P, prefix, pool, stats, backend):
    rows = _rows(P, prefix)
    y = x.new_empty((x.shape[0], rows + H * W, x.shape[2]))
    sums, found = (_sums(x, x.shape[0]) if pool else None), (_sums(x, 2) if stats else None)
    prologue = _contiguous(scale), _contiguous(shift), PROLOGUES.index(act)
    epilogue = _contiguous(out_scale), _contiguous(out_shift), ACTS.index(out_act)
    inputs = x, weight.contiguous(), _contiguous(bias), *prologue, *epilogue, residual
    torch.ops.lifeops_native.token_dwconv_act(*inputs, y, sums, found, H, W, P, rows, _mode(prefix), _isa())
    empty = [x.new_empty((0,), dtype=accumulate_dtype(x.dtype)) for _ in range(3)]
    return y, sums if pool else empty[0], *((found[0], found[1].clone()) if stats else empty[1:])


def _token_dwconv_act_bwd_dx(dy, x, weight, scale, shift, act, a, b, H, W, P, prefix, backend):
    dx, sums = dy.new_empty((dy.shape[0], P + H * W, dy.shape[2])), _sums(x, 2)
    prologue = _contiguous(scale), _contiguous(shift), PROLOGUES.index(act), _contiguous(a), _contiguous(b)
    place = H, W, _rows(P, prefix), P, _mode(prefix), _isa()
    torch.ops.lifeops_native.token_dwconv_act_grad_input(dy, x, weight.contiguous(), *prologue, dx, sums, *place)
    return dx, sums[0], sums[1].clone()


def _token_dwconv_act_bwd_dw(dy, x, K, scale, shift, act, H, W, P, prefix, weight_dtype, bias_dtype, backend):
    dw = x.new_empty((x.shape[2], 1, K, K), dtype=weight_dtype)
    db = None if bias_dtype is None else x.new_empty((x.shape[2],), dtype=bias_dtype)
    prologue = _contiguous(scale), _contiguous(shift), PROLOGUES.index(act)
    torch.ops.lifeops_native.token_dwconv_act_grad_weight(dy, x, *prologue, dw, db, K, H, W, _rows(P, prefix), P, _isa())
    return dw, x.new_empty((0,)) if db is None else db


def _token_dwconv_act_bwd(dy, x, weight, bias, act, H, W, P, prefix, backend):
    dx, dw = dy.new_empty((dy.shape[0], P + H * W, dy.shape[2])), torch.empty_like(weight, memory_format=torch.contiguous_format)
    db = None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    place = H, W, _rows(P, prefix), P, _mode(prefix), _isa()
    parameters = weight.contiguous(), _contiguous(bias), ACTS.index(act)
    torch.ops.lifeops_native.token_dwconv_act_backward(dy, x, *parameters, dx, dw, db, *place)
    return dx, dw, x.new_empty((0,)) if db is None else db


def _channel_pass(number, x, patches, *, dy=None, scale=None, shift=None, gate=None, pool_grad=None, a=None, b=None, residual=None,
                  y=None, sums=None, act="none"):  # fmt: skip
    values = map(_contiguous, (scale, shift, gate, pool_grad, a, b))
    _channel(number, x, dy, *values, residual, y, sums, ACTS.index(act), patches, _isa())
    return y if sums is None else sums


def _sums(x, *shape):
    return x.new_empty((*shape, x.shape[2]), dtype=accumulate_dtype(x.dtype))


def _channel_stats(x, act, patches, backend):
    mean, m2 = _channel_pass(0, x, patches, sums=_sums(x, 2), act=act)
    return mean, m2.clone()  # an operator's outputs must not share memory


def _channel_act(x, scale, shift, gate, residual, act, patches, backend):
    y = x.new_empty((x.shape[0], patches if residual is None else residual.shape[1], x.shape[2]))
    return _channel_pass(1, x, patches, scale=scale, shift=shift, gate=gate, residual=residual, y=y, act=act)


def _channel_act_pool(x, scale, shift, act, patches, backend):
    return _channel_pass(2, x, patches, scale=scale, shift=shift, sums=_sums(x, x.shape[0]), act=act)


def _channel_act_sums(dy, x, scale, shift, act, patches, backend):
    return _channel_pass(3, x, patches, dy=dy, scale=scale, shift=shift, sums=_sums(x, 5, x.shape[0]), act=act)


def _channel_act_grad(dy, x, scale, shift, gate, pool_grad, a, b, act, patches, backend):
    y = x.new_empty((x.shape[0], patches, x.shape[2]))
    values = {"scale": scale, "shift": shift, "gate": gate, "pool_grad": pool_grad, "a": a, "b": b}
    return _channel_pass(4, x, patches, dy=dy, y=y, act=act, **values)


def _dw_shortcut(x, block_output, weight, bias, gamma, beta, eps, H, W, P, backend):
    outputs = torch.empty_like(x, memory_format=torch.contiguous_format), _sums(x), _sums(x), _sums(x, 3)
    parameters = weight.contiguous(), _contiguous(bias), _contiguous(gamma), _contiguous(beta), eps
    torch.ops.lifeops_native.dw_shortcut(x, block_output, *parameters, *outputs, H, W, P, _isa())
    return outputs


def _dw_shortcut_bwd(dy, x, weight, mean, affine, H, W, P, need_dx, backend):
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_dx else None
    dw, sums = mean.new_empty(weight.shape), [torch.empty_like(mean) for _ in range(3)]
    values = map(_contiguous, (weight, mean, affine))
    torch.ops.lifeops_native.dw_shortcut_bwd(dy, x, *values, dx, dw, *sums, H, W, P, _isa())
    return x.new_empty((0,)) if dx is None else dx, dw, *sums


def _dw_shortcut_eval(x, block_output, weight, bias, mean, var, gamma, beta, eps, H, W, P, backend):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    values = [_contiguous(t) for t in (bias, mean, var, gamma, beta)]
    torch.ops.lifeops_native.dw_shortcut_eval(x, block_output, weight.contiguous(), *values, eps, y, H, W, P, _isa())
    return y


def _rollout_step(r, q, k, scale, head_fusion, residual, discard_ratio, backend):
    out = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    dropped = dropped_entries(discard_ratio, r.shape[2])
    torch.ops.lifeops_native.rollout_step(r, q, k, scale, FUSIONS.index(head_fusion), residual, dropped, out, _isa())
    return out


_IMPLEMENTATIONS = {  # op: (native operator, function)
    "token_dwconv": ("token_dwconv", _token_dwconv),
    "token_dwconv_bwd_dx": ("token_dwconv", _token_dwconv_bwd_dx),
    "token_dwconv_bwd_dw": ("token_dwconv_grad_weight", _token_dwconv_bwd_dw),
    "token_dwconv_bwd_db": ("token_dwconv_grad_weight", _token_dwconv_bwd_db),
    "token_dwconv_act": ("token_dwconv_act", _token_dwconv_act),
    "token_dwconv_act_bwd_dx": ("token_dwconv_act_grad_input", _token_dwconv_act_bwd_dx),
    "token_dwconv_act_bwd_dw": ("token_dwconv_act_grad_weight", _token_dwconv_act_bwd_dw),
    "token_dwconv_act_bwd": ("token_dwconv_act_backward", _token_dwconv_act_bwd),
    "channel_stats": ("channel_act", _channel_stats),
    "channel_act": ("channel_act", _channel_act),
    "channel_act_pool": ("channel_act", _channel_act_pool),
    "channel_act_sums": ("channel_act", _channel_act_sums),
    "channel_act_grad": ("channel_act", _channel_act_grad),
    "norm_affine": ("channel_act", norm.reference_affine),  # C numbers: torch's operators
    "norm_gradients": ("channel_act", norm.reference_gradients),
    "dw_shortcut": ("dw_shortcut", _dw_shortcut),
    "dw_shortcut_bwd": ("dw_shortcut_bwd", _dw_shortcut_bwd),
    "dw_shortcut_eval": ("dw_shortcut_eval", _dw_shortcut_eval),
    "rollout_step": ("rollout_step", _rollout_step),
    **native_windows.IMPLEMENTATIONS,
}


def _supports(device: str):
    def reasons(problem) -> list[str]:
        found, dtypes = [], (problem.dtype, getattr(problem, "weight_dtype", None))
        K = 0 if dtypes[1] is None else max(getattr(problem, side, 0) for side in ("K", "Kh", "Kw"))  # poolings may be of any size
        if problem.device.type != device:
            found.append(f"tensors are on {problem.device.type}")
        if dtypes[0] not in DTYPES or dtypes[1] not in (None, *DTYPES):
            found.append(f"dtypes {dtypes[0]}, {dtypes[1]}")
        if K > MAX_KERNEL:
            found.append(f"K = {K} is larger than {MAX_KERNEL}")
        return found

    return reasons


def _has(device: str, op: str = "token_dwconv") -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"lifeops_native::{op}", device.upper())


def _register() -> None:
    global _fwd, _grad_weight, _channel
    error, notes = _load(), build_notes()
    for device in ("cpu", "cuda"):
        if error is not None:
            registry.set_unavailable(device, notes.get(device, error))
        elif not _has(device):
            registry.set_unavailable(device, notes.get(device, "the extension was built without it"))
        else:
            for name, (native, fn) in _IMPLEMENTATIONS.items():
                if not _has(device, native):
                    continue
                registry.register(name, device, fn, supports=_supports(device), priority=registry.BACKEND_PRIORITY[device])
    if error is None:
        _fwd = torch.ops.lifeops_native.token_dwconv.default
        _grad_weight = torch.ops.lifeops_native.token_dwconv_grad_weight.default
        _channel = torch.ops.lifeops_native.channel_act.default


_register()
