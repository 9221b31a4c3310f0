"""The page of ``lower --html``: each kind of block before and after, drawn side by side, with verdicts and costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_lowering.cli.html.choice_drawing import draw_choices
from moe_lowering.cli.html.graph_drawing import draw_graph, draw_key
from moe_lowering.cli.html.page import COLOURS, Markup, element, items, join, key, page
from moe_lowering.cli.html.parts import cost_table, verdict_table
from moe_lowering.explanation.table import Row
from moe_lowering.number_words import UNITS, count_of
from moe_lowering.report.module_names import names
from moe_lowering.report.records import BlockReport, LoweringReport
from moe_lowering.report.text import equal_blocks

if TYPE_CHECKING:
    from moe_lowering.cli.lower.outcome import LowerOutcome

CELL = 14


def lower_page(outcome: LowerOutcome, rows: Sequence[Row]) -> str:
    """Of one command. ``rows``: the choice over tokens and EP sizes; () where the model cannot be described."""
    request = outcome.request
    parts: list[object] = [
        items(f"{label}: {text}" for label, text in outcome.facts),
        *([element("h2", "Problems"), items(outcome.problems())] if outcome.problems() else []),
    ]
    if any(block.sizes is not None for report in outcome.reports for block in report.blocks):
        parts.append(element("p", f"{UNITS}.", class_="note"))
    for number, report in enumerate(outcome.reports, 1):
        title = "The graph" if len(outcome.reports) == 1 else f"Graph {number}"
        parts += [element("h2", title), *_report_parts(report)]
    if rows:
        parts += [element("h2", "The choice over tokens and EP sizes"), draw_choices(rows)]
    return page(f"{outcome.model}: comm {request.comm}, EP {request.ep}, {request.soc}", parts)


def _report_parts(report: LoweringReport) -> list[object]:
    traced = f"; {count_of(report.nodes_before, 'node')} became {report.nodes_after}" if report.nodes_before else ""
    parts: list[object] = [
        element("p", f"{count_of(len(report.blocks), 'MoE block')}{traced}"),
        _strip(report.blocks),
    ]
    if report.blocks:
        parts += [draw_key()]
    for group in equal_blocks(report.blocks):
        parts += _block_parts(group)
    parts.append(items(f"{place}: {why}" for place, why in report.unlowered))
    return parts


def _strip(blocks: Sequence[BlockReport]) -> Markup:
    """A cell for each block, in the colour of its implementation."""
    cells = [
        element(
            "rect",
            element("title", f"{block.name}: {block.comm or 'left as it was'}"),
            x=at * CELL,
            y=0,
            width=CELL - 2,
            height=CELL,
            fill=COLOURS[block.comm],
        )
        for at, block in enumerate(blocks)
    ]
    width = max(len(blocks), 1) * CELL
    strip = element(
        "svg",
        *cells,
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=CELL,
        viewBox=f"0 0 {width} {CELL}",
        role="img",
    )
    return join((strip, key(dict.fromkeys(block.comm for block in blocks))))


def _block_parts(group: Sequence[BlockReport]) -> list[object]:
    """Of equal blocks."""
    block = group[0]
    times = f" x{len(group)}" if len(group) > 1 else ""
    raised = f", raised from {block.raised_from}" if block.raised_from else ""
    after = draw_graph(block.nodes_after) if block.comm is not None else element("p", "as it was", class_="note")
    before = element("div", element("h3", f"before{raised}"), draw_graph(block.nodes_before))
    return [
        element("h3", element("code", names([each.name for each in group])), times),
        element("p", f"{block.comm or 'left as it was'}: {block.reason}"),
        element("div", before, element("div", element("h3", "after"), after), class_="sides"),
        verdict_table(block.verdicts, block.comm),
        cost_table(block.costs),
        items(block.notes),
    ]
