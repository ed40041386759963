"""lifeops.rollout on small models of this library, and `lifeops rollout` on their checkpoints."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import lifeops
from lifeops import cli
from lifeops.models import localvit
from lifeops.models.deit import VisionTransformer
from lifeops.nn import LifeAttention
from test_rollout_step import naive_rollout

SIZES = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}  # a 4 x 6 grid


def _model(kind="plain", **changes):
    torch.manual_seed(0)
    sizes = {**SIZES, **changes}
    if kind == "localvit":
        return localvit(act="hs+se", reduction=4, dist_token=True, **sizes)
    return VisionTransformer(**sizes, dist_token=True, num_reg_tokens=1, attn=LifeAttention if kind == "life" else None)


def _naive(model, x, **options):
    """The full roll-out matrix of a model of this library, from the q and k its attention is known to compute."""
    layers, hooks = [], []

    def take(attn, args):
        tokens, grid = args[0], model.patch_embed.grid_size
        if isinstance(attn, LifeAttention):
            layers.append(attn.qkv_heads(tokens, grid)[:2])
        else:
            q, k, _ = attn.qkv(tokens).chunk(3, -1)
            layers.append(tuple(t.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k)))

    hooks = [block.attn.register_forward_pre_hook(take) for block in model.blocks]
    with torch.no_grad():
        model(x)
        for hook in hooks:
            hook.remove()
        return naive_rollout(layers, **options)


@pytest.mark.parametrize("kind", ["plain", "life", "localvit"])
@pytest.mark.parametrize("options", [{}, {"head_fusion": "max", "residual": 0.4}], ids=str)
def test_model_equals_the_naive_rollout(kind, options):
    model, x = _model(kind).eval(), torch.randn(2, 3, 16, 24)
    P, matrix = model.num_prefix_tokens, _naive(model, x, **options)
    found = lifeops.rollout(model, x, **options)
    assert (found.maps.shape, found.labels) == ((2, 1, 4, 6), ("cls token",))
    assert (found.maps.flatten(2)[:, 0] - matrix[:, 0, P:]).abs().max() <= 1e-6
    assert (found.prefix[:, 0] - matrix[:, 0, :P].sum(-1)).abs().max() <= 1e-6
    assert (found.maps.sum((2, 3)) + found.prefix - 1).abs().max() <= 1e-6
    whole = lifeops.rollout(model, x, prefix="normalize", **options)
    assert (whole.maps.sum((2, 3)) - 1).abs().max() <= 1e-6
    torch.testing.assert_close(whole.maps, found.maps / (1 - found.prefix)[..., None, None])
    torch.testing.assert_close(found.output, model(x))


def test_targets():
    model, x = _model().eval(), torch.randn(2, 3, 16, 24)
    P, matrix = model.num_prefix_tokens, _naive(model, x)

    def same(found, weights):
        torch.testing.assert_close(found.weights, weights)
        torch.testing.assert_close(found.maps.flatten(2), (weights @ matrix)[..., P:], rtol=0, atol=1e-6)

    def one(index):
        return torch.nn.functional.one_hot(torch.tensor([[index]] * 2), P + 24).float()

    same(lifeops.rollout(model, x, 1), one(1))
    last = lifeops.rollout(model, x, -1)
    assert last.labels == (f"token {P + 23}",)
    same(last, one(P + 23))
    found = lifeops.rollout(model, x, (1, 2))
    assert found.labels == ("patch (1, 2)",)
    same(found, one(P + 8))
    mean = torch.cat((torch.zeros(2, 1, P), torch.full((2, 1, 24), 1 / 24)), 2)
    same(lifeops.rollout(model, x, "mean"), mean)
    for value, dtype in ((1, torch.bool), (3, torch.uint8), (3e38, torch.float32), (1e308, torch.float64), (1e-45, torch.float32)):
        same(lifeops.rollout(model, x, torch.full((4, 6), value, dtype=dtype)), mean)
    for prefix in ("keep", "normalize"):
        some = torch.stack((torch.zeros(4, 6), torch.ones(4, 6)))  # of zeros: nothing to follow, a map of zeros
        nothing = lifeops.rollout(model, x, some, prefix=prefix)
        assert not nothing.maps[:, 0].any()
        assert not nothing.prefix[:, 0].any()
        assert torch.equal(nothing.maps[:, 1], lifeops.rollout(model, x, "mean", prefix=prefix).maps[:, 0])
    mask = torch.rand(2, 3, 4, 6)
    same(lifeops.rollout(model, x, mask), torch.nn.functional.pad(mask.flatten(2) / mask.sum((2, 3))[..., None], (P, 0)))
    with torch.no_grad():
        tokens = model.forward_features(x)[:, P:]
        logits = (model.head(tokens) + model.head_dist(tokens)) / 2
    soft = lifeops.rollout(model, x, "soft", classes=[3, 0])
    chances = logits.softmax(-1)[..., [3, 0]].transpose(1, 2)
    assert soft.labels == ("class 3", "class 0")
    same(soft, torch.nn.functional.pad(chances / chances.sum(-1, keepdim=True), (P, 0)))
    hard, predicted = lifeops.rollout(model, x, "hard"), logits.argmax(-1)
    assert hard.labels == tuple(f"class {c}" for c in predicted.unique().tolist())
    shares = torch.stack([(predicted == c) / (predicted == c).sum(-1, keepdim=True).clamp(min=1) for c in predicted.unique()], 1)
    same(hard, torch.nn.functional.pad(shares, (P, 0)))
    dense = logits.transpose(1, 2).unflatten(2, (4, 6))
    for given in (dense, logits, lambda output: dense):
        same(lifeops.rollout(model, x, "hard", token_logits=given), hard.weights)
    assert not lifeops.rollout(model, x, "hard", token_logits=dense * 0, classes=[4]).maps.any()  # nothing is predicted as 4


def test_a_known_dependency_lights_the_right_patch():
    """cls attends to patch 5, which attended to patch 17 one layer below: the pixels of these two move the output."""
    model = VisionTransformer(20, 4, embed_dim=32, depth=2, num_heads=1, num_classes=1, mlp_ratio=1.0, qkv_bias=False).eval()
    N, seen, through = 26, 1 + 17, 1 + 5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.fill_(1)
        model.pos_embed.copy_(10 * torch.eye(N, 32))  # tokens are told apart by their place, patches also by channel 31
        model.patch_embed.proj.weight[31].fill_(0.01)
        for block, (reader, read) in zip(model.blocks, ((through, seen), (0, through)), strict=True):
            q, k, v = block.attn.qkv.weight.chunk(3)
            q[read, reader], v[31, 31], block.attn.proj.weight[31, 31] = 20, 1, 1
            k.copy_(torch.eye(32))
        model.head.weight[0, 31] = 1
    x = torch.rand(1, 3, 20, 20).requires_grad_()
    model(x).sum().backward()
    moved = x.grad.abs().sum(1).unfold(1, 4, 4).unfold(2, 4, 4).sum((-1, -2)).flatten()
    found = lifeops.rollout(model, x.detach()).maps.flatten()
    assert set(moved.topk(2).indices.tolist()) == set(found.topk(2).indices.tolist()) == {5, 17}
    torch.testing.assert_close(found[[17, 5]], torch.tensor([0.25, 0.25]), rtol=0, atol=0.01)  # of four paths, two end at cls
    attended = lifeops.rollout(model, x.detach(), residual=0.0).maps.flatten()  # without the skip connections one path is left
    assert attended.argmax() == 17
    assert attended[17] > 0.99


def test_start_layer_and_half_precision():
    model, x = _model(depth=4).eval(), torch.randn(1, 3, 16, 24)
    layers = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(
            lambda module, args, qkv: layers.append(qkv.unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)[:2])
        )
    with torch.no_grad():
        model(x)
        matrix = naive_rollout(layers[2:])
    upper = lifeops.rollout(model, x, start_layer=2)
    torch.testing.assert_close(upper.maps.flatten(2), matrix[:, :1, model.num_prefix_tokens :], rtol=0, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = lifeops.rollout(model, x)
    full = lifeops.rollout(model, x)
    assert low.maps.dtype == torch.float32
    assert 0 < (low.maps - full.maps).abs().max() < 1e-3
    assert lifeops.rollout(model.double(), x.double()).maps.dtype == torch.float64


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["plain", "life", "localvit"])
def test_leaves_the_model_as_it_was(kind, mode):
    model, x = _model(kind, drop_path_rate=0.2), torch.randn(2, 3, 16, 24)
    getattr(model, mode)()
    before = copy.deepcopy(model.state_dict())

    def hooks():
        return [len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]

    known = hooks()
    found = lifeops.rollout(model, x)
    assert hooks() == known
    assert model.training == (mode == "train")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not found.maps.requires_grad
    with pytest.raises(ValueError, match="head_fusion"):
        lifeops.rollout(model, x, head_fusion="sum")
    assert hooks() == known


class Biased(nn.Module):
    """Attention with a table that roll-out cannot know."""

    def __init__(self, dim, num_heads, num_prefix_tokens):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rel_pos = nn.Parameter(torch.zeros(num_heads))

    def forward(self, x):
        return self.proj(self.qkv(x)[..., : x.shape[-1]])


ERRORS = {
    "prefix": ({"prefix": "drop"}, "prefix must be 'keep' or 'normalize', got 'drop'"),
    "start": ({"start_layer": 3}, "start_layer must be below the 3 attention layers, got 3"),
    "start_type": ({"start_layer": -1}, "start_layer must be an int of at least 0, got -1"),
    "classes": ({"classes": [1]}, "classes go with targets='hard' or 'soft'"),
    "class": ({"targets": "soft", "classes": [5]}, "classes must be some of 0 to 4, got [5]"),
    "name": ({"targets": "dist"}, "targets must be 'cls', 'mean', 'pool', 'hard', 'soft', a token's index"),
    "token": ({"targets": 27}, "the token must be one of 27, got 27"),
    "patch": ({"targets": (4, 0)}, "the patch must lie on the 4 x 6 grid, got (4, 0)"),
    "mask": ({"targets": torch.ones(3, 4)}, "targets must be (B, R, N) or (R, N) with N = 27, or (…, 4, 6), got (3, 4)"),
    "negative": ({"targets": -torch.ones(4, 6)}, "targets must be finite and not negative"),
    "infinite": ({"targets": torch.full((4, 6), torch.inf)}, "targets must be finite and not negative"),
    "not a number": ({"targets": torch.full((4, 6), torch.nan)}, "targets must be finite and not negative"),
    "logits": ({"targets": "hard", "token_logits": torch.ones(1, 5, 3, 3)}, "token_logits must be (B, K, 4, 6), (B, 24, K) or (B, 27, K)"),
    "tokens": ({"num_prefix_tokens": 2}, "2 prefix tokens and a 4 x 6 grid are 26 tokens, the layers have 27"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_messages(name):
    options, message = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        lifeops.rollout(_model().eval(), torch.randn(1, 3, 16, 24), **options)


def test_models_that_do_not_fit():
    x = torch.randn(1, 3, 16, 24)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn is Biased with rel_pos, which is not known"):
        lifeops.rollout(VisionTransformer(**SIZES, attn=Biased), x)
    with pytest.raises(ValueError, match=r"Conv2d is not a known ViT .*; looked for a timm model with one patch_embed"):
        lifeops.rollout(nn.Conv2d(3, 3, 1), x)
    with pytest.raises(ValueError, match="images must be"):
        lifeops.rollout(_model(), x[0])
    model = _model()
    model.blocks = nn.ModuleList()
    with pytest.raises(ValueError, match="no attention layer ran in VisionTransformer"):
        lifeops.rollout(model, x)
    pooled = VisionTransformer(**SIZES, class_token=False)
    assert lifeops.rollout(pooled, x).labels == ("mean of the patch tokens",)
    with pytest.raises(ValueError, match="no cls token"):
        lifeops.rollout(pooled, x, "cls")


# ------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def files(tmp_path):
    """An image and checkpoints of a plain, a LIFE and a LocalViT model, grey 8 x 8 pictures in."""
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    Image.fromarray(np.arange(120, dtype=np.uint8).reshape(10, 12)).save(tmp_path / "grey.png")
    sizes = {**SIZES, "img_size": 8, "patch_size": 2, "in_chans": 1}
    for kind in ("plain", "life", "localvit"):
        torch.manual_seed(0)
        attn = LifeAttention if kind == "life" else None
        model = (
            localvit(act="hs+se", reduction=4, **sizes) if kind == "localvit" else VisionTransformer(**sizes, dist_token=True, attn=attn)
        )
        torch.save({"model": model.state_dict()}, tmp_path / f"{kind}.pt")
    return tmp_path


@pytest.mark.parametrize("kind", ["plain", "life", "localvit"])
def test_command_line(files, kind, capsys):
    (files / "names.txt").write_text("\n".join(["zero", "one", "two", "three", "four"]))
    common = ["--model", "lifeops", "--num-heads", "3", "--checkpoint", str(files / f"{kind}.pt"), "--out", str(files / "out")]
    command = ["rollout", str(files / "grey.png"), *common, "--class-names", str(files / "names.txt")]
    assert cli.main([*command, "--target", "soft", "--classes", "1", "4", "--prefix", "normalize"]) == 0
    assert {p.name for p in (files / "out").iterdir()} == {"grey.npy", "grey_one.png", "grey_four.png"}
    maps = np.load(files / "out" / "grey.npy")
    assert maps.shape == (2, 4, 4)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=1e-6)
    assert (files / "out" / "grey_one.png").read_bytes()[:4] == b"\x89PNG"
    assert "grey_four.png" in capsys.readouterr().out


def test_command_line_errors(files, capsys):
    image, plain = str(files / "grey.png"), str(files / "plain.pt")
    torch.save(dict(torch.load(plain)["model"]), plain)  # without metadata, which would tell the heads
    for arguments, message in (
        ([image, "--model", "lifeops"], "--model lifeops reads its sizes from --checkpoint"),
        ([image, "--model", "lifeops", "--checkpoint", plain], "cannot tell the heads of a model of width 24; pass num_heads"),
        (["absent.png", "--model", "lifeops", "--checkpoint", plain], "no such file: absent.png"),
        (
            [image, "--model", "lifeops", "--num-heads", "3", "--checkpoint", plain, "--target", "9,9"],
            "the patch must lie on the 4 x 4 grid",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["rollout", *arguments, "--out", str(files / "out")])
        assert message in capsys.readouterr().err
