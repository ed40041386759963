"""Dense relative localisation (arXiv 2106.03746): of two patches' tokens a small network tells how far apart they lie on the grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops import geometry
from lifeops.arguments import check_choice, check_factory, check_flags, check_generator, check_int, check_number, check_tensor, got
from lifeops.nn.inputs import check_input, check_like
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.told import ToldInMetadata

NAME, HEAD, WEIGHT = "dense_relative_localization", "RelativeLocalizationHead", "relative_localization_weight"
MODES = ("l1", "ce", "cbr")
NORMALIZE = ("paper", "code", "none")
EPS, LOG_VARIANCE = 1e-8, 1e-3  # of "cbr"


class RelativeLocalizationHead(ToldInMetadata):
    """The network that reads a pair of tokens, [first ; second] (…, 2C): three dense layers with ReLU between them.

        "l1"            (…, 2)                                          the offset of the rows and of the columns
        "ce", "cbr"     (…, classes of H), (…, classes of W)            logits of the offsets: 2n - 1 signed, n absolute for n patches

    State-dict keys are the authors' (``layers.{0,2,4}``, of "ce" and "cbr" ``unshared.{0,1}`` behind them).

    Args:
        dim: C. mode: "l1", "ce" or "cbr" (the mean and variance of the classes are scored).
        signed: whether offsets have a sign; the paper's have none, those of its authors' code do.
        grid: (H, W), which "ce" and "cbr" need: their classes are its offsets. The authors' heads are those of 14 x 14.
        hidden_dim: width of the layers.

    Raises ValueError for an unknown mode and sizes that do not fit.
    """

    told = "mode", "signed"

    def __init__(self, dim, mode="l1", *, signed=False, grid=None, hidden_dim=512, device=None, dtype=None):
        super().__init__()
        dim, hidden_dim = check_int(HEAD, "dim", dim, 1), check_int(HEAD, "hidden_dim", hidden_dim, 1)
        check_choice(HEAD, "mode", mode, MODES), check_flags(HEAD, signed=signed)
        grid, dd = geometry.fixed_grid(HEAD, grid, 0), check_factory(HEAD, device, dtype)
        if (mode == "l1") != (grid is None) or (grid is not None and 0 in grid):
            raise ValueError(f"{HEAD}: grid must be {'None' if mode == 'l1' else 'a patch grid'} with mode {mode!r}, got {got(grid)}")
        self.dim, self.mode, self.signed, self.grid = dim, mode, bool(signed), grid
        widths = 2 * dim, hidden_dim, hidden_dim, 2 if mode == "l1" else hidden_dim
        first, second, third = (nn.Linear(*widths[i : i + 2], **dd) for i in range(3))
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        if mode != "l1":
            self.unshared = nn.ModuleList(nn.Linear(hidden_dim, 2 * n - 1 if signed else n, **dd) for n in grid)

    def forward(self, pairs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Features of pairs (…, 2C) to offsets or logits."""
        check_tensor(HEAD, "pairs", pairs)
        if pairs.dim() < 1 or pairs.shape[-1] != 2 * self.dim:
            raise ValueError(f"{HEAD}: pairs must have shape (…, {2 * self.dim}), got {tuple(pairs.shape)}")
        check_like(HEAD, "pairs", pairs, self.layers[0])
        found = self.layers(pairs)
        return found if self.mode == "l1" else tuple(layer(found) for layer in self.unshared)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, mode={self.mode!r}, signed={self.signed}" + ("" if self.grid is None else f", grid={self.grid}")


def dense_relative_localization(
    tokens: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0, *, head: RelativeLocalizationHead, num_pairs: int = 32,
    normalize: str | None = None, pairs: tuple[Tensor, Tensor] | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """How badly ``head`` tells from pairs of patch tokens how far apart they lie: a loss () to add, weighted, to the task's.

    Of every image m pairs of patches a, b are drawn uniformly, each with replacement. With d = (row, column) of a less that of b on an
    axis n patches long, the target t and the loss, a mean over all pairs, are

        "l1"    |p - t|, the mean of both axes      t = |d| / n             normalize "paper"
                                                    t = |d| or d + n - 1    "none"
                                                    t = |d| / (n - 1) or (d + n - 1) / (2n - 2)     "code"; 0 on an axis of one patch
        "ce"    - log softmax(p)_t, the sum of both axes            t = |d| or d + n - 1, a class
        "cbr"   (μ - t)² / (σ² + 1e-8) + 0.001 log(σ² + 1e-8)       the same; μ and σ² of the classes under softmax(p); sum of both axes

    with |d| for a head of absolute offsets and d + n - 1 for a signed one. Rows and columns have a length of their own, so grids need not
    be square. Prefix tokens are never drawn.

    Args:
        tokens: (B, P + H*W, C), in any floating dtype; the loss of half precision is computed in float32.
        grid: (H, W). num_prefix_tokens: P >= 0.
        head: the network. It trains with the model, which is served without it.
        num_pairs: m.
        normalize: of "l1" alone; None is "paper" for absolute offsets, "none" for signed ones (the authors' default).
        pairs: (a, b), each (B, m, 2) int64 of rows and columns, instead of drawn ones.
        generator: draws the pairs, on its own device.

    Raises ValueError or TypeError for a grid without patches, pairs outside the grid, and a normalisation that does not belong to the
    head. Source: Liu et al., "Efficient Training of Visual Transformers with Small Datasets", section 4.
    """
    if not isinstance(head, RelativeLocalizationHead):
        raise TypeError(f"{NAME}: head must be a RelativeLocalizationHead, got {got(head)}")
    grid = check_input(NAME, tokens, head.dim, grid, num_prefix_tokens, "tokens")
    if 0 in grid:
        raise ValueError(f"{NAME}: grid must have patches, got {grid}")
    if head.grid not in (None, grid):
        raise ValueError(f"{NAME}: grid must be the head's, {head.grid}, got {grid}")
    divisors = _divisors(head, normalize, grid)
    check_like(NAME, "tokens", tokens, head.layers[0])
    first, second = _pairs(tokens, grid, num_pairs, pairs, generator)
    row, column = torch.cat((first, second), 1).unbind(2)
    places = (row * grid[1] + column + num_prefix_tokens)[:, :, None]
    picked = tokens.gather(1, places.expand(-1, -1, head.dim))
    found = head(torch.cat(picked.chunk(2, 1), 2).flatten(0, 1))
    offsets = (first - second).flatten(0, 1)
    targets = offsets + offsets.new_tensor([n - 1 for n in grid]) if head.signed else offsets.abs()
    return _loss(head.mode, found, targets, divisors)


def _divisors(head: RelativeLocalizationHead, normalize: str | None, grid: tuple[int, int]) -> list[int]:
    """What the target of each axis is divided by."""
    if normalize is None:
        normalize = "paper" if head.mode == "l1" and not head.signed else "none"
    check_choice(NAME, "normalize", normalize, NORMALIZE)
    if normalize != "none" and (head.mode != "l1" or (normalize == "paper" and head.signed)):
        kind = "signed" if head.signed else "absolute"
        raise ValueError(f"{NAME}: normalize must be 'none' for {head.mode!r} of {kind} offsets, or None, got {normalize!r}")
    if normalize == "code":
        return [max(1, (n - 1) * (2 if head.signed else 1)) for n in grid]
    return list(grid) if normalize == "paper" else [1, 1]


def _pairs(tokens, grid, num_pairs, pairs, generator) -> tuple[Tensor, Tensor]:
    """(a, b), each (B, m, 2)."""
    num_pairs = check_int(NAME, "num_pairs", num_pairs, 1)
    check_generator(NAME, generator)
    B, device = tokens.shape[0], tokens.device
    if pairs is None:
        where = device if generator is None else generator.device
        drawn = [torch.randint(n, (2, B, num_pairs), generator=generator, device=where) for n in grid]
        return tuple(torch.stack(drawn, -1).to(device))
    if not isinstance(pairs, (tuple, list)) or len(pairs) != 2 or not all(isinstance(t, Tensor) for t in pairs):
        raise TypeError(f"{NAME}: pairs must be two tensors (B, m, 2), got {got(pairs)}")
    first, second = pairs
    fits = all(t.dim() == 3 and t.shape[0] == B and t.shape[2] == 2 and t.dtype == torch.int64 for t in pairs)
    if not fits or first.shape != second.shape or first.shape[1] == 0:
        shapes = " and ".join(f"{tuple(t.shape)} of {t.dtype}" for t in pairs)
        raise ValueError(f"{NAME}: pairs must be two int64 tensors ({B}, m, 2), got {shapes}")
    both, limits = torch.stack((first, second)).to(device), torch.tensor(grid, device=device)
    if ((both < 0) | (both >= limits)).any():
        raise ValueError(f"{NAME}: pairs must lie on the grid {grid}, got rows and columns outside it")
    return both[0], both[1]


def _loss(mode: str, found, targets: Tensor, divisors: list[int]) -> Tensor:
    if targets.shape[0] == 0:  # no image: a loss of 0 that has a gradient
        return sum(t.sum() for t in found) if mode != "l1" else found.sum()
    if mode == "l1":
        wide = accumulate_dtype(found.dtype)
        return F.l1_loss(found.to(wide), targets / torch.tensor(divisors, dtype=wide, device=targets.device))
    axes = [(logits.to(accumulate_dtype(logits.dtype)), t) for logits, t in zip(found, targets.unbind(1), strict=True)]
    return sum((F.cross_entropy if mode == "ce" else _cbr)(logits, t) for logits, t in axes)


def _cbr(logits: Tensor, target: Tensor) -> Tensor:
    """The target under a normal distribution with the classes' mean and variance, but for the log variance's weight."""
    p, classes = logits.softmax(1), torch.arange(logits.shape[1], dtype=logits.dtype, device=logits.device)
    mean = p @ classes
    variance = (p * (classes - mean[:, None]).square()).sum(1) + EPS
    return ((mean - target).square() / variance + LOG_VARIANCE * variance.log()).mean()


def relative_localization_weight(epoch: float, epochs: int, *, weight: float = 0.5, warmup_epochs: int = 20) -> float:
    """What the loss is multiplied by in ``epoch`` of ``epochs``: it rises linearly to ``weight`` and falls linearly to 0.

        weight * epoch / warmup_epochs                                                  up to warmup_epochs
        weight * (1 - (epoch - warmup_epochs) / (epochs - warmup_epochs))               behind it

    ``epoch`` may be fractional. Raises ValueError for one outside [0, epochs], and a warm-up longer than the training. The authors' code
    has this schedule.
    """
    epochs, warmup_epochs = check_int(WEIGHT, "epochs", epochs, 1), check_int(WEIGHT, "warmup_epochs", warmup_epochs, 0)
    weight = check_number(WEIGHT, "weight", weight)
    epoch = check_number(WEIGHT, "epoch", epoch, f"in [0, {epochs}]", lambda e: 0 <= e <= epochs)
    if warmup_epochs > epochs:
        raise ValueError(f"{WEIGHT}: warmup_epochs must be at most epochs {epochs}, got {warmup_epochs}")
    if epoch < warmup_epochs:
        return weight * epoch / warmup_epochs
    return weight * (1 - (epoch - warmup_epochs) / max(1, epochs - warmup_epochs))
