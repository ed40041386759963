"""Structured initialisation: attention that starts as a convolution, and impulse filters for depth-wise convolutions."""

from lifeops.init.closed_form import impulse_qk
from lifeops.init.conv import box_, gaussian_, impulse_conv_, random_conv_
from lifeops.init.offsets import head_offsets
from lifeops.init.optimised import OptimisedQK, optimised_qk, sincos_position_embedding
from lifeops.init.report import HeadReport, Report
from lifeops.init.structured import structured_

__all__ = [
    "HeadReport",
    "OptimisedQK",
    "Report",
    "box_",
    "gaussian_",
    "head_offsets",
    "impulse_conv_",
    "impulse_qk",
    "optimised_qk",
    "random_conv_",
    "sincos_position_embedding",
    "structured_",
]
