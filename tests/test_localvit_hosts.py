"""LocalViT in PVT, TNT, T2T-ViT and Swin: the authors' numbers, both paths, sizes, checkpoints, bad input."""


import pytest
import torch

import lifeops
from lifeops.models.blocks import pre_norm_block
from lifeops.models.deit import Attention, DropPath
from lifeops.models.localvit import _feed_forwards
from lifeops.models.pvt import SpatialReductionAttention
from lifeops.models.swin import SwinBlock
from lifeops.models.t2t import TokenPerformer
from lifeops.models.tnt import TNTBlock
from test_localvit import _close, _state, golden_with_act


def _pvt(d, conv):
    P = int(d["prefix"])
    attn = SpatialReductionAttention(8, int(d["heads"]), int(d["sr"]), P)
    return pre_norm_block(8, attn, float(d["mlp_ratio"]), float(d["ln_eps"]), DropPath(0.0), conv, P)


def _tnt(d, conv):
    return TNTBlock(12, 4, 4, int(d["heads"]), int(d["in_heads"]), float(d["mlp_ratio"]), conv=conv)


def _t2t(d, conv):
    attn = Attention(12, int(d["heads"]), "param.attn.qkv.bias" in d)
    return pre_norm_block(12, attn, float(d["mlp_ratio"]), 1e-5, DropPath(0.0), conv, int(d["prefix"]))


def _swin(d, conv):
    grid = tuple(d["grid"].tolist())
    block = SwinBlock(8, grid, int(d["heads"]), int(d["window"]), int(d["shift"]), 4.0, True, 0.0, conv(8, float(d["mlp_ratio"]), 0))
    return _OnGrid(block)


class _OnGrid(torch.nn.Module):
    """Swin's block, which knows its grid, called as the others are."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, grid):
        return self.block(x)


BLOCKS = {
    "localvit_pvt_block_sr2_nocls_eval": _pvt, "localvit_pvt_block_sr2_nocls_train": _pvt, "localvit_pvt_block_sr1_cls_eval": _pvt,
    "localvit_tnt_block_eval": _tnt, "localvit_t2t_block_eval": _t2t,
    "localvit_t2t_performer_eval": lambda d, conv: TokenPerformer(12, 8, True, 0.1),
    "localvit_swin_block_s0_eval": _swin, "localvit_swin_block_s2_eval": _swin, "localvit_swin_block_s2_train": _swin,
}  # fmt: skip


def _block(name):
    """A golden file and its block, with its weights."""
    d = golden_with_act(name)
    module = BLOCKS[name](d, _feed_forwards(d["act"], int(d["reduction"]) if "reduction" in d else 1)).double().train(bool(d["training"]))
    getattr(module, "block", module).load_state_dict(_state(d, "param."))
    return d, module


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", BLOCKS)
def test_golden(name, backend):
    """Outputs, gradients and running statistics of the authors' blocks to 1e-10."""
    d, module = _block(name)
    inputs, outputs = (("pixel", "patch"), ("y_pixel", "y_patch")) if "pixel" in d else (("x",), ("y",))
    given = [d[key].clone().requires_grad_() for key in inputs]
    with lifeops.use_backend(backend):
        found = module(*given, tuple(d["grid"].tolist()))
        found = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(found, [d[key.replace("y", "g", 1)] for key in outputs])
    for y, key in zip(found, outputs, strict=True):
        _close(y, d[key])
    for x, key in zip(given, inputs, strict=True):
        _close(x.grad, d[f"grad_{key}"])
    parameters = dict(getattr(module, "block", module).named_parameters())
    for key, expected in _state(d, "grad.").items():
        _close(torch.zeros_like(expected) if parameters[key].grad is None else parameters[key].grad, expected)
    assert parameters.keys() - _state(d, "grad.").keys() <= {"w"}
    for key, value in _state(d, "after.").items():
        _close(getattr(module, "block", module).state_dict()[key], value)
