"""What every module says of itself, and what is left of it once its batch norms are folded."""

import copy

import pytest
import torch
from torch import nn

import lifeops
from lifeops.nn.eager_mvit import EagerPoolingAttention

B, H, W, C = 2, 4, 6, 12
SAID = (  # what repr() says beside the sub-modules
    (lambda: lifeops.nn.ConvProjectionAttention(C, 3, 2), "num_heads=3, num_prefix_tokens=2, method='dw_bn', stride_q=1, stride_kv=2"),
    (lambda: lifeops.nn.GlobalSparseAttention(C, 3, 2, 1), "num_heads=3, sr_ratio=2, num_prefix_tokens=1"),
    (lambda: lifeops.nn.LocalAgg(C, num_prefix_tokens=2), "dim=12, num_prefix_tokens=2"),
    (lambda: lifeops.nn.PoolingAttention(C, 3, 1, mode="max"), "num_heads=3, num_prefix_tokens=1, mode='max'"),
    (lambda: lifeops.nn.RegionalAttention(C, 3, 7), "num_heads=3, window_size=7"),
)
FOLDED = {
    "ConvProjectionAttention": lambda: lifeops.nn.ConvProjectionAttention(C, 3, 1),
    "DWShortcut": lambda: lifeops.nn.DWShortcut(C, num_prefix_tokens=1),
    "LocalAgg": lambda: lifeops.nn.LocalAgg(C, num_prefix_tokens=1),
    "LocalityFeedForward": lambda: lifeops.nn.LocalityFeedForward(C, num_prefix_tokens=1),
}


@pytest.mark.parametrize(("make", "said"), SAID, ids=lambda value: value.partition("=")[0] if isinstance(value, str) else "")
def test_repr(make, said):
    assert said in repr(make())


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", FOLDED)
def test_folded_modules_take_every_mode(name, grad):
    """fuse_ leaves nothing that depends on the mode: the same outputs after .eval() and after .train()."""
    module = FOLDED[name]().double().eval()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = [torch.randn(B, 1 + H * W, C, dtype=torch.float64) for _ in range(2 if name == "DWShortcut" else 1)]
    fused = lifeops.fuse_(copy.deepcopy(module))
    with torch.set_grad_enabled(grad):
        expected = module(*x, (H, W))
        for mode in (fused, fused.eval(), fused.train(), fused.eval()):
            torch.testing.assert_close(mode(*x, (H, W)), expected, rtol=1e-10, atol=1e-10)


def test_authors_pooling_attention_projects_first():
    with pytest.raises(ValueError, match="EagerPoolingAttention: pool_first must be False, got True"):
        EagerPoolingAttention(lifeops.nn.PoolingAttention(C, 3, pool_first=True))


def test_layers_that_make_no_maps():
    """An exchanged layer must make maps of maps; what it made is said."""
    module = lifeops.nn.LocalAgg(C)
    module.attn = nn.Sequential(module.attn, nn.Flatten())
    with pytest.raises(ValueError, match=r"LocalAgg.* must make maps \(B, C, H, W\) of \(2, 12, 4, 6\), got \(2, 288\)"):
        module(torch.randn(B, H * W, C), (H, W))


def test_queries_that_are_not_pooled():
    module = lifeops.nn.PoolingAttention(C, 3, mode="max", kernel_q=1, stride_q=1)
    assert module.pool_q is None
    assert module.queries_grid((H, W)) == (H, W)
    assert module(torch.randn(B, H * W, C), (H, W)).shape == (B, H * W, C)


@pytest.mark.parametrize("wrong", [{"embed_size": 3}, {"num_classes": "many"}], ids=["unknown", "of a wrong type"])
def test_named_models_say_what_they_do_not_take(wrong):
    from lifeops.models.named import named

    with pytest.raises(ValueError if "embed_size" in wrong else TypeError, match=f"{next(iter(wrong))}"):
        named("cvt_13", "cvt", **wrong)
