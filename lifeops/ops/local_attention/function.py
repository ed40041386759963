"""local_attention for users: the public function and its autograd Function.

Kept for backward: q, k, v (views, no copies), the attention without its local term, one number per query, the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lifeops import config, geometry, registry, torchlib
from lifeops.arguments import check_generator, check_number, check_rate, check_tensors
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.full_precision import full_precision
from lifeops.ops.local_attention import spec
from lifeops.ops.local_attention.formula import kept, log_sum_exp, scores, sequence
from lifeops.ops.token_dwconv import spec as dwconv
from lifeops.ops.token_dwconv.function import _bwd_db, _bwd_dw
from lifeops.ops.token_dwconv.public import token_dwconv
from lifeops.options import Backend

_fwd, _bwd = torchlib.caller(spec.fwd_op), torchlib.caller(spec.bwd_op)


class LocalAttention(torch.autograd.Function):
    """(y, attn, lse) = local_attention(q, k, v, …): see :func:`lifeops.local_attention`. Differentiable once, with respect to
    q, k, v, weight, bias and a floating-point attn_mask.
    """

    @staticmethod
    def forward(q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, keep, backend):
        return _fwd(q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, True, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, weight, bias, attn_mask, key_mask, seed, *settings, _, backend = inputs
        y, attn, lse = output
        ctx.settings = *settings, backend
        ctx.mark_non_differentiable(attn, lse)
        ctx.set_materialize_grads(False)
        need = ctx.needs_input_grad
        ctx.attention = need[0] or need[1] or need[2] or need[5]
        saved = (q, k, v, attn if weight is not None else y, lse, attn_mask, key_mask, seed)
        ctx.save_for_backward(weight if need[2] else None, *(saved if ctx.attention else (None, None, v, *[None] * 5)))
        if weight is not None:
            ctx.K, ctx.like, ctx.weight_dtype = weight.shape[-1], (weight.shape, weight.stride()), weight.dtype
        ctx.bias_dtype = bias.dtype if bias is not None and need[4] else None

    @staticmethod
    @torchlib.once_differentiable(
        spec.NAME, "for one, write the attention with torch's matmul and softmax and its local term with lifeops.token_dwconv"
    )
    def backward(ctx, dy, *_):
        if dy is None:
            return (*[None] * 15,)
        return *_gradients(ctx, dy), *[None] * 9


torchlib.set_autograd(spec.fwd_op, LocalAttention.apply)


def _gradients(ctx, dy):
    """Of q, k, v, weight, bias, attn_mask; None where none is needed."""
    weight, q, k, v, attn, lse, attn_mask, key_mask, seed = ctx.saved_tensors
    H, W, P, _, _, backend = ctx.settings
    need, dq, dk, dv, dw, db, dmask = ctx.needs_input_grad, *[None] * 6
    if ctx.attention:
        args = dy, q, k, v, weight, attn, lse, attn_mask, key_mask, seed, *ctx.settings[:-1], need[5], backend
        dq, dk, dv, dmask = _bwd(*args)
    place = H, W, P, "zero"
    if need[3]:
        dw, db = _bwd_dw(dy, sequence(v), ctx.K, *place, ctx.weight_dtype, ctx.bias_dtype, backend)
        dw = torchlib.like_parameter(dw, *ctx.like)
    elif need[4]:
        db = _bwd_db(dy, *place, ctx.bias_dtype, backend)
    grads = dq, dk, dv, dw, db, dmask
    return [g if needed else None for g, needed in zip(grads, need, strict=False)]


@full_precision
def _attention_by_torch(q, k, v, attn_mask, key_mask, seed, scale, dropout_p):
    dtype = q.dtype
    q, k, v = (t.to(accumulate_dtype(dtype)) for t in (q, k, v))
    s = scores(q, k, attn_mask, key_mask, scale)
    p = (s - log_sum_exp(s).unsqueeze(-1)).exp()
    return sequence((p if seed is None else p * kept(p, seed, dropout_p)) @ v).to(dtype)


def _by_torch(q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, keep, backend):
    """The formula by torch's own operators: what torch.func transforms see."""
    attn = _attention_by_torch(q, k, v, attn_mask, key_mask, seed, scale, dropout_p)
    if weight is None:
        return attn
    return token_dwconv(sequence(v), weight, bias, grid=(H, W), num_prefix_tokens=P, prefix="zero", residual=attn, backend=backend or None)


def _exported(q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, keep, backend):
    """What exporters write down: torch's own attention, which they know, and which draws dropout itself."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    if key_mask is not None:
        seen = key_mask[:, None, None]
        if attn_mask is not None:
            seen = attn_mask & seen if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~seen, -torch.inf)
        attn_mask = seen
    attn = sequence(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale))
    if weight is None:
        return attn
    return token_dwconv(sequence(v), weight, bias, grid=(H, W), num_prefix_tokens=P, prefix="zero", residual=attn)


def _four(name, attn_mask, q):
    """A mask that broadcasts to (B, h, N, N) as a (B or 1, h or 1, N, N) view."""
    if attn_mask.dim() > 4:
        raise ValueError(f"{name}: attn_mask must have at most 4 dimensions, got {tuple(attn_mask.shape)}")
    attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    N = q.shape[2]
    rows, columns = (N if size == 1 else size for size in attn_mask.shape[2:])
    return attn_mask.expand(*attn_mask.shape[:2], rows, columns)


def _arguments(q, k, v, weight, bias, grid, num_prefix_tokens, scale, attn_mask, key_mask, dropout_p, generator, backend):
    """The schema's arguments: autocast followed, masks brought to four dimensions, seed drawn, backend resolved."""
    name = spec.NAME
    if not all(isinstance(t, torch.Tensor) for t in (q, k, v)):
        raise TypeError(f"{name}: q, k and v must be tensors, got {', '.join(type(t).__name__ for t in (q, k, v))}")
    given = {"q": q, "k": k, "v": v, "weight": weight, "bias": bias, "attn_mask": attn_mask, "key_mask": key_mask}
    check_tensors(name, ("weight", "bias", "attn_mask", "key_mask"), **given)
    dropout_p, scale = check_rate(name, "dropout_p", dropout_p), check_number(name, "scale", scale, optional=True)
    check_generator(name, generator)
    g = geometry.to_grid(name, grid, num_prefix_tokens)
    spec._check_heads(name, q, k, v, g.height, g.width, g.prefix)
    dtype = torchlib.autocast_dtype(q)
    if dtype is not None and q.dtype != dtype:
        q, k, v = (t.to(dtype) for t in (q, k, v))
    attn_mask = None if attn_mask is None else _four(name, attn_mask, q)
    seed = None
    if dropout_p > 0:
        device = q.device if generator is None else generator.device
        seed = torch.randint(2**62, (1,), generator=generator, device=device).to(q.device)
    scale = max(1, q.shape[-1]) ** -0.5 if scale is None else scale  # no channels: nothing to attend with
    place = g.height, g.width, g.prefix
    keep = torchlib.captured() or torchlib.builds_graph(q, k, v, weight, bias, attn_mask)  # a program is the same with and without
    return q, k, v, weight, bias, attn_mask, key_mask, seed, *place, scale, dropout_p, keep, config.requested_backend(name, backend)


def _existing(t, key_mask):
    """``t`` (B, h, N, d) with zeros for the tokens that do not exist."""
    return torch.where(key_mask[:, None, :, None], t, 0)


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, grid: tuple[int, int],
    num_prefix_tokens: int = 0, scale: float | None = None, attn_mask: Tensor | None = None, key_mask: Tensor | None = None,
    dropout_p: float = 0.0, generator: torch.Generator | None = None, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """Multi-head attention plus a depth-wise convolution of its values over the patch grid.

    ``softmax(scale q kᵀ + attn_mask) v + [0 for the prefix ; DW_K(v_patch) + bias]``, head by head: channel c of ``weight`` is
    column c % d of head c // d. ``weight=None`` is plain attention.

    Args:
        q, k, v: (B, h, N, d), N = P + H*W, float64, float32, float16 or bfloat16, equal in shape and dtype. Any strides of B, h
            and N are read in place (chunks of a qkv projection, LIFE's scales); a stride other than 1 in d costs a copy, and so do,
            on GPUs, values whose heads do not lie beside each other if there is a local term. Under autocast they follow its dtype.
        weight: (C, 1, K, K) with C = h*d, odd K, as in ``nn.Conv2d(C, C, K, groups=C)``, or None. bias: (C,) or None.
        grid: (H, W). num_prefix_tokens: P >= 0 (cls, dist, registers); they attend like all others and skip the convolution.
        scale: of q kᵀ; None is d ** -0.5.
        attn_mask: broadcasts to (B or 1, h or 1, N, N). bool: True where a query attends to a key. Floating point: added to the
            scores in float32 (float64 for float64 q), whatever its dtype (relative positions; -inf masks); differentiable.
        key_mask: (B, N) bool, False for tokens that do not exist (padding): no query attends to them, their values are zero in the
            convolution, too, their own output is zero and their gradients are. Costs a copy of q, k, v and the result.
        dropout_p: rate of dropout on the attention probabilities, in [0, 1). generator: what its seed is drawn from (None: torch's
            default); the same generator state gives the same result on the same backend, and backward draws nothing.
        backend: "reference", "cpu", "triton", or None for the enclosing ``use_backend`` or the best one.

    Returns:
        (B, N, C), contiguous, in q's dtype. A query all of whose keys are masked gets 0 from attention. What lies in tokens masked
        by ``key_mask`` (NaN, in the gradient of their output too) reaches nothing; what lies in keys that ``attn_mask`` hides from
        every query reaches no attention. On CPU the same bits at any number of threads, and an image alone has those of its
        batch; with dropout the products are torch's, which promise neither.
        Differentiable once; a second derivative raises RuntimeError.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or the grid do not fit (the message says what was expected and got).
        lifeops.NotSupported: the requested backend cannot run this problem.

    Source: attention as in "Attention is all you need" (arXiv 1706.03762); the local term is LePE of CSWin (arXiv 2107.00652, eq. 7).
    """
    args = _arguments(q, k, v, weight, bias, grid, num_prefix_tokens, scale, attn_mask, key_mask, dropout_p, generator, backend)
    if key_mask is not None:
        spec.check(*args)
        args = *(_existing(t, key_mask) for t in args[:3]), *args[3:]
    if torch._C._are_functorch_transforms_active():
        spec.check(*args)
        y = _by_torch(*args)
    elif torchlib.exporting() and not args[-1]:
        spec.check(*args)
        y = _exported(*args)
    else:
        y = torchlib.apply(LocalAttention, _fwd, *args)[0]
    return y if key_mask is None else torch.where(key_mask[:, :, None], y, 0)


def explain(
    q, k, v, weight=None, bias=None, *, grid, num_prefix_tokens=0, scale=None, attn_mask=None, key_mask=None, dropout_p=0.0,
    generator=None, backend=None,
):  # fmt: skip
    """Which backend each op of this call takes, and why not the others."""
    check_generator(spec.NAME, generator)
    seed = generator if generator is None else torch.Generator(generator.device)  # the caller's is left alone
    args = _arguments(q, k, v, weight, bias, grid, num_prefix_tokens, scale, attn_mask, key_mask, dropout_p, seed, backend)
    spec.check(*args)
    q, request = args[0], args[-1]
    copies = tuple(name for name, t in (("q", q), ("k", k), ("v", v)) if not torchlib.channels_contiguous(t))
    problem = spec.problem(q, weight, dropout_p)
    ops = [(spec.fwd_op, problem), (spec.bwd_op, problem)]
    if weight is not None:
        ops += [(op, dwconv.Problem(*problem[:5])) for op in (dwconv.fwd_op, dwconv.bwd_dw_op)]
    return [registry.explain_op(op, request, p, copies if op is spec.fwd_op else ()) for op, p in ops]
