"""Triton implementations: importing this package registers them. Without a Triton that works it imports, and holds nothing."""

import importlib
import pkgutil

from lifeops import registry as _registry

try:
    import triton as _triton  # noqa: F401
except Exception as error:  # ModuleNotFoundError where there is none; an installation that is broken raises anything
    _hint = "; pip install triton" if getattr(error, "name", None) == "triton" else ""
    _registry.set_unavailable("triton", f"triton cannot be imported: {_registry.one_line(error)}{_hint}")
else:
    for _module in pkgutil.iter_modules(__path__):
        if not _module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{_module.name}")
