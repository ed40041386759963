"""DW shortcuts in timm's hosts whose blocks lie in stages, or take more than tokens: the original with the shortcut added by hooks."""

import copy
import math

import plain_systems
import pytest
import torch
from hosts import hooks_of, timm, unchanged

import lifeops
from test_localvit import _close, _randomised

DEPTHS = (2, 2)
HOSTS = {
    "twins_pcpvt": lambda: timm.models.Twins(
        img_size=(32, 48), embed_dims=(8, 16), num_heads=(1, 2), mlp_ratios=(2, 2), depths=DEPTHS, sr_ratios=(2, 1), num_classes=3
    ),
    "twins_svt": lambda: timm.models.Twins(
        img_size=(32, 48), embed_dims=(8, 16), num_heads=(1, 2), mlp_ratios=(2, 2), depths=DEPTHS, sr_ratios=(2, 1), wss=(2, 2),
        num_classes=3,
    ),
    "pit": lambda: timm.models.PoolingVisionTransformer(
        img_size=(40, 24), patch_size=8, stride=4, base_dims=(4, 4), depth=DEPTHS, heads=(2, 4), mlp_ratio=2, num_classes=3
    ),
    "pit_distilled": lambda: timm.models.PoolingVisionTransformer(
        img_size=(24, 40), patch_size=8, stride=4, base_dims=(4, 4), depth=DEPTHS, heads=(2, 4), mlp_ratio=2, num_classes=3, distilled=True
    ),
    "nest": lambda: timm.models.Nest(
        img_size=24, patch_size=2, num_levels=2, embed_dims=(8, 16), num_heads=(1, 2), depths=DEPTHS, num_classes=3, drop_path_rate=0.0
    ),
    "coat": lambda: timm.models.CoaT(
        img_size=(64, 96), patch_size=4, embed_dims=(8, 8, 8, 8), serial_depths=(2, 2, 2, 2), parallel_depth=2, num_heads=4,
        mlp_ratios=(2, 2, 2, 2), num_classes=3, crpe_window={3: 1, 5: 1, 7: 2},
    ),
    "coat_lite": lambda: timm.models.CoaT(
        img_size=(64, 32), patch_size=4, embed_dims=(8, 8, 16, 16), serial_depths=(2, 2, 2, 2), num_heads=4, mlp_ratios=(2, 2, 2, 2),
        num_classes=3, crpe_window={3: 1, 5: 1, 7: 2},
    ),
    "tnt": lambda: timm.models.TNT(
        img_size=(32, 48), patch_size=8, embed_dim=12, inner_dim=8, depth=4, num_heads_inner=2, num_heads_outer=3, num_classes=3
    ),
    "tnt_legacy": lambda: timm.models.TNT(
        img_size=(48, 32), patch_size=8, embed_dim=12, inner_dim=8, depth=4, num_heads_inner=2, num_heads_outer=3, num_classes=3,
        legacy=True,
    ),
    "xcit": lambda: timm.models.Xcit(img_size=(32, 48), patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=3, eta=0.7),
    "mixed_rope": lambda: timm.create_model(
        "vit_small_patch16_rope_mixed_224", img_size=(64, 96), embed_dim=24, num_heads=3, depth=4, num_classes=3
    ),
    "naflex": lambda: _naflex(class_token=True, reg_tokens=2),
    "naflex_conv": lambda: _naflex(embed_proj_type="conv", pos_embed="factorized"),
    "naflex_rope": lambda: _naflex(rope_type="mixed", block_fn="eva", reg_tokens=1),
}  # fmt: skip
CHECKPOINTED = ["nest", "tnt", "xcit", "naflex", "naflex_rope"]
PREFIX = {
    **dict.fromkeys(("pit", "coat", "coat_lite", "tnt", "tnt_legacy", "mixed_rope", "naflex_rope"), 1), "pit_distilled": 2, "naflex": 3,
}  # fmt: skip
SIZES = {
    "pit": (40, 24), "pit_distilled": (24, 40), "nest": (24, 24), "coat": (64, 96), "coat_lite": (64, 32), "tnt_legacy": (48, 32),
    "mixed_rope": (64, 96),
}  # fmt: skip
LATE = {"coat": 6, **dict.fromkeys(("pit", "pit_distilled", "coat_lite", "tnt", "tnt_legacy", "mixed_rope"), 2)}
"""How many of the last convolutions nothing reads: of the last blocks the class token alone is."""


def _naflex(**options):
    cfg = timm.models.naflexvit.NaFlexVitCfg(
        patch_size=8, embed_dim=24, depth=4, num_heads=3, mlp_ratio=2, global_pool="avg", pos_embed_grid_size=(4, 4), **options
    )
    return timm.models.naflexvit.NaFlexVit(cfg, num_classes=3)


def _host(name):
    torch.manual_seed(0)
    return _randomised(HOSTS[name]().double().eval())


def _images(name, batch=2):
    return torch.randn(batch, 3, *SIZES.get(name, (32, 48)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _lists(model):
    """The lists of blocks, in the order in which they run."""
    if hasattr(model, "serial_blocks1"):
        return [getattr(model, f"serial_blocks{i}") for i in range(1, 5)] + [model.parallel_blocks] * (model.parallel_blocks is not None)
    if hasattr(model, "patch_embeds"):
        return list(model.blocks)
    stages = getattr(model, "transformers", getattr(model, "levels", None))
    if stages is not None:
        return [getattr(stage, "blocks", getattr(stage, "transformer_encoder", None)) for stage in stages]
    return [model.blocks]


def _squares(x, forth=True):
    """NesT's (B, T, N, C) as tokens of the whole grid, or back: by an index per patch."""
    t, n = math.isqrt(x.shape[1]), math.isqrt(x.shape[2])
    index = torch.arange(t * t * n * n).view(t, n, t, n).transpose(1, 2).reshape(-1)  # each patch's place on the grid, square by square
    flat = x.flatten(1, 2)
    return (flat[:, index.argsort()] if forth else flat[:, index].view(x.shape)), (t * n, t * n)


def _grid(name, x, args, kwargs):
    """The grid of a block's tokens, by the configuration or as the block is told it."""
    if name.startswith("pit"):  # stem of 8 by 4, pool of 3 by 2 with padding 1
        H, W = ((side - 8) // 4 + 1 for side in SIZES[name])
        return (H, W) if x.shape[-1] == 8 else ((H - 1) // 2 + 1, (W - 1) // 2 + 1)
    if name.startswith("coat"):
        return kwargs["size"]
    if name.startswith("twins"):
        return args[1]
    H, W = SIZES.get(name, (32, 48))
    return (4, 6) if name == "mixed_rope" else (H // 8, W // 8)


def _added(name, group, args, kwargs, output):
    """``output`` of a group's last block with the shortcuts of what its first block was given."""
    P = PREFIX.get(name, 0)
    if name == "nest":
        x, grid = _squares(args[0])
        term = plain_systems.shortcut(group.shortcut, x, 0, grid)
        return output + _squares(term.view(args[0].shape[0], *args[0].shape[1:]), False)[0]
    if name.startswith("tnt"):
        return output[0], output[1] + plain_systems.shortcut(group.shortcut, args[1], P, _grid(name, args[1], args, kwargs))
    if "sizes" in kwargs:  # CoaT's parallel blocks
        terms = [plain_systems.shortcut(s, args[i], P, kwargs["sizes"][i]) for i, s in enumerate(group.shortcut, 1)]
        return output[0], *(y + term for y, term in zip(output[1:], terms, strict=True))
    return output + plain_systems.shortcut(group.shortcut, args[0], P, _grid(name, args[0], args, kwargs))


def _hooked(name, original, model, every):
    """``original`` with the shortcuts of ``model`` added to what its blocks put out."""
    for blocks, groups in zip(_lists(original), _lists(model), strict=True):
        assert len(blocks) == every * len(_with_shortcut(groups))
        for i, group in enumerate(_with_shortcut(groups)):
            given = []
            blocks[i * every].register_forward_pre_hook(lambda m, a, k, given=given: given.append((a, k)), with_kwargs=True)
            last = blocks[(i + 1) * every - 1]
            last.register_forward_hook(lambda m, a, y, given=given, group=group: _added(name, group, *given.pop(), y))
    return original


def _with_shortcut(blocks):
    """The groups, or the last blocks of groups, of a list."""
    return [block for block in blocks if hasattr(block, "shortcut")]


def _pair(name, every=1, **options):
    """A converted model, and the original with hooks."""
    original = _host(name)
    model = lifeops.convert(copy.deepcopy(original), "dw_shortcut", every=every, **options)
    for groups in _lists(model):
        for group in _with_shortcut(groups):
            _randomised(group.shortcut)
    return model, _hooked(name, original, model, every)


SINGLE = ["coat", "naflex_rope", "mixed_rope"]
"""Something happens between their blocks, or to them one by one."""
CASES = [(name, every) for name in HOSTS for every in (1, 2) if every == 1 or name not in SINGLE]


@pytest.mark.parametrize(("name", "every"), CASES)
def test_outputs_and_gradients(name, every):
    model, twin = _pair(name, every)
    results = []
    for m in (model, twin):
        x = _images(name).requires_grad_()
        y = m(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, gradient))
    with torch.no_grad():
        _close(lifeops.fuse_(copy.deepcopy(model))(_images(name)), results[1][0])
    _close(results[0][0], results[1][0])
    _close(results[0][1], results[1][1], 1e-9)


@pytest.mark.parametrize("name", SINGLE)
def test_blocks_that_cannot_be_grouped(name):
    alone, between = "is told something else in a group than alone", "0 gives something else with a shortcut that adds nothing"
    message = alone if "rope" in name else between
    unchanged(_host(name), lambda m: lifeops.convert(m, "dw_shortcut", every=2), message)


@pytest.mark.parametrize(("name", "every"), CASES)
def test_start_and_back(name, every):
    """Untouched outputs to the bit, gradients that reach every convolution, and the same model after revert."""
    model, x = _host(name), _images(name)
    before, keys = model(x), list(model.state_dict())
    lifeops.convert(model, "dw_shortcut", every=every, kernel_sizes=(3, 5), start="identity")
    y = model(x)
    if name == "naflex_conv":  # whose tokens lie channel by channel in memory, so that their mean is summed in another order
        _close(y, before, 1e-14)
    else:
        assert torch.equal(y, before)
    y.square().sum().backward()
    convs = [conv for m in model.modules() if isinstance(m, lifeops.nn.DWShortcut) for conv in m.convs]
    assert sum(not conv.weight.grad.any() for conv in convs) == LATE.get(name, 0)
    assert all(conv.weight.grad is not None for conv in convs)
    lifeops.revert(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    assert hooks_of(model) == 0


@pytest.mark.parametrize(("name", "every"), [case for case in CASES if case[0] in CHECKPOINTED])
def test_checkpointing(name, every):
    model, _ = _pair(name, every)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model.train()(_images(name)).square().sum(), list(model.parameters()), allow_unused=True))
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            _close(a, b, 1e-9)


@pytest.mark.parametrize("name", ["pit", "nest"])
def test_stages_that_are_run_again(name):
    """torch's checkpoints around whole stages, another model's pass before the backward: nothing but the stage's input tells the grid."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, _ = _pair(name)
    other = lifeops.convert(_host("pit_distilled" if name == "pit" else "pit"), "dw_shortcut")
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(_images(name)).square().sum(), parameters, allow_unused=True)
    stages = getattr(model, "transformers", getattr(model, "levels", getattr(model, "serial_blocks2", None)))
    for i, stage in enumerate(stages):
        stages[i] = checkpoint_wrapper(stage)
    loss = model(_images(name)).square().sum()
    other(_images("pit_distilled" if name == "pit" else "pit"))
    for a, b in zip(torch.autograd.grad(loss, parameters, allow_unused=True), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            _close(a, b, 1e-9)


@pytest.mark.parametrize("name", ["twins_pcpvt", "xcit", "naflex"])
def test_two_sizes_before_one_backward(name):
    """4 x 6 and 6 x 4 patches: which grid a recomputation has is not told by their number."""
    model, _ = _pair(name)
    images, parameters = [_images(name), _images(name).transpose(2, 3).contiguous()], list(model.parameters())
    expected = [torch.autograd.grad(model(x).square().sum(), parameters) for x in images]
    if name in CHECKPOINTED:
        model.set_grad_checkpointing()
    got = torch.autograd.grad(sum(model(x).square().sum() for x in images), parameters)
    for a, b, c in zip(*expected, got, strict=True):
        _close(a + b, c, 1e-9)


@pytest.mark.parametrize(("name", "every"), CASES)
def test_features_and_layers_of_timm(name, every):
    """forward_intermediates and group_matcher mean the same blocks as before."""
    from timm.models._manipulate import group_parameters

    model, twin = _pair(name, every)
    got, expected = (m.forward_intermediates(_images(name), intermediates_only=True) for m in (model, twin))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        _close(a, b, 1e-9)
    if hasattr(model, "group_matcher"):
        layers = [group_parameters(m, m.group_matcher(), reverse=True) for m in (twin, model)]
        before, after = (sorted(layer for key, layer in found.items() if "shortcut" not in key) for found in layers)
        assert before == after
        groups = [group for groups in _lists(model) for group in _with_shortcut(groups)]
        paths = {id(m): path for path, m in model.named_modules()}
        for group in groups:
            own = {layers[1][f"{paths[id(group)]}.shortcut.{key}"] for key, _ in group.shortcut.named_parameters()}
            last = [f"{paths[id(group)]}.{key}" for key, _ in group.named_parameters() if key.startswith((f"blocks.{every - 1}.", "norm"))]
            assert own == {layers[1][key] for key in last if key in layers[1]}  # CoaT's blocks share what is in other layers


@pytest.mark.parametrize("name", ["twins_svt", "pit"])
def test_traced(name):
    """torch.jit.trace gives sizes as tensors."""
    model, _ = _pair(name)
    x = _images(name)
    with torch.no_grad():
        _close(torch.jit.trace(model, x, check_trace=False)(x), model(x))
