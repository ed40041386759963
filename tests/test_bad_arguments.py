"""Every parameter of every public callable with what does not belong there: a ValueError or TypeError that begins with the callable's
name and names the parameter, never an error from inside torch, never an answer.
"""

import inspect

import numpy as np
import pytest
import torch
from argument_catalogue import CASES, DWCONV, KINDS, LIFE, PLACE, Q, X, tensors

import lifeops

FINE = {
    *((op, "x", "rank") for op in ("token_dwconv", "token_dwconv_transpose", "token_dwconv_multi", "token_pool")),  # heads
    ("token_pool", "x", "meta"), ("token_dwconv_transpose", "weight", "sizes"),
    *((op, "x", "sizes") for op in ("token_dwconv_transpose", "token_dwconv_multi", "token_pool")),  # shared filters
    ("attn_mask", "bool"), ("attn_mask", "rank"), ("rope", "rank"), ("rollout", "targets", "int"),  # a token
    ("OverlapPatchEmbed ", "maps", "sizes"),
    ("CvT ", "x", "sizes"), ("EdgeViT ", "x", "sizes"),  # images of any size
    ("RelativeLocalizationHead ", "pairs", "rank"),  # any leading sizes
    ("TokenSmoothing ", "x", "sizes"), ("TokenSmoothing ", "x", "meta"),  # any number of channels; no weights
    ("MViT ", "x", "sizes"), ("RegionViT ", "x", "sizes"),  # any image size
    ("position_embedding", "sizes"), *((op, "weight", "meta") for op in CASES if op.strip() in lifeops.init.__all__),  # as torch.nn.init
}  # fmt: skip


def _bad_values():
    for name, case in CASES.items():
        for parameter, kind in case.kinds.items():
            if kind is not None:
                values = KINDS[kind].items()
            else:
                values = tensors(case.good[parameter])
                values = list(values) if parameter in case.optional else [("None", None), *values]
            for what, value in values:
                if (parameter, what) in FINE or (name, parameter, what) in FINE:
                    continue
                yield pytest.param(name, parameter, what, value, id=f"{name}-{parameter}-{what}")


BAD_VALUES = list(_bad_values())


@pytest.mark.parametrize(("name", "parameter", "what", "value"), BAD_VALUES)
def test_bad_argument(name, parameter, what, value):
    case = CASES[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        case.call(**{**case.good, parameter: value})
    message = str(caught.value)
    assert message.startswith(f"{name.strip()}: "), message
    assert any(known in message for known in (case.kinds if what in ("meta", "sizes") else [parameter])), message


def _public():
    """Every parameter that a user can give: of the callables, and of the modules' ``forward``."""
    for module in (lifeops, lifeops.nn, lifeops.models, lifeops.init, lifeops.losses):
        for name in module.__all__:
            found = getattr(module, name)
            if callable(found) and not (isinstance(found, type) and issubclass(found, (Exception, lifeops.init.Report, tuple))):
                calls = [found, getattr(found, "forward", found)] if isinstance(found, type) else [found]
                yield from ((name, p) for call in calls for p in inspect.signature(call).parameters.values())


def test_every_parameter_has_a_case():
    kinds = {}
    for name, case in CASES.items():
        kinds.setdefault(name.strip(), set()).update(case.kinds)
    given = {(name, p.name) for name, p in _public() if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    results = ("Description",)
    assert not {(name, parameter) for name, parameter in given if name not in results and parameter not in kinds.get(name, ())}
    assert len(given) > 200


CHECKED = "LifeQKV ", "LifeAttention ", "LocalAttention ", "LocalityFeedForward ", "LocalAgg ", "CvT ", "VisionTransformer ", "ViT "
CHECKED += ("TokenPyramid ",)


@pytest.mark.parametrize("name", CHECKED)
def test_tokens_of_another_dtype_than_the_weights(name):
    case = CASES[name]
    good = {**case.good, "x": case.good["x"].double()}
    with pytest.raises(TypeError, match=f"{name.strip()}: x.dtype must be the weights' torch.float32, got torch.float64"):
        case.call(**good)


GOOD_GRIDS = {
    "list": [2, 3], "size": torch.Size((2, 3)), "numpy": (np.int64(2), np.int32(3)), "shape": X[0, :2, :3].shape,
}  # fmt: skip


@pytest.mark.parametrize("grid", GOOD_GRIDS)
def test_grids_as_people_have_them(grid):
    expected = lifeops.token_dwconv(**DWCONV)
    place = {"grid": GOOD_GRIDS[grid], "num_prefix_tokens": np.int64(1)}
    assert torch.equal(lifeops.token_dwconv(**{**DWCONV, **place}), expected)
    module = lifeops.nn.LocalAttention(np.int64(9), np.int64(3), np.int64(3), grid=GOOD_GRIDS[grid], attn_drop=np.float32(0.25)).eval()
    assert torch.equal(module(X), module(X, (2, 3)))


def test_numpy_numbers_and_flags():
    expected = lifeops.local_attention(Q, Q, Q, scale=0.5, **PLACE)
    assert torch.equal(lifeops.local_attention(Q, Q, Q, scale=np.float32(0.5), dropout_p=np.float64(0), **PLACE), expected)
    plain = lifeops.token_dwconv(**DWCONV)
    assert torch.equal(lifeops.token_dwconv(**{**DWCONV, "pool": 0, "stats": np.False_}), plain)
    assert torch.equal(lifeops.token_dwconv(**{**DWCONV, "pool": np.True_}).y, plain)


CALLS = {
    "token_dwconv": lambda x: lifeops.token_dwconv(x, DWCONV["weight"], grid=(2, 3), num_prefix_tokens=1),
    "life_qkv": lambda x: lifeops.life_qkv(x, *LIFE_WEIGHTS, **PLACE)[0],
    "local_attention": lambda x: lifeops.local_attention(*[x.unflatten(2, (3, 3)).transpose(1, 2)] * 3, scale=0.5, **PLACE),
    "grid of the map": lambda x: lifeops.token_dwconv(x[:, 1:], DWCONV["weight"], grid=x[:, 1:].unflatten(1, (-1, 3)).shape[1:3]),
    "use_backend": lambda x: _under_a_backend(x),
    "DWShortcut": lifeops.nn.DWShortcut(9, grid=(2, 3)).eval(),
    "LifeAttention": lifeops.nn.LifeAttention(9, 3, grid=(2, 3)),
    "LocalAttention": lifeops.nn.LocalAttention(9, 3, grid=(2, 3)),
    "LocalityFeedForward": lifeops.nn.LocalityFeedForward(9, grid=(2, 3)).eval(),
}
LIFE_WEIGHTS = [LIFE[name] for name in ("w1", "b1", "dw2", "pw2", "dw3", "pw3")]


def _under_a_backend(x):
    with lifeops.use_backend("reference"):
        return lifeops.token_dwconv(x, DWCONV["weight"], grid=(2, 3), num_prefix_tokens=1)


def _args(call, x):
    return (x, x + 1) if isinstance(call, lifeops.nn.DWShortcut) else (x,)


@pytest.mark.parametrize("name", CALLS)
def test_checks_compile_without_a_break(name):
    call, args = CALLS[name], _args(CALLS[name], X)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(*args), call(*args))
