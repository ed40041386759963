"""What users call: ``lifeops.token_dwconv`` beyond the plain case, and ``token_dwconv_transpose``."""

from __future__ import annotations

import torch
from torch import Tensor

from lifeops import config, geometry, registry, torchlib
from lifeops.arguments import check_int, check_tensor, check_tensors
from lifeops.ops.channel import act as channel_act
from lifeops.ops.channel.activations import GELU_FIRST
from lifeops.ops.token_conv import function, spec
from lifeops.ops.token_dwconv import act_function
from lifeops.ops.token_dwconv import function as plain_function
from lifeops.ops.token_dwconv import spec as plain
from lifeops.options import Backend, Pair, Prefix


def rows_of(op: str, x):
    """(B, N, C) of sequences and (B, h, N, d) of heads as (B, N, h*d): a view where the heads of a token lie side by side, as in qkv."""
    check_tensor(op, "x", x)
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must have shape (B, N, C) or (B, h, N, d), got {tuple(x.shape)}")
    return x if x.dim() == 3 else x.transpose(1, 2).flatten(2)


def formed_as(x, y):
    """y (B, N', C') in the form of ``x``, see :func:`rows_of`: (B, h, N', C'/h) where that was heads."""
    return y if x.dim() == 3 else y.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def _accumulated(t, x):
    """Filters that several channels share: their gradients are added up in the kernels' precision, and rounded once."""
    return t.to(torch.promote_types(t.dtype, channel_act.accumulate_dtype(x.dtype)))


def _kernel(op: str, weight):
    """(Kh, Kw)"""
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f"{op}: weight must have shape (m*C, 1, Kh, Kw) as in nn.Conv2d(groups=C), got {tuple(weight.shape)}")
    return weight.shape[2:]


def shared_filters(op: str, weight, bias, rows, x):
    """A filter, and a bias, for every channel of ``rows``, which is how ``x`` is read: of fewer, d, channel c has that of c mod d."""
    check_tensors(op, ("bias",), weight=weight, bias=bias)
    _kernel(op, weight)
    few, C = weight.shape[0], rows.shape[2]
    if bias is not None and tuple(bias.shape) != (few,):
        raise ValueError(f"{op}: bias must have shape ({few},), a value for every filter, got {tuple(bias.shape)}")
    if x.dim() == 4 and few not in (1, x.shape[3], C):
        raise ValueError(f"{op}: weight.shape[0] must be 1, the {x.shape[3]} channels of a head or the {C} of all heads, got {few}")
    if few >= C:
        return weight, bias
    if few == 0 or C % few:
        raise ValueError(f"{op}: weight.shape[0] must be the {C} channels of the sequence, a multiple or a divisor of them, got {few}")
    return _accumulated(weight, rows).repeat(C // few, 1, 1, 1), None if bias is None else _accumulated(bias, rows).repeat(C // few)


def steps(op: str, kernel, stride, padding) -> tuple:
    """sh, sw, ph, pw."""
    stride = geometry.pair(op, "stride", stride, 1)
    return *stride, *((kernel[0] // 2, kernel[1] // 2) if padding is None else geometry.pair(op, "padding", padding, 0))


def cast(x):
    """Under autocast ``x`` as conv2d's class has it."""
    dtype = torchlib.autocast_dtype(x)
    return x if dtype is None or x.dtype == dtype else x.to(dtype)


@torchlib.sizes_are_numbers
def _prepared(x, weight, bias, grid, num_prefix_tokens, prefix, backend, stride, padding, check=True):
    """The strided operator's arguments; with ``check`` all is known to fit, else what the operator finds out once per signature is not."""
    op, rows = plain.NAME, cast(rows_of(plain.NAME, x))
    plain._check_prefix(op, prefix)
    weight, bias = shared_filters(op, weight, bias, rows, x)
    g = geometry.to_grid(op, grid, num_prefix_tokens)
    place = *steps(op, weight.shape[2:], stride, padding), prefix, config.requested_backend(op, backend)
    args = rows, weight, bias, g.height, g.width, g.prefix, *place
    if check:
        spec.check(*args, op=op)
    return args


def convolve(x, weight, bias, grid, num_prefix_tokens, prefix, residual, backend, prologue, epilogue, pool, stats, stride, padding):
    """token_dwconv in all its generality; what surrounds the convolution are operators of their own."""
    options = grid, num_prefix_tokens, prefix, backend, stride, padding
    if prologue is epilogue is residual is None and not (pool or stats or torchlib.seen_by_torch()):
        return formed_as(x, _alone(_prepared(x, weight, bias, *options, check=False)))
    rows, weight, bias, H, W, P, *place = _prepared(x, weight, bias, *options)
    before, after = _surroundings(rows, weight, prologue, epilogue)
    if before != act_function.ChannelAct():
        rows = act_function.activated(rows, before, P, place[-1])
    y = _filtered(rows, weight, bias, H, W, P, *place)
    kept = 0 if prefix == "drop" else P
    if after != act_function.ChannelAct():
        y = act_function.activated(y, after, kept, place[-1])
    sums = act_function._summed(y[:, kept:], pool, stats) if pool or stats else None
    y = formed_as(x, y)
    if residual is not None:
        y = y + _residual(residual, y)
    return y if sums is None else act_function.Convolved(y, *sums)


def _alone(args):
    """The filter of arguments that the operator checks, once per signature and in its name: refused again in that of the caller."""
    try:
        return _filtered(*args)
    except (ValueError, TypeError) as error:
        refused = error
    spec.check(*args, op=plain.NAME)
    raise refused


@torchlib.sizes_are_numbers
def is_plain(rows, weight, steps) -> bool:
    """Whether (B, N, C) rows have an odd square filter for every channel at stride 1 around every token: the plain operators' case."""
    channels, _, Kh, Kw = weight.shape
    return bool(channels == rows.shape[2] and Kh == Kw and Kh % 2 == 1) and (*steps,) == (1, 1, Kh // 2, Kw // 2)


def _filtered(rows, weight, bias, H, W, P, sh, sw, ph, pw, prefix, backend):
    if is_plain(rows, weight, (sh, sw, ph, pw)):
        return plain_function.convolve(rows, weight, bias, None, H, W, P, prefix, backend)
    return function.strided(rows, weight, bias, H, W, P, sh, sw, ph, pw, prefix, backend)


def _surroundings(rows, weight, prologue, epilogue):
    if prologue is None and epilogue is None:
        return act_function.ChannelAct(), act_function.ChannelAct()
    result = rows.new_empty((rows.shape[0], 0, weight.shape[0]))  # the epilogue's values are checked beside it
    return act_function._values("prologue", rows, prologue), act_function._values("epilogue", result, epilogue)


def explain(x, weight, bias, grid, num_prefix_tokens, prefix, residual, backend, prologue, epilogue, pool, stats, stride, padding):
    """Which backend each op of this call takes, and why not the others."""
    args = _prepared(x, weight, bias, grid, num_prefix_tokens, prefix, backend, stride, padding)
    before, after = _surroundings(*args[:2], prologue, epilogue)
    rows, request = args[0], args[-1]
    copies = ("x",) if not torchlib.channels_contiguous(rows) else ()
    if is_plain(rows, args[1], args[6:10]):
        problem = plain.Problem(rows.device, rows.dtype, args[1].dtype, rows.shape[2], args[1].shape[2])
        ops = [(plain.fwd_op, problem, copies), (plain.bwd_dx_op, problem, ()), (plain.bwd_dw_op, problem, ())]
    else:
        problem = spec.strided_op.problem(*args)
        ops = [(spec.strided_op, problem, copies), (spec.transpose_op, problem, ()), (spec.bwd_dw_op, problem, ())]
    for values, channels in ((before, rows.shape[2]), (after, args[1].shape[0])):
        if values != act_function.ChannelAct():
            act = "gelu" if values.act == GELU_FIRST else values.act
            of_rows = channel_act.Problem(rows.device, rows.dtype, channels, act)
            ops += [(op, of_rows, ()) for op in (channel_act.act_op, channel_act.sums_op, channel_act.grad_op)]
    return [registry.explain_op(op, request, p, copied) for op, p, copied in ops]


def _residual(residual, y):
    op = plain.NAME
    check_tensor(op, "residual", residual)
    if residual.shape != y.shape:
        raise ValueError(f"{op}: residual must have the output's shape {tuple(y.shape)}, got {tuple(residual.shape)}")
    residual = cast(residual)
    if residual.dtype != y.dtype or residual.device != y.device:
        raise TypeError(f"{op}: residual must be {y.dtype} on {y.device} like the output, got {residual.dtype} on {residual.device}")
    return residual


def token_dwconv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, grid: tuple[int, int], num_prefix_tokens: int = 0, prefix: Prefix = "keep",
    stride: Pair, padding: Pair = 0, output_padding: Pair = 0, multiplier: int = 1, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """The transpose of a strided depth-wise convolution: every token spreads its filter over a finer grid.

    ``y[b, P + u*W' + v, c] = bias[c] + sum weight[c, 0, i, j] * x[b, P + r*W + q, c]`` over all r*sh + i - ph = u, q*sw + j - pw = v, as
    ``nn.ConvTranspose2d(C, C, K, stride, padding, output_padding, groups=C)`` on the map of the patches.

    Args:
        x: (B, P + H*W, m*C) tokens, or (B, h, P + H*W, d) heads; dtypes as of :func:`lifeops.token_dwconv`.
        weight: (m*C, 1, Kh, Kw), or fewer filters that the channels share.
        bias: (C,) or None.
        grid: (H, W) of x; the result's is ``(H - 1) * stride - 2 * padding + K + output_padding`` per axis.
        num_prefix_tokens, prefix: P rows in front: "keep" copies them, "zero" zeros them, "drop" leaves them out.
        stride, padding, output_padding: ints, or (rows, columns); output_padding below the stride.
        multiplier: m channels of x are added up into each of the result's.
        backend: as of token_dwconv.

    Returns (B, P + H'*W', C) in x's dtype, or (B, h, P + H'*W', d). Differentiable any number of times.
    Raises ValueError, TypeError: as token_dwconv. Source: the local propagation of EdgeViT (arXiv 2205.03436, section 3.1).
    """
    args = _transposed(x, weight, bias, grid, num_prefix_tokens, prefix, stride, padding, output_padding, multiplier, backend)
    return formed_as(x, function.transpose(*args))


def explain_transpose(
    x, weight, bias=None, *, grid, num_prefix_tokens=0, prefix="keep", stride, padding=0, output_padding=0, multiplier=1, backend=None
):
    """Which backend each op of this call takes, and why not the others."""
    args = _transposed(x, weight, bias, grid, num_prefix_tokens, prefix, stride, padding, output_padding, multiplier, backend)
    problem, copies = spec.transpose_op.problem(*args), () if torchlib.channels_contiguous(args[0]) else ("x",)
    ops = [(spec.transpose_op, copies), (spec.strided_op, ()), (spec.bwd_dw_op, ())]
    return [registry.explain_op(op, args[-1], problem, copied) for op, copied in ops]


@torchlib.sizes_are_numbers
def _transposed(x, weight, bias, grid, num_prefix_tokens, prefix, stride, padding, output_padding, multiplier, backend):
    """The transposed operator's arguments, checked."""
    op = spec.TRANSPOSE
    multiplier = check_int(op, "multiplier", multiplier, 1)
    rows = cast(rows_of(op, x))
    plain._check_prefix(op, prefix)
    if multiplier == 1:
        weight, bias = shared_filters(op, weight, bias, rows, x)
    else:
        check_tensors(op, ("bias",), weight=weight, bias=bias)
    g = geometry.to_grid(op, grid, num_prefix_tokens)
    geometry.check_tokens(op, "x", rows.shape[1], g.height, g.width, g.prefix)
    kernel = _kernel(op, weight)
    sh, sw, ph, pw = steps(op, kernel, stride, padding)
    spare = geometry.pair(op, "output_padding", output_padding, 0)
    if spare[0] >= sh or spare[1] >= sw:
        raise ValueError(f"{op}: output_padding must be smaller than the stride {(sh, sw)}, got {spare}")
    H, W = _fine_grid(op, g, kernel, (sh, sw), (ph, pw), spare)
    P = g.prefix
    if prefix == "drop":
        rows, P, prefix = rows[:, P:], 0, "keep"
    args = rows, weight, bias, multiplier, H, W, P, sh, sw, ph, pw, prefix, config.requested_backend(op, backend)
    spec.check_transpose(*args)
    return args


def _fine_grid(op, g, kernel, stride, padding, spare):
    if g.num_patches == 0:
        return 0, 0
    H, W = geometry.transposed_grid((g.height, g.width), kernel, stride, padding, spare)
    if H < 1 or W < 1:
        raise ValueError(f"{op}: the result must have rows and columns, got {H} x {W}: the padding {tuple(padding)} takes all of them")
    return H, W
