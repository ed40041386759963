"""LIFE in Swin V2 and in T2T-ViT: the authors' numbers, timm's model converted, sizes, checkpoints, bad input."""


import pytest
import torch

import lifeops
from lifeops.models.swin_v2 import SwinV2Block
from test_localvit import _close, _state, golden_with_act

SWIN = {"img_size": 32, "patch_size": 2, "num_classes": 5, "embed_dim": 12, "depths": (2, 2), "num_heads": (3, 6), "window_size": 8}


def _block(name):
    """A golden file and its block, with its weights."""
    d = golden_with_act(name)
    sizes = 12, tuple(d["grid"].tolist()), int(d["heads"]), int(d["window"]), int(d["shift"])
    block = SwinV2Block(*sizes, float(d["mlp_ratio"]), True, 0.0, True).double().train(bool(d["training"]))
    block.load_state_dict(_state(d, "param."))
    assert torch.equal(block.attn.relative_coords_table, d["relative_coords_table"])
    return d, block


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", ["life_swinv2_block_s0", "life_swinv2_block_s2"])
def test_golden(name, backend):
    """Outputs and gradients of the authors' blocks to 1e-10; the biases that have no use have no gradient."""
    d, block = _block(name)
    x = d["x"].clone().requires_grad_()
    with lifeops.use_backend(backend):
        y = block(x)
        y.backward(d["g"])
        with torch.no_grad():
            _close(block(x), d["y"])
    _close(y, d["y"])
    _close(x.grad, d["grad_x"])
    parameters = dict(block.named_parameters())
    assert parameters.keys() == _state(d, "grad.").keys()
    for key, expected in _state(d, "grad.").items():
        _close(torch.zeros_like(expected) if parameters[key].grad is None else parameters[key].grad, expected)
    assert {key for key, p in parameters.items() if p.grad is None} == {"attn.q_bias", "attn.v_bias"}
