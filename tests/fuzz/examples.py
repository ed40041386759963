"""Every mismatch that was ever found, as the case that hypothesis shrank it to."""

import torch

from fuzz.cases import Case

VALUES = (
    # A huge gradient at the border took the small ones beside it out of the window sums: they were a total less what lies outside.
    Case(
        "dw_shortcut_bwd", {"need_dx": False, "B": 1, "H": 1, "W": 3, "P": 0, "C": 2, "K": 3, "prefix": "zero", "residual": True},
        dtype="float64", values="huge", isa="baseline",
    ),
    Case(
        "dw_shortcut_bwd", {"need_dx": False, "B": 1, "H": 1, "W": 2, "P": 0, "C": 5, "K": 3, "prefix": "zero", "residual": True},
        dtype="float64", values="wide", isa="baseline",
    ),
)  # fmt: skip
SPECIAL = (
    # An infinite scale without statistics: a mean that is not there counted as 0 times the scale, NaN.
    (
        Case("dw_shortcut_eval", {"need_dx": False, "B": 1, "H": 1, "W": 1, "P": 0, "C": 1, "K": 1, "bias": False}, isa="baseline"),
        torch.inf, 2, 0,
    ),
)  # fmt: skip
