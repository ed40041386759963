"""Calls of everything in ever other shapes: operators, public functions with their gradients, modules, a converted model, conversions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch

import lifeops
from conftest import declare_torchvision_ops
from fuzz.cases import DTYPES, Case, arguments
from lifeops import registry, torchlib
from lifeops.ops.channel.activations import PROLOGUES

declare_torchvision_ops()
timm = pytest.importorskip("timm")
SYSTEMS = "life", "localvit", "dw_shortcut"
BACKENDS = "cpu", "cpu", "cpu", "reference"


class Calls:
    """Draws one call after the other from ``seed``; a shape hardly ever comes twice."""

    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        nn = lifeops.nn
        self.modules = [nn.LifeAttention(12, 3), nn.LocalAttention(12, 3, num_prefix_tokens=1)]
        self.modules += [nn.LocalityFeedForward(12, reduction=12, num_prefix_tokens=1), nn.DWShortcut(12, 3, num_prefix_tokens=1)]
        self.models = [lifeops.convert(self._host(), system) for system in SYSTEMS]
        kinds = {self.operator: 60, self.convolution: 12, self.attention: 10, self.pointwise: 10, self.module: 6, self.model: 1.5}
        kinds |= {self.new_module: 0.5, self.rollout: 0.1, self.conversion: 0.02}
        self.kinds, self.weights = [*kinds], [*kinds.values()]

    def __iter__(self) -> Iterator[Callable[[], None]]:
        while True:
            yield self.random.choices(self.kinds, self.weights)[0]

    def _sides(self, most: int = 15) -> tuple[int, int]:
        return self.random.randint(1, most), self.random.randint(1, most)

    def _tensor(self, *shape: int, dtype=torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).requires_grad_()

    def _differentiate(self, *outputs: torch.Tensor) -> None:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    def _host(self) -> torch.nn.Module:
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 3}
        return timm.models.VisionTransformer(**sizes, dynamic_img_size=True)

    def operator(self) -> None:
        """Any operator of the registry, those that backward runs among them."""
        draw = self.random.randint
        op = self.random.choice([*registry.ops.values()])
        like = op.samples()[0]
        known = {*like._fields, *getattr(getattr(like, "base", None), "_fields", ())}
        sizes = {"B": draw(1, 4), "H": draw(1, 15), "W": draw(1, 15), "P": draw(0, 5), "C": 3 * draw(1, 30), "K": draw(0, 3) * 2 + 1,
                 "patches": draw(1, 200), "N": draw(2, 60), "R": draw(1, 5), "h": draw(1, 4), "d": draw(1, 24)}  # fmt: skip
        sample = {name: size for name, size in sizes.items() if name in known}
        case = Case(op.name, sample, self.random.choice([*DTYPES]), backend=self.random.choice(BACKENDS), seed=draw(0, 2**20))
        torchlib.overload(op)(*arguments(case))

    def convolution(self) -> None:
        (H, W), P, C, K = self._sides(), self.random.randint(0, 5), self.random.randint(1, 100), self.random.choice((1, 3, 5, 7))
        dtype = self.random.choice([*DTYPES.values()])
        x, weight, bias = self._tensor(self.random.randint(1, 4), P + H * W, C, dtype=dtype), self._tensor(C, 1, K, K), self._tensor(C)
        options = {"prologue": lifeops.ChannelAct(act=self.random.choice(PROLOGUES))} if self.random.random() < 0.5 else {}
        how = {"grid": (H, W), "num_prefix_tokens": P, "prefix": self.random.choice(("keep", "zero", "drop")), **options}
        self._differentiate(lifeops.token_dwconv(x, weight, bias, backend=self.random.choice(BACKENDS), **how))

    def attention(self) -> None:
        (H, W), P, h, d = self._sides(8), self.random.randint(0, 3), self.random.randint(1, 4), self.random.randint(1, 24)
        dtype, B = self.random.choice([*DTYPES.values()]), self.random.randint(1, 3)
        q, k, v = (self._tensor(B, h, P + H * W, d, dtype=dtype) for _ in range(3))
        self._differentiate(lifeops.local_attention(q, k, v, self._tensor(h * d, 1, 3, 3), grid=(H, W), num_prefix_tokens=P))

    def pointwise(self) -> None:
        C = self.random.randint(1, 200)
        x, weight = self._tensor(2, self.random.randint(1, 200), C), self._tensor(self.random.randint(1, 20), C)
        with torch.no_grad():
            lifeops.pointwise.pointwise_bwd_dw(lifeops.pointwise.pointwise(x, weight), x)

    def module(self) -> None:
        module, grid, P = self.random.choice(self.modules), self._sides(), 1
        x = self._tensor(self.random.randint(2, 3), P + grid[0] * grid[1], 12)
        inputs = (x, x.tanh()) if isinstance(module, lifeops.nn.DWShortcut) else (x,)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.random.random() < 0.3):
            y = module(*inputs, grid=grid)
        self._differentiate(y)
        module.zero_grad(set_to_none=True)

    def new_module(self) -> None:
        dim, grid = 3 * self.random.randint(1, 20), self._sides()
        module = self.random.choice((lifeops.nn.LifeAttention, lifeops.nn.LocalAttention))(dim, 3, num_prefix_tokens=2)
        self._differentiate(module(self._tensor(2, 2 + grid[0] * grid[1], dim), grid=grid))

    def model(self) -> None:
        model, (H, W) = self.random.choice(self.models), self._sides(10)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.random.random() < 0.3):
            y = model.train()(self._tensor(2, 3, 4 * H, 4 * W))
        self._differentiate(y)
        model.zero_grad(set_to_none=True)

    def rollout(self) -> None:
        (H, W), model = self._sides(10), self.random.choice(self.models)
        lifeops.rollout(model.eval(), self._tensor(1, 3, 4 * H, 4 * W).detach(), "cls")

    def conversion(self) -> None:
        model = lifeops.convert(self._host(), self.random.choice(SYSTEMS))
        model(self._tensor(1, 3, 4 * self.random.randint(1, 6), 16))
        lifeops.revert(model)
