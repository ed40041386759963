"""`lifeops flops MODEL`: parameters, multiply-accumulates and activation memory of a model with each system, beside published sizes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lifeops.cli.main import Parser, image_pair, told_plainly
from lifeops.cost import published
from lifeops.cost.model_cost import ModelCost, model_cost
from lifeops.models.named import NAMES, SYSTEMS, image_size, named, systems_of

_NOTE = (
    "GMACs: convolutions and matrix products of one image, forward; 'with norms' adds what fvcore counts of layer and batch norms, as\n"
    "published numbers do; 'trained' is forward and backward. Saved: MiB that training keeps for backward, per image, in float32.\n"
    "Published numbers in parentheses: nobody printed them, they are counted on the authors' definition."
)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lifeops flops",
        description="Parameters, multiply-accumulates and activation memory of a model with each system built in, beside published sizes."
        " Shapes alone are computed: seconds for any size. Without MODEL: the names, and every published size.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{', '.join(NAMES)}, or a timm name")
    parser.add_argument("--system", choices=(*SYSTEMS, "all"), default="all", help="default: every one the model can have")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help="one number, or height and width")
    parser.add_argument("--patch-size", type=int, help="default: the model's own")
    parser.add_argument("--num-classes", type=int, default=1000, help="default: 1000")
    parser.add_argument("--batch", type=int, default=1, help="images per batch that per-image numbers are taken from (default: 1)")
    return parser


def _millions(n: float) -> str:
    return f"{n / 1e6:.3f}"


def _digits(value: float | None, factor: float = 1) -> str:
    return "-" if value is None else f"{value * factor:g}"


def published_text(row: published.Row | None, num_classes: int) -> str:
    """A row's parameters / GMACs, with the number of classes where it is another one; of unpublished rows what they count to."""
    if row is None:
        return "-"
    numbers = f"{_digits(row.params_m)} / {_digits(row.gmacs)}"
    if row.params_m is None and row.gmacs is None:
        numbers = f"({_digits(row.counted_params, 1e-6)} / {_digits(row.counted_gmacs)})"
    return numbers if row.num_classes == num_classes else f"{numbers} with {row.num_classes} classes"


def _cells(cost: ModelCost) -> list[str]:
    giga = (cost.macs, cost.macs + cost.norm_ops, cost.train_macs)
    return [_millions(cost.params), *(f"{n / 1e9:.4f}" for n in giga), f"{cost.saved / 2**20:.2f}"]


def costs(args: argparse.Namespace, img_size: tuple[int, int] | None) -> dict[str, ModelCost]:
    """The cost of the model with every system asked for. ValueError for a model that cannot have the one that was named."""
    options = {"img_size": img_size, "patch_size": args.patch_size}
    host = {"num_classes": args.num_classes, **{name: value for name, value in options.items() if value is not None}}
    size = image_size(args.model, img_size)
    if args.system != "all":
        return {args.system: model_cost(lambda: named(args.model, args.system, **host), size, args.batch)}
    first, *others = systems_of(args.model, **host)
    found = {first: model_cost(lambda: named(args.model, first, **host), size, args.batch)}
    for system in others:
        try:
            found[system] = model_cost(lambda s=system: named(args.model, s, **host), size, args.batch)
        except ValueError as error:  # a host that the conversion does not know
            print(f"{system}: {error}", file=sys.stderr)
    return found


def _print(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    widths = [max(map(len, cells)) for cells in zip(columns, *lines, strict=True)]

    def row(cells: Sequence[str]) -> str:
        padded = (f"{cell:{'<' if i == 0 or columns[i] == 'source' else '>'}{widths[i]}}" for i, cell in enumerate(cells))
        return f"│ {' │ '.join(padded)} │"

    print(title, row(columns), f"├─{'─┼─'.join('─' * width for width in widths)}─┤", *map(row, lines), *notes, sep="\n")


def print_costs(args: argparse.Namespace, img_size: tuple[int, int] | None) -> None:
    lines, sources = [], {}
    for system, cost in costs(args, img_size).items():
        row = published.find(args.model, system, args.num_classes, img_size, args.patch_size)
        lines.append([system, *_cells(cost), published_text(row, args.num_classes)])
        if row is not None:
            sources[f"{row.name}: {row.source}" + (f" ({row.note})" if row.note else "")] = None
    columns = "system", "params M", "GMACs", "with norms", "trained", "saved MiB", "published M / GMACs"
    _print(f"{args.model}, {args.num_classes} classes", columns, lines, [_NOTE, *sources])


def print_published() -> None:
    lines = [
        [r.name, ", ".join(r.models[:1]) or "-", r.system, str(r.num_classes), f"{_digits(r.params_m)} / {_digits(r.gmacs)}",
         f"{_digits(r.counted_params, 1e-6)} / {_digits(r.counted_gmacs)} ({_digits(r.counted_gmacs_with_norms)})", r.source.split(":")[0]]
        for r in published.rows()
    ]  # fmt: skip
    columns = "published", "MODEL", "--system", "classes", "published M / GMACs", "counted M / GMACs (with norms)", "source"
    _print("MODEL: " + ", ".join(NAMES) + ", or a timm name", columns, lines, [])


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.model is None:
        print_published()
        return 0
    with told_plainly(parser):
        if args.batch < 1 or args.num_classes < 1:
            raise ValueError(f"--batch and --num-classes must be positive, got {args.batch} and {args.num_classes}")
        if args.patch_size is not None and args.patch_size < 1:
            raise ValueError(f"--patch-size must be positive, got {args.patch_size}")
        print_costs(args, image_pair(args.img_size))
    return 0
