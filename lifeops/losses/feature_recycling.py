"""Self-slimmed ViT's distillation (arXiv 2111.12624) from a teacher that keeps all its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lifeops.arguments import check_number, check_positive, check_tensor, got
from lifeops.losses.distillation import logit_distillation, widened

NAME = "feature_recycling_distillation"


def feature_recycling_distillation(
    student: tuple[Tensor, Sequence[Tensor]], teacher: tuple[Tensor, Sequence[Tensor]], *, token_weight: float = 2.0,
    logit_weight: float = 2.0, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """What a self-slimmed student has not of its teacher, a loss () to add to that of the labels:

        token_weight * mean over the L layers of MSE(student tokens, teacher tokens)
            + logit_weight * T² * KL(softmax(teacher / T) || softmax(student / T)), a mean over the images

    Args:
        student, teacher: (logits (B, classes), tokens (B, N, C) of each of L layers), as ``lifeops.models.SiT.forward_tokens`` gives
            them. Of the teacher nothing has a gradient.
        token_weight, logit_weight: the authors' numbers by default. temperature: T.

    Half precision is computed in float32. Raises ValueError where the two do not match.
    """
    weights = check_number(NAME, "token_weight", token_weight), check_number(NAME, "logit_weight", logit_weight)
    T = check_positive(NAME, "temperature", temperature)
    (logits, tokens), (taught, targets) = _read("student", student), _read("teacher", teacher)
    if [tuple(t.shape) for t in (logits, *tokens)] != [tuple(t.shape) for t in (taught, *targets)]:
        shapes = [tuple(t.shape) for t in (logits, *tokens)], [tuple(t.shape) for t in (taught, *targets)]
        raise ValueError(f"{NAME}: teacher must have the student's logits and tokens {shapes[0]}, got {shapes[1]}")
    pairs = zip(tokens, targets, strict=True)
    apart = sum(F.mse_loss(widened(t), widened(other.detach())) for t, other in pairs) / len(tokens)
    return weights[0] * apart + weights[1] * logit_distillation(logits, taught, temperature=T)


def _read(name: str, value) -> tuple[Tensor, Sequence[Tensor]]:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or not isinstance(value[1], (tuple, list)) or not value[1]:
        raise TypeError(f"{NAME}: {name} must be (logits, [tokens of every layer]), got {got(value)}")
    for t in (value[0], *value[1]):
        check_tensor(NAME, name, t)
    return value[0], value[1]
