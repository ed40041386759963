"""What users hand over, checked: every message is ``<op or class>: <parameter> must be <expected>, got <what came>``.

A wrong type is a TypeError, a wrong value of the right type a ValueError. NumPy's numbers count as numbers, bools do not, and symbolic
sizes of a compiler pass as they are.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INT = (int, torch.SymInt)
LARGEST = 2**62  # sizes are int64 in torch, with room for sums
_STRIDED = torch.strided


def got(value) -> str:
    """``value`` in a message: numbers, names and short tuples as written, of all else the type."""
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor {tuple(value.shape)}, layout {value.layout}"
    if value is None or isinstance(value, (str, tuple, list, numbers.Number)):
        try:
            text = repr(value)
        except ValueError:  # Python writes no ints of more than 4300 digits
            return "a huge int"
        return text if len(text) <= 100 else f"{text[:100]}…"
    return type(value).__name__


# ------------------------------------------------------------------------------------------------ tensors


def is_dense(t) -> bool:
    """A tensor that has strides: what kernels read. Asked at every call."""
    return isinstance(t, Tensor) and t.layout is _STRIDED and not t.is_nested


def check_tensor(op: str, name: str, t, optional: bool = False) -> None:
    if is_dense(t) or (optional and t is None):
        return
    or_none = " or None" if optional else ""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor{or_none}, got {type(t).__name__}")
    raise TypeError(f"{op}: {name} must be a dense tensor{or_none}, got {'a nested one' if t.is_nested else f'layout {t.layout}'}")


def check_tensors(op: str, optional: tuple = (), **tensors) -> None:
    """By name; those whose name is in ``optional`` may be None."""
    for name, t in tensors.items():
        if not is_dense(t):
            check_tensor(op, name, t, name in optional)


def check_floating(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        raise TypeError(f"{op}: {name}.dtype must be float64, float32, float16 or bfloat16, got {t.dtype}")


# ------------------------------------------------------------------------------------------------ numbers, names, flags


def check_int(op: str, name: str, value, least: int | None = None, optional: bool = False):
    """``value`` as an int of at least ``least`` (or a SymInt)."""
    if optional and value is None:
        return None
    if type(value) is not int:  # bools are ints in Python
        if isinstance(value, bool) or not isinstance(value, (*INT, numbers.Integral)):
            raise TypeError(f"{op}: {name} must be an int{' or None' if optional else ''}, got {got(value)}")
        value = value if isinstance(value, torch.SymInt) else int(value)
    if least is not None and value < least:
        raise ValueError(f"{op}: {name} must {'not be negative' if least == 0 else f'be at least {least}'}, got {got(value)}")
    if type(value) is int and value >= LARGEST:
        raise ValueError(f"{op}: {name} must be a size below 2**62, got {got(value)}")
    return value


def check_number(op: str, name: str, value, expected: str = "finite", holds: Callable[[float], bool] | None = None, optional: bool = False):
    """``value`` as a finite float for which ``holds``, which ``expected`` says in words."""
    if value is None and optional:
        return None
    given = value
    if type(value) is not float and not isinstance(value, (torch.SymFloat, torch.SymInt)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{op}: {name} must be a number{' or None' if optional else ''}, got {got(value)}")
        value = _as_float(value)
    if not (-math.inf < value < math.inf and (holds is None or holds(value))):  # comparisons: a compiler traces them
        raise ValueError(f"{op}: {name} must be {expected}, got {got(given)}")
    return value


def _as_float(value) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_positive(op: str, name: str, value, optional: bool = False):
    return check_number(op, name, value, "positive", lambda v: v > 0, optional)


def check_rate(op: str, name: str, value, one: bool = False):
    """A probability below 1, or with ``one`` up to it."""
    if type(value) is float and 0 <= value < 1:
        return value
    return check_number(op, name, value, "in [0, 1]" if one else "in [0, 1)", lambda v: 0 <= v < 1 or (one and v == 1))


def check_choice(op: str, name: str, value, known: Collection[str]) -> None:
    """One of some names; what cannot be hashed or compared is none of them."""
    if not isinstance(value, str) or value not in known:
        names = [*map(repr, known)]
        expected = " or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}"
        raise ValueError(f"{op}: {name} must be {expected}, got {got(value)}")


def check_flags(op: str, **flags) -> None:
    """True or False by name; 0 and 1 serve."""
    for name, value in flags.items():
        if value is not True and value is not False:
            is_bool = type(value).__name__ in ("bool", "bool_", "SymBool")  # NumPy's, a compiler's
            if not is_bool and not (isinstance(value, int) and value in (0, 1)):
                raise TypeError(f"{op}: {name} must be True or False, got {got(value)}")


# ------------------------------------------------------------------------------------------------ modules and what they are built with


def check_module(op: str, name: str, module, optional: bool = False) -> None:
    if not isinstance(module, nn.Module) and not (optional and module is None):
        raise TypeError(f"{op}: {name} must be a torch.nn.Module{' or None' if optional else ''}, got {got(module)}")


def check_callable(op: str, name: str, value) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{op}: {name} must be callable or None, got {got(value)}")


def check_factory(op: str, device, dtype) -> dict:
    """``device`` and ``dtype`` of new parameters, as torch's modules take them."""
    if dtype is not None:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{op}: dtype must be a torch.dtype or None, got {got(dtype)}")
        if not dtype.is_floating_point:
            raise TypeError(f"{op}: dtype must be a floating-point one, got {dtype}")
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{op}: device must be a torch.device, its name or None, got {got(device)}") from error
    return {"device": device, "dtype": dtype}


def check_generator(op: str, generator) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, got {type(generator).__name__}")


@contextlib.contextmanager
def under(op: str):
    """Around what ``op`` builds or calls with its user's arguments; usable as a decorator: a complaint about one begins with ``op``'s name,
    the complaining class's behind it; the library's own, which a part that serves all begins with, is replaced.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        if str(error).startswith(f"{op}: "):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{op}: {str(error).removeprefix('lifeops: ')}") from error
