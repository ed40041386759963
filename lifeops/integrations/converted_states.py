"""State dicts of converted models, told by the names of what ``convert`` puts into a model, or takes from it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from torch import nn

from lifeops.errors import CheckpointError
from lifeops.hosts.host import CONVERSION as RECORD

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
    return _not_converted(has) if has is not None and held is None and given & wanted else None


def _not_converted(system: str) -> str:
    return (
        f"the checkpoint is of a model that was not converted, this one is, to {system!r}: load it, then lifeops.convert(model,"
        f" {system!r}) (lifeops rollout: without --convert)"
    )


def names_of(model: nn.Module) -> set[str]:
    """Of its parameters and buffers, shared ones under each of their names."""
    both = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return {name for name, _ in itertools.chain(*both)}


def refuse_others(model: nn.Module, state, prefix: str, *_) -> None:
    """torch's hook before a converted model loads a state dict: CheckpointError where that holds layers of another system, or what the
    conversion took out of the model or renamed. A part of a converted model's own is neither.
    """
    record, wanted = getattr(model, RECORD), names_of(model)
    given = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    other = converted_differently(given, wanted) if system_of(given) else None
    if other is None and given & (record.gone - wanted):
        other = _not_converted(record.system)
    if other is not None:
        raise CheckpointError(f"convert: {other}")
