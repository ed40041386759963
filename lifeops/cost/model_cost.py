"""What a model costs, found out without computing it: parameters, multiply-accumulates, bytes kept for backward.

FLOPs are torch.utils.flop_counter's: 2 per multiply-add of a convolution (taps in the zero padding included), a matrix product or
attention, 0 of everything else. Two of torch's formulas are completed, see :func:`flop_formulas`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops.nn.conv_projection import ConvProjectionAttention
from lifeops.nn.dw_shortcut import ShortcutModule
from lifeops.nn.local_agg import LocalAgg
from lifeops.nn.localvit import LocalityFeedForward

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_TELLS_ELEMENTS = (ConvProjectionAttention, LocalAgg)  # modules that know how much goes through the batch norms inside


class ModelCost(NamedTuple):
    """Of one image: ``macs`` forward, ``train_macs`` forward and backward, ``norm_ops`` see :func:`count_norm_ops`, ``saved`` bytes
    that training keeps for backward. ``params`` are the model's.
    """

    params: int
    macs: float
    train_macs: float
    norm_ops: float
    saved: float


# ------------------------------------------------------------------------------------------------ products


def _conv_backward(
    dy, x, weight, _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, mask, out_shape=None, **kwargs
):
    """Each of dX and dW has as many products as the convolution itself."""
    return 2 * x[0] * prod((x if transposed else dy)[2:]) * prod(weight) * (bool(mask[0]) + bool(mask[1]))


def flop_formulas() -> dict:
    """``custom_mapping`` for torch.utils.flop_counter.FlopCounterMode.

    * torch counts dW of a convolution with groups as that of one without: C times too many of a depth-wise one.
    * torch counts its fused attention kernels except the CPU's: 2 products forward, 5 backward (the scores again).
    """
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    return {
        aten.convolution_backward: _conv_backward,
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dy, q, k, v, *a, **kw: sdpa_backward_flop_count(dy, q, k, v),
    }


def count_flops(fn: Callable[[], object]) -> int:
    """FLOPs of what ``fn`` runs, backward passes included."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        fn()
    return counter.get_total_flops()


def count_macs(fn: Callable[[], object]) -> int:
    """Multiply-accumulates of convolutions and matrix products in ``fn``, without gradients."""
    with torch.no_grad():
        return count_flops(fn) // 2


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ norms


def _own_norms(module: nn.Module) -> list[nn.Module]:
    """Batch norms that a fused module computes itself instead of calling them."""
    if isinstance(module, (LocalityFeedForward, *_TELLS_ELEMENTS)):
        return [m for m in module.modules() if isinstance(m, _BATCH_NORM)]
    return list(module.batchnorms) if isinstance(module, ShortcutModule) else []


def _norm_ops(module: nn.Module, x: Tensor, grid: tuple[int, int] | None = None) -> int:
    if isinstance(module, _TELLS_ELEMENTS):
        return 2 * x.shape[0] * module.norm_elements(module.grid_holder.of(type(module).__name__, grid))
    if isinstance(module, nn.LayerNorm):
        return 5 * x.numel()
    if isinstance(module, _BATCH_NORM):
        return 2 * x.numel()
    patches = x.numel() // x.shape[-1] - x.shape[0] * getattr(module, "num_prefix_tokens", 0)
    pooled = module.hidden_dim if getattr(module, "attention", "") else 0
    return patches * (2 * sum(norm.num_features for norm in _own_norms(module)) + pooled)


def _sizes(module: nn.Module, args: tuple) -> tuple:
    """The tokens and, of modules that ask for it, the grid that was given with them."""
    return args[:2] if isinstance(module, _TELLS_ELEMENTS) else args[:1]


def count_norm_ops(model: nn.Module, fn: Callable[[], object]) -> int:
    """What fvcore, whose totals papers print, counts beside the products: 5 for an element of a layer norm, 2 of a batch norm in
    evaluation mode, 1 of the pool of LocalViT's channel attention.
    """
    fused = {id(norm) for m in model.modules() for norm in _own_norms(m)}
    kinds = nn.LayerNorm, _BATCH_NORM, LocalityFeedForward, ShortcutModule, *_TELLS_ELEMENTS
    found = [m for m in model.modules() if isinstance(m, kinds)]
    ops: list[int] = []
    hooks = [m.register_forward_hook(lambda m, args, y: ops.append(_norm_ops(m, *_sizes(m, args)))) for m in found if id(m) not in fused]
    try:
        with torch.no_grad():
            fn()
    finally:
        for hook in hooks:
            hook.remove()
    return sum(ops)


# ------------------------------------------------------------------------------------------------ memory


def saved_bytes(fn: Callable[[], object], beside: Iterable[Tensor] = ()) -> int:
    """Bytes of distinct storages that ``fn`` keeps for backward, without those of the tensors ``beside`` (parameters, inputs).

    What autograd saves, by torch.autograd.graph.saved_tensors_hooks; tensors that an autograd Function hides elsewhere are not in it.
    """
    held = [t.untyped_storage() for t in beside]
    known = {s._cdata for s in held}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = fn()
    del result
    return sum(s.nbytes() for s in storages.values())


# ------------------------------------------------------------------------------------------------ a model


def without_memory(model: nn.Module, mode) -> nn.Module:
    """``model``, built on the meta device, with fake CPU tensors of ``mode`` (a FakeTensorMode) as parameters and buffers, in place."""
    fakes: dict[int, Tensor] = {}

    def fake(t):
        if id(t) not in fakes:
            new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
            fakes[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
        return fakes[id(t)]

    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: fake(t) for name, t in tensors.items() if t is not None})
    return model


def _trained(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """(FLOPs of a forward and a backward pass, bytes kept between them)."""
    outputs: list[Tensor] = []
    saved: list[int] = []

    def forward():
        y = model(x)
        outputs.append(sum(t.sum() for t in y) if isinstance(y, tuple) else y.sum())

    def step():
        saved.append(saved_bytes(forward, (x, *model.parameters(), *model.buffers())))
        outputs[0].backward()

    return count_flops(step), saved[0]


def _evaluated(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """(MACs, norm operations) of a forward pass."""
    macs: list[int] = []
    norm_ops = count_norm_ops(model, lambda: macs.append(count_macs(lambda: model(x))))
    return macs[0], norm_ops


def model_cost(build: Callable[[], nn.Module], image_size: tuple[int, int, int], batch: int = 1) -> ModelCost:
    """The cost of the model that ``build()`` returns on ``batch`` images (channels, height, width), per image.

    Shapes alone are computed, for the CPU, in float32 (torch.compile's fake tensors): seconds for any size. MACs are those of
    evaluation mode, ``train_macs`` and ``saved`` of training mode.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        model = build()
    mode = FakeTensorMode()
    without_memory(model, mode)
    with mode:
        x = torch.empty(batch, *image_size)
        train_flops, saved = _trained(model.train(), x)
        model.eval().requires_grad_(False)  # the counter's hooks cannot stand views of parameters under no_grad
        macs, norm_ops = _evaluated(model, x)
    return ModelCost(count_params(model), macs / batch, train_flops / 2 / batch, norm_ops / batch, saved / batch)
