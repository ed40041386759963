"""State dicts of converted models, told by the names of what ``convert`` puts into a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SYSTEMS = {  # by the ends of two names that one module of the system has
    "life": (r"\.scale2\.depthwise\.weight", r"\.scale2\.pointwise\.weight"),
    "localvit": (r"\.conv\.0\.weight", r"\.conv\.3\.weight"),
    "dw_shortcut": (r"\.shortcut\.(\d+\.)?convs\.0\.weight",) * 2,
}


def system_of(names: Iterable[str]) -> str | None:
    """The system whose layers a state dict with these names holds; None of a model that is not converted."""
    names = list(names)
    for system, ends in _SYSTEMS.items():
        first, second = ({re.sub(f"{end}$", "", name) for name in names if re.search(f"{end}$", name)} for end in ends)
        if first & second:
            return system
    return None


def converted_differently(given: Iterable[str], wanted: Iterable[str]) -> str | None:
    """What to do where a state dict with the names ``given`` is of a model converted in another way than that with the names ``wanted``,
    or not at all; None where they are converted alike or have no name in common.
    """
    given, wanted = set(given), set(wanted)
    held, has = system_of(given), system_of(wanted)
    if held is not None and held != has:
        return (
            f"the checkpoint is of a model converted to {held!r}: lifeops.convert(model, {held!r}), with the options that it had, before"
            f" loading it (lifeops rollout: --convert {held})"
        )
    if has is not None and held is None and given & wanted:
        return f"the checkpoint is of a model that was not converted, this one is, to {has!r}: load it first (without --convert)"
    return None
