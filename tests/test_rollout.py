"""Roll-out: the op against a naive one, its invariances, and lifeops.rollout on small models of this library."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import lifeops
from lifeops import cli, registry, testing
from lifeops.demo.measure import peak_memory
from lifeops.models import localvit
from lifeops.models.deit import VisionTransformer
from lifeops.nn import LifeAttention

needs_cpu = pytest.mark.skipif(registry.unavailable("cpu") is not None, reason="no compiled CPU kernels")
SIZES = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}  # a 4 x 6 grid


def naive_layer(q, k, head_fusion="mean", residual=0.5, discard_ratio=0.0):
    """Â (B, N, N) as one would write it down."""
    attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    fused = {"mean": attention.mean, "max": attention.amax, "min": attention.amin}[head_fusion](1)
    kept = fused.shape[-1] - int(discard_ratio * fused.shape[-1])
    fused = fused * (fused >= fused.topk(kept, dim=-1).values[..., -1:])
    matrix = (1 - residual) * fused + residual * torch.eye(fused.shape[-1])
    return matrix / matrix.sum(-1, keepdim=True)


def naive_rollout(layers, **options):
    """Â_L … Â_1 (B, N, N) of (q, k) pairs, first layer first."""
    product = None
    for q, k in layers:
        layer = naive_layer(q, k, **options)
        product = layer if product is None else layer @ product
    return product


def _layers(count, B, h, N, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, B, h, N, d, generator=generator)) for _ in range(count)]


# ------------------------------------------------------------------------------------------------ the op

OPTIONS = [{}, {"residual": 0.0}, {"head_fusion": "max"}, {"head_fusion": "min", "residual": 0.3}, {"discard_ratio": 0.75},
           {"head_fusion": "max", "discard_ratio": 0.5}]  # fmt: skip


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpu), "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_naive_rollout(backend, options):
    layers, r = _layers(3, 2, 3, 301, 16), torch.rand(2, 4, 301)
    r = start = r / r.sum(-1, keepdim=True)
    for q, k in reversed(layers):
        r = lifeops.rollout_step(r, q, k, backend=backend, **options)
    assert (r - start @ naive_rollout(layers, **options)).abs().max() <= 1e-6
    assert (r.sum(-1) - 1).abs().max() <= 1e-6


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fusion", ["mean", "min"])
def test_same_bits_at_any_thread_count_and_alone_or_in_a_batch(dtype, fusion, threads):
    (q, k), r = _layers(1, 5, 2, 333, 24)[0], torch.rand(5, 3, 333)
    q, k, r = q.to(dtype), k.to(dtype), r.double() if dtype == torch.float64 else r

    def step(r, q, k):
        return lifeops.rollout_step(r, q, k, head_fusion=fusion, discard_ratio=0.1 if fusion == "min" else 0.0, backend="cpu")

    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(step(r, q, k))
    assert all(torch.equal(results[0], other) for other in results[1:])
    for b in range(5):
        assert torch.equal(step(r[b : b + 1], q[b : b + 1], k[b : b + 1])[0], results[0][b])


@needs_cpu
def test_ties_at_the_threshold_stay():
    """Equal keys give equal attention: nothing lies below the threshold, so nothing is discarded."""
    q, k, r = torch.randn(1, 2, 9, 4), torch.zeros(1, 2, 9, 4), torch.rand(1, 1, 9)
    for backend in ("cpu", "reference"):
        full, dropped = (lifeops.rollout_step(r, q, k, discard_ratio=ratio, backend=backend) for ratio in (0.0, 0.9))
        torch.testing.assert_close(dropped, full)


@needs_cpu
def test_nan_reaches_the_maps_it_belongs_to():
    (q, k), r = _layers(1, 2, 2, 40, 8)[0], torch.rand(2, 1, 40)
    k[1, 0, 3, 2] = float("nan")
    out = lifeops.rollout_step(r, q, k, backend="cpu")
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_no_matrix_of_all_pairs_is_allocated():
    N, h = 1536, 4
    (q, k), r = _layers(1, 1, h, N, 8)[0], torch.rand(1, 2, N)
    reference = peak_memory(lambda: lifeops.rollout_step(r, q, k, backend="reference"))
    naive = peak_memory(lambda: r @ naive_layer(q, k))
    assert naive >= h * N * N * 4
    assert reference <= 0.8 * naive  # in blocks of 2**22 scores, whatever N is
    if registry.unavailable("cpu") is None:
        assert peak_memory(lambda: lifeops.rollout_step(r, q, k, backend="cpu")) <= N * N * 4 / 100


def test_flops_count_both_products():
    from torch.utils.flop_counter import FlopCounterMode

    (q, k), r = _layers(1, 2, 3, 10, 4)[0], torch.rand(2, 5, 10)
    with FlopCounterMode(display=False) as counter:
        lifeops.rollout_step(r, q, k)
    assert counter.get_total_flops() == 2 * 2 * 10 * 10 * (3 * 4 + 5)


def test_the_operator_passes_opcheck():
    op = registry.ops["rollout_step"]
    args = testing.make(op, op.samples()[0], torch.float32)
    results = torch.library.opcheck(torch.ops.lifeops.rollout_step.default, args, test_utils=("test_schema", "test_faketensor"))
    assert set(results.values()) == {"SUCCESS"}


_Q, _R = torch.randn(2, 3, 9, 4), torch.rand(2, 1, 9)
STEP_ERRORS = {
    "rank": ((_R, _Q[0], _Q[0]), {}, ValueError, "q must have shape (B, h, N, d) with h > 0, got (3, 9, 4)"),
    "k": ((_R, _Q, _Q[:, :, :8]), {}, ValueError, "k must be like q, (2, 3, 9, 4), torch.float32 on cpu, got (2, 3, 8, 4)"),
    "r": ((_R[:, :, :8], _Q, _Q), {}, ValueError, "r must have shape (B, R, N) = (2, R, 9), got (2, 1, 8)"),
    "r_dtype": ((_R.double(), _Q, _Q), {}, TypeError, "r must be torch.float32 on cpu beside torch.float32 q, got torch.float64"),
    "dtype": ((_R, _Q.int(), _Q.int()), {}, TypeError, "q.dtype must be float64, float32, float16 or bfloat16, got torch.int32"),
    "fusion": ((_R, _Q, _Q), {"head_fusion": "sum"}, ValueError, "head_fusion must be one of 'mean', 'max', 'min', got 'sum'"),
    "residual": ((_R, _Q, _Q), {"residual": 1.5}, ValueError, "residual must be between 0 and 1, got 1.5"),
    "discard": ((_R, _Q, _Q), {"discard_ratio": 1.0}, ValueError, "discard_ratio must be at least 0 and below 1, got 1.0"),
    "grad": ((_R, _Q.clone().requires_grad_(), _Q), {}, RuntimeError, "rollout_step: is not differentiable"),
}  # fmt: skip


@pytest.mark.parametrize("name", STEP_ERRORS)
def test_op_messages(name):
    args, options, error, message = STEP_ERRORS[name]
    with pytest.raises(error, match=re.escape(message)):
        lifeops.rollout_step(*args, **options)


# ------------------------------------------------------------------------------------------------ models


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
    found = lifeops.rollout(model, x, (1, 2))
    assert found.labels == ("patch (1, 2)",)
    same(found, one(P + 8))
    mean = torch.cat((torch.zeros(2, 1, P), torch.full((2, 1, 24), 1 / 24)), 2)
    same(lifeops.rollout(model, x, "mean"), mean)
    same(lifeops.rollout(model, x, torch.ones(4, 6, dtype=torch.bool)), mean)
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
    "name": ({"targets": "dist"}, "targets must be 'cls', 'mean', 'hard', 'soft', a token's index"),
    "token": ({"targets": 27}, "the token must be one of 27, got 27"),
    "patch": ({"targets": (4, 0)}, "the patch must lie on the 4 x 6 grid, got (4, 0)"),
    "mask": ({"targets": torch.ones(3, 4)}, "targets must be (B, R, N) or (R, N) with N = 27, or (…, 4, 6), got (3, 4)"),
    "negative": ({"targets": -torch.ones(4, 6)}, "targets must not be negative or NaN"),
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
    with pytest.raises(ValueError, match=r"blocks\.0\.attn is Biased with rel_pos, which roll-out does not know"):
        lifeops.rollout(VisionTransformer(**SIZES, attn=Biased), x)
    with pytest.raises(ValueError, match="Conv2d has no patch_embed"):
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
    assert cli.main([*command, "--target", "soft", "--classes", "1", "4"]) == 0
    assert {p.name for p in (files / "out").iterdir()} == {"grey.npy", "grey_one.png", "grey_four.png"}
    maps = np.load(files / "out" / "grey.npy")
    assert maps.shape == (2, 4, 4)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=1e-6)
    assert (files / "out" / "grey_one.png").read_bytes()[:4] == b"\x89PNG"
    assert "grey_four.png" in capsys.readouterr().out


def test_command_line_errors(files, capsys):
    image, plain = str(files / "grey.png"), str(files / "plain.pt")
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
