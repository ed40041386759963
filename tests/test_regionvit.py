"""RegionViT: the authors' numbers with both masks, padding, exchanged layers, sizes, checkpoints."""

import copy

import numpy as np
import pytest
import system_checks
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import lifeops
from lifeops.errors import CheckpointError
from lifeops.models import RegionViT, regionvit
from lifeops.models.regionvit import RegionalToLocalBlock, RegionStage, from_windows, to_windows
from lifeops.nn import RegionalAttention, TwoGridDownsampling
from lifeops.nn.downsampling import LayerNorm2d
from lifeops.nn.eager_regionvit import EagerLayerNorm2d, EagerRegionalAttention, EagerRegionStage, EagerTwoGridDownsampling
from lifeops.nn.regional_attention import padding_mask
from test_checkpoints import quiet
from test_mvit import _close, _golden, _randomised

TINY = {"img_size": 32, "num_classes": 5, "embed_dim": (8, 16), "depths": (2, 1), "num_heads": (2, 4), "window_size": 2}
STAGES = ("regionvit_stage_ws4_peg", "regionvit_stage_ws3_nopeg", "regionvit_stage_ws4_padded")


def _tokens(maps):
    return maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:])


def _maps(tokens, grid):
    return tokens.transpose(1, 2).unflatten(2, grid)


def _state(d):
    return {k.removeprefix("param."): v for k, v in d.items() if k.startswith("param.")}


def _hooked(module):
    """Layers that are hooked are called, not read."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda *_: None)
    return module


# ------------------------------------------------------------------------------------------------ the authors' numbers


def _both_grids(d, run, names, module, expected="y", gradients=True):
    """Outputs on both grids and every gradient of a golden file."""
    regions, x = d["region"].requires_grad_(), d["local"].requires_grad_()
    r, region_grid, t, grid = run(*_tokens(regions), *_tokens(x))
    found = _maps(r, region_grid), _maps(t, grid)
    for maps, name in zip(found, ("region", "local"), strict=True):
        _close(maps, d[f"{expected}_{name}"])
    if gradients:
        torch.autograd.backward(found, [d["g_region"], d["g_local"]])
        _close(regions.grad, d["grad_region"])
        _close(x.grad, d["grad_local"])
        for name, p in module.named_parameters():
            _close(p.grad, d[f"grad.{names(name)}"])


@pytest.mark.parametrize("how", ["fused", "called", "eager"])
def test_golden_downsampling(how):
    d = _golden("regionvit_down_c6_c12")
    module = TwoGridDownsampling(6, 12).double()
    module.load_state_dict(_state(d))
    assert {*module.state_dict()} == {*_state(d)}
    run = _hooked(module) if how == "called" else module
    if how == "eager":
        eager = EagerTwoGridDownsampling(module)

        def run(regions, region_grid, x, grid):
            r, t = eager(_maps(regions, region_grid), _maps(x, grid))
            return *_tokens(r), *_tokens(t)

    _both_grids(d, run, str, module)


def _stage(d, corner_mask):
    dim, dim_out = d["region"].shape[1], d["y_region"].shape[1]
    step = TwoGridDownsampling(dim, dim_out) if d["pool"] == "sc" else None
    blocks = [RegionalToLocalBlock(dim_out, d["heads"], d["window"], d["mlp_ratio"]) for _ in range(d["depth"])]
    stage = RegionStage(step, blocks, bool(d["peg"]), corner_mask).double()
    stage.load_state_dict(_state(d))
    return stage


@pytest.mark.parametrize("how", ["fused", "called", "eager"])
@pytest.mark.parametrize("name", STAGES)
def test_golden_stages(name, how):
    """The authors' mask, and where nothing is padded ours."""
    d = _golden(name)
    for corner_mask in ("authors", "fixed")[: 1 if name.endswith("padded") else 2]:
        stage = _stage(d, corner_mask)
        names = [n for n, _ in stage.named_parameters()]
        run = _hooked(stage) if how == "called" else EagerRegionStage(stage) if how == "eager" else stage
        if how == "eager":
            assert [n for n, _ in run.named_parameters()] == names
        _both_grids(copy.deepcopy(d), run, str, run)


def test_golden_stage_with_the_corner_fixed():
    d = _golden("regionvit_stage_ws4_padded")
    _both_grids(d, _stage(d, "fixed"), str, None, "fixed", gradients=False)
    assert (d["y_region"] - d["fixed_region"]).abs().max() > 0.1


@pytest.mark.parametrize("eager", [False, True])
def test_golden_block(eager):
    d = _golden("regionvit_r2l_ws4_tokens")
    block = RegionalToLocalBlock(12, d["heads"], d["window"], 2.0).double()
    block.load_state_dict(_state(d))
    if eager:
        block.attn = EagerRegionalAttention(block.attn)
        assert torch.equal(block.attn.index, d["rel_pos_index"])
    x = d["x"].requires_grad_()
    y = block(x, d["batch"])
    y.backward(d["g"])
    _close(y, d["y"])
    _close(x.grad, d["grad_x"])
    for name, p in block.named_parameters():
        _close(p.grad, d[f"grad.{name}"])
    with torch.no_grad():
        _close(block(x, d["batch"]), d["y"])


# ------------------------------------------------------------------------------------------------ windows and padding


@pytest.mark.parametrize(("regions", "grid"), [((2, 3), (6, 9)), ((2, 3), (5, 9)), ((2, 3), (4, 7)), ((1, 1), (2, 2))], ids=str)
def test_windows(regions, grid):
    r, x = torch.randn(2, regions[0] * regions[1], 4), torch.randn(2, grid[0] * grid[1], 4)
    t = to_windows(r, regions, x, grid, 3)
    assert t.shape == (2 * regions[0] * regions[1], 10, 4)
    back = from_windows(t, regions, grid, 3)
    assert torch.equal(back[0], r)
    assert torch.equal(back[1], x)
    maps = F.pad(_maps(x, grid), (0, 3 * regions[1] - grid[1], 0, 3 * regions[0] - grid[0]))
    last = t.unflatten(0, (2, *regions))[:, -1, -1]
    assert torch.equal(last[:, 1:], maps[:, :, -3:, -3:].flatten(2).transpose(1, 2))
    assert torch.equal(last[:, 0], r[:, -1])


@pytest.mark.parametrize("grid", [(6, 9), (5, 9), (6, 7), (5, 7), (3, 4)], ids=str)
def test_no_query_attends_to_padding(grid):
    """The mask has exactly the real patches of every window; a fixed corner makes a map independent of what is behind it."""
    mask, w = padding_mask((2, 3), 3, grid), 3
    if grid == (6, 9):
        assert mask is None
        return
    for window in range(6):
        rows, columns = window // 3 * w + torch.arange(w), window % 3 * w + torch.arange(w)
        real = ((rows < grid[0])[:, None] & (columns < grid[1])).flatten()
        assert mask[window, 0].tolist() == [True, *real.tolist()]


def test_the_authors_corner():
    """Right and bottom windows are as ours for real queries; in the last window rows OR columns."""
    ours, theirs = (padding_mask((2, 2), 4, (7, 6), corner) for corner in ("fixed", "authors"))
    real = [ours[i, 0] for i in range(4)]
    for window in range(3):
        assert torch.equal(theirs[window][real[window]], real[window].expand(int(real[window].sum()), -1))
    assert real[3].sum() == 1 + 3 * 2
    assert theirs[3][0].sum() == 1 + 16 - 1 * 2  # all but the patches that are padded on both sides
    one_sided = padding_mask((2, 2), 4, (8, 6), "authors")
    assert one_sided[-1].all()
    with pytest.raises(ValueError, match=r"padding_mask: the map must fit 2 x 2 windows of 4 x 4 patches, got 9 x 6"):
        padding_mask((2, 2), 4, (9, 6))
    with pytest.raises(ValueError, match="the authors' code pads by one window at most, got 0 rows and 5 columns"):
        padding_mask((2, 3), 4, (8, 7), "authors")


def test_the_bias_between_patches():
    """The authors' loop: row (y' - y + w // 2) and column alike, where negative ones count from the end."""
    module, w = RegionalAttention(8, 2, 3), 3
    table = module.rel_pos.view(2, 2 * w - 1, 2 * w - 1)
    bias = module.bias()
    assert bias.shape == (2, 10, 10)
    assert bias[:, 0].count_nonzero() == bias[:, :, 0].count_nonzero() == 0
    for y, x, y2, x2 in np.ndindex(w, w, w, w):
        assert torch.equal(bias[:, 1 + y * w + x, 1 + y2 * w + x2], table[:, y2 - y + w // 2, x2 - x + w // 2])


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (32, 40), (28, 60)], ids=str)
def test_images_of_any_size(size):
    """What a padded pixel holds reaches nothing: the model gives the same with patches beyond the map exchanged."""
    torch.manual_seed(0)
    model = _randomised(RegionViT(**TINY, peg=True)).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    y = model(x)
    assert y.shape == (2, 5)
    poisoned = copy.deepcopy(model)
    for stage in poisoned.layers:
        for block in stage.block[1:]:
            block.norm1.register_forward_hook(_poison(stage, block))
    seen = []
    poisoned.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[1::2]))
    _close(poisoned(x), y)
    regions, grid = seen[0]
    assert regions == tuple(-(-n // 8) for n in size)
    assert grid == tuple(-(-n // 4) for n in size)


def _poison(stage, block):
    """Large numbers in the padded rows of normed windows, for which the mask of the call stands."""
    masks = []
    block.attn.register_forward_pre_hook(lambda m, args: masks.append(args[2]) if len(args) > 2 else None)
    inner = block.forward

    def forward(t, images, mask=None):
        masks[:] = [mask]
        return inner(t, images, mask)

    block.forward = forward

    def hook(module, args, out):
        mask = masks[-1]
        if mask is None:
            return out
        real = mask[:, 0].repeat(out.shape[0] // mask.shape[0], 1)
        return torch.where(real[..., None], out, 50.0)

    return hook


def test_the_masks_agree_where_nothing_is_padded_and_only_there():
    torch.manual_seed(0)
    fixed = _randomised(RegionViT(**TINY)).double().eval()
    theirs = RegionViT(**TINY, corner_mask="authors").double().eval()
    theirs.load_state_dict({k: v for k, v in fixed.state_dict().items()})
    for size, same in (((32, 48), True), ((32, 44), False), ((40, 36), False)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        assert ((fixed(x) - theirs(x)).abs().max() < 1e-10) == same


# ------------------------------------------------------------------------------------------------ layers that are not plain


def test_exchanged_layers_are_called():
    torch.manual_seed(0)
    module = _randomised(TwoGridDownsampling(4, 8).double())
    args = torch.randn(2, 6, 4).double(), (2, 3), torch.randn(2, 24, 4).double(), (4, 6)
    before = module(*args)
    assert lifeops.explain(module)[0].fused
    module.proj[1] = nn.GELU(approximate="tanh")
    assert lifeops.explain(module)[0].reasons == ("proj.1: approximate is 'tanh', the kernel computes 'none'",)
    after = module(*args)
    assert after[1::2] == before[1::2]
    torch.testing.assert_close(after[2], before[2], rtol=1e-2, atol=1e-2)
    assert (after[2] - before[2]).abs().max() > 1e-6


def test_norms_are_alike():
    maps, norm = torch.randn(2, 6, 3, 4).double(), _randomised(LayerNorm2d(6).double())
    eager = EagerLayerNorm2d(6).double()
    eager.load_state_dict(norm.state_dict())
    _close(norm(maps), eager(maps))
    _close(norm.of_tokens(_tokens(maps)[0]), _tokens(eager(maps))[0])


# ------------------------------------------------------------------------------------------------ what is refused

REFUSED = {
    "heads": (lambda: RegionalAttention(8, 3, 7), "RegionalAttention: dim must be a multiple of num_heads"),
    "windows": (lambda: RegionalAttention(8, 2, 3)(torch.randn(2, 9, 8), True), r"x must be windows \(B, 1 \+ 3\*3, C\), got \(2, 9, 8\)"),
    "mask": (lambda: RegionalAttention(8, 2, 3)(torch.randn(2, 10, 8), True, torch.ones(3, 1, 10) > 0), "RegionalAttention: mask must be"),
    "widths": (lambda: TwoGridDownsampling(8, 12), "TwoGridDownsampling: dim_out must be a multiple of dim 8, got 12"),
    "variant": (lambda: regionvit("large"), "regionvit: variant must be one of 'tiny', 'small', 'medium', 'base', got 'large'"),
    "stages": (lambda: RegionViT(depths=(2, 2)), "RegionViT: embed_dim, depths and num_heads must have one number per stage"),
    "multiples": (lambda: RegionViT(embed_dim=(64, 96, 192, 384)), "RegionViT: embed_dim must be multiples"),
    "corner": (lambda: regionvit(corner_mask="ours"), "regionvit: RegionViT: corner_mask must be 'fixed' or 'authors', got 'ours'"),
    "patches": (lambda: regionvit(patch_size=8), "RegionViT: patch_size must be 4 with stem='3conv', got 8"),
    "stem": (lambda: regionvit(stem="conv"), "RegionViT: stem must be '3conv' or '1conv', got 'conv'"),
    "block heads": (lambda: regionvit(num_heads=(3, 4, 8, 16)), "regionvit: RegionViT: RegionalAttention: dim must be a multiple"),
    "images": (lambda: RegionViT(**TINY)(torch.randn(1, 1, 32, 32)), r"RegionViT: x must be images \(B, 3, 32, 32\), got \(1, 1, 32, 32\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_rollout_is_refused():
    """Two kinds of tokens with one weight between them are no sequence of patches."""
    with pytest.raises(ValueError, match=r"rollout: layers\.0\.block\.1\.attn is RegionalAttention, which attends among regions and"):
        lifeops.rollout(RegionViT(**TINY).eval(), torch.randn(1, 3, 32, 32))


# ------------------------------------------------------------------------------------------------ torch's tools, checkpoints


@pytest.mark.parametrize("size", [(32, 32), (36, 44)], ids=str)
def test_compile_export_and_state_dict(size, tmp_path):
    torch.manual_seed(0)
    model = _randomised(RegionViT(**{**TINY, "depths": (1, 1)}, peg=True)).eval()
    x = torch.randn(2, 3, *size)
    y = model(x)
    torch._dynamo.reset()  # of another size it would trace symbols, slowly
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), y)
    system_checks.exported(model, x)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = quiet(lifeops.load_official, tmp_path / "model.pt", img_size=size)
    assert torch.equal(again(x), y)
    assert (again.corner_mask, again.img_size) == ("fixed", size)
    other = RegionViT(**{**TINY, "depths": (1, 1)}, peg=True, corner_mask="authors")
    with pytest.raises(RuntimeError, match="saved with corner_mask='fixed', this module has corner_mask='authors'"):
        other.load_state_dict(torch.load(tmp_path / "model.pt"))


MODELS = {
    "3conv": {}, "1conv": {"stem": "1conv", "qkv_bias": False}, "peg": {"peg": True, "mlp_ratio": 2.0},
    "windows of 4": {"window_size": 4, "num_heads": (4, 2)}, "patches of 2": {"patch_size": 2, "stem": "1conv"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_load_official(name):
    """The authors' files say no mask: it is theirs."""
    torch.manual_seed(0)
    model = _randomised(RegionViT(**{**TINY, **MODELS[name]}, corner_mask="authors")).eval()
    loaded = quiet(lifeops.load_official, {"model": dict(model.state_dict())})
    assert loaded.corner_mask == "authors"
    for size in ((64, 64), (36, 44)):
        x = torch.randn(1, 3, *size)
        assert torch.equal(loaded(x), model(x))
    with pytest.warns(UserWarning, match="a new head for 3 classes"):
        assert lifeops.load_official(model.state_dict(), num_classes=3)(x).shape == (1, 3)


def test_load_official_refuses():
    state = dict(RegionViT(**TINY).state_dict())
    state["cls_token.proj.weight"] = torch.zeros(8, 3, 9, 9)
    with pytest.raises(CheckpointError, match=r"a region of 2 x 2 patches must be a square of whole patches, got a filter of \(9, 9\)"):
        lifeops.load_official(state)
    with pytest.raises(CheckpointError, match="norm0"):  # of a detector
        lifeops.load_official({**RegionViT(**TINY).state_dict(), "norm0.weight": torch.zeros(1, 8, 1, 1)})


def test_both_names_of_the_step_are_stored_and_one_tensor():
    model = RegionViT(**TINY)
    state = model.state_dict()
    first, second = (f"layers.1.block.0.{name}.2.weight" for name in ("proj", "proj_cls"))
    assert state[first].data_ptr() == state[second].data_ptr() == model.get_parameter(first).data_ptr()
    assert not any(name.startswith("layers.0.block.0") for name in state)
    assert get_model_state_dict(model).keys() == state.keys()  # which looks every name up as an attribute
    RegionViT(**TINY).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"proj_cls\.2\.weight must be the tensor that proj has there, too"):
        RegionViT(**TINY).load_state_dict({**state, second: state[second] + 1})


def test_gradients_of_each_image():
    torch.manual_seed(0)
    model, x = _randomised(RegionViT(**TINY, peg=True)).double(), torch.randn(2, 3, 32, 36, dtype=torch.float64)
    system_checks.gradients_of_each_image(model, x, 1e-9, unused=True)


@pytest.mark.parametrize("training", [False, True])
def test_autocast_and_half(training):
    torch.manual_seed(0)
    model, x = RegionViT(**TINY, peg=True).train(training), torch.randn(2, 3, 36, 40)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)
