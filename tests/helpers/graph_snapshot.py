"""All that an FX graph is, to compare a graph with itself before something happened to it."""

from __future__ import annotations

import itertools
from typing import Any

from torch.fx import Graph


def snapshot(graph: Graph) -> dict[str, Any]:
    """Nodes by identity in order, with names, arguments, readers in order, metadata by identity, and what finds them."""
    nodes = [*graph.nodes]
    place = {node: index for index, node in enumerate(nodes)}
    return {
        "nodes": [(id(n), n.op, n.name, str(n.target), repr(n.args), repr(n.kwargs), n._erased) for n in nodes],
        "backwards": [id(n) for n in reversed(graph.nodes)],
        "inputs": [[i.name for i in n.all_input_nodes] for n in nodes],
        "readers": [[place.get(user, user.name) for user in n.users] for n in nodes],
        "meta": [{key: id(value) for key, value in n.meta.items()} for n in nodes],
        "order": [all(a < b for a, b in itertools.pairwise(nodes))],
        "length": len(nodes) == len(graph.nodes),
        "found": {
            str(key): sorted(map(id, found)) for key, found in graph._find_nodes_lookup_table.table.items() if found
        },
        "names": [graph._graph_namespace._obj_to_name[n] for n in nodes],
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]
