"""token_dwconv beyond stride 1, its transpose, several filters at once, pooling: public functions against torch's own maps."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import lifeops
from lifeops import conv_grid

D = torch.float64
H, W, P, C = 6, 7, 2, 8


def draw(*shape, dtype=D, grad=False):
    generator = torch.Generator().manual_seed(sum(i * n for i, n in enumerate(shape, 1)))
    return torch.randn(*shape, generator=generator, dtype=D).to(dtype).requires_grad_(grad)


def to_map(t, grid, prefix):
    return t[:, prefix:].transpose(1, 2).reshape(t.shape[0], -1, *grid)


def behind(x, y, prefix):
    """The map ``y`` as tokens behind the prefix rows of ``x``."""
    y = y.flatten(2).transpose(1, 2)
    rows = {"keep": x[:, :P], "zero": x.new_zeros(len(x), P, y.shape[2]), "drop": x[:, :0].new_empty(len(x), 0, y.shape[2])}[prefix]
    return torch.cat((rows, y), 1)


def same(got, expected, inputs):
    """Values, and gradients of something that is not a sum."""
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    need = [t for t in inputs if t is not None]
    grads = (torch.autograd.grad(y.sin().sum(), need, retain_graph=True) for y in (got, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


STEPS = {  # kernel, stride, padding
    "k3_s2": (3, 2, 1), "k3_s4": (3, 4, 1), "k3_s8": (3, 8, 1), "k2_s2": (2, 2, 0), "k7_s4": (7, 4, 2), "valid": (3, 1, 0),
    "axes": ((2, 5), (3, 1), (0, 2)), "k4": (4, (1, 2), 2),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["keep", "zero", "drop"])
@pytest.mark.parametrize("steps", STEPS)
def test_strided(steps, prefix):
    kernel, stride, padding = STEPS[steps]
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    x, weight, bias = draw(2, P + H * W, C, grad=True), draw(C, 1, *size, grad=True), draw(C, grad=True)
    place = {"grid": (H, W), "num_prefix_tokens": P, "prefix": prefix, "stride": stride, "padding": padding}
    y = lifeops.token_dwconv(x, weight, bias, **place)
    expected = F.conv2d(to_map(x, (H, W), P), weight, bias, stride, padding, groups=C)
    assert conv_grid((H, W), kernel, stride, padding) == tuple(expected.shape[2:])
    same(y, behind(x, expected, prefix), (x, weight, bias))


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 2), (1, 3)])
def test_windows_of_stride_2_at_every_edge(padding, m):
    """Whole vectors of channels: outputs without a tap at one edge, or both, are summed with their neighbours."""
    for w in (1, 2, 3, 9, 16, 17, 34):
        x, weight, bias = draw(2, 5 * w, 32), draw(32 * m, 1, 3, 3), draw(32 * m)
        if w + 2 * padding[1] >= 3:
            y = lifeops.token_dwconv(x, weight, bias, grid=(5, w), stride=2, padding=padding)
            expected = F.conv2d(to_map(x, (5, w), 0), weight, bias, 2, padding, groups=32).flatten(2).transpose(1, 2)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_refused_in_the_name_of_what_was_called():
    """At every call, also where a graph is built; the operator's own name is another."""
    x, weight = draw(2, P + H * W, C), draw(C, 1, 3, 3, grad=True)
    wrong = ((x[:, 1:], weight, 2), (x, draw(C, 1, 9, 3), 2), (x, weight, 0))
    for args in wrong * 2:
        with pytest.raises(ValueError, match=r"^token_dwconv: "):
            lifeops.token_dwconv(*args[:2], grid=(H, W), num_prefix_tokens=P, stride=args[2], padding=0)
    with pytest.raises(TypeError, match=r"^token_dwconv: "):
        lifeops.token_dwconv(x.long(), weight, grid=(H, W), num_prefix_tokens=P, stride=2)


@pytest.mark.parametrize("m", [2, 3])
def test_channel_multiplier(m):
    """RegionViT's: channel c makes c*m … c*m + m - 1, as nn.Conv2d orders them."""
    x, weight, bias = draw(2, H * W, C, grad=True), draw(m * C, 1, 3, 3, grad=True), draw(m * C, grad=True)
    y = lifeops.token_dwconv(x, weight, bias, grid=(H, W), stride=2)
    same(y, F.conv2d(to_map(x, (H, W), 0), weight, bias, 2, 1, groups=C).flatten(2).transpose(1, 2), (x, weight, bias))
    with pytest.raises(ValueError, match="channel multiplier of"):
        lifeops.token_dwconv(draw(2, P + H * W, C), weight, grid=(H, W), num_prefix_tokens=P)
    y = lifeops.token_dwconv(draw(2, P + H * W, C), weight, grid=(H, W), num_prefix_tokens=P, prefix="drop")
    assert y.shape == (2, H * W, m * C)


@pytest.mark.parametrize("shared", [1, 6, 24])
@pytest.mark.parametrize("stride", [1, 2])
def test_heads_share_their_filters(shared, stride):
    """q of (B, N, 3, h, d) as attention sees it, filters of one head's width, of one for all, of all."""
    heads, d = 4, 6
    qkv, weight, bias = draw(2, P + H * W, 3, heads, d, grad=True), draw(shared, 1, 3, 3, grad=True), draw(shared, grad=True)
    q = qkv[:, :, 1].transpose(1, 2)
    y = lifeops.token_dwconv(q, weight, bias, grid=(H, W), num_prefix_tokens=P, stride=stride)
    times = heads * d // shared
    rows = q.transpose(1, 2).flatten(2)
    every = F.conv2d(to_map(rows, (H, W), P), weight.repeat(times, 1, 1, 1), bias.repeat(times), stride, 1, groups=heads * d)
    expected = behind(rows, every, "keep").unflatten(2, (heads, d)).transpose(1, 2)
    same(y, expected, (qkv, weight, bias))
    flat = lifeops.token_dwconv(rows, weight, bias, grid=(H, W), num_prefix_tokens=P, stride=stride)
    assert torch.equal(flat, y.transpose(1, 2).flatten(2))


def test_a_view_of_qkv_is_read_in_place():
    from lifeops import torchlib

    before = torchlib.copies["count"]
    qkv = draw(2, P + H * W, 3, 4, 6)
    q = qkv[:, :, 0].transpose(1, 2)
    assert q.transpose(1, 2).flatten(2).data_ptr() == qkv.data_ptr()
    lifeops.token_dwconv(q, draw(6, 1, 3, 3), grid=(H, W), num_prefix_tokens=P, stride=2)
    assert torchlib.copies["count"] == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shared_gradients_are_rounded_once(dtype):
    """Of 64 heads that share a filter: the gradient is the float64 one to the dtype's rounding, not 64 roundings."""
    x, weight = draw(1, 64, 16, 3, dtype=dtype), draw(3, 1, 3, 3, dtype=dtype, grad=True)
    y = lifeops.token_dwconv(x, weight, grid=(4, 4), stride=2)
    dy = torch.ones_like(y)
    (got,) = torch.autograd.grad(y, weight, dy)
    wide = weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(lifeops.token_dwconv(x.double(), wide, grid=(4, 4), stride=2), wide, dy.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_what_surrounds_it():
    """Prologue, epilogue, sums and residual, composed; the padding is 0 whatever the prologue makes of 0."""
    x, weight, bias = draw(2, P + H * W, C, grad=True), draw(C, 1, 3, 3, grad=True), draw(C, grad=True)
    scale, shift, residual = draw(C, grad=True), draw(C, 1, grad=True).flatten(), draw(2, P + 12, C, grad=True)
    before, after = lifeops.ChannelAct(scale, shift, "gelu_first"), lifeops.ChannelAct(scale, shift, "gelu")
    place = {"grid": (H, W), "num_prefix_tokens": P, "stride": 2}
    around = {"residual": residual, "prologue": before, "epilogue": after, "pool": True, "stats": True}
    y, pool, mean, m2 = lifeops.token_dwconv(x, weight, bias, **place, **around)
    u = to_map(x, (H, W), P)
    u = F.gelu(u) * scale[:, None, None] + shift[:, None, None]
    z = F.gelu(F.conv2d(u, weight, bias, 2, 1, groups=C) * scale[:, None, None] + shift[:, None, None])
    same(y, behind(x, z, "keep") + residual, (x, weight, bias, scale, residual))
    torch.testing.assert_close(pool, z.sum((2, 3)))
    torch.testing.assert_close(mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(m2, z.var((0, 2, 3), correction=0) * z.numel() / C)


@pytest.mark.parametrize("prefix", ["keep", "zero", "drop"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "spare"), [(2, 2, 0, 0), (4, 4, 0, 0), (3, 2, 1, 1), ((3, 2), (2, 3), (1, 0), (0, 2))]
)
def test_transpose(kernel, stride, padding, spare, prefix):
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    x, weight, bias = draw(2, P + 12, C, grad=True), draw(C, 1, *size, grad=True), draw(C, grad=True)
    y = lifeops.token_dwconv_transpose(
        x, weight, bias, grid=(3, 4), num_prefix_tokens=P, prefix=prefix, stride=stride, padding=padding, output_padding=spare
    )
    expected = F.conv_transpose2d(to_map(x, (3, 4), P), weight, bias, stride, padding, spare, groups=C)
    same(y, behind(x, expected, prefix), (x, weight, bias))


def test_transpose_adds_up_multiplied_channels():
    x, weight, bias = draw(2, 12, 2 * C, grad=True), draw(2 * C, 1, 2, 2, grad=True), draw(C, grad=True)
    y = lifeops.token_dwconv_transpose(x, weight, bias, grid=(3, 4), stride=2, multiplier=2)
    expected = F.conv_transpose2d(to_map(x, (3, 4), 0), weight, bias, 2, groups=C)
    same(y, expected.flatten(2).transpose(1, 2), (x, weight, bias))


def test_transpose_of_heads_and_its_refusals():
    x, weight = draw(2, 3, 12, C), draw(C, 1, 2, 2)
    y = lifeops.token_dwconv_transpose(x, weight, grid=(3, 4), stride=2)
    one = lifeops.token_dwconv_transpose(x[:, 1], weight, grid=(3, 4), stride=2)
    assert torch.equal(y[:, 1], one)
    with pytest.raises(ValueError, match=r"output_padding must be smaller than the stride \(2, 2\), got \(2, 2\)"):
        lifeops.token_dwconv_transpose(x, weight, grid=(3, 4), stride=2, output_padding=2)
    with pytest.raises(ValueError, match="the result must have rows and columns"):
        lifeops.token_dwconv_transpose(draw(2, 1, C), weight, grid=(1, 1), stride=2, padding=1)


def test_multi_is_one_by_one():
    """CvT: q at stride 1, k and v at stride 2."""
    x, weights = draw(2, P + H * W, C, grad=True), [draw(C, 1, 3, 3 + 2 * (i > 1), grad=True) for i in range(3)]
    place = {"grid": (H, W), "num_prefix_tokens": P}
    q, k, v = lifeops.token_dwconv_multi(x, weights, [None, draw(C), None], strides=[1, 2, (2, 1)], **place)
    for got, w, b, s in zip((q, k, v), weights, (None, draw(C), None), (1, 2, (2, 1)), strict=True):
        expected = F.conv2d(to_map(x, (H, W), P), w, b, s, (1, w.shape[3] // 2), groups=C)
        same(got, behind(x, expected, "keep"), (x, w))
    with pytest.raises(ValueError, match="token_dwconv_multi: strides must have an entry for each of the 3 filters"):
        lifeops.token_dwconv_multi(x, weights, strides=[1, 2], **place)
    with pytest.raises(ValueError, match=r"token_dwconv_multi: weights\[1\]: token_dwconv: weight.shape\[0\] must be the 8 channels"):
        lifeops.token_dwconv_multi(x, [weights[0], draw(5, 1, 3, 3)], **place)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 3, 0), ((2, 3), (1, 4), (0, 1)), (5, 4, 2)])
def test_pooling(kernel, stride, padding, ceil_mode):
    x = draw(2, P + H * W, C, grad=True)
    place = {"grid": (H, W), "num_prefix_tokens": P, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    window = kernel, stride, padding
    expected = F.max_pool2d(to_map(x, (H, W), P), *window, ceil_mode=ceil_mode)
    assert conv_grid((H, W), *window, ceil_mode) == tuple(expected.shape[2:])
    for prefix in ("keep", "zero", "drop"):
        same(lifeops.token_pool(x, kernel, prefix=prefix, **place), behind(x, expected, prefix), (x,))
    for include in (False, True):
        expected = F.avg_pool2d(to_map(x, (H, W), P), *window, ceil_mode, include)
        same(lifeops.token_pool(x, kernel, mode="avg", count_include_pad=include, **place), behind(x, expected, "keep"), (x,))


def test_subsample_takes_every_token_of_a_stride():
    x = draw(2, 3, P + H * W, 4, grad=True)
    y = lifeops.token_pool(x, 1, mode="subsample", stride=(2, 3), grid=(H, W), num_prefix_tokens=P)
    picked = x[:, :, P:].unflatten(2, (H, W))[:, :, ::2, ::3].flatten(2, 3)
    same(y, torch.cat((x[:, :, :P], picked), 2), (x,))


def _calls():
    x, weight, bias, place = draw(1, P + 12, 3), draw(3, 1, 3, 2), draw(3), {"grid": (3, 4), "num_prefix_tokens": P}
    return {
        "strided": (lambda x, w, b: lifeops.token_dwconv(x, w, b, stride=2, **place), (x, weight, bias)),
        "multiplied": (lambda x, w: lifeops.token_dwconv(x, w, stride=2, grid=(3, 4)), (x[:, P:], draw(6, 1, 2, 3))),
        "shared": (lambda x, w: lifeops.token_dwconv(x, w, stride=2, grid=(3, 4)), (x[:, P:], draw(1, 1, 3, 3))),
        "transpose": (lambda x, w, b: lifeops.token_dwconv_transpose(x, w, b, stride=2, **place), (x, weight, bias)),
        "max": (lambda x: lifeops.token_pool(x, 3, stride=2, padding=1, **place), (x,)),
        "avg": (lambda x: lifeops.token_pool(x, 3, mode="avg", stride=2, padding=1, **place), (x,)),
    }


CALLS = _calls()


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_gradients(name):
    call, given = CALLS[name]
    given = [t.detach().clone().requires_grad_() for t in given]
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("name", CALLS)
def test_under_transforms(name):
    """vmap over all inputs, and a gradient for each sample."""
    call, given = CALLS[name]
    many = [torch.stack([t, 2 * t, -t]) for t in given]
    torch.testing.assert_close(torch.vmap(call)(*many), torch.stack([call(*(t[i] for t in many)) for i in range(3)]))
    per_sample = torch.vmap(torch.func.grad(lambda *a: call(*a).sin().sum()))(*many)
    one = [t[1].detach().clone().requires_grad_() for t in many]
    torch.testing.assert_close(per_sample[1], torch.autograd.grad(call(*one).sin().sum(), one)[0])


@pytest.mark.parametrize("name", CALLS)
def test_captured(name):
    """torch.compile without a graph break, forward and back; torch.export; torch.jit.trace without a warning."""
    call, given = CALLS[name]
    eager, compiled = ([t.detach().clone().requires_grad_() for t in given] for _ in range(2))
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(y, call(*eager))
    for ours, theirs in zip(*(torch.autograd.grad(call(*t).sin().sum(), t) for t in (compiled, eager)), strict=True):
        torch.testing.assert_close(ours, theirs)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    program = torch.export.export(Module(), tuple(given))
    assert not [n for n in program.graph.nodes if "lifeops" in str(n.target)]
    torch.testing.assert_close(program.module()(*given), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(Module(), tuple(given), check_trace=False)
    torch.testing.assert_close(traced(*given), y)


@pytest.mark.parametrize("name", CALLS)
def test_on_meta_and_under_autocast(name):
    call, given = CALLS[name]
    y = call(*given)
    on_meta = call(*(t.to("meta") for t in given))
    assert (on_meta.shape, on_meta.dtype, on_meta.is_meta) == (y.shape, y.dtype, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*(t.float() for t in given)).dtype == torch.bfloat16
        assert call(*given).dtype == D


def test_dynamic_sizes():
    """One program for every batch and image size."""
    weight = draw(C, 1, 3, 3)

    def call(map_):
        return lifeops.token_dwconv(map_.flatten(1, 2), weight, grid=map_.shape[1:3], stride=2)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 6, 7), (3, 9, 5), (5, 4, 12)):
        x = draw(*shape, C)
        torch.testing.assert_close(compiled(x), call(x))


def test_conv_grid():
    assert conv_grid((14, 14), 3, stride=2) == (7, 7)
    assert conv_grid((7, 8), (2, 4), (1, 2), (0, 1)) == (6, 4)
    assert conv_grid((6, 7), 3, 2, 1, ceil_mode=True) == (4, 4)
    assert conv_grid((0, 5), 3, 2) == (0, 0)
    with pytest.raises(ValueError, match=r"conv_grid: the kernel \(5, 5\) must fit the grid \(2, 3\) padded by \(1, 1\)"):
        conv_grid((2, 3), 5, padding=1)


def test_explained():
    x, weight = draw(1, P + H * W, C), draw(C, 1, 3, 3)
    place = {"grid": (H, W), "num_prefix_tokens": P}
    ops = [e.op for e in lifeops.explain("token_dwconv", x, weight, stride=2, epilogue=lifeops.ChannelAct(act="gelu"), **place)]
    acts = [f"channel_act{s}" for s in ("", "_sums", "_grad")]
    assert ops == ["token_dwconv_strided", "token_dwconv_transpose", "token_dwconv_strided_bwd_dw", *acts]
    heads = x.unflatten(2, (2, C // 2)).transpose(1, 2)
    assert lifeops.explain("token_dwconv", heads, weight[: C // 2], **place)[0].op == "token_dwconv"
    assert [e.op for e in lifeops.explain("token_pool", x, 2, **place)] == ["token_pool", "token_pool_bwd"]
    assert lifeops.explain("token_dwconv_transpose", x, weight, stride=2, **place)[0].op == "token_dwconv_transpose"


@pytest.mark.parametrize("m", [1, 2])
def test_bias_alone_with_frozen_filters(m):
    """The bias gradient without the weight's, over the patch rows of the coarse grid."""
    x, weight, bias = draw(2, P + H * W, C), draw(m * C, 1, 3, 3), draw(m * C, grad=True)
    y = lifeops.token_dwconv(x, weight, bias, grid=(H, W), num_prefix_tokens=P, prefix="zero", stride=2)
    dy = draw(*y.shape)
    torch.testing.assert_close(torch.autograd.grad(y, bias, dy)[0], dy[:, P:].sum((0, 1)))


def test_prologue_under_a_transform():
    x, weight = draw(3, 2, H * W, C), draw(C, 1, 3, 3)
    around = {"grid": (H, W), "stride": 2, "prologue": lifeops.ChannelAct(act="gelu")}
    y = torch.vmap(lambda t: lifeops.token_dwconv(t, weight, **around))(x)
    torch.testing.assert_close(y, torch.stack([lifeops.token_dwconv(t, weight, **around) for t in x]))


def test_an_empty_maximum_has_a_second_derivative():
    x, g = draw(0, 1 + 12, C, grad=True), draw(0, 1 + 2, C)
    y = lifeops.token_pool(x, 2, grid=(3, 4), num_prefix_tokens=1)
    dy = torch.zeros_like(y, requires_grad=True)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert torch.autograd.grad(dx.sum(), dy)[0].shape == g.shape


T, V = torch.zeros(1, 5, 4), torch.zeros(8, 1, 2, 2)
GEO = (2, 2, 1, 2, 2, 0, 0, "zero")
ONE = {"grid": (2, 2), "num_prefix_tokens": 1}
REFUSED = {  # what only a call of the operator itself can get wrong, and what the public function says of it
    "rank": (lambda: lifeops.token_dwconv_transpose(T[0], V[:4], **ONE, stride=2), r"x must have shape \(B, N, C\) or"),
    "residual": (
        lambda: lifeops.token_dwconv(T, V[:4], **ONE, stride=2, residual=T.double()),
        "residual must be torch.float32 on cpu like the output, got torch.float64",
    ),
    "subsample": (lambda: lifeops.token_pool(T, 2, mode="subsample", **ONE), "must have kernel_size 1 and padding 0"),
    "pool padding": (
        lambda: lifeops.token_pool(T, 2, padding=2, **ONE), r"padding must be at most half of the kernel size \(2, 2\)",
    ),
    "stride": (lambda: _op("strided", T, V, None, 2, 2, 1, 0, 2, 0, 0, "zero", ""), r"the stride must be at least 1, got \(0, 2\)"),
    "filters": (lambda: _op("strided", T, V[0], None, *GEO, ""), r"weight must have shape \(m\*C, 1, Kh, Kw\) as in nn.Conv2d"),
    "bias": (lambda: _op("strided", T, V, torch.zeros(4), *GEO, ""), r"bias must have shape \(8,\), got \(4,\)"),
    "transposed filters": (lambda: _op("transpose", T, V[0], None, 1, *GEO, ""), r"as in nn.ConvTranspose2d"),
    "transposed channels": (lambda: _op("transpose", T[:, :2], V, None, 1, *GEO, ""), r"must be the 4 channels of .*, got 8"),
    "multiplier": (lambda: _op("transpose", T[:, :2], V[:4], None, 3, *GEO, ""), "multiplier must divide the 4 channels of .*, got 3"),
    "sides": (lambda: _op("strided_bwd_dw", T[:, :2], T.double(), 2, 2, *GEO, T.dtype, None, ""), "must agree in B, C and dtype"),
    "places": (
        lambda: torch.ops.lifeops.token_pool_bwd(T[:, :2], None, "max", 2, 2, *GEO, False, True, ""), "mode 'max' takes it and no other",
    ),
}  # fmt: skip


def _op(name, *args):
    return getattr(torch.ops.lifeops, f"token_dwconv_{name}")(*args)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
