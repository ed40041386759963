"""Copies of one module of a converted model, put into it: they are told the grid of the pass that runs."""

import copy
import io

import pytest
import torch

import lifeops
from conftest import declare_torchvision_ops

SIZES = {"img_size": (8, 16), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}


@pytest.mark.parametrize("system", ["life", "localvit", "dw_shortcut"])
def test_a_copy_of_one_block_in_the_same_model(system):
    """peft's modules_to_save and hand-made layer duplication put a copy of a module where it, or another one, was."""
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = lifeops.convert(timm.models.VisionTransformer(**SIZES), system).eval(), torch.randn(2, 3, 8, 16)
    expected = model(x)
    model.blocks[0] = copy.deepcopy(model.blocks[0])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    name, inner = next((name, m) for name, m in model.blocks[1].named_modules() if hasattr(m, "grid_holder"))
    parent, _, last = name.rpartition(".")
    setattr(model.blocks[1].get_submodule(parent), last, copy.deepcopy(copy.deepcopy(inner)))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="the grid is unknown"):
        model.blocks[0](torch.randn(2, 9, 24))
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    del model, inner
    for other in (twin, torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-6)
