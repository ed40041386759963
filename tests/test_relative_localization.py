"""Dense relative localisation: the authors' numbers, non-square grids, drawn pairs, the schedule, bad input."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from lifeops.cost.model_cost import count_macs
from lifeops.losses import RelativeLocalizationHead, dense_relative_localization, relative_localization_weight
from lifeops.losses.eager_relative_localization import eager_relative_localization
from test_localvit import _close, _state, golden_with_act

L1 = {"l1_paper": None, "l1_signed": None, "l1_abs": "none", "l1_abs_norm": "code", "l1_signed_norm": "code"}
CLASSES = dict.fromkeys(f"{mode}_{kind}" for mode in ("ce", "cbr") for kind in ("signed", "abs"))
GRID, P = (4, 6), 2


def build(name):
    d = golden_with_act(f"drloc_{name}")
    mode, signed = name.split("_")[0], not d["use_abs"]
    head = RelativeLocalizationHead(6, mode, signed=signed, grid=None if mode == "l1" else (5, 5), hidden_dim=16).double()
    head.load_state_dict(_state(d, "param."))
    return d, head


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("name", [*L1, *CLASSES])
def test_golden(name, prefix):
    """The loss and its gradients to 1e-10, whatever prefix tokens there are."""
    d, head = build(name)
    patches = d["x"].flatten(2).transpose(1, 2)
    x = torch.cat((torch.randn(2, prefix, 6, dtype=torch.float64), patches), 1).requires_grad_()
    options = {"normalize": {**L1, **CLASSES}[name], "pairs": (d["pts_a"], d["pts_b"])}
    loss = dense_relative_localization(x, (5, 5), prefix, head=head, **options)
    _close(loss, d["y"][0])
    loss.backward(d["g"][0])
    _close(x.grad[:, prefix:], d["grad_x"].flatten(2).transpose(1, 2))
    assert not x.grad[:, :prefix].any()
    for key, parameter in head.named_parameters():
        _close(parameter.grad, d[f"grad.{key}"])


def test_eager_baseline_is_the_authors():
    d, head = build("l1_paper")
    x = d["x"].flatten(2).transpose(1, 2)
    _close(eager_relative_localization(x, (5, 5), 0, head, (d["pts_a"], d["pts_b"])), d["y"][0])


def case(mode, signed, grid=GRID):
    torch.manual_seed(0)
    head = RelativeLocalizationHead(8, mode, signed=signed, grid=None if mode == "l1" else grid, hidden_dim=16).double()
    return head, torch.randn(3, P + grid[0] * grid[1], 8, dtype=torch.float64)


def plainly(head, x, grid, a, b, normalize):
    """Pair by pair."""
    total, count = 0.0, 0
    for i in range(len(x)):
        patches = x[i, P:].reshape(*grid, -1)
        for first, second in zip(a[i].tolist(), b[i].tolist(), strict=True):
            found = head(torch.cat((patches[tuple(first)], patches[tuple(second)])))
            for axis, n in enumerate(grid):
                d = first[axis] - second[axis]
                t = d + n - 1 if head.signed else abs(d)
                t /= {"paper": n, "code": max(1, (2 if head.signed else 1) * (n - 1)), "none": 1}[normalize]
                if head.mode == "l1":
                    total = total + (found[axis] - t).abs() / 2
                elif head.mode == "ce":
                    total = total - F.log_softmax(found[axis], 0)[int(t)]
                else:
                    p, classes = found[axis].softmax(0), torch.arange(len(found[axis]))
                    mean = (p * classes).sum()
                    variance = (p * (classes - mean) ** 2).sum() + 1e-8
                    total = total + (mean - t) ** 2 / variance + 1e-3 * variance.log()
            count += 1
    return total / count


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (1, 5)], ids=str)
@pytest.mark.parametrize(
    ("mode", "signed", "normalize"),
    [
        ("l1", False, "paper"),
        ("l1", False, "code"),
        ("l1", True, "code"),
        ("l1", True, "none"),
        ("ce", True, "none"),
        ("cbr", False, "none"),
    ],
)
def test_any_grid(mode, signed, normalize, grid):
    """Rows and columns have lengths of their own; the pairs that a generator draws are those of the same generator."""
    head, x = case(mode, signed, grid)
    pairs = drawn(grid, 3, 20)
    found = dense_relative_localization(x, grid, P, head=head, num_pairs=20, normalize=normalize, generator=seeded())
    _close(found, plainly(head, x, grid, *pairs, normalize), 1e-12)
    _close(dense_relative_localization(x, grid, P, head=head, normalize=normalize, pairs=pairs), found, 0)


def seeded():
    return torch.Generator().manual_seed(3)


def drawn(grid, batch, count):
    generator = seeded()
    return tuple(torch.stack([torch.randint(n, (2, batch, count), generator=generator) for n in grid], -1))


def test_drawn_pairs_reach_every_patch_and_no_prefix():
    head, x = case("l1", False)
    x.requires_grad_()
    dense_relative_localization(x, GRID, P, head=head, num_pairs=500, generator=seeded()).backward()
    reached = x.grad.abs().sum(2) > 0
    assert reached[:, P:].all()
    assert not reached[:, :P].any()
    torch.manual_seed(5)
    first = dense_relative_localization(x, GRID, P, head=head)
    assert dense_relative_localization(x, GRID, P, head=head) != first
    torch.manual_seed(5)
    assert dense_relative_localization(x, GRID, P, head=head) == first


def test_the_head_learns_offsets():
    """Tokens that carry their position: the loss falls."""
    torch.manual_seed(0)
    head = RelativeLocalizationHead(2, hidden_dim=32)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 6), indexing="ij")
    x = torch.stack((rows, columns), -1).flatten(0, 1).expand(4, -1, -1)
    adam, losses = torch.optim.Adam(head.parameters(), 3e-3), []
    for _ in range(150):
        losses.append(dense_relative_localization(x, GRID, head=head, num_pairs=64, generator=None))
        adam.zero_grad()
        losses[-1].backward()
        adam.step()
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("mode", ["l1", "ce", "cbr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype, mode):
    head, x = case(mode, False)
    expected, low = dense_relative_localization(x, GRID, P, head=head, generator=seeded()), copy.deepcopy(head).to(dtype)
    found = dense_relative_localization(x.to(dtype), GRID, P, head=low, generator=seeded())
    assert found.dtype == torch.float32
    found.backward()
    assert all(p.grad.dtype == dtype for p in low.parameters())
    assert abs(found.item() - expected.item()) < (1e-5 if dtype == torch.float32 else 0.03) * abs(expected.item())


def test_autocast_compile_and_transforms():
    head, x = case("ce", True)
    head, x = head.float(), x.float()
    pairs = drawn(GRID, 3, 5)
    expected = dense_relative_localization(x, GRID, P, head=head, pairs=pairs)
    with torch.autocast("cpu", torch.bfloat16):
        found = dense_relative_localization(x, GRID, P, head=head, pairs=pairs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)

    def step(x, a, b):
        return dense_relative_localization(x, GRID, P, head=head, pairs=(a, b))

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(x, *pairs), expected)
    compiled = torch.compile(lambda x: dense_relative_localization(x, GRID, P, head=head), fullgraph=True, backend="aot_eager")
    assert math.isfinite(compiled(x).item())


def test_no_images():
    for mode in ("l1", "ce"):
        head, x = case(mode, False)
        loss = dense_relative_localization(x[:0], GRID, P, head=head)
        loss.backward()
        assert loss == 0
        assert all(not p.grad.any() for p in head.parameters())


def test_flops_are_counted():
    head, x = case("ce", True)
    macs = 3 * 32 * (16 * 16 + 16 * 16 + 16 * 16 + 16 * (7 + 11))
    assert count_macs(lambda: dense_relative_localization(x, GRID, P, head=head)) == macs


def test_weight():
    epochs = torch.linspace(0, 100, 101).tolist()
    weights = [relative_localization_weight(e, 100) for e in epochs]
    expected = [0.5 * e / 20 if e < 20 else 0.5 * (1 - (e - 20) / 80) for e in epochs]
    assert weights == pytest.approx(expected)
    assert (weights[0], weights[20], weights[100]) == (0, 0.5, 0)
    assert relative_localization_weight(20, 20) == 0.5
    assert relative_localization_weight(0, 10, weight=2, warmup_epochs=0) == 2


def test_state_dict_remembers_the_mode():
    head, _ = case("ce", True)
    twin = RelativeLocalizationHead(8, "ce", grid=(7, 11), hidden_dim=16)  # as many classes, of absolute offsets
    with pytest.raises(RuntimeError, match="saved with signed=True, this module has signed=False"):
        twin.load_state_dict(head.state_dict())
    assert repr(head).startswith("RelativeLocalizationHead(\n  dim=8, mode='ce', signed=True, grid=(4, 6)")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RelativeLocalizationHead(8, "ce"), "RelativeLocalizationHead: grid must be a patch grid with mode 'ce', got None"),
        (lambda: RelativeLocalizationHead(8, grid=(2, 3)), "RelativeLocalizationHead: grid must be None with mode 'l1', got (2, 3)"),
        (lambda: RelativeLocalizationHead(8, "l2"), "RelativeLocalizationHead: mode must be one of 'l1', 'ce', 'cbr', got 'l2'"),
        (lambda: RelativeLocalizationHead(8)(torch.ones(2, 8)), "RelativeLocalizationHead: pairs must have shape (…, 16), got (2, 8)"),
        (lambda: run(grid=(4, 5)), "dense_relative_localization: tokens.shape[1] must be P + H*W = 2 + 4*5 = 22, got 26"),
        (lambda: run(grid=(0, 6), x=torch.randn(1, 2, 8)), "dense_relative_localization: grid must have patches, got (0, 6)"),
        (lambda: run("ce", grid=(6, 4)), "dense_relative_localization: grid must be the head's, (4, 6), got (6, 4)"),
        (lambda: run("ce", normalize="code"), "normalize must be 'none' for 'ce' of absolute offsets, or None, got 'code'"),
        (lambda: run(signed=True, normalize="paper"), "normalize must be 'none' for 'l1' of signed offsets, or None, got 'paper'"),
        (
            lambda: run(pairs=(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))),
            "pairs must be two int64 tensors (1, m, 2), got (1, 2, 2) of torch",
        ),
        (
            lambda: run(pairs=points([[4, 0]])),
            "dense_relative_localization: pairs must lie on the grid (4, 6), got rows and columns outside",
        ),
        (lambda: run(pairs=points([[0, -1]])), "dense_relative_localization: pairs must lie on the grid (4, 6)"),
        (lambda: relative_localization_weight(11, 10), "relative_localization_weight: epoch must be in [0, 10], got 11"),
        (lambda: relative_localization_weight(1, 10), "relative_localization_weight: warmup_epochs must be at most epochs 10, got 20"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert message in str(error.value)


def points(rows):
    return torch.tensor([rows]), torch.zeros(1, len(rows), 2, dtype=torch.int64)


def run(mode="l1", *, signed=False, grid=GRID, x=None, **options):
    head, tokens = case(mode, signed)
    return dense_relative_localization(tokens[:1] if x is None else x, grid, P, head=head.float() if x is not None else head, **options)
