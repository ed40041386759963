"""``lifeops.explain(op, …)``: which backend runs a call, and every reason why the others do not."""

from __future__ import annotations

from lifeops import registry
from lifeops.ops import life_qkv_function, local_attention_function, rollout_step, token_dwconv_function

_EXPLAINERS = {
    "token_dwconv": token_dwconv_function.explain,
    "life_qkv": life_qkv_function.explain,
    "local_attention": local_attention_function.explain,
    "rollout_step": rollout_step.explain,
}


class Report(list):
    """One :class:`lifeops.registry.Explanation` per torch operator of the call, printed one below the other."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def explain(op: str, *args, **kwargs) -> Report:
    """Explain ``lifeops.<op>(*args, **kwargs)`` without running it: forward and backward operators, chosen backend, reasons
    against each other one, copies that would be made.

    >>> print(lifeops.explain("token_dwconv", x, weight, grid=(14, 14), num_prefix_tokens=1))
    """
    if op not in _EXPLAINERS:
        raise ValueError(f"explain: op must be one of {', '.join(map(repr, _EXPLAINERS))}, got {op!r}; all ops: {', '.join(registry.ops)}")
    return Report(_EXPLAINERS[op](*args, **kwargs))
