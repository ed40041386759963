"""Draws the pictures of docs/op.md: docs/token_dwconv.svg and docs/prefix.svg."""

from pathlib import Path

CELL, GAP = 26, 4
COLORS = {"prefix": "#d98c5f", "patch": "#8fb3d9", "tap": "#3d6fa5"}


def square(x, y, color, label=""):
    text = f'<text x="{x + CELL / 2}" y="{y + 17}" font-size="10" text-anchor="middle" fill="#fff">{label}</text>' if label else ""
    return f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="4" fill="{color}"/>{text}'


def row(y, labels, taps=(), x=10):
    parts = []
    for i, label in enumerate(labels):
        kind = "prefix" if label in ("cls", "dist") else "tap" if i - 2 in taps else "patch"
        parts.append(square(x + i * (CELL + GAP), y, COLORS[kind], label if kind == "prefix" else str(i - 2)))
    return "".join(parts)


def text(x, y, words, size=12):
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="#444">{words}</text>'


def picture():
    labels = ["cls", "dist", *range(12)]
    step = CELL + GAP
    grid = "".join(
        square(150 + c * step, 92 + r * step, COLORS["tap" if (r, c) in NEAR else "patch"], str(r * 4 + c))
        for r in range(3)
        for c in range(4)
    )
    arrows = "".join(
        f'<path d="M{10 + CELL / 2 + i * step} 62 V 208" stroke="{COLORS["prefix"]}" stroke-width="2" stroke-dasharray="4 3"/>'
        for i in (0, 1)
    )
    body = (
        text(10, 22, "x (B, P + H·W, C): prefix tokens, then the patches of an H×W grid") + row(32, labels, TAPS)
        + arrows + grid + text(290, 120, "K×K depth-wise convolution of the grid,") + text(290, 138, "each channel on its own, zero padding;")
        + text(290, 156, "one kernel reads x and writes y: no reshape,") + text(290, 174, "no permute, no cat")
        + row(212, labels, (5,)) + text(10, 258, "y: prefix tokens copied (or zero, or dropped), patches convolved (+ bias, + residual)")
    )  # fmt: skip
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="560" height="270" font-family="sans-serif">{body}</svg>\n'


def rule(y, words, cells, note):
    """One line of the rules: what stands in each row of the result."""
    step, colours = CELL + GAP, {"c": COLORS["prefix"], "d": COLORS["prefix"], "0": "#c8c8c8"}
    drawn = "".join(
        square(120 + i * step, y, colours.get(cell, COLORS["tap"]), {"c": "cls", "d": "dist"}.get(cell, cell))
        for i, cell in enumerate(cells)
        if cell != " "
    )
    return text(10, y + 18, words) + drawn + text(380, y + 18, note, 11)


def prefix_picture():
    x = row(28, ["cls", "dist", *range(6)], x=120)
    lines = (
        rule(78, 'prefix="keep"', ["c", "d", *["y"] * 6], "prefix rows copied (+ residual)"),
        rule(112, 'prefix="zero"', ["0", "0", *["y"] * 6], "prefix rows 0 (+ residual)"),
        rule(146, 'prefix="drop"', [" ", " ", *["y"] * 6], "no prefix rows: y is (B, H·W, C)"),
    )
    read = text(380, 46, "x: no patch reads a prefix token", 11)
    body = text(10, 46, "x") + x + read + "".join(lines) + text(10, 194, "y: convolved patches, with stride s fewer of them; the rules are the same", 11)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="600" height="206" font-family="sans-serif">{body}</svg>\n'


NEAR = {(r, c) for r in range(3) for c in range(3)}
TAPS = tuple(r * 4 + c for r, c in NEAR)

PICTURES = {"token_dwconv.svg": picture, "prefix.svg": prefix_picture}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (Path(__file__).parent / name).write_text(draw())
