"""Triton implementations: importing this package registers them. Without Triton it imports, and holds nothing."""

import importlib
import pkgutil

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    from lifeops import registry as _registry

    _registry.set_unavailable("triton", f"triton cannot be imported: {error}")
else:
    for _module in pkgutil.iter_modules(__path__):
        if not _module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{_module.name}")
