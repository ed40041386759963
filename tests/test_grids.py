"""The grid of a converted model belongs to one forward pass: the true one, or an error; never another image's."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lifeops
from conftest import declare_torchvision_ops

declare_torchvision_ops()
timm = pytest.importorskip("timm")
SYSTEMS = ("life", "localvit", "dw_shortcut")
UNKNOWN = "the grid is unknown"
WIDE, TALL = (16, 64), (64, 16)  # 2 x 8 and 8 x 2 patches: as many tokens, other neighbours


def _model(system, depth=3, **options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": depth, "num_heads": 3, "num_classes": 5}
    model = lifeops.convert(timm.models.VisionTransformer(**{**sizes, "dynamic_img_size": True, **options}), system)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def _images(size, seed=0, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


class _Checkpointed(nn.Module):
    """A block as torch's checkpoint wrappers hold it."""

    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x, **kwargs):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def _by_timm(model):
    model.set_grad_checkpointing(True)


def _by_two(model):
    """timm's checkpoint_seq over pairs of blocks."""
    blocks = list(model.blocks)
    model.blocks = nn.Sequential(*(_Checkpointed(nn.Sequential(*blocks[i : i + 2]), False) for i in range(0, len(blocks), 2)))


def _each(reentrant):
    def apply(model):
        model.blocks = nn.Sequential(*(_Checkpointed(block, reentrant) for block in model.blocks))

    return apply


def _gradients(model, sizes):
    model.train()
    sum(model(_images(size, i).requires_grad_()).square().sum() for i, size in enumerate(sizes)).backward()
    return {name.replace(".block.", "."): p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sizes", [(WIDE, TALL), ((32, 32), (16, 16)), (WIDE, TALL, (32, 32))])
@pytest.mark.parametrize("how", [_by_timm, _by_two, _each(True), _each(False)], ids=["timm", "pairs", "reentrant", "not reentrant"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_checkpointing_with_several_image_sizes(system, how, sizes):
    """Several forwards before one backward: each block is run again with its own image's grid."""
    model = _model(system)
    twin = copy.deepcopy(model)
    expected = _gradients(model, sizes)
    how(twin)
    got = _gradients(twin, sizes)
    assert len(got) == len(expected)
    for ours, theirs in zip(got.values(), expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_checkpointing_tokens_that_went_through_other_memory(system):
    """Saved tensors that come back as copies (offloading): one image size is known, of several none is guessed."""
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)
    model, twin = _model(system), _model(system)
    _each(False)(twin)
    expected = _gradients(model, [WIDE])
    with hooks:
        got = _gradients(twin, [WIDE])
    for ours, theirs in zip(got.values(), expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with hooks, pytest.raises(ValueError, match=UNKNOWN):
        _gradients(twin, [TALL, WIDE])


@pytest.mark.parametrize("system", SYSTEMS)
def test_threads(system):
    """Two threads on one model, images of other shapes with as many patches."""
    model, wrong, start = _model(system, depth=2), [], threading.Barrier(2)

    def work(size):
        x = _images(size)
        with torch.no_grad():
            expected = copy.deepcopy(model)(x)
            start.wait()
            for _ in range(30):
                wrong.append((model(x) - expected).abs().max().item())

    threads = [threading.Thread(target=work, args=(size,)) for size in (WIDE, TALL)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(wrong) == 60
    assert max(wrong) < 1e-4


@pytest.mark.parametrize("system", SYSTEMS)
def test_replicas(system):
    """DataParallel's replicas share the original's hooks and run in threads of their own."""
    from torch.nn.parallel.parallel_apply import parallel_apply  # noqa: F401  (what runs them, on devices)

    def replica(module):
        new = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else replica(child)
        for name, p in module._parameters.items():
            setattr(new, name, None if p is None else p.detach())
        return new

    model, out = _model(system), {}
    parts = {size: (replica(model), _images(size)) for size in (WIDE, TALL)}
    threads = [threading.Thread(target=lambda s=s, m=m, x=x: out.__setitem__(s, m(x))) for s, (m, x) in parts.items()]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for size, (_, x) in parts.items():
        torch.testing.assert_close(out[size], model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_methods_beside_forward(system):
    """forward_features, forward_intermediates (cut short, too), timm's feature wrapper: the grid of the images they are given."""
    from timm.models._features import FeatureGetterNet

    model = _model(system)
    block, seen = model.blocks[0], []
    holder = next(m.grid_holder for m in model.modules() if getattr(m, "grid_holder", None) is not None)
    block.register_forward_hook(lambda m, args, out: seen.append(holder.grid))
    with torch.no_grad():
        features = [model.forward_features(_images(size)) for size in (WIDE, TALL)]
        for size, expected in zip((WIDE, TALL), features, strict=True):
            last, maps = model.forward_intermediates(_images(size), indices=[0, 2])
            torch.testing.assert_close(last, expected, rtol=0, atol=1e-5)
            assert maps[0].shape[-2:] == (size[0] // 8, size[1] // 8)
            model.forward_intermediates(_images(size), indices=[0], stop_early=True, intermediates_only=True)
        wrapped = FeatureGetterNet(model, out_indices=(0, 2))  # takes the model's norm away
        assert [len(wrapped(_images(size))) for size in (WIDE, TALL)] == [2, 2]
    assert seen == [(2, 8), (8, 2), (2, 8), (2, 8), (8, 2), (8, 2), (2, 8), (8, 2)]


@pytest.mark.parametrize("system", SYSTEMS)
def test_blocks_called_on_their_own(system):
    """Whatever ran before: an error in the words of a timm user, or the grid that was said."""
    model, tokens = _model(system), torch.randn(2, 17, 24)
    with torch.no_grad():
        for before in (
            lambda: None, lambda: model(_images(WIDE)), lambda: model.forward_features(_images(WIDE)),
            lambda: model.forward_intermediates(_images(WIDE), indices=[0], stop_early=True),
        ):  # fmt: skip
            before()
            with pytest.raises(ValueError, match=UNKNOWN) as error:
                model.blocks[1](tokens)
            assert "lifeops.use_grid(model, (H, W))" in str(error.value)
        outputs = []
        for grid in ((2, 8), (8, 2)):
            with lifeops.use_grid(model, grid):
                outputs.append(model.blocks[1](tokens))
                other = model(_images((32, 32)))  # its own grid inside
        assert (outputs[0] - outputs[1]).abs().max() > 1e-3
        torch.testing.assert_close(other, model(_images((32, 32))), rtol=0, atol=1e-5)
        with lifeops.use_grid(model, (4, 5)), pytest.raises(ValueError, match=r"must be P \+ H\*W = 1 \+ 4\*5 = 21, got 17"):
            model.blocks[1](tokens)
        with pytest.raises(ValueError, match=UNKNOWN):
            model.blocks[1](tokens)
    with pytest.raises(ValueError, match="Linear has no module of lifeops that asks for a grid"), lifeops.use_grid(nn.Linear(1, 1), (1, 1)):
        pass
    with pytest.raises(TypeError, match=r"use_grid: grid must be two ints \(H, W\), got 4"), lifeops.use_grid(model, 4):
        pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_forward_pass_that_was_broken_off(system, error):
    model, tokens = _model(system), torch.randn(2, 17, 24)

    def stop(*args):
        raise error("stop")

    for method in (model, model.forward_features):
        handle = model.blocks[1].register_forward_hook(stop)
        with pytest.raises(error, match="stop"):
            method(_images(WIDE))
        handle.remove()
        with pytest.raises(ValueError, match=UNKNOWN):
            model.blocks[2](tokens)
        torch.testing.assert_close(model(_images(TALL)), copy.deepcopy(model)(_images(TALL)), rtol=0, atol=1e-5)


class _Embed(nn.Module):
    """A patch embedding of someone's own: it gives tokens and says its patch size."""

    def __init__(self, proj, flat=True):
        super().__init__()
        self.proj, self.flat, self.patch_size = proj, flat, (8, 8)
        self.grid_size = (4, 4)

    def forward(self, x):
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2) if self.flat else x.permute(0, 2, 3, 1)


class _Wrapped(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed, self.grid_size = embed, (4, 4)

    def forward(self, x):
        return self.embed(x)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_patch_embedding_exchanged_after_conversion(system):
    model = _model(system, dynamic_img_size=False, pos_embed="none")
    images = {size: _images(size) for size in (WIDE, TALL, (32, 32))}
    dynamic = _model(system, pos_embed="none")
    dynamic.load_state_dict(model.state_dict())
    expected = {size: dynamic(x) for size, x in images.items()}
    old = model.patch_embed
    model.patch_embed = _Embed(old.proj)
    for size, x in images.items():
        torch.testing.assert_close(model(x), expected[size], rtol=0, atol=1e-5)
    model.patch_embed = _Wrapped(old)
    torch.testing.assert_close(model(images[32, 32]), expected[32, 32], rtol=0, atol=1e-5)
    model.patch_embed = _Embed(old.proj)
    del model.patch_embed.patch_size, model.patch_embed.grid_size
    with pytest.raises(ValueError, match=r"_Embed, the model's patch embedding, gives \(2, 16, 24\), whose 16 tokens are no grid"):
        model(images[WIDE])
    lifeops.revert(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not old._forward_hooks


@pytest.mark.parametrize("system", SYSTEMS)
def test_copies(system):
    """deepcopy, EMA and pickle: copies know their own grids, while the original runs and after."""
    from timm.utils import ModelEmaV3

    model = _model(system)
    expected = model(_images(WIDE))
    found = []

    def copied(m, args, out):
        twin = copy.deepcopy(model)  # in the middle of the original's forward pass
        handles[0].remove()
        twin.blocks[0]._forward_hooks.pop(handles[0].id)
        with pytest.raises(ValueError, match=UNKNOWN):
            twin.blocks[1](torch.randn(2, 17, 24))
        found.append(twin)

    handles = [model.blocks[0].register_forward_hook(copied)]
    model(_images(TALL))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (found[0], ModelEmaV3(model).module, torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(_images(WIDE)), expected, rtol=0, atol=1e-5)
        lifeops.revert(other)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_model_inside_a_model(system):
    """A teacher of another patch size that runs inside the student's forward pass."""
    student, teacher = _model(system), _model(system, patch_size=16, img_size=64)
    x = _images((64, 32))
    expected = student(x), teacher(x)
    inner = []
    student.blocks[0].register_forward_hook(lambda m, args, out: inner.append(teacher(x)))
    torch.testing.assert_close(student(x), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(inner[0], expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_hooks_that_change_a_blocks_output(system):
    """Activation patching gives the next block tokens that no block has made."""
    model = _model(system)
    model.blocks[0].register_forward_hook(lambda m, args, out: out * 2)
    for size in (WIDE, TALL):
        assert model(_images(size)).isfinite().all()


@pytest.mark.parametrize("system", SYSTEMS)
def test_compiled_parts(system):
    """Blocks compiled one by one inside an eager model, images of other shapes with as many patches."""
    torch._dynamo.reset()
    model = _model(system, depth=2)
    twin = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    with torch.no_grad():
        for size in (WIDE, TALL, WIDE):
            torch.testing.assert_close(model(_images(size)), twin(_images(size)), rtol=0, atol=1e-5)
            torch.testing.assert_close(model.forward_features(_images(size)), twin.forward_features(_images(size)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_memory_on_two_grids(system):
    """The same tokens checkpointed on two grids: which of them a recomputation is for cannot be known, and is not guessed."""
    model, tokens = _model(system).train(), torch.randn(2, 17, 24, requires_grad=True)
    outputs = []
    for grid in ((2, 8), (8, 2)):
        with lifeops.use_grid(model, grid):
            outputs.append(checkpoint(model.blocks[0], tokens, use_reentrant=False))
    with pytest.raises(ValueError, match=UNKNOWN):
        sum(y.sum() for y in outputs).backward()


@pytest.mark.parametrize("system", SYSTEMS)
def test_compiled_with_an_embedding_that_tells_no_grid(system):
    torch._dynamo.reset()
    model = _model(system, pos_embed="none")
    model(_images(WIDE))
    old = model.patch_embed
    model.patch_embed = _Embed(old.proj)  # hooked by the first eager call
    with pytest.raises(Exception, match=UNKNOWN):
        torch.compile(model, backend="eager", fullgraph=True)(_images(TALL))
    expected = model(_images(TALL))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(_images(TALL)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_another_image_between_the_embedding_and_the_blocks(system):
    """A hook that runs the model's own methods on another image there."""
    model = _model(system)
    expected = model(_images(WIDE))
    for method in (model, model.forward_features):
        others = [method]

        def run(module, args, out, others=others):
            if others:
                others.pop()(_images(TALL))

        handle = model.norm_pre.register_forward_hook(run)
        torch.testing.assert_close(model(_images(WIDE)), expected, rtol=0, atol=1e-5)
        handle.remove()


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_images_embedded_before_the_blocks(system):
    """Whose tokens come first cannot be known; one after the other is."""
    model = _model(system)
    cls = model.cls_token.expand(2, -1, -1)
    with torch.no_grad():
        alone = []
        for size, grid in ((WIDE, (2, 8)), (TALL, (8, 2))):
            x = torch.cat((cls, model.patch_embed(_images(size)).flatten(1, 2)), 1)
            alone.append(model.blocks(x))
            with lifeops.use_grid(model, grid):
                torch.testing.assert_close(alone[-1], model.blocks(x), rtol=0, atol=1e-5)
        first = model.patch_embed(_images(WIDE))
        model.patch_embed(_images(TALL))
        with pytest.raises(ValueError, match=UNKNOWN):
            model.blocks(torch.cat((cls, first.flatten(1, 2)), 1))


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_function_that_embeds_sometimes(system):
    """A later call of the same function does not find the grid of an earlier one."""
    model = _model(system)

    def run(images=None, tokens=None):
        import sys

        sys._getframe()
        if images is not None:
            tokens = torch.cat((model.cls_token.expand(2, -1, -1), model.patch_embed(images).flatten(1, 2)), 1)
        return model.blocks(tokens)

    with torch.no_grad():
        for _ in range(5):
            run(_images(WIDE))
            with pytest.raises(ValueError, match=UNKNOWN):
                run(tokens=torch.randn(2, 17, 24))
