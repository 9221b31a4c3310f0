"""An SVG picture of a block's nodes: each is a box below all boxes that it reads, with an edge from each of them."""

from __future__ import annotations

from collections.abc import Sequence

from moe_lowering.cli.html.page import Markup, element
from moe_lowering.report.graphs import GraphNode

HEIGHT, LEVEL, GAP, CHARACTER, MARGIN = 26, 48, 14, 6.8, 10
# Of nodes, by what their operators are: the package's own, exchanges, torch_npu's, and others.
FILLS = {
    "moe_lowering": "#e6ddf2",
    "_c10d_functional": "#f9dcc4",
    "npu_define": "#f9dcc4",
    "npu": "#d3e5f5",
    "": "#eeeeee",
}
ITEM = "getitem"


def draw_graph(nodes: Sequence[GraphNode]) -> Markup:
    """Of nodes in graph order. Outputs of an operator are part of it; what comes from outside is in the hint of each node."""
    drawn, sources = _without_items(nodes)
    if not drawn:
        return element("p", "no nodes", class_="note")
    levels = _levels(drawn, sources)
    rows: dict[int, list[GraphNode]] = {}
    for node in drawn:
        rows.setdefault(levels[node.name], []).append(node)
    widths = {node.name: len(_label(node)) * CHARACTER + 16 for node in drawn}
    width = max(sum(widths[node.name] + GAP for node in row) for row in rows.values()) + 2 * MARGIN
    places: dict[str, tuple[float, float]] = {}  # the middle of the upper edge
    for level, row in rows.items():
        x = (width - sum(widths[node.name] + GAP for node in row) + GAP) / 2
        for node in row:
            places[node.name] = (x + widths[node.name] / 2, MARGIN + level * LEVEL)
            x += widths[node.name] + GAP
    edges = [
        _edge(places[source], places[node.name]) for node in drawn for source in sources[node.name] if source in places
    ]
    boxes = [_box(node, places[node.name], widths[node.name]) for node in drawn]
    height = 2 * MARGIN + max(rows) * LEVEL + HEIGHT
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


def _label(node: GraphNode) -> str:
    return node.operator.rpartition(".")[2] or node.operator


def _box(node: GraphNode, place: tuple[float, float], width: float) -> Markup:
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


def _edge(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    (x, y), (to_x, to_y) = (start[0], start[1] + HEIGHT), end
    bend = (to_y - y) / 2
    path = f"M{x:.1f},{y:.1f} C{x:.1f},{y + bend:.1f} {to_x:.1f},{to_y - bend:.1f} {to_x:.1f},{to_y:.1f}"
    return element("path", d=path, fill="none", stroke="#777", stroke_width=1.2, stroke_opacity=0.8)
