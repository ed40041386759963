"""timm's optimizer groups, features by block and re-parametrisation on converted models mean what they mean without a conversion."""

import copy
import pickle

import pytest
import torch

import lifeops
from conftest import declare_torchvision_ops
from test_dw_shortcut_timm import HOSTS, SMALL
from test_localvit import _randomised

timm = None
IMAGES = {"swin": (2, 3, 32, 64), "rectangle": (2, 3, 32, 48)}
COUNTED = ["cls", "distilled", "no_prefix", "cait"]


@pytest.fixture(autouse=True, scope="module")
def _timm():
    global timm
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    import test_dw_shortcut_timm

    test_dw_shortcut_timm.timm = timm


def _host(name):
    torch.manual_seed(0)
    return HOSTS[name]().double().eval()


def _converted(name, every=2, **options):
    return _randomised(lifeops.convert(_host(name), "dw_shortcut", every=every, **options))


def _images(name):
    return torch.randn(IMAGES.get(name, (2, 3, 32, 32)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _layers(model, coarse=False):
    from timm.models._manipulate import group_parameters

    layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    return {id(p): layers[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", HOSTS)
def test_layers(name, every, coarse):
    """Every parameter of before in the layer of before, a shortcut's in its last block's."""
    model = _host(name)
    before, count = _layers(model, coarse), len(list(model.parameters()))
    lifeops.convert(model, "dw_shortcut", every=every)
    after = _layers(model, coarse)
    assert {p: after[p] for p in before} == before
    assert len(after) > count
    for group in (m for m in model.modules() if isinstance(m, lifeops.nn.shortcut_blocks.ShortcutBlocks)):
        assert {after[id(p)] for p in group.shortcut.parameters()} == {after[id(p)] for p in group.blocks[-1].parameters()}
    lifeops.revert(model)
    assert _layers(model, coarse) == before
    assert "group_matcher" not in model.__dict__


def test_layer_decay():
    from timm.optim import param_groups_layer_decay

    def scales(model):
        return {id(p): group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5) for p in group["params"]}

    model = _host("cls")
    before = scales(model)
    after = scales(lifeops.convert(model, "dw_shortcut", every=2))
    assert {p: after[p] for p in before} == before
    assert len(set(before.values())) == 6


def _outputs(model, images):
    """What comes out behind each block of the converted model, behind the last of a group with its shortcut; by hand."""
    found = {}
    handles = []
    at = 0
    for group in model.blocks:
        last = at + len(group.blocks) - 1
        for module, i in [*((b, at + j) for j, b in enumerate(group.blocks[:-1])), (group, last)]:
            handles.append(module.register_forward_hook(lambda m, args, y, i=i: found.__setitem__(i, y)))
        at = last + 1
    model(images)
    for handle in handles:
        handle.remove()
    return [found[i] for i in range(at)]


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("name", COUNTED)
def test_features(name, every):
    model, images = _converted(name, every), _images(name)
    with torch.no_grad():
        expected = [y[:, getattr(model, "num_prefix_tokens", 0) if name != "cait" else 0 :] for y in _outputs(model, images)]
        for indices, wanted in ((None, [0, 1, 2, 3]), (2, [2, 3]), ([0, -2], [0, 2]), ([1], [1])):
            for early in (False, True):
                got = model.forward_intermediates(images, indices, stop_early=early, output_fmt="NLC", intermediates_only=True)
                torch.testing.assert_close(got, [expected[i] for i in wanted], rtol=1e-10, atol=1e-10)
        final, _ = model.forward_intermediates(images, 3)
        torch.testing.assert_close(final, model.forward_features(images), rtol=1e-10, atol=1e-10)
        if hasattr(model, "get_intermediate_layers"):
            torch.testing.assert_close(list(model.get_intermediate_layers(images, n=2)), expected[2:], rtol=1e-10, atol=1e-10)
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(images, 5)
    lifeops.revert(model)
    assert not {"forward_intermediates", "prune_intermediate_layers"} & model.__dict__.keys()
    assert len(model.forward_intermediates(images, intermediates_only=True)) == 4


def test_gradients_of_features_with_checkpoints():
    model, images = _converted("cls"), _images("cls")

    def gradients(run):
        loss = sum(y.square().sum() for y in run.forward_intermediates(images, [0, 1, 3], intermediates_only=True))
        return torch.autograd.grad(loss, list(run.blocks.parameters()))

    expected = gradients(model)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model), expected)
    assert model.grad_checkpointing


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_count_their_own_blocks(copied):
    model, images = _converted("cls"), _images("cls")
    other = copied(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        expected = [y[:, 1:] for y in _outputs(other, images)]
        got = other.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_pruning():
    model, images = _converted("cls"), _images("cls")
    with torch.no_grad():
        expected = model.forward_intermediates(images, [0, 1], intermediates_only=True)
        with pytest.raises(ValueError, match=r"prune_intermediate_layers: must cut .* \[1, 3\], got block 2 inside of a group of 2"):
            model.prune_intermediate_layers([2])
        with pytest.raises(ValueError, match=r"prune_intermediate_layers: indices must name some of the 4 blocks, got \[4\]"):
            model.prune_intermediate_layers([4])
        assert model.prune_intermediate_layers([0, -3]) == [0, 1]
        assert len(model.blocks) == 1
        torch.testing.assert_close(model.forward_intermediates(images, intermediates_only=True), expected)


@pytest.mark.parametrize("options", [{"system": "localvit"}, {"system": "dw_shortcut", "every": 2, "kernel_sizes": (3, 5)}], ids=str)
def test_reparameterize_is_fuse_(options):
    from timm.models import reparameterize_model

    torch.manual_seed(0)
    model = _randomised(lifeops.convert(timm.models.VisionTransformer(**SMALL).double().eval(), **options))
    images = _images("cls")
    with torch.no_grad():
        expected = model(images)
        done = reparameterize_model(model)
        torch.testing.assert_close(done(images), expected)
    assert any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in done.modules())
    fused = lifeops.fuse_(copy.deepcopy(model)).state_dict()
    torch.testing.assert_close(dict(done.state_dict()), dict(fused), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^fuse_: .* takes its statistics from the batch: call .eval\(\) first"):
        reparameterize_model(model.train())
