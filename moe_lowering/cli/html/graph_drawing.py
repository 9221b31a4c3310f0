"""An SVG picture of a block's nodes: each is a box below all boxes that it reads, with an edge from each of them.

An edge that crosses rows has a lane of its own in each of them, between the boxes: behind a box nobody sees where it goes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from moe_lowering.cli.html.page import Markup, element, join
from moe_lowering.report.graphs import GraphNode

HEIGHT, LEVEL, GAP, CHARACTER, MARGIN = 26, 48, 14, 6.8, 10
LANE = 4  # the width that an edge takes in a row which it crosses
# Of nodes, by what their operators are: the package's own, exchanges, torch_npu's, and others.
FILLS = {
    "moe_lowering": "#e6ddf2",
    "_c10d_functional": "#f9dcc4",
    "npu_define": "#f9dcc4",
    "npu": "#d3e5f5",
    "": "#eeeeee",
}
MEANINGS = {
    "this package": "moe_lowering",
    "exchange": "npu_define",
    "torch_npu": "npu",
    "torch": "",
}
ITEM = "getitem"

Place = tuple[float, float]  # the middle of an upper edge
InRow = tuple[str, int]  # a node's name and a row: that of its box, or one that its edges cross


def draw_key() -> Markup:
    """What the colours of boxes stand for."""
    marks = (
        join((element("span", class_="key", style=f"background:{FILLS[namespace]};border:1px solid #888"), meaning))
        for meaning, namespace in MEANINGS.items()
    )
    return element("p", *marks, class_="note")


def draw_graph(nodes: Sequence[GraphNode]) -> Markup:
    """Of nodes in graph order. Outputs of an operator are part of it; what comes from outside is in the hint of each node."""
    drawn, sources = _without_items(nodes)
    if not drawn:
        return element("p", "no nodes", class_="note")
    levels = _levels(drawn, sources)
    widths = {(node.name, levels[node.name]): len(_label(node)) * CHARACTER + 16 for node in drawn}
    rows = _rows(drawn, sources, levels)
    width = max(sum(widths.get(each, LANE) + GAP for each in row) for row in rows) + 2 * MARGIN
    places = _places(rows, sources, widths, width)
    edges = [
        _edge(
            [places[source, level] for level in range(levels[source], levels[node.name])],
            places[node.name, levels[node.name]],
        )
        for node in drawn
        for source in sources[node.name]
        if source in levels
    ]
    boxes = [_box(node, places[node.name, levels[node.name]], widths[node.name, levels[node.name]]) for node in drawn]
    height = 2 * MARGIN + (len(rows) - 1) * LEVEL + HEIGHT
    return element(
        "svg",
        *edges,
        *boxes,
        xmlns="http://www.w3.org/2000/svg",
        width=f"{width:.0f}",
        height=height,
        role="img",
        viewBox=f"0 0 {width:.0f} {height}",
    )


def _without_items(nodes: Sequence[GraphNode]) -> tuple[list[GraphNode], dict[str, list[str]]]:
    """The nodes but for outputs taken from a tuple, and what each of them reads."""
    stands_for = {node.name: node.inputs[0] for node in nodes if node.operator == ITEM and node.inputs}
    drawn = [node for node in nodes if node.name not in stands_for]
    return drawn, {node.name: list(dict.fromkeys(stands_for.get(name, name) for name in node.inputs)) for node in drawn}


def _levels(nodes: Sequence[GraphNode], sources: dict[str, list[str]]) -> dict[str, int]:
    """The level of each node: below all that it reads."""
    levels: dict[str, int] = {}
    for node in nodes:
        above = [levels[name] for name in sources[node.name] if name in levels]
        levels[node.name] = max(above, default=-1) + 1
    return levels


def _rows(nodes: Sequence[GraphNode], sources: dict[str, list[str]], levels: dict[str, int]) -> list[list[InRow]]:
    """What each row has: boxes in graph order, then one lane for each node that is read further below."""
    last_row: dict[str, int] = {}  # the last row that edges of a node cross
    for node in nodes:
        for source in sources[node.name]:
            if source in levels:
                last_row[source] = max(last_row.get(source, 0), levels[node.name] - 1)
    rows: list[list[InRow]] = [[] for _ in range(max(levels.values()) + 1)]
    for node in nodes:
        rows[levels[node.name]].append((node.name, levels[node.name]))
    for name, last in last_row.items():
        for level in range(levels[name] + 1, last + 1):
            rows[level].append((name, level))
    return rows


def _places(
    rows: list[list[InRow]], sources: dict[str, list[str]], widths: dict[InRow, float], width: float
) -> dict[InRow, Place]:
    """Each row in the middle of the picture, in the order of what is read from the row above, so that few edges cross."""
    places: dict[InRow, Place] = {}
    for level, row in enumerate(rows):
        above = {each: _middle_above(each, sources, places, width / 2) for each in row}
        x = (width - sum(widths.get(each, LANE) + GAP for each in row) + GAP) / 2
        for each in sorted(row, key=above.__getitem__):
            own = widths.get(each, LANE)
            places[each] = (x + own / 2, MARGIN + level * LEVEL)
            x += own + GAP
    return places


def _middle_above(each: InRow, sources: dict[str, list[str]], places: dict[InRow, Place], otherwise: float) -> float:
    """The mean x of what stands right above: of an edge's lane its own, of a box all that it reads."""
    name, level = each
    own = [places[name, level - 1][0]] if (name, level - 1) in places else []
    above = own or [places[source, level - 1][0] for source in sources[name] if (source, level - 1) in places]
    return sum(above) / len(above) if above else otherwise


def _label(node: GraphNode) -> str:
    return node.operator.rpartition(".")[2] or node.operator


def _box(node: GraphNode, place: Place, width: float) -> Markup:
    x, y = place
    namespace = node.operator.partition(".")[0]
    fill = FILLS.get(namespace, FILLS[""])
    return element(
        "g",
        element("title", str(node)),
        element(
            "rect", x=f"{x - width / 2:.1f}", y=y, width=f"{width:.1f}", height=HEIGHT, rx=5, fill=fill, stroke="#888"
        ),
        element(
            "text", _label(node), x=f"{x:.1f}", y=y + 17, text_anchor="middle", font_size=12, font_family="monospace"
        ),
    )


def _edge(starts: Sequence[Place], end: Place) -> Markup:
    """From the box at ``starts[0]``, through the lanes at the others, to a box."""
    path = f"M{starts[0][0]:.1f},{starts[0][1] + HEIGHT:.1f}"
    for (x, y), (to_x, to_y) in itertools.pairwise([*starts, end]):
        low = y + HEIGHT
        bend = (to_y - low) / 2
        path += f" L{x:.1f},{low:.1f} C{x:.1f},{low + bend:.1f} {to_x:.1f},{to_y - bend:.1f} {to_x:.1f},{to_y:.1f}"
    return element("path", d=path, fill="none", stroke="#777", stroke_width=1.2, stroke_opacity=0.8)
