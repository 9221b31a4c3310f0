"""What ``moe-lowering explain`` prints for several deployments: one entry for each row of ``explanation.table``.

Lines are wrapped to ``report_width``, and coloured on request.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

from moe_lowering.explanation import Explanation
from moe_lowering.explanation.layout import Paint, labelled_rows
from moe_lowering.explanation.memory import ON_TOP, TOO_SMALL, Memory
from moe_lowering.explanation.table import Row
from moe_lowering.explanation.text import size_lines
from moe_lowering.number_words import UNITS
from moe_lowering.report.block_costs import BlockCost
from moe_lowering.report.width import report_width, wrap

INDENT = " " * 16
MOST_TOKENS = 12  # columns


def render_table(first: Explanation, rows: Sequence[Row], colour: bool = False) -> str:
    """The block, one entry for each row, what the columns mean, and what was assumed."""
    paint = Paint(colour)
    widths = _Widths.of(rows)
    parts = [_header(first, paint), "\n".join([paint(_titles(widths), "dim"), *_entries(rows, widths, paint)])]
    are_known = all(row.memory.layers for row in rows)
    memory = (
        "one MoE layer but for memory, which is that of all layers"
        if are_known
        else ("one MoE layer, memory too: how many layers there are is not known")
    )
    notes = [
        f"figures are those at the most tokens of a row; {memory}",
        f"memory is of {ON_TOP}",
        "HCCL_BUFFSIZE: what is enough for the choice; any: none of its rules is on it; not used: it has no communicator",
        "[cost]: legal, and not the cheapest, or tied with a simpler one; [policy]: legal, and the policy takes another",
    ]
    notes.append(UNITS)
    return "\n\n".join([*parts, labelled_rows("columns", notes), labelled_rows("assumed", first.assumptions)])


def _header(first: Explanation, paint: Paint) -> str:
    block = first.block
    title = textwrap.wrap(f"{block.title} in several deployments", report_width())
    return "\n".join([*(paint(line, "bold") for line in title), *size_lines(block)])


@dataclasses.dataclass(frozen=True)
class _Widths:
    """Of the columns that are as wide as the rows need, as far as a line has room: ranges of tokens, and prices."""

    tokens: int
    price: int

    @staticmethod
    def of(rows: Sequence[Row]) -> _Widths:
        tokens = min(max([1, *(len(_tokens(row)) for row in rows)]), MOST_TOKENS)
        prices = [len(_price(row.cost)) for row in rows if row.cost is not None]
        room = report_width() - len(_titles(_Widths(tokens, 0)).rstrip()) + len("cost us")
        return _Widths(tokens, min(max([len("cost us"), *prices]), room))


def _titles(widths: _Widths) -> str:
    figures = f"{'cost us':>{widths.price}} {'kernels':>7} {'MB moved':>9} {'MB sent':>8}"
    return f"  SoC   EP quant {'T':<{widths.tokens}} {'choice':<9} {figures}"


def _entries(rows: Sequence[Row], widths: _Widths, paint: Paint) -> list[str]:
    lines: list[str] = []
    before = None
    for row in rows:
        where = (row.soc, row.ep, row.quantisation)
        lines += _entry(row, where != before, widths, paint)
        before = where
    return lines


def _entry(row: Row, names_deployment: bool, widths: _Widths, paint: Paint) -> list[str]:
    """A line of figures, and what goes with them below it."""
    where = f"{row.soc:<4} {row.ep:>3} {row.quantisation:<5}" if names_deployment else " " * 14
    choice = row.choice or "NONE"
    line = f"  {where} {_tokens(row):<{widths.tokens}} {choice:<9}"
    figures = "" if row.cost is None else _figures(row.cost, widths)
    fits = len(line) + len(figures) <= report_width()
    lines = [f"{line}{figures}".rstrip() if fits else line.rstrip()]
    lines[0] = lines[0].replace(f" {choice}", " " + paint.legal(choice, row.choice is not None), 1)
    lines += [] if fits else [INDENT + figures.strip()]
    for text in _below(row):
        lines += wrap(text, INDENT, INDENT + "  ")
    return lines


def _tokens(row: Row) -> str:
    return str(row.piece.low) if row.piece.low == row.piece.high else f"{row.piece.low}..{row.piece.high}"


def _price(cost: BlockCost) -> str:
    return f"{_number(cost.us, 0)} +- {_number(cost.error_us, 0)}"


def _figures(cost: BlockCost, widths: _Widths) -> str:
    sent = (cost.sent_within + cost.sent_between) / 1e6
    return f" {_price(cost):>{widths.price}} {cost.kernels:>7} {_number(cost.moved / 1e6, 1):>9} {_number(sent, 1):>8}"


def _number(value: float, digits: int) -> str:
    """With some digits after the point, or short where it is large."""
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.3g}"


def _below(row: Row) -> list[str]:
    """One change for what is refused first, then why not the others, and memory."""
    changes = {name: found for name, found in row.changes.items() if found}
    texts = [f"{name} legal with {' or '.join(change.text for change in found)}" for name, found in changes.items()]
    lines = [f"one change: {'; '.join(texts)}"] if texts else []
    others = ", ".join(f"{name} [{'] ['.join(codes)}]" for name, codes in row.others.items())
    lines += [f"not {others}"] if others else []
    memory = row.memory
    figures = (
        f"{_gb(memory.experts * (memory.layers or 1))} weights + {_gb(memory.buffers)} buffers + {_workspace(memory)}"
        f"{_gb(memory.window)} HCCL window = {_gb(memory.needed)} GB"
    )
    if not memory.fits and memory.capacity is not None:
        figures = f"[{TOO_SMALL}] {figures}, of {_gb(memory.capacity)}"
    return [*lines, f"{figures}; HCCL_BUFFSIZE {row.buffer_needed}"]


def _workspace(memory: Memory) -> str:
    if memory.workspace is None:
        return "workspace not known + "
    return f"{_gb(memory.workspace)} workspace + " if memory.workspace else ""


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"
