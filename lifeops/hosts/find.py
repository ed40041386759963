"""Which part of a model is a known Vision Transformer."""

from __future__ import annotations

from torch import nn

from lifeops.hosts import timm, transformers
from lifeops.hosts.host import Host


def find_host(op: str, model: nn.Module, blocks: bool = True) -> Host:
    """The outermost part of ``model`` that an entry knows; ``blocks=False``: for who does without a list of blocks.

    Raises ValueError, in the words of ``op``, with what was found and what was looked for, and where there are several side by side.
    """
    hosts, found = [], []
    for path, module in model.named_modules():
        if any(not host.path or path.startswith(f"{host.path}.") for host in hosts):  # a part of one
            continue
        for library in (timm, transformers):
            host = library.read(path, module)
            if isinstance(host, Host) and (host.blocks or not blocks):
                hosts.append(host)
                break
            if isinstance(host, Host):
                host = f"{type(module).__name__} has {host.embed_path}, and no list of blocks called {', '.join(library.LISTS)}"
            found += [] if host is None else [host]
    whole = [host for host in hosts if host.blocks]
    if len(whole) > 1:
        names = ", ".join(f"{host.path} ({type(host.trunk).__name__})" for host in whole)
        raise ValueError(f"{op}: {type(model).__name__} holds {len(whole)} ViTs, {names}; give them one by one")
    if hosts:
        return hosts[0]
    why = "; ".join(dict.fromkeys(found)) or f"it holds {_held(model)}"
    raise ValueError(f"{op}: {type(model).__name__} is not a known ViT ({why}); looked for {timm.LOOKED_FOR}, or {transformers.LOOKED_FOR}")


def _held(model: nn.Module) -> str:
    names = [name for name, _ in model.named_children()]
    return ", ".join(names[:8]) + ", …" * (len(names) > 8) or "no modules"
