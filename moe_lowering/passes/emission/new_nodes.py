"""``insert_call``: ``Graph.call_function`` for nodes that the pass makes by the dozen, in half the time.

``call_function`` walks the arguments to look for SymInts, which the pass never gives, and derives a candidate for the
name from the target anew for each node; setting arguments afterwards takes the node out of the graph's index and puts it
back. Measured per node: 10.8 us with arguments, 8.4 us with arguments set afterwards, 4.3 us here. ``repeated_call`` is for
nodes that a tape makes again and again: what belongs to the graph and the target is looked up once, and no Python code of
FX runs for a node.

What is done here is what ``Graph.create_node`` does after that. A torch that does more there would be missed in silence, so
the first nodes of a process are compared with what ``call_function`` makes; when they differ, or where somebody listens to
new nodes or has a graph of a class of his own, ``call_function`` makes them.
Source: torch.fx_graph: create_node, _Namespace, _FindNodesLookupTable; torch.fx_node: Node.__init__, prepend.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _NodeBase
from torch.fx import Graph, Node
from torch.fx.graph import _Namespace

Make = Callable[[Graph, Any, tuple[Any, ...], dict[str, Any]], Node]

# Makes one more node of a target in front of a node, from arguments by position and by name.
MakeBefore = Callable[[Node, tuple[Any, ...], dict[str, Any]], Node]


def insert_call(graph: Graph) -> Make:
    """What makes call_function nodes of a graph at its insertion point, from the graph, a target, arguments by position and
    by name. Arguments hold nodes and plain values, no SymInt."""
    module = graph.owning_module
    if type(graph) is not Graph or (module is not None and getattr(module, "_create_node_hooks", None)):
        return type(graph).call_function
    return _insert if _is_whole() else Graph.call_function


def repeated_call(graph: Graph, target: Any) -> MakeBefore:
    """What makes call_function nodes of one target in one graph, from the node in front of which each is to stand and its
    arguments, which hold nodes and plain values, no SymInt. The graph has had a node of that target."""
    make = insert_call(graph)
    known = _CANDIDATES.get(id(target)) if make is _insert else None
    if known is None:
        return functools.partial(_insert_before, make, graph, target)
    return _repeated(graph, target, known[1])


def _insert_before(
    make: Make, graph: Graph, target: Any, before: Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Node:
    with graph.inserting_before(before):
        return make(graph, target, args, kwargs)


def _repeated(graph: Graph, target: Any, candidate: str) -> MakeBefore:
    """As ``_insert``, with ``Node.__init__`` but for its look at the target, and the C++ function that ``prepend`` calls."""
    names, index = graph._graph_namespace, graph._find_nodes_lookup_table.table["call_function", target]
    used, counts, owners = names._used_names, names._base_count, names._obj_to_name
    new, fill = Node.__new__, _NodeBase.__init__

    def make(before: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        name, number = candidate, counts.get(candidate, 0)
        while name in used:
            number += 1
            name = f"{candidate}_{number}"
        used.add(name)
        counts[candidate] = number
        node = new(Node)
        fill(node, graph, name, "call_function", target, None)
        node._update_args_kwargs(args, kwargs)
        owners[node] = name
        before._prepend(node)
        index[node] = None
        graph._len += 1
        return node

    return make


def _insert(graph: Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    names = graph._graph_namespace
    known = _CANDIDATES.get(id(target))
    if known is None:
        name = _first_name(names, target)
    else:  # as ``_Namespace.create_name`` for a candidate that is a legal name without a number
        name = candidate = known[1]
        used, counts = names._used_names, names._base_count
        number = counts.get(candidate, 0)
        while name in used:
            number += 1
            name = f"{candidate}_{number}"
        used.add(name)
        counts[candidate] = number
    node = Node(graph, name, "call_function", target, args, kwargs)
    names._obj_to_name[node] = name
    graph._insert(node)
    graph._find_nodes_lookup_table.table["call_function", target][node] = None
    graph._len += 1
    return node


# By the id of a target: the target itself, so that the id stays its own, and the name that nodes of it are numbered after.
# Hashing an operator takes as long as the rest of a look-up.
_CANDIDATES: dict[int, tuple[Any, str]] = {}


def _first_name(names: Any, target: Any) -> str:
    """The name of a node of a target that was not met before, by FX itself."""
    candidate = Graph()._target_to_str(target)
    first = _Namespace().create_name(candidate, None)
    if not first.rpartition("_")[2].isdigit():  # those are numbered in another way, as words of Python are
        _CANDIDATES[id(target)] = (target, first)
    return str(names.create_name(candidate, None))


@functools.cache
def _is_whole() -> bool:
    """Whether nodes are what ``call_function`` makes; asked once per process, and said once when they are not."""
    try:
        lost = _differences()
    except (AttributeError, AssertionError, KeyError, RuntimeError, TypeError) as error:  # what torch changed there
        lost = [f"{type(error).__name__}: {error}"]
    if lost:
        warnings.warn(
            f"moe_lowering: nodes of lowered graphs are made by torch {torch.__version__}'s Graph.call_function, which is "
            f"slower: those made here differ in {', '.join(lost)}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not lost


def _differences() -> list[str]:
    """In what graphs of the same nodes differ that are made here, in either way, from one that ``call_function`` makes."""
    reference = _describe(Graph.call_function)
    made = [_describe(_insert), _describe(_insert_again)]
    return [name for name in reference if any(each.get(name) != reference[name] for each in made)]


def _insert_again(graph: Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """As a tape does it; the first node of a target is made by ``_insert``."""
    known = _CANDIDATES.get(id(target))
    if known is None or not graph._find_nodes_lookup_table.table["call_function", target]:
        return _insert(graph, target, args, kwargs)
    return _repeated(graph, target, known[1])(graph._root, args, kwargs)  # the root stands behind the last node


def _describe(make: Make) -> dict[str, Any]:
    """All that a graph and its nodes hold, nodes by their names."""
    graph = Graph()
    x = graph.placeholder("x")
    for target, args, kwargs in (
        (torch.ops.aten.add.Tensor, (x, x), {"alpha": 2}),
        (operator.getitem, (x, 0), {}),
        (torch.ops.aten.cat.default, ([x, x],), {}),
    ):
        for _ in range(3):  # the first of a target is named in another way
            make(graph, target, args, kwargs)
    names, table = graph._graph_namespace, graph._find_nodes_lookup_table.table
    graph.lint()
    return {
        "nodes": [_describe_node(node) for node in graph.nodes],
        "length": len(graph.nodes),
        "names": {repr(owner): name for owner, name in names._obj_to_name.items()},
        "used names": (names._used_names, names._base_count),
        "index": {str(key): [*map(repr, entries)] for key, entries in table.items()},
        "state of the graph": sorted(vars(graph)),
    }


def _describe_node(node: Node) -> dict[str, Any]:
    held = {name: repr(value) for name, value in vars(node).items()}
    read = (
        "name",
        "op",
        "target",
        "args",
        "kwargs",
        "type",
        "users",
        "_input_nodes",
        "meta",
        "_sort_key",
        "_erased",
        "_repr_fn",
    )
    return {**held, **{name: repr(getattr(node, name)) for name in read}, "kinds": [type(node.args), type(node.kwargs)]}
