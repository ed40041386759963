"""Self-slimmed ViT: the authors' numbers, both paths, prefix tokens, what is not finite, distillation, sizes, checkpoints, bad input."""

import copy

import pytest
import system_checks
import torch
import torch.nn.functional as F
from torch import nn

import lifeops
from lifeops import cli
from lifeops.cost.model_cost import count_macs
from lifeops.losses import feature_recycling_distillation
from lifeops.models import sit
from lifeops.models.sit import ScaledBlock
from lifeops.nn import ReverseTokenSlimming, TokenSlimming
from lifeops.nn.eager_token_slimming import EagerBlock, EagerTokenSlimming
from test_checkpoints import quiet
from test_edgevit import layer_by_layer
from test_localvit import _close, _randomised, _state, golden_with_act

GOLDEN = {
    "sit_tsm_p1_16to8": lambda: TokenSlimming(12, 8, 1),
    "sit_rtsm_8to16": lambda: ReverseTokenSlimming(12, 8, 16, 2.0),
}
TINY = {"img_size": (64, 96), "embed_dim": 24, "num_heads": 3, "stage_blocks": (1, 2, 1), "num_classes": 5}


def agrees(d, module):
    x = d["x"].clone().requires_grad_()
    system_checks.agrees(d, module, x, module(x))


def build(name):
    d, module = golden_with_act(name), GOLDEN[name]().double()
    module.load_state_dict(_state(d, "param."))
    return d, module


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, backend, fused):
    d, module = build(name)
    with lifeops.use_backend(backend):
        agrees(d, module if fused else layer_by_layer(module))


def test_eager_baseline_is_the_authors():
    d, module = build("sit_tsm_p1_16to8")
    agrees(d, EagerTokenSlimming(module))
    block = _randomised(ScaledBlock(12, 3, 2.0, False, nn.Identity(), 3.0).double())
    _close(EagerBlock(block)(d["x"]), block(d["x"]), 1e-13)


# ------------------------------------------------------------------------------------------------ the module


def module(P=2, K=5, scale=1.7):
    torch.manual_seed(0)
    made = _randomised(TokenSlimming(12, K, P, hidden_ratio=0.75).double())
    nn.init.constant_(made.scale, scale)
    return made


@pytest.mark.parametrize("P", [0, 1, 3])
@pytest.mark.parametrize("N", [1, 5, 24])
def test_any_number_of_tokens(P, N):
    """Plainly, patch by patch; prefix tokens pass untouched."""
    slim, x = module(P), torch.randn(3, P + N, 12, dtype=torch.float64)
    norm, first, _, last = slim.weight
    scores = F.linear(F.gelu(F.linear(F.layer_norm(x[:, P:], (12,), norm.weight, norm.bias), first.weight, first.bias)), last.weight)
    shares = (1.7 * scores).exp() / (1.7 * scores).exp().sum(1, keepdim=True)  # the last bias is the same for every patch
    _close(slim(x)[:, P:], torch.einsum("bnk,bnc->bkc", shares, x[:, P:]), 1e-12)
    assert torch.equal(slim(x)[:, :P], x[:, :P])
    _close(slim.shares(x[:, P:]).sum(1), torch.ones(3, 5, dtype=torch.float64), 1e-12)


def test_both_paths():
    slim, x = module(), torch.randn(3, 2 + 24, 12, dtype=torch.float64)
    out = []
    for m in (copy.deepcopy(slim), layer_by_layer(slim)):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        y.square().sum().backward()
        out.append((y, leaf.grad, *[p.grad for p in m.parameters()]))
    for fast, plain in zip(*out, strict=True):
        _close(fast, plain, 1e-10)
    slim.weight[2] = nn.GELU(approximate="tanh")
    assert "weight.2: approximate is 'tanh', the kernel computes 'none'" in str(lifeops.explain(slim))
    assert (slim(x) - out[0][0]).abs().max() > 1e-6
    slim.weight[3] = nn.Linear(9, 5, bias=False).double()
    slim.weight[2] = nn.GELU()
    assert lifeops.explain(slim)[0].fused
    _close(slim(x), layer_by_layer(slim)(x), 1e-12)


def test_what_is_not_finite_stays_in_its_image():
    """One infinite patch makes the joined tokens of its image NaN, which shows; prefix tokens and other images are as they were."""
    slim, x = module().float(), torch.randn(3, 2 + 24, 12)
    expected = slim(x)
    for value in (float("inf"), float("nan")):
        broken = x.clone()
        broken[1, 7, 3] = value
        y = slim(broken)
        assert y[1, 2:].isnan().all()
        torch.testing.assert_close(y[[0, 2]], expected[[0, 2]])
        assert torch.equal(y[1, :2], x[1, :2])
    prefix = x.clone()
    prefix[1, 0] = float("inf")
    assert torch.equal(slim(prefix)[:, 2:], expected[:, 2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_scale_does_not_overflow(dtype):
    """As in the authors' code in half precision, where it makes tokens NaN: each joined token is one patch then."""
    slim = module(scale=3e4).to(dtype)
    y = slim(torch.randn(2, 2 + 24, 12).to(dtype))
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    def call(m, x, grid):
        return m(x)

    class OnGrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.slim, self.reverse = module(), ReverseTokenSlimming(12, 5, 24).double()

        def forward(self, x, grid):
            y = self.slim(x)
            return torch.cat((y[:, :2], self.reverse(y[:, 2:])), 1)

    system_checks.low_precision(OnGrid(), torch.randn(4, 2 + 24, 12, dtype=torch.float64), (4, 6), dtype)


def test_autocast_compile_export_and_transforms():
    slim, x = module().float(), torch.randn(2, 2 + 24, 12)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(slim(x)[:, 2:].float(), slim(x).float()[:, 2:], rtol=0.05, atol=0.05)
    system_checks.compiled(slim, x)
    system_checks.exported(slim, x)
    system_checks.traced(slim, x)
    system_checks.gradients_of_each_image(slim, torch.randn(3, 2 + 24, 12), 1e-4)


def test_cost():
    slim, x = module().float(), torch.randn(2, 2 + 24, 12)
    assert count_macs(lambda: slim(x)) == 2 * 24 * (12 * 9 + 9 * 5 + 5 * 12)
    reverse = ReverseTokenSlimming(12, 5, 24, 2.0)
    assert count_macs(lambda: reverse(x[:, :5])) == 2 * (12 * (5 * 48 + 48 * 24) + 24 * 2 * 12 * 24)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenSlimming(12, 0), "TokenSlimming: num_tokens must be at least 1, got 0"),
        (lambda: TokenSlimming(1, 2), "TokenSlimming: dim * hidden_ratio must be at least 1, got 1 * 0.5"),
        (
            lambda: TokenSlimming(12, 2)(torch.ones(2, 1, 12)),
            "TokenSlimming: x must have patches behind its 1 prefix tokens, got (2, 1, 12)",
        ),
        (lambda: TokenSlimming(12, 2)(torch.ones(2, 5, 8)), "TokenSlimming: x must have shape (B, N, 12), got (2, 5, 8)"),
        (lambda: ReverseTokenSlimming(12, 0, 3), "ReverseTokenSlimming: num_tokens must be at least 1, got 0"),
        (
            lambda: ReverseTokenSlimming(12, 2, 3, 0.1),
            "ReverseTokenSlimming: ratio must leave 12 channels and 3 patches a hidden unit, got 0.1",
        ),
        (lambda: ReverseTokenSlimming(12, 2, 3)(torch.ones(2, 3, 12)), "x must be (B, 2, 12), without prefix tokens, got (2, 3, 12)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------ the model


def tiny(**options):
    torch.manual_seed(0)
    return _randomised(sit(**{**TINY, **options})).eval()


def plainly(model, x):
    """(logits, patch tokens behind every block), layer by layer."""
    count = model.patch_embed.depth
    for i in range(1, count + 1):
        conv, norm = model.patch_embed.get_submodule(f"conv{i}"), model.patch_embed.get_submodule(f"bn{i}")
        x = norm(F.conv2d(x, conv.weight, stride=conv.stride, padding=1))
        x = F.gelu(x) if i < count else x
    x = torch.cat((model.cls_token.expand(len(x), -1, -1), x.flatten(2).mT), 1) + model.pos_embed
    slims, found, stages = iter(model.tsm), [], [s for s, n in enumerate(model.stage_blocks) for _ in range(n)]
    for i, block in enumerate(model.blocks):
        x = EagerBlock(block)(x)
        if i + 1 < len(stages) and stages[i + 1] != stages[i]:
            x = EagerTokenSlimming(next(slims))(x)
        recover = model.rtsm[i] if hasattr(model, "rtsm") else nn.Identity()
        found.append(recover(x[:, 1:]))
    return model.head(model.norm(x)[:, 0]), found


@pytest.mark.parametrize(
    "options", [{}, {"stem": 6, "skip": 3.0, "distill": True}, {"stage_blocks": (2,)}, {"num_tokens": (7, 7)}], ids=str
)
def test_model(options):
    model = tiny(**options).double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    logits, tokens = plainly(model, x)
    _close(model(x), logits, 1e-11)
    K = {"{}": 6}.get(str(options), 7 if "num_tokens" in options else 24 if "stage_blocks" in options else 6)
    assert model.forward_features(x).shape == (2, 1 + K, 24)
    if "distill" in options or not model.tsm:
        found = model.forward_tokens(x)
        _close(found[0], logits, 1e-11)
        for a, b in zip(found[1], tokens, strict=True):
            assert a.shape == (2, 24, 24)
            _close(a, b, 1e-11)


def test_distillation():
    """The loss plainly; a step trains everything but the frozen head, and leaves the teacher alone."""
    student, teacher = tiny(distill=True).train(), tiny(stage_blocks=(4,))
    x = torch.randn(2, 3, 64, 96)
    ours, theirs = student.forward_tokens(x), teacher.forward_tokens(x)
    loss = feature_recycling_distillation(ours, theirs, token_weight=3.0, logit_weight=0.5, temperature=2.0)
    said, known = (logits.div(2).log_softmax(1) for logits in (ours[0], theirs[0]))
    apart = torch.stack([(a - b).square().mean() for a, b in zip(ours[1], theirs[1], strict=True)]).mean()
    torch.testing.assert_close(loss, 3 * apart + 0.5 * 4 * (known.exp() * (known - said)).sum(1).mean())
    assert feature_recycling_distillation(theirs, theirs).item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert {n for n, p in student.named_parameters() if p.grad is None} == {"aux_head.weight", "aux_head.bias"}
    assert not [n for n, p in teacher.named_parameters() if p.grad is not None]
    half = feature_recycling_distillation(*((t.bfloat16(), [u.bfloat16() for u in us]) for t, us in (ours, theirs)))
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="feature_recycling_distillation: teacher must have the student's logits and tokens"):
        feature_recycling_distillation(ours, (theirs[0], theirs[1][:-1]))
    with pytest.raises(ValueError, match="SiT: forward_tokens needs distill=True"):
        tiny().forward_tokens(x)


def test_published_sizes_of_training():
    """With rtsm, as the authors' training model has it."""
    counts = {"tiny": 29_888_110, "xsmall": 47_408_414, "small": 36_691_534, "medium": 80_960_586, "large": 226_943_274}
    with torch.device("meta"):
        assert {v: sum(p.numel() for p in sit(v, distill=True).parameters()) for v in counts} == counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"img_size": 32},
            "sit: SiT: img_size and keep_ratio must leave every stage 1 to 4 patch tokens, got [4, 2, 1, 0] patch tokens in",
        ),
        ({"img_size": 40}, "sit: SiT: img_size must be a multiple of patch_size (16, 16), got (40, 40)"),
        ({"keep_ratio": 2.0}, "sit: SiT: img_size and keep_ratio must leave every stage 1 to 196 patch tokens, got [196, 392, 784, 1568]"),
        ({"num_tokens": (3,)}, "sit: SiT: num_tokens must be 3 ints, one for each stage behind the first, got (3,)"),
        ({"num_tokens": (9, 300, 4)}, "sit: SiT: num_tokens must be at most the 196 patches of images (224, 224), got (9, 300, 4)"),
        ({"stem": 5}, "sit: SiT: stem must be 4 or 6 convolutions, got 5"),
        ({"embed_dim": 36}, "sit: SiT: embed_dim must be a multiple of 8 and of num_heads 5, got 36"),
    ],
)
def test_model_errors(options, message):
    with torch.device("meta"), pytest.raises(ValueError) as error:  # noqa: PT011
        sit(**options)
    assert message in str(error.value)


def test_no_roll_out():
    with pytest.raises(ValueError, match=r"rollout: tsm.0 is TokenSlimming, behind which a token is a sum of patches"):
        lifeops.rollout(tiny(), torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training):
    model, x = tiny(), torch.randn(2, 3, 64, 96)
    model.aux_head = nn.Identity()
    system_checks.compiled(model.train(training), x)
    if not training:
        system_checks.exported(model, x)


def same(loaded, model):
    x = torch.randn(2, 3, *model.img_size)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"distill": True, "img_size": 64}, {"qkv_bias": True, "stem": 6, "skip": 4.0, "mlp_ratio": 2, "img_size": 64}], ids=str
)
def test_official(options):
    model = tiny(**options)
    load = {} if "img_size" in options else {"img_size": (64, 96)}
    same(quiet(lifeops.load_official, {"model": model.state_dict()}, **load), model)
    if "distill" in options:  # of plain tensors: the width is none of the published ones
        with pytest.raises(ValueError, match="cannot tell what a SiT of width 24 divides its residual branches by"):
            lifeops.load_official(dict(model.state_dict()), num_heads=3)


def published(variant, **options):
    """Of a published width and depth, with few hidden units."""
    torch.manual_seed(0)
    return sit(variant, mlp_ratio=0.05, num_classes=3, **options).eval()


def test_official_files_tell_no_stages():
    model = published("tiny")
    with pytest.warns(UserWarning, match=r"assumed num_heads=5, stage_blocks=\(1, 1, 1, 11\); pass num_heads=…, stage_blocks=… to say"):
        same(lifeops.load_official(dict(model.state_dict())), model)
    small = published("small", img_size=128)
    with pytest.raises(ValueError, match=r"pass stage_blocks=…, 4 ints of sum 16; of published models \(1, 1, 1, 13\) or \(9, 3, 2, 2\)"):
        lifeops.load_official(dict(small.state_dict()), num_heads=6)
    same(quiet(lifeops.load_official, dict(small.state_dict()), num_heads=6, stage_blocks=(9, 3, 2, 2)), small)
    with pytest.raises(ValueError, match="stage_blocks must be the model's own"):
        lifeops.load_official(small.state_dict(), stage_blocks=(1, 1, 1, 13))
    recycling = published("small", img_size=64, distill=True)
    same(quiet(lifeops.load_official, dict(recycling.state_dict()), num_heads=6), recycling)
    with pytest.raises(ValueError, match="its rtsm recovers 16 patch tokens: img_size must have as many, got 64"):
        lifeops.load_official(recycling.state_dict(), img_size=128)


def test_official_at_another_size():
    """Positions are resampled, the numbers of joined tokens stay; the head may be another."""
    model = tiny(img_size=64)
    with pytest.warns(UserWarning, match="a new head for 7 classes"):
        loaded = lifeops.load_official(model.state_dict(), img_size=(96, 64), num_classes=7)
    assert loaded.num_tokens == (24, 8, 4)
    assert (loaded.head.out_features, loaded.aux_head.out_features) == (7, 7)
    assert loaded(torch.randn(1, 3, 96, 64)).shape == (1, 7)


def test_flops_command(capsys):
    pytest.importorskip("rich")
    assert cli.main(["flops", "sit_tiny"]) == 0
    out = capsys.readouterr().out
    assert "│ sit " in out
    assert all(number in out for number in ("15.873", "0.9875", "15.9 / 1", "arXiv 2111.12624"))
