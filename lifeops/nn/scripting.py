"""torch.jit.script is refused in words that name the way out: the modules choose kernels and read hooks in Python."""

from __future__ import annotations


class NotScripted:
    """Base of the modules that TorchScript's compiler cannot take; tracing works."""

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"lifeops: {type(self).__name__} cannot be compiled by torch.jit.script; use torch.jit.trace(model.eval(), x),"
            " torch.export.export(model, (x,)) or torch.compile(model), or lifeops.revert(model) first"
        )
