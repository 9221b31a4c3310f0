"""What ``moe-lowering explain`` prints for several deployments: one entry for each row of ``explanation.table``.

Lines are wrapped to ``report_width``, and coloured on request.
"""

from __future__ import annotations

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


def render_table(first: Explanation, rows: Sequence[Row], colour: bool = False) -> str:
    """The block, one entry for each row, what the columns mean, and what was assumed."""
    paint = Paint(colour)
    parts = [_header(first, paint), "\n".join([paint(_titles(), "dim"), *_entries(rows, paint)])]
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


def _titles() -> str:
    return f"  SoC   EP quant T            {'choice':<9} {'cost us':>13} {'kernels':>7} {'MB moved':>9} {'MB sent':>8}"


def _entries(rows: Sequence[Row], paint: Paint) -> list[str]:
    lines: list[str] = []
    before = None
    for row in rows:
        where = (row.soc, row.ep, row.quantisation)
        lines += _entry(row, where != before, paint)
        before = where
    return lines


def _entry(row: Row, names_deployment: bool, paint: Paint) -> list[str]:
    """A line of figures, and what goes with them below it."""
    piece, cost = row.piece, row.cost
    where = f"{row.soc:<4} {row.ep:>3} {row.quantisation:<5}" if names_deployment else " " * 14
    tokens = str(piece.low) if piece.low == piece.high else f"{piece.low}..{piece.high}"
    choice = row.choice or "NONE"
    line = f"  {where} {tokens:<12} {choice:<9}"
    figures = "" if cost is None else _figures(cost)
    fits = len(line) + len(figures) <= report_width()
    lines = [f"{line}{figures}".rstrip() if fits else line.rstrip()]
    lines[0] = lines[0].replace(f" {choice}", " " + paint.legal(choice, row.choice is not None), 1)
    lines += [] if fits else [INDENT + figures.strip()]
    for text in _below(row):
        lines += wrap(text, INDENT, INDENT + "  ")
    return lines


def _figures(cost: BlockCost) -> str:
    sent = (cost.sent_within + cost.sent_between) / 1e6
    price = f"{_number(cost.us, 0)} +- {_number(cost.error_us, 0)}"
    return f" {price:>13} {cost.kernels:>7} {_number(cost.moved / 1e6, 1):>9} {_number(sent, 1):>8}"


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
