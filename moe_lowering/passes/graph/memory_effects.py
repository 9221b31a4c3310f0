"""Writes in place: which nodes write, into which memory, and whether a read may be moved past them.

A graph of AOTAutograd is functional but for copies into its inputs at the end. A pass of the user's that ran before, or a
graph made by hand, may write anywhere. The rewrite of a block reads what the block reads at other places between its
first and its last stage, so nothing of that may be written there.

What may share memory: results that an operator's schema says are views of its arguments, everything that goes through an
operator with an unknown or untrue schema (Python functions, higher-order operators that are not functional, operators of
others that write), and what has one storage in ``meta["val"]``. The first two are needed because who edits a graph
rarely makes the values anew. A write to what has no value counts as one to everything.

Cost: a graph that is functional pays for a look at each of its targets, not at its nodes.
Sources: torch.fx_graph: _FindNodesLookupTable; torch.higher_order_ops.
"""

from __future__ import annotations

import bisect
import functools
import operator
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.graph.own_writes import is_unseen_write, makes_memory
from moe_lowering.source_lines import innermost

# Their schemas declare every view, but for those of _VIEWS_UNSAID
_TRUE_SCHEMAS = ("aten", "prims", "prim", "_c10d_functional")
_VIEWS_UNSAID = ("_unsafe_view", "wait_tensor", "unsafe_split", "unsafe_split_with_sizes", "dequantize", "lift")
_WRITES_UNSAID = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")  # running statistics
# Operators without a result that only look, beside this package's, whose schemas are true; any other one with a tensor is
# there for what it writes, whatever it says.
_LOOKS = ("record_stream", "_assert_async")
_FUNCTIONAL = ("auto_functionalized", "auto_functionalized_v2", "triton_kernel_wrapper_functional")
_IN_PLACE = frozenset(name for name in dir(operator) if name.startswith("i") and f"__{name}__" in dir(operator))


class Writes:
    """The writes of one graph, as it is when this is made; not those into memory that nothing else reads."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._nodes = sorted(node for node in _writers(graph) if not is_unseen_write(node))
        self._memory: dict[Node, Node] | None = None

    @property
    def exist(self) -> bool:
        """Whether there is any."""
        return bool(self._nodes)

    def between(self, first: Node, last: Node, read: Iterable[Node], gone: Container[Node] = ()) -> Node | None:
        """A node from ``first`` on and before ``last`` that may write what one of ``read`` before it is, or shares memory with.

        Writes that change sizes count wherever they stand in front of ``last``: values are taken to have the sizes they were
        made with.

        Args:
            gone: writers that do not count, as they are erased with what they write into.
        """
        if not self._nodes:
            return None
        low, high = bisect.bisect_left(self._nodes, first), bisect.bisect_left(self._nodes, last)
        candidates = [*filter(_changes_sizes, self._nodes[:low]), *self._nodes[low:high]]
        if not candidates:
            return None
        if self._memory is None:
            self._memory = _shared_memory(self._graph)
        roots: dict[Node, Node] = {}  # to the first node that has this memory
        for node in sorted(read, reverse=True):
            roots[_root(self._memory, node)] = node
        return next((node for node in candidates if node not in gone and self._hits(node, roots)), None)

    def _hits(self, node: Node, roots: dict[Node, Node]) -> bool:
        """Whether a write may change what is read: what it makes itself, or what is made after it, it does not."""
        assert self._memory is not None
        written = _written(node)
        if written is None or not all(map(_is_known, written)):
            return True
        return any(roots.get(_root(self._memory, n), node) < node for n in written)


def _changes_sizes(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    if getattr(node.target, "_opname", "") == "detach_":
        return False
    return torch.Tag.inplace_view in tags or getattr(node.target, "_opname", "").startswith(("set_", "resize"))


def describe(node: Node) -> str:
    """A node and the line of the user's model that it comes from."""
    line = innermost(node.meta.get("stack_trace") or "")
    return f"{node.name} ({call_name(node)})" + (f", {line}" if line else "")


def writes(node: Node) -> bool:
    """Whether a node may change a value that exists before it."""
    if node.op == "call_method":
        name = str(node.target)
        return name.startswith(("__i", "__setitem__")) or (name.endswith("_") and not name.endswith("__"))
    if node.op == "call_module":
        return True
    if node.op != "call_function" or not _may_write(node.target):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _writes_inside(node)
    return True


@functools.lru_cache(maxsize=4096)
def _may_write(target: Any) -> bool:
    """Of a function that a node calls; for a higher-order operator whether what it calls must be looked at."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable or _writes_without_schema(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(_may_write(getattr(target, name)) for name in target._overload_names)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target) not in _FUNCTIONAL
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", None) or ""
    if module in ("_operator", "operator"):
        return name in _IN_PLACE or name in ("setitem", "delitem")
    return not (module == "math" or name.startswith("sym_") or module.startswith("torch.fx.experimental"))


def _writes_without_schema(target: torch._ops.OpOverload) -> bool:
    takes_tensors = any("Tensor" in str(argument.type) for argument in target._schema.arguments)
    looks = target.namespace == "moe_lowering" or target._opname in _LOOKS or target._opname.startswith("_assert")
    return target._opname in _WRITES_UNSAID or (takes_tensors and not target._schema.returns and not looks)


def _writes_inside(node: Node) -> bool:
    """Whether a graph that a higher-order operator runs writes, or cannot be seen."""
    module = node.graph.owning_module
    attributes = [
        leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, Node) and leaf.op == "get_attr"
    ]
    graphs = [_attribute(module, str(leaf.target)) for leaf in attributes]
    called = [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, torch._ops.OpOverload)]
    inner = [graph for graph in graphs if isinstance(graph, GraphModule)]
    if not inner and not called:
        return True
    return any(map(_may_write, called)) or any(next(iter(_writers(each.graph)), None) for each in inner)


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _writers(graph: Graph) -> Iterator[Node]:
    """Nodes that write, found by their targets."""
    for (op, target), nodes in [*graph._find_nodes_lookup_table.table.items()]:
        if op == "call_function":
            if _may_write(target):
                yield from (node for node in nodes if writes(node))
        elif op in ("call_method", "call_module"):
            yield from (node for node in nodes if writes(node))


def _written(node: Node) -> list[Node] | None:
    """The arguments that a writing node may write; None when it may write anything."""
    target = node.target
    if node.op == "call_method":
        return _tensor_nodes(node.args[:1])
    if node.op == "call_module" or isinstance(target, torch._ops.HigherOrderOperator):
        return None
    if isinstance(target, torch._ops.OpOverload) and not _writes_without_schema(target):
        return [n for argument, value in _bound(node) if _is_written(argument) for n in _tensor_nodes(value)]
    return _tensor_nodes((node.args, node.kwargs))


def _bound(node: Node) -> Iterator[tuple[Any, Any]]:
    """Pairs of an argument in the schema and its value in the call."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            yield argument, node.args[index]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _tensor_nodes(tree: Any) -> list[Node]:
    """Nodes in an argument, without those that are known to be sizes."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Node) and not _is_size(leaf)]


def _is_size(node: Node) -> bool:
    return _is_number(node.meta.get("val"))


def _is_known(node: Node) -> bool:
    """Whether every storage of a node's value is known."""
    value = node.meta.get("val")
    leaves = tree_leaves(value)
    return value is not None and all(leaf is None or _storage(leaf) is not None or _is_number(leaf) for leaf in leaves)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _storage(value: Any) -> int | None:
    """An identity of the value's storage; None for a value without one."""
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # subclasses and sparse tensors have no storage of their own
        return None


def _shared_memory(graph: Graph) -> dict[Node, Node]:
    """A forest: nodes that may share memory have one root (``_root``). 2 us a node, and only where a write asks for it."""
    parents: dict[Node, Node] = {}
    owners: dict[int, Node] = {}
    for node in graph.nodes:
        parents[node] = node
        for source in _may_be(node):
            _join(parents, source, node)
        has_memory = node.op != "output" and not _gives_parts(node)
        for leaf in tree_leaves(node.meta.get("val")) if has_memory else ():
            storage = _storage(leaf)
            if storage is not None:
                _join(parents, owners.setdefault(storage, node), node)
    return parents


def _may_be(node: Node) -> list[Node]:
    """Arguments whose memory the result of a node may share, and with which other arguments may share theirs after it."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output") or _is_size(node):
        return []
    if target is operator.getitem and isinstance(node.args[0], Node) and _gives_parts(node.args[0]):
        return []
    if not isinstance(target, torch._ops.OpOverload):
        functional = isinstance(target, torch._ops.HigherOrderOperator) and not _may_write(target)
        return [] if functional else _tensor_nodes((node.args, node.kwargs))
    schema_is_true = target.namespace in _TRUE_SCHEMAS and not target._opname.startswith("set_")
    if target._opname in _VIEWS_UNSAID or (target._schema.is_mutable and not schema_is_true):
        return _tensor_nodes((node.args, node.kwargs))
    if not _returns_views(target):
        return _tensor_nodes((node.args, node.kwargs)) if _may_return_arguments(target) else []
    return [n for argument, value in _bound(node) if argument.alias_info is not None for n in _tensor_nodes(value)]


def _gives_parts(node: Node) -> bool:
    """Whether a node gives several new tensors, such as values and indices, each of which is read by itself."""
    target = node.target
    if (
        not isinstance(target, torch._ops.OpOverload)
        or target.namespace not in _TRUE_SCHEMAS
        or len(target._schema.returns) < 2
    ):
        return False
    is_new = not target._schema.is_mutable and not _returns_views(target)
    return is_new and all(user.target is operator.getitem for user in node.users)


@functools.lru_cache(maxsize=4096)
def _returns_views(target: torch._ops.OpOverload) -> bool:
    return any(result.alias_info is not None for result in target._schema.returns)


@functools.lru_cache(maxsize=4096)
def _may_return_arguments(target: torch._ops.OpOverload) -> bool:
    """Of an operator that is written with others, as dropout is: its schema says nothing of what they return."""
    name = f"{target._schema.name}.{target._schema.overload_name}".rstrip(".")
    made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return bool(made_of_others) and not makes_memory(target)


def _root(parents: dict[Node, Node], node: Node) -> Node:
    while parents[node] is not node:
        parents[node] = node = parents[parents[node]]
    return node


def _join(parents: dict[Node, Node], a: Node, b: Node) -> None:
    parents[_root(parents, a)] = _root(parents, b)
