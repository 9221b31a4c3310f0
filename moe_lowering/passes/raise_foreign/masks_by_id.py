"""For which experts a mask of slots is True: computed for every id that there is, whatever operators spell it.

A mask is read where it is a function of one tensor of ids element by element: comparisons, logic, arithmetic with numbers, a
look-up in a table that the graph itself makes. It is then computed for 0, 1, ... in place of the ids. A table that comes from
outside of the graph (an input, a buffer, a parameter) has no values here and proves nothing; a buffer might have others later.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from moe_lowering.passes.graph.arguments import input_node
from moe_lowering.passes.graph.walks import name_of
from moe_lowering.passes.raise_foreign.chain_walk import equal_values

# What is computed for each element on its own
_BY_ELEMENT = frozenset({
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and",
    "bitwise_or", "bitwise_xor", "bitwise_not", "add", "sub", "rsub", "mul", "floor_divide", "div", "remainder", "neg",
    "abs", "clamp", "clamp_min", "clamp_max", "where", "_to_copy", "clone", "alias", "detach",
})  # fmt: skip
# What makes tables of numbers, from nothing or from other tables
_TABLES = _BY_ELEMENT | {
    "arange", "full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones",
    "scalar_tensor", "slice", "slice_scatter", "select", "select_scatter", "cat", "copy", "view", "reshape", "unsqueeze",
    "squeeze", "expand", "index_put", "lift_fresh_copy", "index",
}  # fmt: skip
_LARGEST = 1 << 16  # elements of a table
_STEPS = 64


def experts_of_mask(mask: Any, ids: Any, experts: int) -> list[bool] | None:
    """Of each expert whether the mask is True where its id stands; None where that is not known."""
    if not isinstance(mask, Node) or not isinstance(ids, Node):
        return None
    with unset_fake_temporarily(), torch.no_grad():
        known: dict[Node, torch.Tensor | None] = {}
        value = _compute(mask, ids, torch.arange(experts), known)
        if value is None or value.dtype != torch.bool or tuple(value.shape) != (experts,):
            return None
        found: list[bool] = value.tolist()
        return found


def _compute(node: Node, ids: Node, numbers: torch.Tensor, known: dict[Node, Any]) -> Any:
    """A node's values with ``numbers`` in place of the ids, or of a table; None where they are not known."""
    if node not in known:
        known[node] = None  # while its operands are looked at, and beyond the steps
        if equal_values(node, ids):
            known[node] = numbers.to(node.meta["val"].dtype)
        elif len(known) <= _STEPS:
            known[node] = _called(node, ids, numbers, known)
    return known[node]


def _called(node: Node, ids: Node, numbers: torch.Tensor, known: dict[Node, Any]) -> Any:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target.namespace != "aten" or name_of(node) not in _TABLES:
        return None
    value = functools.partial(_compute, ids=ids, numbers=numbers, known=known)
    by_slot = [each for each in node.all_input_nodes if _depends(each, ids)]
    if by_slot and not _is_by_element(node, by_slot):
        return None
    if not by_slot and not _is_small(node):
        return None
    made: dict[Node, Any] = {each: value(each) for each in node.all_input_nodes}
    if any(each is None for each in made.values()):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, _without_device(node.kwargs)), made.__getitem__)
    try:
        result = node.target(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return None  # a constant has sizes of slots, or a table has no such id
    return result if isinstance(result, torch.Tensor) and result.numel() <= _LARGEST else None


def _is_small(node: Node) -> bool:
    """Whether a table may be made, before it is."""
    size = node.meta["val"].numel()
    return isinstance(size, int) and size <= _LARGEST


def _is_by_element(node: Node, by_slot: list[Node]) -> bool:
    """Whether each element comes from those of the operands in the same place: all of the ids' shape, or numbers; or whether
    it is looked up in a table of one dimension."""
    shape = node.meta["val"].shape
    alike = all(each.meta["val"].shape == shape for each in by_slot)
    if name_of(node) == "index":
        table, places = node.args[:2]
        return alike and places == [by_slot[0]] and table not in by_slot and input_node(node).meta["val"].dim() == 1
    others = [each for each in node.all_input_nodes if each not in by_slot]
    return alike and name_of(node) in _BY_ELEMENT and all(each.meta["val"].numel() == 1 for each in others)


def _depends(node: Node, ids: Node) -> bool:
    """Whether a node is computed from the ids."""
    pending, visited = [node], {node}
    while pending:
        at = pending.pop()
        if equal_values(at, ids):
            return True
        fresh = [each for each in at.all_input_nodes if each not in visited and each.op == "call_function"]
        fresh += [each for each in at.all_input_nodes if each is ids and each not in visited]
        visited.update(fresh)
        pending += fresh
    return False


def _without_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A factory's words without where its result lies, which is computed here."""
    return {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "layout")}
