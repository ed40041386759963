"""The speed-of-light table of bench/results/predicted follows from what it says of each kernel."""

import pytest

pytest.importorskip("triton")

from bench import light

ROWS = light.read()


def test_a_row_for_every_kernel_size_and_dtype():
    asked = [(kind, K, dtype, size) for dtype in light.DTYPES for kind in light.KINDS for K in (3, 5, 7) for size in light.WIDTHS]
    assert [r[:4] for r in ROWS] == asked
    assert not any(r.spilled for r in ROWS if r.dtype == "bfloat16")


@pytest.mark.parametrize("given", ROWS, ids=lambda r: f"{r.kernel}-{r.K}-{r.dtype}-{r.size}")
def test_predictions_follow_from_the_code(given):
    """Programs, bytes and times are those of the launches of today, for the registers and instructions that the table has."""
    assert light.row(*given[:4], (given.registers, given.spilled, given.instructions)) == given


@pytest.mark.parametrize(
    ("moved", "slots", "warps", "expected"),
    [(4_300_000, 10, 16, ("bytes", 1e-6 / 0.88)), (4_300_000, 10, 8, ("warps", 1e-6 / 0.75)), (43, 926_640, 16, ("issue", 1e-6 / 0.85))],
)
def test_the_limit_that_binds(moved, slots, warps, expected):
    time, bound = light.seconds(moved, slots, warps)
    assert (bound, time) == (expected[0], pytest.approx(expected[1]))


def test_the_table_is_printed(capsys):
    light.main([])
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS) + 1
