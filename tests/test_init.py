"""Structured initialisation: the authors' numbers, the solvers, the figures of ViT-T, every message."""

import io
import re
import sys

import pytest
import torch
import torch.nn.functional as F

from lifeops.init import head_offsets, impulse_qk, optimised_qk, sincos_position_embedding, structured_
from lifeops.init.offsets import random_offsets, shift_matrix, shift_targets
from lifeops.models import VisionTransformer
from test_life import golden

SMALL = {"grid": (5, 4), "num_heads": 2, "head_dim": 6}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def embedding(rows=20, dim=16, seed=0):
    return torch.randn(rows, dim, generator=generator(seed))


# offsets ------------------------------------------------------------------------------------------------------------------


def test_offsets_are_the_authors_order_and_cycle():
    flat = [(dy + 1) * 3 + dx + 1 for dy, dx in head_offsets(12)]
    assert flat == [4, 1, 5, 3, 7, 0, 2, 6, 8, 4, 1, 5]
    five = head_offsets(27, kernel_size=5)
    assert five[:9] == head_offsets(9)
    assert len(set(five[:25])) == 25
    assert five[25:] == five[:2]
    assert max(max(map(abs, o)) for o in five) == 2


def test_shift_matrix_moves_patches():
    S = shift_matrix((3, 4), (-1, 2))
    image = torch.arange(12.0).view(3, 4)
    moved = (S @ image.flatten()).view(3, 4)
    expected = torch.zeros(3, 4)
    expected[1:, :2] = image[:-1, 2:]  # row r sees row r - 1, column q sees column q + 2
    assert torch.equal(moved, expected)
    rows, targets = shift_targets((3, 4), (-1, 2))
    assert torch.equal(S.nonzero(), torch.stack((rows, targets), 1))
    assert len(shift_targets((1, 2), (1, 0))[0]) == 0


def test_random_offsets():
    drawn = random_offsets(2000, 5, generator())
    assert set(drawn) == set(head_offsets(25, 5))
    assert drawn == random_offsets(2000, 5, generator())


# the closed form ----------------------------------------------------------------------------------------------------------


def test_impulse_golden():
    """The authors' numbers: Q·K to 1e-5 of its largest entry, attention to 2e-5. Q and K alone are not unique."""
    case = golden("impulse2025_h3_5x5_d8")
    d = int(case["head_dim"])
    Q, K = impulse_qk(case["E"], grid=tuple(case["grid"].tolist()), num_heads=int(case["heads"]), head_dim=d, noise=case["noise"])
    assert Q.dtype == K.dtype == torch.float32
    torch.testing.assert_close(Q @ K, case["QK"], rtol=0, atol=1e-5 * case["QK"].abs().max().item())
    X = F.layer_norm(case["E"], case["E"].shape[-1:])
    attention = (49 * X @ Q @ K @ X.T * d**-0.5).softmax(-1)
    torch.testing.assert_close(attention, case["attention"], rtol=0, atol=2e-5)


def test_impulse_is_the_full_svd():
    """The d x d route equals the formula's C x C one."""
    E, noise = embedding().double(), torch.randn(2, 20, 20, generator=generator(1)).double()
    Q, K = impulse_qk(E, **SMALL, noise=noise)
    X = F.layer_norm(E, E.shape[-1:])
    U, S, Vh = torch.linalg.svd(X.T @ X)
    inverse = Vh[:6].T @ torch.diag(1 / S[:6]) @ U[:, :6].T @ X.T
    for i, offset in enumerate(head_offsets(2)):
        shift = shift_matrix((5, 4), offset, torch.float64)
        u, s, vh = torch.linalg.svd(inverse @ (1000 * shift + 3 * noise[i] * (shift == 0)) @ inverse.T)
        root = s[:6].sqrt()
        expected = (u[:, :6] * root / root.norm()) @ (root[:, None] / root.norm() * vh[:6])
        torch.testing.assert_close(Q[i] @ K[i], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(Q.flatten(1).norm(dim=1), torch.ones(2).double())
    torch.testing.assert_close(K.flatten(1).norm(dim=1), torch.ones(2).double())


def test_impulse_is_reproducible():
    state = torch.random.get_rng_state()
    first = impulse_qk(embedding(), **SMALL, generator=generator(3))
    second = impulse_qk(embedding(), **SMALL, generator=generator(3))
    other = impulse_qk(embedding(), **SMALL, generator=generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0] @ first[1], other[0] @ other[1])
    assert torch.equal(state, torch.random.get_rng_state())


def test_impulse_at_any_thread_count(threads):
    results = []
    for count in (1, 2):
        threads(count)
        results.append(impulse_qk(embedding(), **SMALL, generator=generator()))
        assert torch.get_num_threads() == count
    assert torch.equal(results[0][0], results[1][0])


def test_half_precision_embedding():
    E = embedding().bfloat16()
    Q, K = impulse_qk(E, **SMALL, generator=generator())
    expected, _ = impulse_qk(E.float(), **SMALL, generator=generator())
    assert Q.dtype == K.dtype == torch.float32
    assert torch.equal(Q, expected)


class OfAGPU(torch.Generator):
    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"head_dim": 20}, ValueError, "head width must be smaller than the number of patches 5*4 = 20, got 20"),
        ({"head_dim": 16}, ValueError, "head width must be smaller than the 16 channels"),
        ({"grid": (4, 4)}, ValueError, "must have shape (4*4 = 16, C), patches only, got (20, 16)"),
        ({"grid": 20}, TypeError, "impulse_qk: grid must be two ints (H, W), got 20"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"kernel_size": 7}, ValueError, "kernel_size must be 3 or 5, got 7"),
        ({"noise": torch.zeros(2, 20, 19)}, ValueError, "noise must have shape (h, N, N) = (2, 20, 20), got (2, 20, 19)"),
        ({"generator": OfAGPU()}, ValueError, "generator must be a CPU generator (numbers are drawn on the CPU and copied), got cuda"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"E": torch.zeros(20, 16)}, ValueError, "has rank 0, less than the head width 6"),
        ({"E": sincos_position_embedding((5, 4), 16), "head_dim": 12}, ValueError, "less than the head width 12"),
        ({"E": torch.full((20, 16), float("nan"))}, ValueError, "must be finite"),
        ({"E": torch.zeros(20, 16, dtype=torch.int64)}, TypeError, "must be a floating-point tensor, got torch.int64"),
    ],
)
def test_impulse_errors(changes, error, message):
    arguments = {"E": embedding(), **SMALL, **changes}
    with pytest.raises(error, match=re.escape(message)):
        impulse_qk(arguments.pop("E"), **arguments)


# ViT-T -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_t():
    torch.manual_seed(0)
    model = VisionTransformer()
    before = model.pos_embed.detach().clone()
    return model, before, structured_(model, generator=generator())


def test_vit_t_has_the_published_impulses(vit_t):
    _, _, report = vit_t
    assert report.num_layers == 12
    for head, (mass, offset) in enumerate(((0.997, (0, 0)), (0.795, (-1, 0)), (0.806, (0, 1)))):
        measured = [h for h in report.heads if h.head == head]
        assert len(measured) == 12
        assert all(h.offset == offset for h in measured)
        assert all(h.mass == pytest.approx(mass, abs=0.03) for h in measured)
        assert min(h.hit_rate for h in measured) >= 0.98
    assert report.diagonals == pytest.approx([-0.398] * 12, abs=0.02)
    text = str(report)
    assert "impulse 2025: 12 layers" in text
    assert re.search(r"head 1: offset \(-1, 0\), mean attention mass 0\.7\d\d, hits", text)


def test_vit_t_norms_and_position_embedding(vit_t):
    model, before, _ = vit_t
    torch.testing.assert_close(model.pos_embed, 18 * before)  # prefix row included
    for block in model.blocks:
        q, k, _ = block.attn.qkv.weight.detach().unflatten(0, (3, 3, 64))
        torch.testing.assert_close(q.flatten(1).norm(dim=1), torch.full((3,), 7.0))
        torch.testing.assert_close(k.flatten(1).norm(dim=1), torch.full((3,), 7.0))
        assert not block.attn.qkv.bias.any()
    assert not torch.equal(model.blocks[0].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def test_report_is_what_the_model_computes(vit_t):
    """The model's own attention on a blank image with silent patch embedding, class token left out of the softmax."""
    model, _, report = vit_t
    block = model.blocks[4]
    x = F.layer_norm(model.pos_embed.detach()[:, 1:], (192,))
    q, k, _ = block.attn.qkv(x).detach().reshape(1, 196, 3, 3, 64).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(-2, -1) / 8).softmax(-1)[0]
    for h in report.layer(4):
        rows, targets = shift_targets((14, 14), h.offset)
        assert attention[h.head, rows, targets].mean().item() == pytest.approx(h.mass, abs=1e-4)


# the optimised form -------------------------------------------------------------------------------------------------------

FIT = {"grid": (6, 5), "num_heads": 2, "head_dim": 16, "offsets": [[(0, 0), (0, 1)]]}
AUTHORS_LOSS = 0.0248
"""Where the authors' run ends on FIT: optimised_qk(…, warm_start=False, steps=10000, seed 0) takes a quarter of a minute."""


def test_warm_start_saves_nine_tenths_of_the_steps():
    E = sincos_position_embedding((6, 5), 32)
    cold = optimised_qk(E, **FIT, steps=300, warm_start=False, generator=generator())
    untrained = optimised_qk(E, **FIT, steps=0, warm_start=False, generator=generator())
    warm = optimised_qk(E, **FIT, steps=30, generator=generator())
    assert cold.loss.item() < 0.98 * untrained.loss.item()  # the baseline does learn
    assert warm.loss.item() < cold.loss.item()
    assert warm.loss.item() < AUTHORS_LOSS


def test_optimised_layers_are_independent():
    E = sincos_position_embedding((4, 3), 16)
    sizes = {"grid": (4, 3), "num_heads": 2, "head_dim": 8, "steps": 30}
    layers = optimised_qk(E, **sizes, num_layers=3, kernel_size=5, generator=generator())
    assert layers.Q.shape == (3, 2, 16, 8)
    assert layers.K.shape == (3, 2, 8, 16)
    assert layers.loss.shape == (3,)
    assert [len(o) for o in layers.offsets] == [2, 2, 2]
    again = optimised_qk(E, **sizes, num_layers=3, kernel_size=5, generator=generator())
    assert torch.equal(layers.Q, again.Q)
    assert layers.offsets == again.offsets


def test_optimised_columns_have_the_authors_norm():
    E = sincos_position_embedding((4, 3), 16)
    fit = optimised_qk(E, grid=(4, 3), num_heads=2, head_dim=8, steps=0, generator=generator())
    norm = torch.tensor((16 / (3 * 8 * 2)) ** 0.5)
    for t in (fit.Q, fit.K):
        torch.testing.assert_close(t.norm(dim=-2), norm.expand(1, 2, t.shape[-1]))


@pytest.mark.parametrize("rich", ["in a terminal", "elsewhere", "missing"])
def test_the_bar_of_the_optimisation(rich, monkeypatch):
    """Is shown in a terminal where rich is installed, and changes no number."""
    console, shown = pytest.importorskip("rich.console"), io.StringIO()
    made = console.Console(file=shown, force_terminal=rich == "in a terminal")
    monkeypatch.setattr(console, "Console", lambda **options: made)
    if rich == "missing":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    E, sizes = sincos_position_embedding((4, 3), 16), {"grid": (4, 3), "num_heads": 2, "head_dim": 8, "steps": 3}
    fits = [optimised_qk(E, **sizes, progress=progress, generator=generator()) for progress in (False, True)]
    assert torch.equal(fits[0].Q, fits[1].Q)
    assert ("fitting impulses" in shown.getvalue(), "100%" in shown.getvalue()) == ((rich == "in a terminal",) * 2)


def test_sincos_tells_shifts_apart():
    E = sincos_position_embedding((4, 6), 16)
    products = (E @ E.T).view(4, 6, 4, 6)
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 3, 3, 5])  # depends on the displacement alone
    assert E.shape == (24, 16)
    with pytest.raises(ValueError, match="multiple of 4, got 18"):
        sincos_position_embedding((4, 6), 18)


def test_optimised_errors():
    E = sincos_position_embedding((4, 3), 16)
    sizes = {"grid": (4, 3), "num_heads": 2, "head_dim": 8}
    with pytest.raises(ValueError, match=r"offsets must be 1 lists of 2 pairs, got \[1\]"):
        optimised_qk(E, **sizes, offsets=[[(0, 0)]])
    with pytest.raises(ValueError, match="steps must be at least 0"):
        optimised_qk(E, **sizes, steps=-1)
    with pytest.raises(ValueError, match="optimised_qk: the head width must be smaller"):
        optimised_qk(E, **{**sizes, "head_dim": 12})
    with pytest.raises(ValueError, match="kernel_size must be 3 or 5, got 4"):
        optimised_qk(E, **sizes, kernel_size=4)
