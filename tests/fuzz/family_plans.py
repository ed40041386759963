"""Plans of the modules of CvT, MViT, EdgeViT, RegionViT, SiT and their like: a module, what it is given and the formula of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from fuzz import family, systems
from fuzz.cases import DTYPES
from fuzz.layouts import SHARING
from fuzz.test_modules import HEADS, TRAIN
from fuzz.test_public import few_tokens
from lifeops import losses, nn
from lifeops.nn.regional_attention import padding_mask

BOTH = {**TRAIN, "hooked": st.sampled_from((False, False, True))}  # hooked layers are called, one by one
DROP = {"drop": st.sampled_from((0.0, 0.0, 0.0, 1.0))}  # 1: nothing is left in training


class Built(NamedTuple):
    """What a plan comes to: ``formula(p, *inputs)`` gives results and running statistics of ``module(*arguments(*inputs))``."""

    module: torch.nn.Module
    inputs: dict
    formula: Callable
    arguments: Callable
    near: Callable = lambda p, *inputs: torch.inf  # how close to a kink it comes
    floor: float = 1.0  # of :func:`compare`: what the numbers on the way to the results are like


def _on_grid(plan):
    return lambda x: (x, (plan.H, plan.W))


def _trained(plan, patches):
    """The plan, in evaluation where a batch norm would see few values, and without layouts that repeat them: their variance says little."""
    if patches < 8:
        return plan._replace(options={**plan.options, "train": False})
    repeats = SHARING if plan.options["train"] else ()
    return plan._replace(layouts=tuple("permuted" if layout in repeats else layout for layout in plan.layouts))


# ------------------------------------------------------------------------------------------------ CvT, MViT

CVT = {
    **BOTH, **HEADS, **DROP, "method": st.sampled_from(("dw_bn", "dw_bn", "avg", "linear")), "K": st.sampled_from((1, 3, 3, 5)),
    "stride_q": st.integers(1, 3), "stride_kv": st.integers(1, 4), "qkv_bias": st.booleans(),
}  # fmt: skip


def cvt(plan):
    plan = few_tokens(plan)
    o, B, H, W, P = plan.options, plan.B, plan.H, plan.W, plan.P
    dim, method = o["h"] * o["d"], o["method"]
    strides = o["stride_q"] if method == "dw_bn" else 1, 1 if method == "linear" else o["stride_kv"]
    plan = _trained(plan, B * -(-H // max(strides)) * -(-W // max(strides)))
    train = plan.options["train"]
    options = {"method": method, "kernel_size": o["K"], "stride_q": strides[0], "stride_kv": strides[1], "qkv_bias": o["qkv_bias"]}
    drop = {"attn_drop": 0.0 if train else 0.5, "proj_drop": o["drop"]}
    module = nn.ConvProjectionAttention(dim, o["h"], P, **options, **drop, dtype=DTYPES[plan.dtype])

    def formula(p, x):
        y, seen = family.conv_projection(p, x, H, W, P, o["h"], method, o["K"], *strides, train)
        return 0 * y if train and o["drop"] else y, *seen

    # a filter's gradient may be what is left of larger ones: before a batch norm, or where all keys are alike
    return plan, Built(module, {"x": plan.draw(B, P + H * W, dim)}, formula, _on_grid(plan), floor=8.0)


SIZES, PACES = st.tuples(*(st.sampled_from((1, 2, 3, 3, 5)),) * 2), st.tuples(*(st.integers(1, 3),) * 2)
MVIT = {
    **BOTH, **HEADS, "mode": st.sampled_from(("conv", "conv", "max", "avg", "conv_unshared")), "kernel_q": SIZES, "kernel_kv": SIZES,
    "stride_q": PACES, "stride_kv": PACES, "pool_first": st.booleans(), "residual": st.booleans(), "residual_prefix": st.booleans(),
    "tables": st.sampled_from(("", "its own", "another")), "made_for": st.tuples(st.integers(1, 9), st.integers(1, 9)),
    "resize": st.sampled_from(("interpolate", "middle")), "qkv_bias": st.booleans(), "eps": st.sampled_from((1e-6, 1e-3)),
}  # fmt: skip


def mvit(plan):
    plan = few_tokens(plan)
    o, B, H, W, P, h = plan.options, plan.B, plan.H, plan.W, plan.P, plan.options["h"]
    if not H * W:
        return None
    mode, first, dim = o["mode"], o["pool_first"] or o["mode"] == "conv_unshared", plan.C
    dim = h * -(-dim // h) if first else dim
    table = {"": None, "its own": (H, W), "another": o["made_for"]}[o["tables"]]
    same = {n: o[n] for n in ("kernel_q", "kernel_kv", "stride_q", "stride_kv", "residual_prefix", "qkv_bias")}
    options = {"mode": mode, "pool_first": first, "residual_pooling": o["residual"], "rel_pos": table, "rel_pos_resize": o["resize"]}
    module = nn.PoolingAttention(dim, h, P, dim_out=h * o["d"], **options, **same, norm_eps=o["eps"], dtype=DTYPES[plan.dtype])
    kernels, strides = ((o[f"{n}_q"], o[f"{n}_kv"], o[f"{n}_kv"]) for n in ("kernel", "stride"))

    def formula(p, x):
        around = o["residual"], o["residual_prefix"], o["resize"]
        return (family.pooling_attention(p, x, H, W, P, h, mode, kernels, strides, first, o["eps"], *around),)

    def near(p, x):
        if mode != "max":
            return torch.inf
        parts = [x] * 3 if first else family.dense(p, "qkv", x).chunk(3, 2)
        return min(family.least_lead(systems.heads(t, h), H, W, P, k, s) for t, k, s in zip(parts, kernels, strides, strict=True))

    return plan, Built(module, {"x": plan.draw(B, P + H * W, dim)}, formula, _on_grid(plan), near)


# ------------------------------------------------------------------------------------------------ EdgeViT, RegionViT

AGGREGATE = {**BOTH, "ratio": st.sampled_from((1.0, 2.0, 4.0)), "K": st.sampled_from((1, 3, 5, 5, 7))}


def local_agg(plan):
    o, B, H, W, P = plan.options, plan.B, plan.H, plan.W, plan.P
    plan = _trained(plan, B * H * W)
    module = nn.LocalAgg(plan.C, o["ratio"], P, kernel_size=o["K"], dtype=DTYPES[plan.dtype])

    def formula(p, x):
        y, seen = family.local_agg(p, x, H, W, P, plan.options["train"])
        return y, *seen

    return plan, Built(module, {"x": plan.draw(B, P + H * W, plan.C)}, formula, _on_grid(plan))


SPARSE = {**BOTH, **HEADS, **DROP, "r": st.integers(1, 4), "qkv_bias": st.booleans()}


def global_sparse(plan):
    plan, o = few_tokens(plan), plan.options
    plan = plan._replace(H=min(plan.H, 6) * o["r"], W=min(plan.W, 6) * o["r"])
    B, H, W, P, dim = plan.B, plan.H, plan.W, plan.P, o["h"] * o["d"]
    drop = {"attn_drop": 0.0 if o["train"] else 0.5, "proj_drop": o["drop"]}
    module = nn.GlobalSparseAttention(dim, o["h"], o["r"], P, qkv_bias=o["qkv_bias"], **drop, dtype=DTYPES[plan.dtype])

    def formula(p, x):
        return (family.global_sparse(p, x, H, W, P, o["h"], o["r"]) * (not (o["train"] and o["drop"])),)

    return plan, Built(module, {"x": plan.draw(B, P + H * W, dim)}, formula, _on_grid(plan))


REGIONS = {
    **BOTH, **HEADS, "w": st.integers(1, 4), "windows": st.booleans(), "padded": st.sampled_from(("", "fixed", "authors")),
    "below": st.integers(0, 4), "beside": st.integers(0, 4), "qkv_bias": st.booleans(),
}  # fmt: skip


def regional(plan):
    o, B, w, gh, gw = plan.options, plan.B, plan.options["w"], 1 + plan.H % 3, 1 + plan.W % 3
    dim, windows = o["h"] * o["d"], o["windows"] or bool(o["padded"])
    grid = tuple(n * w - min(more, w) for n, more in ((gh, o["below"]), (gw, o["beside"])))
    mask = padding_mask((gh, gw), w, grid, o["padded"]) if o["padded"] else None
    expected = None if mask is None else family.padded_windows(gh, gw, w, *grid, o["padded"] == "authors")
    module = nn.RegionalAttention(dim, o["h"], w, o["qkv_bias"], dtype=DTYPES[plan.dtype])
    shape = (B * gh * gw, 1 + w * w) if windows else (B, plan.P + plan.H % 12)

    def formula(p, x):
        return (family.regional(p, x, o["h"], w, windows, expected),)

    return plan, Built(module, {"x": plan.draw(*shape, dim)}, formula, lambda x: (x, windows, mask))


STEPS = {**BOTH, "times": st.integers(1, 3), "region_grid": st.tuples(st.integers(1, 5), st.integers(1, 5))}


def downsampling(plan):
    B, C, grid, regions = plan.B, plan.C, (plan.H, plan.W), plan.options["region_grid"]
    if 0 in grid:
        return None
    module = nn.TwoGridDownsampling(C, C * plan.options["times"]).to(DTYPES[plan.dtype])
    inputs = {"regions": plan.draw(B, regions[0] * regions[1], C), "x": plan.draw(B, plan.H * plan.W, C)}

    def formula(p, r, x):
        return family.downsampled(p, r, *regions), family.downsampled(p, x, *grid)

    return plan, Built(module, inputs, formula, lambda r, x: (r, regions, x, grid))


# ------------------------------------------------------------------------------------------------ smoothing, slimming, shared weights

SMOOTHING = {
    **BOTH, "sigma": st.sampled_from((0, 0.05, 0.7, 1.0, 6.0)), "K": st.sampled_from((1, 3, 3, 5, 7)),
    "padding": st.sampled_from((None, None, 0, 1, 4)),
}  # fmt: skip


def smoothing(plan):
    o, B, H, W, P, K = plan.options, plan.B, plan.H, plan.W, plan.P, plan.options["K"]
    padding = K // 2 if o["padding"] is None else o["padding"]
    if min(H, W) + 2 * padding < K or not H * W:
        return None
    module = nn.TokenSmoothing(o["sigma"], K, P, padding=o["padding"])

    def formula(p, x):
        return (family.smoothed(x, H, W, P, o["sigma"], K, padding),)

    return plan, Built(module, {"x": plan.draw(B, P + H * W, plan.C)}, formula, _on_grid(plan))


SLIM = {**BOTH, "K": st.integers(1, 9), "ratio": st.sampled_from((0.5, 1.0, 2.0))}


def slimming(plan):
    o, B, P, N, dim = plan.options, plan.B, plan.P, plan.H * plan.W, max(2, plan.C)
    if not N:
        return None
    module = nn.TokenSlimming(dim, o["K"], P, hidden_ratio=o["ratio"], dtype=DTYPES[plan.dtype])
    return plan, Built(module, {"x": plan.draw(B, P + N, dim)}, lambda p, x: (family.slimmed(p, x, P),), lambda x: (x,))


def growing(plan):
    o, N = plan.options, max(1, plan.H * plan.W % 50)
    N, dim = max(2, N), max(2, plan.C)
    module = nn.ReverseTokenSlimming(dim, o["K"], N, o["ratio"], dtype=DTYPES[plan.dtype])
    inputs = {"x": plan.draw(plan.B, o["K"], dim)}

    def near(p, x):  # few tokens mixed vary little, and rounding is divided by that
        return torch.inf if family.grown(p, x)[1] > 0.1 else 0.0

    return plan, Built(module, inputs, lambda p, x: family.grown(p, x)[:1], lambda x: (x,), near, floor=8.0)


SHARED = {
    **BOTH, "h": st.integers(1, 9), "d": st.integers(1, 6), "names": st.sampled_from((("qkv", "proj"), ("linear_qkv", "linear_out"))),
    "qkv_bias": st.booleans(), "offsets": st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=9, max_size=9),
    "own": st.booleans(), "out": st.integers(1, 12),
}  # fmt: skip


def shared_conv(plan):
    o, B, H, W, P, h, C = plan.options, plan.B, plan.H, plan.W, plan.P, plan.options["h"], plan.C
    K = {1: 1, 5: 3, 6: 3, 7: 3, 8: 3, 9: 3}.get(h)  # of the authors' kernel; there is none for the other numbers of heads
    own = o["own"] or K is None
    offsets = o["offsets"][:h] if own else [(i // K - K // 2, i % K - K // 2) for i in range(h)]
    mhsa, (qkv, out), dd = torch.nn.Module(), o["names"], {"dtype": DTYPES[plan.dtype]}
    mhsa.num_heads = h
    mhsa.add_module(qkv, torch.nn.Linear(C, 3 * h * o["d"], bias=o["qkv_bias"], **dd))
    mhsa.add_module(out, torch.nn.Linear(h * o["d"], o["out"], **dd))
    module = nn.SharedConvAttention(mhsa, P, offsets=offsets if own else None)

    def formula(p, x):
        return (family.shared_conv(p, x, H, W, P, offsets, qkv, out),)

    return plan, Built(module, {"x": plan.draw(B, P + H * W, C)}, formula, _on_grid(plan))


# ------------------------------------------------------------------------------------------------ PVTv2, pyramids, a loss

CONV_FFN = {**BOTH, **DROP, "ratio": st.sampled_from((1.0, 2.0, 4.0)), "K": st.sampled_from((1, 3, 3, 5, 7)), "relu": st.booleans()}


def conv_ffn(plan):
    o, B, H, W, P = plan.options, plan.B, plan.H, plan.W, plan.P
    options = {"kernel_size": o["K"], "extra_relu": o["relu"], "drop": o["drop"]}
    module = nn.ConvFeedForward(plan.C, o["ratio"], P, **options, dtype=DTYPES[plan.dtype])

    def formula(p, x):
        return (family.conv_feed_forward(p, x, H, W, P, o["relu"])[0] * (not (o["train"] and o["drop"])),)

    def near(p, x):
        read = family.conv_feed_forward(p, x, H, W, P, True)[1]
        return read.abs().min().item() if o["relu"] and read.numel() else torch.inf

    return plan, Built(module, {"x": plan.draw(B, P + H * W, plan.C)}, formula, _on_grid(plan), near)


EMBED = {
    **BOTH, "channels": st.integers(1, 5), "size": st.integers(1, 7), "stride": st.integers(1, 5),
    "padding": st.sampled_from((None, None, 0, 1, 3)),
}  # fmt: skip


def embedding(plan):
    o, H, W = plan.options, plan.H, plan.W
    padding = o["size"] // 2 if o["padding"] is None else o["padding"]
    if min(H, W) + 2 * padding < o["size"] or not H * W:
        return None
    module = nn.OverlapPatchEmbed(o["channels"], plan.C, o["size"], o["stride"], o["padding"], dtype=DTYPES[plan.dtype])

    def formula(p, m):
        return (family.patch_embed(p, m, o["stride"], padding),)

    return plan, Built(module, {"maps": plan.draw(plan.B, o["channels"], H, W)}, formula, lambda m: (m,))


PYRAMID = {
    **BOTH, "out": st.integers(1, 16), "eps": st.sampled_from((1e-6, 1e-3)),
    "sizes": st.sampled_from(((16, (4, 8, 16, 32)), (4, (1, 8)), (2, (1, 2, 6)), (1, (1, 3)), (6, (2, 3, 6, 12)), (3, (3, 12)))),
}  # fmt: skip


def pyramid(plan):
    plan = few_tokens(plan)
    o, B, H, W, P, (size, strides) = plan.options, plan.B, plan.H, plan.W, plan.P, plan.options["sizes"]
    if not H * W:
        return None
    module = nn.TokenPyramid(plan.C, o["out"], P, patch_size=size, strides=strides, norm_eps=o["eps"], dtype=DTYPES[plan.dtype])

    def formula(p, x):
        return family.pyramid(p, x, H, W, P, size, strides, o["eps"])

    return plan, Built(module, {"x": plan.draw(B, P + H * W, plan.C)}, formula, _on_grid(plan))


class Localization(torch.nn.Module):
    """The loss as a module that has the head."""

    def __init__(self, head, **options):
        super().__init__()
        self.head, self.options = head, options

    def forward(self, x, grid):
        return losses.dense_relative_localization(x, grid, head=self.head, **self.options)


LOCALIZE = {
    **BOTH, "mode": st.sampled_from(("l1", "ce", "cbr")), "signed": st.booleans(), "normalize": st.sampled_from(("paper", "code", "none")),
    "m": st.integers(1, 6), "hidden": st.integers(1, 12),
}  # fmt: skip


def localization(plan):
    o, B, H, W, P, mode, signed = plan.options, plan.B, plan.H, plan.W, plan.P, plan.options["mode"], plan.options["signed"]
    if not H * W:
        return None
    normalize = o["normalize"] if mode == "l1" and not (signed and o["normalize"] == "paper") else "none"
    draw = torch.Generator().manual_seed(plan.seed)
    pairs = [torch.stack([torch.randint(n, (B, o["m"]), generator=draw) for n in (H, W)], 2) for _ in range(2)]
    grid = None if mode == "l1" else (H, W)
    head = losses.RelativeLocalizationHead(plan.C, mode, signed=signed, grid=grid, hidden_dim=o["hidden"], dtype=DTYPES[plan.dtype])
    module = Localization(head, num_prefix_tokens=P, normalize=normalize, pairs=pairs)

    def loss(p, x):
        p = {n.removeprefix("head."): t for n, t in p.items()}
        return family.relative_localization(p, x, H, W, P, mode, signed, normalize, pairs)

    inputs = {"x": plan.draw(B, P + H * W, plan.C)}
    return plan, Built(module, inputs, lambda p, x: loss(p, x)[:1], _on_grid(plan), lambda p, x: loss(p, x)[1])


# ------------------------------------------------------------------------------------------------ all of them

BUILDERS = {
    "nn.ConvProjectionAttention": (CVT, cvt),
    "nn.PoolingAttention": (MVIT, mvit),
    "nn.LocalAgg": (AGGREGATE, local_agg),
    "nn.GlobalSparseAttention": (SPARSE, global_sparse),
    "nn.RegionalAttention": (REGIONS, regional),
    "nn.TwoGridDownsampling": (STEPS, downsampling),
    "nn.TokenSmoothing": (SMOOTHING, smoothing),
    "nn.TokenSlimming": (SLIM, slimming),
    "nn.ReverseTokenSlimming": (SLIM, growing),
    "nn.SharedConvAttention": (SHARED, shared_conv),
    "nn.ConvFeedForward": (CONV_FFN, conv_ffn),
    "nn.OverlapPatchEmbed": (EMBED, embedding),
    "nn.TokenPyramid": (PYRAMID, pyramid),
    "lifeops.losses.dense_relative_localization": (LOCALIZE, localization),
}
