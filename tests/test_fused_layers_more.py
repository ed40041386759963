"""Ways to change a layer that leave its type as it was: each is seen, before the first call and after it."""

from collections import OrderedDict

import pytest
import seams
import torch
from seams import C, P
from torch import nn

from lifeops.nn import LifeAttention, LocalityFeedForward
from lifeops.nn.channel_attention import SELayer

CONVS = {"LifeAttention": "qkv.scale2.depthwise", "LocalAttention": "local", "LocalityFeedForward": "conv.3", "DWShortcut": "convs.0"}


def _double(layer, name):
    """``name`` of the instance gives twice what it gave."""
    before = getattr(layer, name)
    setattr(layer, name, lambda *args, **kwargs: 2 * before(*args, **kwargs))


def _new_hooks(layer):
    layer._forward_hooks = OrderedDict()
    layer.register_forward_hook(lambda m, args, out: 2 * out)


def _same_length(layer):
    layer.note = 1
    del layer.note
    _double(layer, "forward")


CHANGES = {
    "_conv_forward": lambda layer: _double(layer, "_conv_forward"), "_call_impl": lambda layer: _double(layer, "_call_impl"),
    "forward": lambda layer: _double(layer, "forward"), "hooks of a new dict": _new_hooks, "forward after a note": _same_length,
}  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CONVS)
def test_instances(name, change, first):
    module, oracle, _ = seams.build(name)
    module.eval()
    x = seams.tokens()
    before = seams.call(module, x) if first else None
    CHANGES[change](module.get_submodule(CONVS[name]))
    y = seams.call(module, x)
    torch.testing.assert_close(y, oracle(module, x), rtol=0, atol=1e-7)
    assert before is None or (y - before).abs().max() > 1e-6


@pytest.mark.parametrize("name", CONVS)
def test_classes(name, monkeypatch):
    """A method put in place of torch's own for every convolution."""
    module, oracle, _ = seams.build(name)
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * forward(self, x))
    x = seams.tokens()
    torch.testing.assert_close(seams.call(module.eval(), x), oracle(module, x), rtol=0, atol=1e-7)


def _in_place(module):
    module.conv[2].max_val = 3.0


def _built(module):
    module.conv[5] = nn.ReLU6()
    module.conv[5].__init__()
    module.conv[5].min_val, module.conv[5].max_val = -1.0, 1.0


def _longer(module):
    module.conv[6].fc.append(nn.Softsign())


def _exchanged(module):
    module.conv._modules = {**module.conv._modules, "2": nn.GELU()}


def _moved(module):
    act = module.conv._modules.pop("2")
    module.conv.add_module("2", act)


@pytest.mark.parametrize(("act", "change"), [("relu6", _in_place), ("relu6", _built), ("hs+se", _longer), ("hs+se", _exchanged)])
@pytest.mark.parametrize("first", [True, False])
def test_feed_forward(act, change, first):
    module, oracle, _ = seams.build("LocalityFeedForward, relu6" if act == "relu6" else "LocalityFeedForward")
    module.eval()
    x = seams.tokens()
    if first:
        seams.call(module, x)
    change(module)
    torch.testing.assert_close(seams.call(module, x), oracle(module, x), rtol=0, atol=1e-7)


@pytest.mark.parametrize("attribute", ["activation", "attention", "act"])
def test_the_layers_say_what_is_computed(attribute):
    module, oracle, _ = seams.build("LocalityFeedForward")
    setattr(module.eval(), attribute, "relu6" if attribute != "attention" else "")
    x = seams.tokens()
    torch.testing.assert_close(seams.call(module, x), oracle(module, x), rtol=0, atol=1e-7)
    for i in (2, 5):
        module.conv[i] = nn.ReLU6()
    torch.testing.assert_close(seams.call(module, x), oracle(module, x), rtol=0, atol=1e-7)


def test_layers_in_another_order():
    module, oracle, _ = seams.build("LocalityFeedForward, relu6")
    _moved(module.eval())
    x = seams.tokens()
    torch.testing.assert_close(seams.call(module, x), oracle(module, x), rtol=0, atol=1e-7)


@pytest.mark.parametrize("change", [
    lambda m: setattr(m.conv[6].fc, "0", nn.Linear(24, 6, bias=False).double()), lambda m: setattr(m.conv[4], "bias", None),
    lambda m: setattr(m.conv[1], "weight", None),
])  # fmt: skip
def test_parameters_left_out(change):
    module, oracle, _ = seams.build("LocalityFeedForward")
    change(module.train())
    x = seams.tokens()
    torch.testing.assert_close(seams.call(module, x), oracle(module, x), rtol=0, atol=1e-7)


def test_a_gate_alone():
    gate = SELayer(C, 2).double()
    gate.fc.append(nn.Softsign())
    x = torch.randn(2, 5, C, dtype=torch.float64)
    torch.testing.assert_close(gate(x), x * gate.fc(x.mean(1))[:, None], rtol=0, atol=1e-7)


@pytest.mark.parametrize("stats", [{"num_batches_tracked": None}, {"running_mean": None, "running_var": None}])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_statistics_left_out(stats, momentum):
    module = LocalityFeedForward(C, 2.0, "relu6", num_prefix_tokens=P).train()
    plain = nn.BatchNorm2d(24, momentum=momentum)
    for norm in (module.conv[1], plain):
        norm.momentum = momentum
        for name, value in stats.items():
            setattr(norm, name, value)
    module(seams.tokens(dtype=torch.float32), seams.GRID)
    plain(torch.randn(2, 24, 3, 3))
    assert module.conv[1].num_batches_tracked == plain.num_batches_tracked


def test_dropping_everything():
    """torch's dropout takes a rate of one."""
    module = LifeAttention(C, 3, P, attn_drop=0.0).train()
    module.attn_drop.p = 1.0
    y = module(seams.tokens(dtype=torch.float32), seams.GRID)
    torch.testing.assert_close(y, module.proj.bias.expand_as(y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.bool, torch.float64], ids=str)
def test_masks_where_dropout_is_called(kind):
    """Scores by hand: of a query that is shown no key nothing comes, as from the op."""
    module, x = LifeAttention(C, 3, P, attn_drop=0.5).double().eval(), seams.tokens()
    N = x.shape[1]
    shown = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.6
    shown[3] = False
    mask = shown if kind == torch.bool else torch.randn(N, N, dtype=kind).masked_fill(~shown, -torch.inf)
    expected = module(x, seams.GRID, attn_mask=mask)
    q, k, v = module.qkv_heads(x, seams.GRID)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + (0 if kind == torch.bool else mask)
    p = scores.masked_fill(~shown, -torch.inf).softmax(-1).nan_to_num(0)
    torch.testing.assert_close(expected, module.proj((p @ v).transpose(1, 2).flatten(2)))
    called = []
    module.attn_drop.register_forward_hook(lambda m, args, out: called.append(out))
    torch.testing.assert_close(module(x, seams.GRID, attn_mask=mask), expected)
    torch.testing.assert_close(called[0], p)


def test_selective_checkpointing():
    """What a cache of matrix products keeps does not change behind it."""
    from functools import partial

    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    module, x = LifeAttention(C, 3, P), seams.tokens(dtype=torch.float32).requires_grad_()
    (expected,) = torch.autograd.grad(module(x, seams.GRID).square().sum(), x)
    context = partial(create_selective_checkpoint_contexts, kept)
    y = checkpoint(module, x, seams.GRID, use_reentrant=False, context_fn=context)
    (g,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-5)
