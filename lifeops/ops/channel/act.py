"""What a batch-normalised, activated sequence needs around its convolutions: one pass over the tokens each, nothing stored twice.

Over the last ``patches`` rows of every sequence (B, rows + patches, C), with v = scale[c] * x + shift[c]:

    channel_stats      mean[c], m2[c] = sum (f(x) - mean)²                         over B and the patches
    channel_act        y = f(v) * gate[b, c], behind the residual's leading rows and added to it, if there is one
    channel_act_pool   pool[b, c] = sum f(v)
    channel_act_sums   sums of dy f(v), dy f'(v), dy f'(v) x, f'(v), f'(v) x       each (B, C)
    channel_act_grad   dx = scale[c] * (dy * gate[b, c] + pool_grad[b, c]) * f'(v) + a[c] + b[c] * x

The five sums are all that batch norm, the gate and the pool need from one reading of dy and x. Per-channel and per-image values
are float32 (float64 for float64 sequences); gate, pool_grad, a and b may be absent: 1, 0, 0, 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops import torchlib
from lifeops.ops.channel import activations
from lifeops.ops.token_dwconv.samples import Maker, lay_out
from lifeops.ops.token_dwconv.spec import check_rows
from lifeops.registry import Op


class Problem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    C: int
    act: str


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and per-channel values are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------ checks


def check_sequence(op, name, t, patches, like=None):
    check_rows(op, name, t)
    if patches < 0 or t.shape[1] < patches:
        raise ValueError(f"{op}: {name} must have at least the {patches} patch tokens, got {t.shape[1]}")
    if like is not None and (t.shape[0], t.shape[2], t.dtype, t.device) != (like.shape[0], like.shape[2], like.dtype, like.device):
        expected = f"B = {like.shape[0]}, C = {like.shape[2]}, {like.dtype} on {like.device}"
        raise ValueError(f"{op}: {name} must have {expected}, got {tuple(t.shape)}, {t.dtype} on {t.device}")


def check_values(op, x, **values):
    """Per-channel (C,) or per-image (B, C) values beside ``x``, by name; None is fine."""
    B, C, dtype = x.shape[0], x.shape[2], accumulate_dtype(x.dtype)
    for name, t in values.items():
        shape = (B, C) if name in ("gate", "pool_grad") else (C,)
        if t is not None and (tuple(t.shape) != shape or t.dtype != dtype or t.device != x.device):
            got = f"{tuple(t.shape)}, {t.dtype} on {t.device}"
            raise ValueError(f"{op}: {name} must have shape {shape}, dtype {dtype} on {x.device}, got {got}")


def _check_stats(x, act, patches, backend):
    activations.check("channel_stats", "act", act)
    check_sequence("channel_stats", "x", x, patches)


def _check_act(x, scale, shift, gate, residual, act, patches, backend):
    activations.check("channel_act", "act", act)
    check_sequence("channel_act", "x", x, patches)
    check_values("channel_act", x, scale=scale, shift=shift, gate=gate)
    if residual is not None:
        check_sequence("channel_act", "residual", residual, patches, x)


def _check_pool(x, scale, shift, act, patches, backend):
    activations.check("channel_act_pool", "act", act)
    check_sequence("channel_act_pool", "x", x, patches)
    check_values("channel_act_pool", x, scale=scale, shift=shift)


def _check_sums(dy, x, scale, shift, act, patches, backend):
    activations.check("channel_act_sums", "act", act)
    check_sequence("channel_act_sums", "x", x, patches)
    check_sequence("channel_act_sums", "dy", dy, patches, x)
    check_values("channel_act_sums", x, scale=scale, shift=shift)


def _check_grad(dy, x, scale, shift, gate, pool_grad, a, b, act, patches, backend):
    activations.check("channel_act_grad", "act", act)
    check_sequence("channel_act_grad", "x", x, patches)
    check_sequence("channel_act_grad", "dy", dy, patches, x)
    check_values("channel_act_grad", x, scale=scale, shift=shift, gate=gate, pool_grad=pool_grad, a=a, b=b)


# ------------------------------------------------------------------------------------------------ references


def patch_rows(t, patches):
    """The last ``patches`` rows, in the accumulation dtype."""
    return t[:, t.shape[1] - patches :].to(accumulate_dtype(t.dtype))


def _per_image(t):
    return t[:, None, :]


def stats_of(x):
    """mean and m2 of (B, n, C) over B and n; zeros where there is nothing."""
    if x.shape[0] * x.shape[1] == 0:
        return x.new_zeros(x.shape[2]), x.new_zeros(x.shape[2])
    mean = x.mean((0, 1))
    return mean, (x - mean).square().sum((0, 1))


def reference_stats(x, act, patches, backend):
    return stats_of(activations.value(patch_rows(x, patches), act))


def reference_act(x, scale, shift, gate, residual, act, patches, backend):
    y = activations.value(activations.affine(patch_rows(x, patches), scale, shift), act)
    if gate is not None:
        y = y * _per_image(gate)
    if residual is None:
        return y.to(x.dtype, copy=True)
    return torch.cat((residual[:, : residual.shape[1] - patches], (patch_rows(residual, patches) + y).to(x.dtype)), 1)


def reference_pool(x, scale, shift, act, patches, backend):
    return activations.value(activations.affine(patch_rows(x, patches), scale, shift), act).sum(1)


def reference_sums(dy, x, scale, shift, act, patches, backend):
    x, dy = patch_rows(x, patches), patch_rows(dy, patches)
    v = activations.affine(x, scale, shift)
    f, df = activations.value(v, act), activations.derivative(v, act)
    return torch.stack([t.sum(1) for t in (dy * f, dy * df, dy * df * x, df, df * x)])


def reference_grad(dy, x, scale, shift, gate, pool_grad, a, b, act, patches, backend):
    dtype = x.dtype
    x, dy = patch_rows(x, patches), patch_rows(dy, patches)
    dx = dy if gate is None else dy * _per_image(gate)
    dx = dx if pool_grad is None else dx + _per_image(pool_grad)
    dx = dx * activations.derivative(activations.affine(x, scale, shift), act)
    dx = activations.affine(dx, scale, a)
    return (dx if b is None else dx + b * x).to(dtype, copy=True)


# ------------------------------------------------------------------------------------------------ fakes


def _channels(x):
    return x.new_empty((x.shape[2],), dtype=accumulate_dtype(x.dtype))


def _fake_stats(x, act, patches, backend):
    return _channels(x), _channels(x)


def _fake_act(x, scale, shift, gate, residual, act, patches, backend):
    return x.new_empty((x.shape[0], patches if residual is None else residual.shape[1], x.shape[2]))


def _fake_pool(x, scale, shift, act, patches, backend):
    return x.new_empty((x.shape[0], x.shape[2]), dtype=accumulate_dtype(x.dtype))


def _fake_sums(dy, x, scale, shift, act, patches, backend):
    return x.new_empty((5, x.shape[0], x.shape[2]), dtype=accumulate_dtype(x.dtype))


def _fake_grad(dy, x, scale, shift, gate, pool_grad, a, b, act, patches, backend):
    return x.new_empty((x.shape[0], patches, x.shape[2]))


# ------------------------------------------------------------------------------------------------ samples


class Sample(NamedTuple):
    name: str
    reason: str
    B: int = 2
    patches: int = 12
    lead: int = 0  # rows before the patches of the residual or of dy
    C: int = 8
    act: str = "hardswish"
    affine: bool = True
    extras: bool = True  # gate, residual, pool_grad, a, b
    layout: str = "contiguous"
    tiny: bool = True


def samples():
    return (
        Sample("plain", "LocalViT's h-swish after batch norm"),
        Sample("relu", "integer inputs stay integers", act="relu"),
        Sample("relu6", "and below six", act="relu6"),
        Sample("linear", "the last batch norm has no activation; dy has a cls token", act="none", lead=1),
        Sample("bare", "no affine, no gate, no residual", affine=False, extras=False),
        Sample("gelu", "the DW shortcut", act="gelu", extras=False),
        Sample("registers", "five leading rows", lead=5, act="relu6"),
        Sample("one_token", "a single patch per image", patches=1, C=3),
        Sample("odd_channels", "C one past a vector", C=33, patches=7, act="relu6"),
        Sample("sliced", "x is a slice of a longer sequence", layout="slice"),
        Sample("expanded", "stride 0 in the batch", layout="expand", act="relu6"),
        Sample("transposed", "channels not contiguous: one counted copy", layout="transpose", act="none"),
        Sample("empty_batch", "B = 0", B=0),
        Sample("empty_grid", "no patches", patches=0, lead=2),
        Sample("hidden", "the hidden width of a ViT-T at 14x14", B=3, patches=196, C=768, tiny=False),
        Sample("long_sum", "many tokens", B=20, patches=250, C=40, tiny=False),
    )


def _values(s: Sample, draw: Maker):
    """scale and shift, or None twice."""
    dtype = accumulate_dtype(draw.dtype)
    return (draw(s.C, dtype=dtype, scale=1), draw(s.C, dtype=dtype, scale=1)) if s.affine else (None, None)


def _x(s: Sample, draw: Maker, lead: int = 0):
    return lay_out(draw(s.B, lead + s.patches, s.C, scale=1), s.layout)


def _extra(s: Sample, draw: Maker, *shape):
    return draw(*shape, dtype=accumulate_dtype(draw.dtype), scale=1) if s.extras else None


def _make_stats(s, draw, backend):
    return _x(s, draw, s.lead), s.act, s.patches, backend


def _make_act(s, draw, backend):
    residual = _x(s, draw, s.lead) if s.extras else None
    return _x(s, draw), *_values(s, draw), _extra(s, draw, s.B, s.C), residual, s.act, s.patches, backend


def _make_pool(s, draw, backend):
    return _x(s, draw), *_values(s, draw), s.act, s.patches, backend


def _make_sums(s, draw, backend):
    return _x(s, draw, s.lead), _x(s, draw), *_values(s, draw), s.act, s.patches, backend


def _make_grad(s, draw, backend):
    per_image, per_channel = (_extra(s, draw, s.B, s.C) for _ in range(2)), (_extra(s, draw, s.C) for _ in range(2))
    return _x(s, draw, s.lead), _x(s, draw), *_values(s, draw), *per_image, *per_channel, s.act, s.patches, backend


# ------------------------------------------------------------------------------------------------ ops


def _op(name, schema, reference, check, fake, make, reduces=None):
    """x is the last sequence of the schema: the first argument, or the second behind dy."""
    at = 1 if schema.startswith("Tensor dy") else 0

    def problem(*args):
        return Problem(args[at].device, args[at].dtype, args[at].shape[2], args[-3])

    return Op(
        name, f"{name}({schema}, SymInt patches, str backend) -> {'(Tensor, Tensor)' if name == 'channel_stats' else 'Tensor'}",
        reference, check, fake, problem=problem, flops=lambda *shapes: 0, samples=samples, make=make, reduces=reduces,
        exact=lambda s: name != "channel_stats" and s.act in activations.EXACT,
        is_empty=lambda *args: args[at].shape[0] * args[at].shape[2] * args[-2] == 0,
    )  # fmt: skip


_AFFINE = "Tensor? scale, Tensor? shift"
stats_op = _op(
    "channel_stats", "Tensor x, str act", reference_stats, _check_stats, _fake_stats, _make_stats, reduces=lambda s: s.B * s.patches
)
act_op = _op(
    "channel_act", f"Tensor x, {_AFFINE}, Tensor? gate, Tensor? residual, str act", reference_act, _check_act, _fake_act, _make_act
)
pool_op = _op(
    "channel_act_pool", f"Tensor x, {_AFFINE}, str act", reference_pool, _check_pool, _fake_pool, _make_pool, reduces=lambda s: s.patches
)
sums_op = _op(
    "channel_act_sums", f"Tensor dy, Tensor x, {_AFFINE}, str act", reference_sums, _check_sums, _fake_sums, _make_sums,
    reduces=lambda s: s.patches,
)  # fmt: skip
grad_op = _op(
    "channel_act_grad", f"Tensor dy, Tensor x, {_AFFINE}, Tensor? gate, Tensor? pool_grad, Tensor? a, Tensor? b, str act",
    reference_grad, _check_grad, _fake_grad, _make_grad,
)  # fmt: skip
for op in (stats_op, act_op, pool_op, sums_op, grad_op):
    torchlib.install(op)
