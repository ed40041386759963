"""Tensors past 2^31 elements on the CPU: many images, or one large one, zero but for a few planted ones at the start, across that border
and at the end. The zeros are pages that were never written, which take no memory.

Each planted image must have the bits that it has among four images, every other one those of a zero image: a wrapped or truncated index
shows as a wrong image, or ends the process.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import lifeops
from fuzz.cases import Case, arguments, names
from fuzz.test_operators import BY_IMAGE, IMAGES
from lifeops import registry, testing, torchlib

BORDER = 2**31
DTYPE = torch.bfloat16
OPERATORS = {  # fields of the registry's sample beside B: images of some 65,000 elements, attention's of few tokens
    "token_dwconv": {"H": 31, "W": 33, "C": 64, "residual": False}, "token_dwconv_bwd_dx": {"H": 31, "W": 33, "C": 64},
    "token_dwconv_bwd_dw": {"H": 31, "W": 33, "C": 64}, "token_dwconv_bwd_db": {"H": 31, "W": 33, "C": 64},
    "token_dwconv_act": {"H": 31, "W": 33, "C": 64, "stats": False, "pool": True, "act": "hardswish"},
    "token_dwconv_act_bwd_dx": {"H": 31, "W": 33, "C": 64, "act": "hardswish"},
    "token_dwconv_act_bwd_dw": {"H": 31, "W": 33, "C": 64, "act": "hardswish"},
    "token_dwconv_act_bwd": {"H": 31, "W": 33, "C": 64, "out_act": "gelu"},
    "channel_act": {"patches": 1024, "C": 64}, "channel_act_pool": {"patches": 1024, "C": 64},
    "channel_act_sums": {"patches": 1024, "C": 64}, "channel_act_grad": {"patches": 1024, "C": 64},
    "dw_shortcut_eval": {"H": 31, "W": 33, "C": 64}, "rollout_step": {"N": 64, "h": 2, "d": 32},
    "local_attention": {"H": 7, "W": 9, "h": 2, "d": 32},
}  # fmt: skip
"""Left out: life_qkv and local_attention_bwd, whose three results of that size take more than 14 GB and whose kernels are those of
token_dwconv beside torch's; channel_stats, dw_shortcut and dw_shortcut_bwd, whose statistics see every image."""
LARGE = "token_dwconv with gradients, channel_stats and channel_act of one image"
NEEDS = 14  # GB of memory
FEW = 4  # images: three that are planted, and one of zeros


def zeros(*shape: int) -> torch.Tensor:
    """Zeros of ``DTYPE`` in memory that nobody has touched."""
    return torch.from_numpy(np.zeros(shape, dtype=np.int16)).view(DTYPE)


def available() -> int:
    """Bytes of memory that can be had without swapping."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


# ------------------------------------------------------------------------------------------------ many images


def _few(name: str) -> dict:
    """The operator's arguments for ``FEW`` images, the last of them zero, by name."""
    op = registry.ops[name]
    sample = {"B": FEW, **OPERATORS[name]}
    given = dict(zip(names(op), arguments(Case(name, sample, "bfloat16", layouts=("contiguous",), seed=1)), strict=True))
    for t in _images(given).values():
        t[FEW - 1] = 0
    return given


def _images(given: dict) -> dict[str, torch.Tensor]:
    """Those of the arguments that are a value of each image."""
    return {n: t for n, t in given.items() if n in IMAGES | {"v"} and isinstance(t, torch.Tensor)}


def _many(given: dict, border: int) -> tuple[dict, list[int]]:
    """The same with so many images that the widest argument goes past ``border``, and where the first three of the few are among them."""
    each = max(t[0].numel() for t in _images(given).values() if t.dtype == DTYPE)
    places = [0, border // each, border // each + 2]
    many = dict(given)
    for n, t in _images(given).items():
        shape = places[-1] + 1, *t.shape[1:]
        many[n] = zeros(*shape) if t.dtype == DTYPE else torch.zeros(shape, dtype=t.dtype)
        many[n][places] = t[: FEW - 1]
    return many, places


def _compare_images(what: str, many: torch.Tensor, few: torch.Tensor, places: list[int]) -> None:
    for i, place in enumerate(places):
        assert torch.equal(many[place], few[i]), f"{what}: image {place} has other values than among {FEW}"
    wrong, step = 0, max(1, 2**26 // few[0].numel())
    for start in range(0, len(many), step):
        wrong += int((many[start : start + step] != few[FEW - 1]).flatten(1).any(1).sum())
    planted = sum(not torch.equal(few[i], few[FEW - 1]) for i in range(FEW - 1))
    assert wrong == planted, f"{what}: {wrong - planted} images of zeros have other values than among {FEW}"


def many_images(name: str, border: int = BORDER) -> int:
    """Hold the operator ``name`` against itself on few images, and that against its formula; elements of its widest argument."""
    registry.load("cpu")
    call, few = torchlib.overload(registry.ops[name]), _few(name)
    many, places = _many(few, border)
    expected = testing.tensors(call(*few.values()))
    testing.check(registry.ops[name], tuple(few.values()), expected, terms=FEW * 31 * 33)
    for i, (got, want) in enumerate(zip(testing.tensors(call(*many.values())), expected, strict=True)):
        dim = BY_IMAGE.get(name, {0: 0} if name == "local_attention" else {}).get(i)
        what = f"{name}, output {i}"
        if dim is not None:
            _compare_images(what, got.movedim(dim, 0), want.movedim(dim, 0), places)
        else:  # a sum over the images; an image's sums, cut otherwise in another batch; log-sum-exps
            got, want = (got, want) if got.shape == want.shape else (got[places], want[: FEW - 1])
            most = want.abs().max().item() if want.numel() else 0.0
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * most, msg=lambda m, w=what: f"{w}: {m}")
    return max(t.numel() for t in _images(many).values())


# ------------------------------------------------------------------------------------------------ one large image

SPOT = 5  # rows and columns that are planted
CHANNELS = 64


class _Spots:
    """Three spots of a grid (H, W): in the first corner, across the border, in the last corner, each in a window of zeros around it."""

    def __init__(self, H: int, W: int, border: int):
        row = border // (W * CHANNELS)
        self.H, self.W = H, W
        self.corners = (0, 0), (row - SPOT // 2, W // 2), (H - SPOT, W - SPOT)

    def plant(self, t: torch.Tensor, seed: int) -> None:
        """``t``: (1, 1 + H W, C), its cls token is planted, too."""
        generator = torch.Generator().manual_seed(seed)
        t[0, 0] = torch.randn(CHANNELS, generator=generator)
        for r, q in self.corners:
            t[0, 1:].view(self.H, self.W, CHANNELS)[r : r + SPOT, q : q + SPOT] = torch.randn(SPOT, SPOT, CHANNELS, generator=generator)

    def windows(self, t: torch.Tensor) -> list[torch.Tensor]:
        """(rows, columns, C) of each spot and of what a filter reaches around it, views."""
        m, reach = t[0, 1:].view(self.H, self.W, CHANNELS), 2 * SPOT
        return [m[max(0, r - reach) : r + SPOT + reach, max(0, q - reach) : q + SPOT + reach] for r, q in self.corners]


def _maps(window: torch.Tensor) -> torch.Tensor:
    return window.permute(2, 0, 1)[None].double()


def _elsewhere(what: str, t: torch.Tensor, spots: _Spots, value: torch.Tensor) -> None:
    """Outside of the windows, which are overwritten, every token of ``t`` is ``value`` (C,)."""
    for window in spots.windows(t):
        window[:] = value
    for part in t[0, 1:].split(2**20):
        assert bool((part == value).all()), f"{what}: a token far from every planted one has another value than those of zeros"


def _close(what: str, got: torch.Tensor, want: torch.Tensor, rtol: float = 2.0**-7) -> None:
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=2.0**-7, msg=lambda m: f"{what}: {m}")


def large_image(border: int = BORDER) -> int:
    """token_dwconv with its gradients and the channel passes on one image; its elements."""
    W = int((border / CHANNELS) ** 0.5)
    H = border // (W * CHANNELS) + 2 * SPOT
    spots = _Spots(H, W, border)
    x, dy = zeros(1, 1 + H * W, CHANNELS), zeros(1, 1 + H * W, CHANNELS)
    spots.plant(x, 1), spots.plant(dy, 2)
    generator = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((CHANNELS, 1, 5, 5), (CHANNELS,)))
    _passes(x, spots)
    leaves = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    y = lifeops.token_dwconv(*leaves, grid=(H, W), num_prefix_tokens=1, backend="cpu")
    wide = [t.detach().double() for t in (weight, bias)]
    expected = [torch.nn.functional.conv2d(_maps(w), *wide, padding=2, groups=CHANNELS) for w in spots.windows(x.detach())]
    for window, want in zip(spots.windows(y.detach()), expected, strict=True):
        _close("token_dwconv", _maps(window), want)
    assert torch.equal(y[0, 0], x[0, 0])
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    _elsewhere("token_dwconv", y.detach(), spots, bias.detach().to(DTYPE))
    del y
    layer = wide[0], [CHANNELS], [1, 1], [2, 2], [1, 1], False, [0, 0], CHANNELS, [True] * 3
    pairs = zip(spots.windows(dy), spots.windows(x.detach()), strict=True)
    sums = [torch.ops.aten.convolution_backward(_maps(g), _maps(v), *layer) for g, v in pairs]
    for window, (want, _, _) in zip(spots.windows(dx), sums, strict=True):
        _close("token_dwconv's dX", _maps(window), want)
    _close("token_dwconv's dW", dw, sum(s[1] for s in sums), 1e-4), _close("token_dwconv's db", db, sum(s[2] for s in sums), 1e-4)
    _elsewhere("token_dwconv's dX", dx, spots, torch.zeros(CHANNELS, dtype=DTYPE))
    return x.numel()


def _passes(x: torch.Tensor, spots: _Spots) -> None:
    """Mean and squared deviations of an activation over the patches, and the activation itself."""
    n = spots.H * spots.W
    mean, m2 = torch.ops.lifeops.channel_stats(x, "relu", n, "cpu")
    planted = torch.cat([w.reshape(-1, CHANNELS).double().relu() for w in spots.windows(x)])
    _close("channel_stats' mean", mean * n, planted.sum(0), 1e-4)
    _close("channel_stats' m2", m2, planted.square().sum(0) - planted.sum(0).square() / n, 1e-4)
    y = torch.ops.lifeops.channel_act(x, None, None, None, None, "hardswish", n, "cpu")
    y = torch.cat((x[:, :1], y), 1) if y.shape[1] == n else y
    for window, of in zip(spots.windows(y), spots.windows(x), strict=True):
        _close("channel_act", window, torch.nn.functional.hardswish(of.double()))
    _elsewhere("channel_act", y, spots, torch.zeros(CHANNELS, dtype=DTYPE))
