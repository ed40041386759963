"""What the Triton kernels of a depth-wise convolution could reach on an H200, from their machine code: a prediction, nothing was run.

    python -m bench.light             the table of bench/results/predicted/h200.csv
    python -m bench.light --write     the same, compiled again and written there (minutes)

A row is a kernel of bench/budgets.py at a K, dtype and width (T 192, S 384, B 768; 256 images of 14 x 14 patches and a cls token).
Bytes are what has to be moved; issue slots the instructions of all warps. ``seconds`` says how they become a time, and ``bound`` is which
of them it was. The share is of a copy's bandwidth: rows of a device (bench/results, bench/gpu.sh) are to be compared with it.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch

from bench import budgets
from lifeops.kernels import _tile, token_dwconv, token_dwconv_grad

TABLE = Path(__file__).parent / "results" / "predicted" / "h200.csv"
WIDTHS = {"T": 192, "S": 384, "B": 768}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KINDS = {"forward": "", "gelu": "gelu", "gelubwd": "gelubwd", "dw": "", "dw-gelu": "gelu"}
"""Kernels, and what is around the convolution: ``gelu`` and ``dw-gelu`` are the DW shortcut's, ``gelubwd`` is its input gradient."""

# The device: multiprocessors, issue slots of each a cycle, cycles a second, registers of each, bytes a second that a copy moves.
SMS, ISSUE, CLOCK, REGISTERS, COPY = 132, 4, 1.755e9, 65536, 4.3e12
OF_COPY, OF_ISSUE, FEW_WARPS = 0.88, 0.85, 0.75  # what streams, and what straight code, reach of either; streams with 8 warps on an SM
ARCH = 90


class Row(NamedTuple):
    kernel: str
    K: int
    dtype: str
    size: str
    bytes: int
    programs: int
    registers: int
    spilled: int
    instructions: float  # of a thread, for an element that is written
    issue_slots: int
    warps: int  # on a multiprocessor
    waves: float
    us: float
    share: float  # of copy bandwidth, percent
    bound: str


def seconds(moved: int, issue_slots: int, warps: int) -> tuple[float, str]:
    """The longest of the limits, and its name."""
    limits = {
        "bytes": moved / (COPY * OF_COPY),
        "issue": issue_slots / (SMS * ISSUE * CLOCK * OF_ISSUE),
        "warps": moved / (COPY * FEW_WARPS) if warps <= 8 else 0.0,
    }
    bound = max(limits, key=limits.get)
    return limits[bound], bound


def _launch(kind: str, K: int, C: int, dtype: torch.dtype):
    """(kernel, programs, arguments, sequences moved, elements of a job, trips of the loop)."""
    x = budgets.sequence(budgets.GRID, budgets.GRID, C, dtype)
    steps, side = KINDS[kind], budgets.GRID
    if kind.startswith("dw"):
        value = torch.empty((C,), device="meta") if steps else None
        programs, a = token_dwconv_grad.grad_launch(x, x, K, side, side, 1, 1, True, value, value, steps)
        trips = a["iterations"]
        return token_dwconv_grad.token_dwconv_bwd_dw_kernel, programs, a, 2, a["ROWS"] * a["SEGMENT"] * trips, trips
    around = budgets._around(steps, x, side, side, K)
    weight, residual = torch.empty((C, 1, K, K), dtype=dtype, device="meta"), x if steps == "gelu" else None
    programs, a = token_dwconv.forward_launch(x, weight, None, residual, x, side, side, 1, 1, not steps, steps == "gelubwd", around)
    trips = K - 1 if K >= 7 else 1
    return token_dwconv.token_dwconv_fwd_kernel, programs, a, 3 if steps else 2, token_dwconv.ROWS * a["SEGMENT"], trips


def row(kind: str, K: int, dtype: str, size: str, cost) -> Row:
    """``cost``: registers, spilled bytes and instructions of the kernel at S, whose code is that of the other widths but for constants."""
    registers, spilled, instructions = cost
    C = WIDTHS[size]
    _, programs, arguments, sequences, written, _ = _launch(kind, K, C, DTYPES[dtype])
    x = budgets.sequence(budgets.GRID, budgets.GRID, C, DTYPES[dtype])
    moved = sequences * x.numel() * x.element_size()
    elements = programs * arguments["BLOCK_R"] * written * arguments["BLOCK_C"]
    issue_slots = round(instructions * elements / 32)
    warps = min(64, REGISTERS // (32 * math.ceil(registers / 8) * 8) // _tile.WARPS * _tile.WARPS)
    waves = programs * _tile.WARPS / (warps * SMS)
    time, bound = seconds(moved, issue_slots, warps)
    share = 100 * moved / COPY / time
    return Row(kind, K, dtype, size, moved, programs, registers, spilled, round(instructions, 2), issue_slots, warps, round(waves, 2),
               round(time * 1e6, 1), round(share, 1), bound)  # fmt: skip


def compiled() -> Iterator[Row]:
    for dtype in DTYPES:
        for kind in KINDS:
            for K in (3, 5, 7):
                kernel, _, arguments, _, written, trips = _launch(kind, K, WIDTHS["S"], DTYPES[dtype])
                found = budgets.cost(kind, ARCH, kernel, arguments, trips, written)
                for size in WIDTHS:
                    yield row(kind, K, dtype, size, (found.registers, found.spilled, round(found.per_element, 2)))


def read() -> list[Row]:
    types = get_type_hints(Row).values()
    with TABLE.open(newline="") as file:
        return [Row(*(kind(value) for kind, value in zip(types, line, strict=True))) for line in list(csv.reader(file))[1:]]


def write(rows: list[Row]) -> None:
    with TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Row._fields, *rows])


def table(rows: list[Row]) -> str:
    lines = [[*Row._fields], *([str(value) for value in r] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(value.rjust(width) for value, width in zip(line, widths, strict=True)) for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.light", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"compile again and write {TABLE.name}")
    if parser.parse_args(argv).write:
        write([*compiled()])
    print(table(read()))


if __name__ == "__main__":
    main()
