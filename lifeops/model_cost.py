"""The public name of :mod:`lifeops.cost.model_cost`."""

from lifeops.cost.model_cost import (
    ModelCost,
    count_flops,
    count_macs,
    count_norm_ops,
    count_params,
    flop_formulas,
    model_cost,
    saved_bytes,
)

__all__ = ["ModelCost", "count_flops", "count_macs", "count_norm_ops", "count_params", "flop_formulas", "model_cost", "saved_bytes"]
