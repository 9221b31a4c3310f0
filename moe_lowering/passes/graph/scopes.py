"""The stream, super-kernel and core-limit scopes of a graph: which are open at each node. Nothing is fused across one.

npugraph_ex marks scopes by paired nodes in the graph (``npugraph_ex.scope_enter`` / ``scope_exit``,
``npu.super_kernel_scope_begin`` / ``_end``). ``stream_label`` metadata is set only after the pre-pass, so the nodes
themselves are read. Source: wheel.fx_compiler: _valid_graph.
"""

from __future__ import annotations

from torch.fx import Graph, Node

_OPEN = frozenset({"scope_enter", "super_kernel_scope_begin"})
_CLOSE = frozenset({"scope_exit", "super_kernel_scope_end"})


def is_marker(node: Node) -> bool:
    """Whether a node opens or closes a scope."""
    name = getattr(node.target, "_opname", None)
    return name in _OPEN or name in _CLOSE


def scope_paths(graph: Graph) -> dict[Node, tuple[str, ...]]:
    """For each node the names of the scope markers open around it. Empty when the graph has no scopes, as its index of targets
    says."""
    if not any(getattr(target, "_opname", None) in _OPEN for _, target in graph._find_nodes_lookup_table.table):
        return {}
    paths: dict[Node, tuple[str, ...]] = {}
    open_scopes: list[str] = []
    for node in graph.nodes:
        name = getattr(node.target, "_opname", None)  # only OpOverloads have it: cheap for every other node
        if name in _OPEN:
            open_scopes.append(node.name)
        elif name in _CLOSE and open_scopes:
            open_scopes.pop()
        if open_scopes:
            paths[node] = tuple(open_scopes)
    return paths
