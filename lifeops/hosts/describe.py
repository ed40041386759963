"""``lifeops.describe(model)``: what is known of a host, in words and as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from lifeops.arguments import check_module
from lifeops.hosts import patch_order
from lifeops.hosts.find import find_host
from lifeops.hosts.host import CONVERSION, FLOWS, GRIDS, PARTS, Block, Host


@dataclass(frozen=True)
class Description:
    """What :func:`describe` returns; ``print`` it.

    Attributes:
        host: the :class:`lifeops.hosts.host.Host`.
        system: "life", "localvit" or "dw_shortcut" of a converted model, else None.
    """

    host: Host
    system: str | None

    def __str__(self) -> str:
        h = self.host
        where = f" at {h.path}" if h.path else ""
        prefix = "an unknown number of" if h.prefix is None else h.prefix
        behind = f", {h.suffix} behind them" if h.suffix else ""
        late = f"; {h.late} join in front of all behind the first blocks{' (class token)' if h.late_cls else ''}" if h.late else ""
        stages = f" in {len(h.blocks_path)} stages" if h.staged else ""
        lines = [
            f"{type(h.trunk).__name__} of {h.library}{where}",
            f"  patches: {h.embed_path} ({type(h.embed).__name__})",
            f"  tokens before the patches: {prefix}{' (class token first)' if h.has_cls else ''}{behind}{late}",
            *(f"  patches on their way: {told}" for told in patch_order.words(h)),
            *([] if h.grid_from == "embedding" else [f"  grid: {GRIDS[h.grid_from]}"]),
            f"  {len(h.blocks)} blocks{stages}: {', '.join(h.blocks_path)}",
            *(f"    {count} x {kind}" for kind, count in Counter(map(_block, h.blocks)).items()),
        ]
        return "\n".join(lines + ([f"  converted to {self.system}"] if self.system else []))


_FORMULAS = {
    "pre": "norms before the branches", "post": "norms behind the branches", "parallel": "branches side by side", None: "order unknown",
}  # fmt: skip


def _block(block: Block) -> str:
    parts = [f"{name}={getattr(block, name)}" for name in PARTS if getattr(block, name) is not None]
    attn = block.part("attn")
    kind = "" if attn is None else f"; attention {type(attn).__name__}"
    takes = "" if block.flow == "tokens" else f"; takes {FLOWS[block.flow]}"
    return f"{type(block.module).__name__}, {_FORMULAS[block.order]}{kind} ({', '.join(parts)}){takes}"


def describe(model: nn.Module) -> Description:
    """What lifeops knows of ``model``: patch embedding, tokens beside the patches, blocks and their parts. Nothing is run.

    :func:`lifeops.convert`, :func:`lifeops.rollout` and :func:`lifeops.init.structured_` go by the same description, and check on the
    model itself what they rely on.

    Raises:
        ValueError: nothing of the model is a known ViT; the message says what was found and looked for. TypeError: no module.
    """
    check_module("describe", "model", model)
    record = getattr(model, CONVERSION, None)
    return Description(find_host("describe", model), getattr(record, "system", None))
