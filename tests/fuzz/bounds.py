"""How far a result may be from the oracle: what rounding can do at most, element by element.

    |got - expected| <= u |expected| + (n u_sum + m u) magnitude + the smallest number the dtype can tell

u: unit roundoff of the result's dtype, u_sum: of what is summed in (float32, float64 for float64), n: how many numbers are added up,
m: how many times something is stored in the tokens' dtype on the way. Integers on a lattice, which all sums hold exactly, have n = 0.
Infinities and NaN must be where the oracle has them, but where sums of the magnitude leave the range of what they are summed in.
"""

import torch

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def accumulate(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def kind(t):
    """2 where NaN, 1 and -1 at the infinities, else 0."""
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign().double(), 0.0))


def allowed(expected, magnitude, dtype, *, terms, stored, tokens):
    """The bound above; ``tokens``: the dtype that things are stored in on the way."""
    wide = accumulate(tokens)
    per_term = terms * UNIT[wide] + stored * UNIT[tokens]
    floor = TINY[dtype] + (terms + 1) * TINY[wide] + stored * TINY[tokens] * (1 + magnitude)
    return 1.01 * (UNIT[dtype] * expected.abs() + per_term * magnitude) + floor


def judge(got, expected, magnitude, *, terms, stored, tokens, planted=False, products=1, floor=0.0):
    """None, or what is wrong in words. ``planted``: NaN or an infinity was among the inputs. ``products``: of how many sums there are
    products on the way, each of which has to be in range. ``floor``: added to the bound.
    """
    dtype = got.dtype
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    wide, rounded = accumulate(tokens), expected.to(dtype).double()
    got = got.double()
    bound = allowed(expected, magnitude, dtype, terms=terms, stored=stored, tokens=tokens) + floor
    top = torch.finfo(dtype).max
    in_range = magnitude < (0.25 * torch.finfo(wide).max) ** (1 / products)
    in_range &= (expected.abs() + bound < top) | (expected.abs() - bound > 1.01 * top)
    in_range &= (magnitude < torch.finfo(tokens).max) | (stored == 0) | magnitude.isinf()
    special = ~expected.isfinite() if planted else torch.zeros_like(in_range)  # where magnitudes say nothing
    wrong = torch.where(special | in_range, kind(got) != kind(rounded), False)
    finite = in_range & got.isfinite() & rounded.isfinite()
    off = torch.where(finite, (got - expected).abs(), 0.0)
    wrong |= finite & ~(off <= bound)
    if not wrong.any():
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    found = f"{int(wrong.sum())} of {wrong.numel()} elements, first at {at}: {got[at].item():.9g} for {expected[at].item():.9g}"
    return f"{found}, allowed {bound[at].item():.3g} of magnitude {magnitude[at].item():.3g}"
