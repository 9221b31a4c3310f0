"""``GraphCalls``: the calls of a graph by the name of what they call, from one look at the graph's index of targets.

Of a graph that is not edited meanwhile. The look costs as much as any question after it, and finding foreign layers asks
a dozen.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from moe_lowering.passes.graph.walks import name_of, target_name
from moe_lowering.passes.leftovers.foreign_operators import ROUTER, kind_of


class GraphCalls:
    """Calls in the order of the index: by target in the order of their first, and of a target in the order of the graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        # No nodes: a look-up in the graph's index leaves an empty entry for its target
        called = [
            (target, nodes)
            for (op, target), nodes in graph._find_nodes_lookup_table.table.items()
            if op == "call_function" and nodes
        ]
        self._named = [(target_name(target), nodes) for target, nodes in called]
        self._routers = [nodes for target, nodes in called if kind_of(target) == ROUTER]

    def named(self, *names: str) -> Iterator[Node]:
        """Calls of operators with one of these names, of any overload."""
        for name, nodes in self._named:
            if name in names:
                yield from filter(name_of, nodes)

    def routers(self) -> Iterator[Node]:
        """Calls of operators that choose experts."""
        for nodes in self._routers:
            yield from nodes
