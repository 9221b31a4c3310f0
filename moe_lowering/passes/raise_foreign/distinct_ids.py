"""Whether the ids of one token are different ones: what made them is followed back along the axis of the choices.

MC2 wants different experts for a token (op_plugin.dispatch: the experts of a token differ), and the generic ``dispatch`` refuses
others. Choices of several heads, one choice that was repeated, or a choice along another axis may name an expert twice, each in
the range of experts. Of tables and ids from outside of the graph it is taken for granted.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument, explicit_arguments, input_node
from moe_lowering.passes.graph.walks import split_words, stock_name_of
from moe_lowering.passes.raise_foreign.meanings import sizes
from moe_lowering.passes.raise_foreign.rules_of_layout import order_of

_STEPS = 60
_SAME_PLACES = split_words("_to_copy to convert_element_type type_as clone contiguous alias detach lift_fresh_copy")
_CASTS = ("_to_copy", "to", "convert_element_type", "type_as")
_WIDE = (torch.int32, torch.int64, torch.float32, torch.float64)  # that hold any id
_SAME_ORDER = split_words(
    "view _unsafe_view reshape _reshape_alias unsqueeze squeeze flatten unflatten view_as reshape_as"
)
_CHOICES = ("topk", "sort", "max", "min")  # (values, indices)
_COLLIDE = split_words(  # after which two numbers may be equal
    "mul where masked_fill clamp clamp_min clamp_max minimum maximum remainder floor_divide div bitwise_and bitwise_right_shift"
)


@dataclasses.dataclass(frozen=True)
class _Lines:
    """Numbers of a node that must differ within each line: along axis ``at``, or, without one, in each run of ``width``."""

    node: Node
    at: int | None
    width: Any

    @property
    def axis(self) -> int | None:
        """The axis that the numbers of a line lie along; None where there is none."""
        if self.at is not None:
            return self.at
        last = sizes(self.node)[-1:]
        fits = bool(last) and isinstance(last[0], int) and last[0] > 0 and last[0] % self.width == 0
        return len(sizes(self.node)) - 1 if fits else None


# What to look at next; whether the numbers differ; None where that is not known
_Step: TypeAlias = "_Lines | bool | None"


def may_repeat(ids: Node, given: bool = True) -> Node | None:
    """The node after which two ids of a token may be equal; None where none is seen.

    Args:
        given: what is not known to repeat is taken not to, as operators of torch_npu that route rows take it. Otherwise
            it must be known that the ids differ.
    """
    return _follow(_of_tokens(ids), given)[0]


def read_to_differ(ids: Node) -> list[Node]:
    """The nodes that ``may_repeat`` looks at."""
    return _follow(_of_tokens(ids), given=False)[1]


def _of_tokens(ids: Node) -> _Lines:
    return _Lines(ids, None, sizes(ids)[-1])


def _follow(lines: _Lines, given: bool, outside: bool = True) -> tuple[Node | None, list[Node]]:
    """(where numbers may become equal, or None; what was looked at).

    Args:
        outside: what comes from outside of the graph is taken to differ.
    """
    visited: list[Node] = []
    while len(visited) < _STEPS and (lines.at is not None or isinstance(lines.width, int)):
        visited.append(lines.node)
        step = True if lines.width == 1 else _step(lines)
        if lines.node.op in ("placeholder", "get_attr"):
            step = step or (True if outside and lines.at in (None, len(sizes(lines.node)) - 1) else None)
        if isinstance(step, bool):
            return None if step else lines.node, visited
        if step is None:
            break
        lines = step
    return None if given else lines.node, visited


def _step(lines: _Lines) -> _Step:
    """Where the numbers of lines come from."""
    node = lines.node
    name, first = stock_name_of(node), node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(first, Node):
        return None
    if node.target is operator.getitem:
        return _of_item(lines, first)
    if name in _COLLIDE:
        return False
    if name in ("argsort", "argmax", "argmin"):
        return name == "argsort" and _is_along(node, explicit_arguments(node).get("dim", -1), lines.axis)
    adds_number = name in ("add", "sub") and not isinstance(node.args[1], Node)
    if name in _CASTS and node.meta["val"].dtype not in _WIDE:
        return None
    if adds_number or name in _SAME_PLACES:
        return dataclasses.replace(lines, node=first)
    if name in _SAME_ORDER:
        return _in_order(lines, first)
    if name in ("index", "index_select", "embedding", "gather"):
        return _looked_up(lines, first)
    return _along(lines, name, first)


def _whole(source: Node, axis: int | None) -> _Step:
    """The lines of ``source`` along an axis."""
    return None if axis is None else _Lines(source, axis, sizes(source)[axis])


def _in_order(lines: _Lines, source: Node) -> _Step:
    if lines.node.meta["val"].dtype != source.meta["val"].dtype:  # a view of the bits
        return None
    return _Lines(source, None, lines.width) if lines.at in (None, len(sizes(lines.node)) - 1) else None


def _along(lines: _Lines, name: str, source: Node) -> _Step:
    """Of operators that move axes, repeat what is along them or leave some of it out."""
    node, axis, before = lines.node, lines.axis, sizes(source)
    if axis is None:
        return None
    if name in ("permute", "transpose", "t"):
        return _whole(source, order_of(node)[axis])
    if name in ("expand", "expand_as", "repeat"):
        axis -= len(sizes(node)) - len(before)
        return _whole(source, axis) if axis >= 0 and before[axis] == sizes(node)[axis] else False
    if name == "repeat_interleave":
        other = explicit_arguments(node).get("dim") not in (None, axis, axis - len(before))
        return _whole(source, axis) if other else False
    if name == "select":
        return _whole(source, axis + (axis >= argument(node, "dim") % len(before)))
    return _whole(source, axis) if name in ("slice", "flip") else None


def _of_item(lines: _Lines, source: Node) -> _Step:
    """Of one result of an operator with several."""
    name, first, index, axis = (
        stock_name_of(source),
        source.args[0] if source.args else None,
        lines.node.args[1],
        lines.axis,
    )
    if name == "route":
        return bool(index == 1)
    if not isinstance(first, Node):
        return None
    if name in _CHOICES and index == 1:
        keeps: bool = name in ("topk", "sort") or argument(source, "keepdim") is True
        return keeps and _is_along(source, argument(source, "dim"), axis)
    if name == "unbind" and axis is not None:
        axis += axis >= argument(source, "dim") % len(sizes(first))
    return _whole(first, axis) if name in ("split", "split_with_sizes", "chunk", "unbind") else None


def _is_along(choice: Node, dim: Any, axis: int | None) -> bool:
    """Whether a choice is along an axis: then all of its ids differ there."""
    rank = len(sizes(input_node(choice)))
    return isinstance(dim, int) and axis is not None and dim % rank == axis


def _looked_up(lines: _Lines, source: Node) -> _Step:
    """Numbers of a table with one dimension, at numbers that differ; or lines of a table."""
    node, name, axis = lines.node, stock_name_of(lines.node), lines.axis
    by_dim = name in ("gather", "index_select")
    dim, index = (node.args[1], node.args[2]) if by_dim else (0, node.args[1])
    if isinstance(index, (list, tuple)):
        index = index[0] if len(index) == 1 else None
    is_index = isinstance(index, Node) and index.meta["val"].dtype in (torch.int32, torch.int64)
    if not is_index or not isinstance(index, Node) or not isinstance(dim, int):
        return None
    dim %= len(sizes(source))
    if len(sizes(source)) == 1:
        return dataclasses.replace(lines, node=index) if _is_permutation(source) else None
    if axis is None:
        return None
    if by_dim:  # gather needs places that differ, too
        is_other = axis != dim if name == "index_select" else axis == dim and _differs_along(index, axis)
        return _whole(source, axis) if is_other else None
    inside = axis - len(sizes(index)) + 1
    return _whole(source, inside) if inside > 0 else None


def _differs_along(index: Node, axis: int) -> bool:
    """Of an index, or of a table that the graph makes: one from outside of the graph is no ids, and may repeat."""
    lines = _Lines(index, axis, sizes(index)[axis])
    return _follow(lines, given=False, outside=False)[0] is None


def _is_permutation(table: Node) -> bool:
    """Whether a table has each number once: one from outside of the graph, numbers from 0 on, or an order."""
    while table.op == "call_function" and stock_name_of(table) in _SAME_PLACES and isinstance(table.args[0], Node):
        table = table.args[0]
    return table.op in ("placeholder", "get_attr") or stock_name_of(table) == "arange" or _differs_along(table, 0)
