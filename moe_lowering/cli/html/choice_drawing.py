"""An SVG picture of which implementation is chosen, by tokens and EP size, for the pages of ``--html``.

Each EP size is a line; on it each range of T (tokens of a rank) with one choice is a box in the colour of that
implementation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_lowering.cli.html.page import COLOURS, Markup, element, items, join, key, wide
from moe_lowering.explanation.table import Row

WIDTH, LEFT, TOP, LINE, BAND = 1060, 64, 8, 44, 24


def draw_choices(rows: Sequence[Row]) -> Markup:
    """One picture for each SoC and quantisation of some rows, and below it what sets each boundary."""
    parts: list[object] = []
    for soc, quantisation in dict.fromkeys((row.soc, row.quantisation) for row in rows):
        own = [row for row in rows if (row.soc, row.quantisation) == (soc, quantisation)]
        format = "" if quantisation == "none" else f", experts in {quantisation}"
        parts += [element("h3", f"{soc}{format}"), wide(_picture(own)), items(_boundaries(own))]
    return join([key(dict.fromkeys(row.choice for row in rows)), *parts])


def _picture(rows: Sequence[Row]) -> Markup:
    low, high = min(row.piece.low for row in rows), max(row.piece.high for row in rows)
    start, end = math.log2(low + 1), math.log2(high + 2)

    def x(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - 16) * (math.log2(tokens + 1) - start) / max(end - start, 1e-9)

    sizes = list(dict.fromkeys(row.ep for row in rows))
    drawn: list[Markup] = []
    for at, ep in enumerate(sizes):
        y = TOP + at * LINE
        drawn.append(_text(f"EP {ep}", LEFT - 8, y + 17, anchor="end"))
        for row in (row for row in rows if row.ep == ep):
            drawn += _field(row, x(row.piece.low), x(row.piece.high + 1), y)
    bottom = TOP + len(sizes) * LINE
    ticks = [low, *(2**n for n in range(32) if low < 2**n < high), high]
    drawn += [_text(str(tick), x(tick), bottom + 10, size=11) for tick in _spread(ticks, x)]
    drawn.append(_text("tokens of a rank (T)", (LEFT + WIDTH) / 2, bottom + 28, size=12))
    height = bottom + 36
    return element(
        "svg",
        *drawn,
        xmlns="http://www.w3.org/2000/svg",
        width=WIDTH,
        height=height,
        role="img",
        viewBox=f"0 0 {WIDTH} {height}",
    )


def _field(row: Row, x: float, end: float, y: float) -> list[Markup]:
    """A range of T, and at its end the code of what ends it."""
    name = row.choice or "none legal"
    cost = "" if row.cost is None else f", {row.cost.us:.0f} +- {row.cost.error_us:.0f} us at {row.piece.high}"
    hint = f"EP {row.ep}, T {row.piece.low} to {row.piece.high}: {name}{cost}"
    field = element(
        "g",
        element("title", hint),
        element("rect", x=f"{x:.1f}", y=y, width=f"{max(end - x - 1, 0.5):.1f}", height=BAND, fill=COLOURS[row.choice]),
    )
    drawn = [field]
    if end - x > len(name) * 7 + 6:
        drawn.append(_text(name, (x + end) / 2, y + 16, fill="#fff"))
    if row.piece.boundary:
        more = f" +{len(row.piece.boundary) - 1}" if len(row.piece.boundary) > 1 else ""
        text = f"{row.piece.high} | {row.piece.boundary[0]}{more}"
        room = end - LEFT > len(text) * 6
        drawn.append(_text(text, end, y + BAND + 12, size=10, anchor="end" if room else "start", fill="#444"))
    return drawn


def _boundaries(rows: Sequence[Row]) -> list[str]:
    return [
        f"EP {row.ep}, T {row.piece.high}: {row.choice or 'none'} ends because of [{code}] {why}"
        for row in rows
        for code, why in zip(row.piece.boundary, row.piece.because, strict=True)
    ]


def _spread(ticks: Sequence[int], x: object) -> list[int]:
    """Ticks that do not overlap: the ends, and of the others those with room."""
    assert callable(x)
    shown = [ticks[0]]
    for tick in ticks[1:-1]:
        if x(tick) - x(shown[-1]) > 44 and x(ticks[-1]) - x(tick) > 52:
            shown.append(tick)
    return shown if ticks[-1] == shown[-1] else [*shown, ticks[-1]]


def _text(text: str, x: float, y: float, size: int = 13, anchor: str = "middle", fill: str = "#222") -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", font_size=size, text_anchor=anchor, fill=fill)
