"""The DW shortcut's models (arXiv 2407.19394) by the authors' sizes; state-dict keys are theirs."""

from __future__ import annotations

from torch import nn

from lifeops.arguments import check_choice, check_int, under
from lifeops.models.swin import SwinTransformer
from lifeops.models.vit_cait import CaiT, ViT
from lifeops.nn.inputs import kernel_sizes as check_kernel_sizes

VARIANTS = {  # parameters with 10 classes, without and with shortcuts
    "vit_tiny": (ViT, {"embed_dim": 192, "num_heads": 3}),  # 5,519,434  5,547,082
    "vit_small": (ViT, {"embed_dim": 384, "num_heads": 6}),  # 21,655,690  21,710,986
    "cait_xxs12": (CaiT, {"embed_dim": 192, "num_heads": 4, "depth": 12}),  # 6,413,642  6,441,290
    "cait_xxs24": (CaiT, {"embed_dim": 192, "num_heads": 4, "depth": 24}),  # 11,750,090  11,805,386
    "swin_tiny": (SwinTransformer, {"drop_path_rate": 0.2}),  # 27,527,044  27,580,036
}


@under("dw_shortcut")
def dw_shortcut(variant: str = "vit_tiny", *, every: int | None = 1, kernel_sizes: int | tuple[int, ...] = 3, **host: object) -> nn.Module:
    """A Transformer with depth-wise convolution shortcuts around its blocks.

    Args:
        variant: one of the authors' models, "vit_tiny", "vit_small", "cait_xxs12", "cait_xxs24", "swin_tiny".
        every: one shortcut around so many consecutive blocks: 1 the main method, 2 to 4 variant 1, None the plain model.
        kernel_sizes: an odd int, or several for parallel kernels (variant 2); shortcut i has the convolutions i * n to i * n + n - 1.
        host: everything else :class:`lifeops.models.vit_cait.ViT`, ``CaiT`` or :class:`lifeops.models.swin.SwinTransformer` takes
            (img_size, num_classes, …), instead of the variant's own.

    Raises ValueError for an unknown variant or sizes that do not fit.
    """
    check_choice("dw_shortcut", "variant", variant, VARIANTS)
    check_kernel_sizes("dw_shortcut", "kernel_sizes", kernel_sizes)
    check_int("dw_shortcut", "every", every, 1, optional=True)
    build, sizes = VARIANTS[variant]
    return build(**{**sizes, **host}, every=every, kernel_sizes=kernel_sizes)
