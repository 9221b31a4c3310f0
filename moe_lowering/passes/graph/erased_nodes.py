"""``eraser``: ``Graph.erase_node`` for the nodes that the pass erases by the dozen, in a third of its time.

What is done here is what ``erase_node`` does, without Python code for each attribute that is set and each argument that goes. A
torch that does more there would be missed in silence, so the first erasure of a process is compared with that of
``erase_node``; when they differ, or where somebody listens or has a graph of a class of his own, ``erase_node`` is called.
Source: torch.fx_graph: erase_node, _FindNodesLookupTable; torch.fx_node: Node.__setattr__.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

Erase = Callable[[Graph, Node], None]

_NONE: dict[Node, None] = {}
_nothing: Callable[[Node], None] = _NONE.get  # None for every node, as ``erase_node`` has it, and no Python code


def eraser(graph: Graph) -> Erase:
    """What erases a node of a graph, from the graph and the node, which nobody reads."""
    module = graph.owning_module
    if type(graph) is not Graph or (module is not None and getattr(module, "_erase_node_hooks", None)):
        return type(graph).erase_node
    return _erase if _is_whole() else Graph.erase_node


def _erase(graph: Graph, node: Node) -> None:
    if node.users or node.graph is not graph or node._erased:
        Graph.erase_node(graph, node)  # raises or warns
        return
    graph._find_nodes_lookup_table.table[node.op, node.target if node.op == "call_function" else None].pop(node)
    node._remove_from_list()
    object.__setattr__(node, "_erased", True)  # ``Node.__setattr__`` keeps the index, in which it is no more
    graph._len -= 1
    kwargs = node._kwargs
    node._update_args_kwargs(map_arg(node._args, _nothing), map_arg(kwargs, _nothing) if kwargs else kwargs)


@functools.cache
def _is_whole() -> bool:
    """Whether a graph is what ``erase_node`` leaves; asked once per process, and said once when it is not."""
    try:
        kept, reference = (_describe(erase) for erase in (_erase, Graph.erase_node))
        lost = [name for name in reference if kept.get(name) != reference[name]]
    except (AttributeError, AssertionError, KeyError, RuntimeError, TypeError) as error:  # what torch changed there
        lost = [f"{type(error).__name__}: {error}"]
    if lost:
        warnings.warn(
            "moe_lowering: nodes are erased by this torch's Graph.erase_node, which is slower: an erasure here differs in "
            f"{', '.join(lost)}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not lost


def _describe(erase: Erase) -> dict[str, Any]:
    """All that a graph holds of which a node was erased, and that node, nodes by their names."""
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.call_function(max, (x, [y, 1]))
    node = graph.call_function(max, (x, [y, 1], {"key": x}), {"default": y, "more": 2})
    graph.call_function(operator.getitem, (x, 0))
    erase(graph, node)
    names, index = graph._graph_namespace, graph._find_nodes_lookup_table.table
    graph.lint()
    return {
        "nodes": [(repr(each), repr(each.args), [*map(repr, each.users)]) for each in graph.nodes],
        "length": len(graph.nodes),
        "names": ([*map(repr, names._obj_to_name.items())], sorted(names._used_names), dict(names._base_count)),
        "index": [(str(key), [*map(repr, entries)]) for key, entries in index.items()],
        "state of the graph": sorted(vars(graph)),
        "the node": {
            name: repr(getattr(node, name)) for name in ("args", "kwargs", "users", "_input_nodes", "_erased", "meta")
        },
        "its state": sorted(vars(node)),
    }
