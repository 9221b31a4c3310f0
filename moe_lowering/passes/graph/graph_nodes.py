"""``graph_nodes``: the nodes of a block as records (``report.graphs.GraphNode``), so that a report holds no graph."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from moe_lowering.passes.graph.operator_names import operator_name
from moe_lowering.report.graphs import GraphNode


def graph_nodes(nodes: Iterable[Node]) -> tuple[GraphNode, ...]:
    """Of nodes in graph order, those that call something."""
    return tuple(
        [
            GraphNode(node.name, operator_name(node), tuple([each.name for each in node._input_nodes]))
            for node in nodes
            if node.op == "call_function"
        ]
    )
