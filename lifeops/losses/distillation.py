"""What two models that train together, or one that taught the other, have to say to each other: of their logits and of their tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.arguments import check_choice, check_factory, check_flags, check_floating, check_int, check_positive, check_tensors
from lifeops.nn.inputs import check_like, check_sequence
from lifeops.ops.channel.act import accumulate_dtype

NAME, HINT = "logit_distillation", "FeatureHint"


def widened(t: Tensor) -> Tensor:
    """In the precision in which losses are computed: float32 at least."""
    return t.to(accumulate_dtype(t.dtype))


def logit_distillation(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T² KL(softmax(teacher / T) || softmax(student / T)), a mean over the images: a loss (), of which the teacher has no gradient.

    Of two models that train together each is the other's teacher: it is called twice. Half precision is computed in float32.

    Args:
        student, teacher: logits (B, classes). temperature: T; the agent's authors (Bootstrapping ViTs) have 4.

    Raises ValueError for logits of different shapes. Source: Hinton et al., "Distilling the Knowledge in a Neural Network".
    """
    check_tensors(NAME, student=student, teacher=teacher)
    check_floating(NAME, "student", student), check_floating(NAME, "teacher", teacher)
    T = check_positive(NAME, "temperature", temperature)
    if student.device != teacher.device:
        raise ValueError(f"{NAME}: student and teacher must be on one device, got {student.device} and {teacher.device}")
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(f"{NAME}: student and teacher must be logits (B, classes), got {tuple(student.shape)} and {tuple(teacher.shape)}")
    said, known = ((widened(t) / T).log_softmax(1) for t in (student, teacher.detach()))
    return T**2 * F.kl_div(said, known, reduction="batchmean", log_target=True)


class FeatureHint(nn.Module):
    """mean((LN(vit patches) - LN(cnn patches))²), a loss (): what a ViT's layer is to have of its convolutional agent's, or the reverse.

    The two LayerNorms are learnt, with a weight and a bias each (``norm_s`` of the ViT, ``norm_t`` of the agent).

    Args:
        dim: C. num_prefix_tokens: P of the ViT's tokens, which are left out; the agent has none.
        resample: whether fewer tokens of an agent that has pooled its maps are held against means of the ViT's: of as many consecutive
            ones, row by row, as there are for each (the authors' one-dimensional pooling).

    Raises ValueError for sizes that do not fit. Source: Bootstrapping ViTs, arXiv 2112.03552.
    """

    def __init__(self, dim: int, num_prefix_tokens: int = 1, *, resample: bool = False, device=None, dtype=None):
        super().__init__()
        self.dim, self.num_prefix_tokens = check_int(HINT, "dim", dim, 1), check_int(HINT, "num_prefix_tokens", num_prefix_tokens, 0)
        check_flags(HINT, resample=resample)
        dd, self.resample = check_factory(HINT, device, dtype), bool(resample)
        self.norm_s, self.norm_t = nn.LayerNorm(dim, **dd), nn.LayerNorm(dim, **dd)

    def forward(self, vit: Tensor, cnn: Tensor, teacher: str = "cnn") -> Tensor:
        """vit (B, P + N, C), cnn (B, N', C) -> (); the ``teacher``, "cnn" or "vit", has no gradient."""
        check_choice(HINT, "teacher", teacher, ("cnn", "vit"))
        for name, tokens in (("vit", vit), ("cnn", cnn)):
            check_sequence(HINT, name, tokens, self.dim)
            check_like(HINT, name, tokens, self.norm_s)
        patches = vit[:, self.num_prefix_tokens :]
        patches, cnn = (patches.detach(), cnn) if teacher == "vit" else (patches, cnn.detach())
        patches, cnn = self._alike(patches, cnn)
        return F.mse_loss(widened(self.norm_s(patches)), widened(self.norm_t(cnn)))

    def _alike(self, patches: Tensor, cnn: Tensor) -> tuple[Tensor, Tensor]:
        """As many of one as of the other."""
        N, few = patches.shape[1], cnn.shape[1]
        if few and self.resample and few < N and N % few == 0:
            patches = patches.unflatten(1, (few, N // few)).mean(2)
        if patches.shape != cnn.shape or not few:
            more = "as many or a divisor of them" if self.resample else "as many"
            raise ValueError(f"{HINT}: cnn must have {more} tokens as vit has patches, {N}, got {few} (batches {len(patches)}, {len(cnn)})")
        return patches, cnn

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_prefix_tokens={self.num_prefix_tokens}, resample={self.resample}"
