"""Which of the state dicts in a checkpoint is the model's, and its names without what wrappers put before them."""

from __future__ import annotations

import contextlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lifeops.errors import CheckpointError, warn
from lifeops.integrations.checkpoint_files import Inert, read
from lifeops.integrations.converted_states import converted_differently

_WRAPPERS = "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"  # torch.compile, FSDP, activation checkpointing
_FIRST = "", "model", "state_dict", "model_state_dict", "net", "network", "module"
_AVERAGED = re.compile("ema|teacher|average|momentum|swa", re.IGNORECASE)


class Chosen(NamedTuple):
    """A model's state dict (with torch's ``_metadata`` attribute), and what the caller should be told about the choice."""

    state: OrderedDict[str, Tensor]
    notes: list[str]


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _mappings(content: Mapping, path: str = "", inside: tuple[int, ...] = ()) -> Iterator[tuple[str, Mapping]]:
    """Every mapping with tensors by name, and the names that lead to it, joined by dots."""
    if any(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        yield path, content
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and id(value) not in inside:
            yield from _mappings(value, f"{path}.{key}" if path else key, (*inside, id(content)))


def _prefixes(names: Sequence[str], anchors: Sequence[str]) -> list[str]:
    """What stands before a name that tells the model: "", "module.", …; not a list's index, whose modules are parts of a model."""
    found = {name[: -len(a)] for name in names for a in anchors if name == a or name.endswith("." + a)}
    return sorted(p for p in found if not p.split(".")[-2:][0].isdigit())


def _under(mapping: Mapping, prefix: str, others: Sequence[str]) -> OrderedDict[str, Tensor]:
    """The tensors under ``prefix`` without those under a longer one of ``others``, with their metadata."""
    deeper = tuple(p for p in others if len(p) > len(prefix) and p.startswith(prefix))
    named = {_clean(k): v for k, v in mapping.items() if isinstance(k, str) and isinstance(v, Tensor)}
    state = OrderedDict((k[len(prefix) :], v) for k, v in named.items() if k.startswith(prefix) and not (deeper and k.startswith(deeper)))
    metadata = getattr(mapping, "_metadata", None)
    told = {_clean(k) + ".": v for k, v in metadata.items() if isinstance(k, str)} if isinstance(metadata, Mapping) else {}
    state._metadata = OrderedDict((k[len(prefix) : -1], v) for k, v in told.items() if k.startswith(prefix) and isinstance(v, Mapping))
    return state


def candidates(content: Mapping, anchors: Sequence[str]) -> dict[str, OrderedDict[str, Tensor]]:
    """State dicts that hold one of the names ``anchors``, by their place in the checkpoint."""
    found = {}
    for path, mapping in _mappings(content):
        prefixes = _prefixes([_clean(k) for k in mapping if isinstance(k, str)], anchors)
        for prefix in prefixes:
            parts = [path, prefix.rstrip(".") if len(prefixes) > 1 else ""]
            found[".".join(filter(None, parts))] = _under(mapping, prefix, prefixes)
    return found


def _rank(name: str) -> tuple[int, int]:
    """Order of preference: the trained model itself, then others, then averages of it."""
    return (2, 0) if _AVERAGED.search(name) else (0, _FIRST.index(name)) if name in _FIRST else (1, 0)


def _among(found: dict, key: str | None) -> list[str]:
    if key is None:
        return sorted(found, key=_rank)
    narrowed = sorted((name for name in found if name == key or name.startswith(key + ".")), key=_rank)
    if not narrowed:
        raise CheckpointError(f"key must be one of {', '.join(map(repr, found))}, got {key!r}")
    return narrowed


def _largest(content: Mapping) -> Mapping:
    return max((mapping for _, mapping in _mappings(content)), key=len, default=content)


def _contents(content) -> str:
    """What there is instead of a state dict that was looked for."""
    if not isinstance(content, Mapping):
        if isinstance(content, Inert):
            return f"a whole pickled {content.__name__} object; save its state_dict() instead"
        return f"a {type(content).__name__}, not a dict"
    objects = [f"{k!r} is a pickled {v.__name__} object" for k, v in content.items() if isinstance(v, Inert) and k in _FIRST]
    largest = _largest(content)
    kinds = sorted({v.__name__ if isinstance(v, Inert) else type(v).__name__ for v in content.values()})
    values = "" if largest is not content or "Tensor" in kinds else f" with values of type {', '.join(kinds[:5])}"
    return "; ".join([f"keys such as {sorted(map(str, largest))[:5]}{values}", *objects])


def choose(checkpoint, anchors: Sequence[str], looked_for: str, key: str | None = None, names: Sequence[str] = ()) -> Chosen:
    """The state dict of a checkpoint (a path or what was loaded) that holds one of the names ``anchors``.

    It may lie under any name and any prefix (``module.``, ``model.``, ``_orig_mod.`` …). Of several the model itself is taken before
    averages of it, and a note says so; ``key`` names another one. Raises CheckpointError where there is none, naming what there is.
    ``names``: of all that the model holds.
    """
    content = read(os.fsdecode(checkpoint)) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
    found = candidates(content, anchors) if isinstance(content, Mapping) else {}
    if not found:
        given = [_clean(name) for name in _largest(content) if isinstance(name, str)] if isinstance(content, Mapping) else []
        other = converted_differently(given, names)
        raise CheckpointError(other or f"no known checkpoint; looked for {looked_for}, got {_contents(content)}")
    keys, notes = _among(found, key), []
    if len(keys) > 1:
        others = ", ".join(f"key={name!r}" for name in keys[1:])
        notes.append(f"took the weights {f'under {keys[0]!r}' if keys[0] else 'outside of any key'}; for others pass {others}")
    return Chosen(found[keys[0]], notes)


@contextlib.contextmanager
def errors_of(caller: str, checkpoint) -> Iterator[None]:
    """Errors about a checkpoint begin with the function's name and the file's. TypeError for neither a path nor a dict."""
    path = isinstance(checkpoint, (str, os.PathLike))
    if not path and not isinstance(checkpoint, Mapping):
        raise TypeError(f"{caller}: the checkpoint must be a path or a dict, got {type(checkpoint).__name__}")
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{caller}: {f'{os.fsdecode(checkpoint)}: ' if path else ''}{error}") from error


def load_strictly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """load_state_dict, every name and shape as the model's. CheckpointError otherwise; in few words where one of them is converted."""
    other = converted_differently(state, model.state_dict())
    if other is not None:
        raise CheckpointError(other)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(" ".join(str(error).split())) from error


def load_into(model: nn.Module, checkpoint, key: str | None, caller: str) -> None:
    """Load what a checkpoint (a path or what was loaded) holds for ``model``, strictly; says which of several state dicts it takes."""
    with errors_of(caller, checkpoint):
        names = list(model.state_dict())
        anchor = max(names, key=lambda name: (name.count("."), len(name)))  # no other module's name ends in it
        chosen = choose(checkpoint, [anchor], f"{type(model).__name__} ({anchor!r})", key, names)
        load_strictly(model, chosen.state)
    for note in chosen.notes:
        warn(f"{caller}: {note}")
