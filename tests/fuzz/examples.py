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
    # torch's bfloat16 weight gradient leaves taps that see padding alone as they lay in memory: the reference computes it in float32.
    Case(
        "token_dwconv_strided_bwd_dw",
        {"B": 2, "H": 7, "W": 1, "P": 4, "C": 155, "m": 3, "Kh": 7, "Kw": 3, "sw": 8, "ph": 2, "prefix": "drop"},
        dtype="bfloat16", values="lattice", isa="baseline", backend="reference",
    ),
    # torch's transposed convolution adds its taps up in half precision; the reference in float32.
    Case(
        "token_dwconv_transpose",
        {"B": 1, "H": 1, "W": 31, "P": 0, "C": 49, "Kh": 1, "Kw": 16, "sh": 8, "sw": 1, "ph": 0, "pw": 0, "bias": False},
        dtype="float16", isa="baseline", backend="reference",
    ),
)  # fmt: skip
SPECIAL = (
    # An infinite scale without statistics: a mean that is not there counted as 0 times the scale, NaN.
    (
        Case("dw_shortcut_eval", {"need_dx": False, "B": 1, "H": 1, "W": 1, "P": 0, "C": 1, "K": 1, "bias": False}, isa="baseline"),
        torch.inf, 2, 0,
    ),
)  # fmt: skip
