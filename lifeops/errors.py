"""Errors and warnings of the library that are more than a ValueError or TypeError."""


class NotSupported(RuntimeError):
    """No implementation of ``op`` can run this problem on the backend that was asked for.

    Attributes: ``op`` (str), ``backend`` (str), ``reasons`` (list of str, every reason, not the first).
    """

    def __init__(self, op: str, backend: str, reasons: list[str]):
        self.op, self.backend, self.reasons = op, backend, list(reasons)
        super().__init__(f"{op}: backend {backend!r} cannot run this problem: " + "; ".join(self.reasons))

    def __reduce__(self):
        return NotSupported, (self.op, self.backend, self.reasons)


class KernelNotBuilt(RuntimeError):
    """A kernel that this machine cannot build: nothing has run, so another implementation may."""


class FallbackWarning(UserWarning):
    """A slower implementation than the preferred one runs; ``LIFEOPS_STRICT=1`` makes it an error."""


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that cannot be read or does not fit: a ValueError as for other bad input, and load_state_dict's RuntimeError."""
