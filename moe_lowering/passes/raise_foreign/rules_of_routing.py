"""Rules of what is done to ids: sorted, counted, inverted; and of rows that are moved by them.

A sort need not be stable: slots of one expert may stand in any order, as long as one order is used throughout, which is
what a sorted axis says (it is that of one sort).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument, explicit_arguments, input_node
from moe_lowering.passes.graph.own_writes import overload_of
from moe_lowering.passes.raise_foreign.meanings import (
    Value,
    as_ids,
    choices,
    dim,
    flat,
    is_float,
    mapped_value,
    match_dims,
    opaque,
    product,
    sizes,
    slots,
    tokens,
)
from moe_lowering.passes.raise_foreign.read_meanings import Reader, item_rule, rule
from moe_lowering.passes.raise_foreign.terms import (
    SORTED,
    Axis,
    Dim,
    Pick,
    Place,
    Position,
    Slot,
    Tensor,
    Term,
    TokenOf,
)

_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)


def order_axis(sort: Node) -> Axis:
    """The order that a sort of ids gives: by the node that sorts."""
    return Axis(SORTED, sizes(input_node(sort))[0], sort)


def order_of_ids(reader: Reader, line: Dim) -> Tensor | None:
    """The ids whose slots a dimension runs over in sorted order; None of any other dimension."""
    if len(line) != 1 or line[0].kind != SORTED or line[0].of is None:
        return None
    value = reader.value(line[0].of.args[0])
    ids = None if value is None else as_ids(value)
    return None if ids is None else ids[1]


@item_rule("sort")
def sorted_ids(reader: Reader, node: Node, index: int) -> Value | None:
    """Result 0: the ids in order; result 1: their slots."""
    return _sorted(reader, node, index % 2)


@rule("argsort")
def argsorted_ids(reader: Reader, node: Node) -> Value | None:
    return _sorted(reader, node, 1)


def _sorted(reader: Reader, node: Node, index: int) -> Value | None:
    source = node.args[0]
    value = reader.value(source) if isinstance(source, Node) else None
    if value is None or len(value.dims) != 1:
        return None
    term = value.term
    if isinstance(term, Slot) and index == 1 and not argument(node, "descending"):  # the inverse of a permutation
        (order,) = value.dims
        if len(order) == 1 and order[0].kind == SORTED:
            return Value((slots(term.ids),), Place(term.ids, order[0]))
        return None
    ids = as_ids(value) if not input_node(node).meta["val"].is_floating_point() else None
    if ids is None or ids[0].dims != (slots(ids[1]),):
        return None
    if argument(node, "descending"):
        return reader.refuse(node, "raise.sort_order", "ids sorted in descending order", "ascending, as the rows end")
    order_dims = (dim(order_axis(node)),)
    return Value(order_dims, ids[1] if index == 0 else Slot(ids[1]))


def token_of_slot(reader: Reader, node: Node) -> Value | None:
    """A slot's number divided by k, rounded down."""
    arguments = explicit_arguments(node)
    source, by = node.args[0], node.args[1]
    value = reader.value(source) if isinstance(source, Node) else None
    if value is None or not isinstance(value.term, Slot):
        return None
    if "floor_divide" not in str(node.target) and arguments.get("rounding_mode") not in ("floor", "trunc"):
        return None
    count = product(choices(value.term.ids))
    if by != count:
        return reader.refuse(node, "raise.top_k", f"slots divided by {by}", f"by k = {count}, the ids of a token")
    return Value(value.dims, TokenOf(value.term.ids))


@rule("arange")
def positions(reader: Reader, node: Node) -> Value | None:
    arguments = explicit_arguments(node)
    if arguments.get("start", 0) != 0 or arguments.get("step", 1) != 1 or node.meta["val"].dtype not in _EXACT:
        return None
    dims = opaque(node).dims
    return Value(dims, Position(dims[0]))


@rule("index", "index_select", "gather", "embedding")
def gathered(reader: Reader, node: Node) -> Value | None:
    """Lines of a tensor by an index of its first dimension."""
    read = _lines(reader, node)
    if read is None:
        return None
    source, index = read
    if isinstance(index.term, Tensor):
        return _picked(reader, node, source, index)
    value = reader.value(source)
    if value is None or not value.dims:
        return None
    number = index.term
    if isinstance(number, Place):
        mapped: dict[Axis, Dim] | None = {}
        if value.dims[0] != dim(number.order):
            return reader.refuse(
                node, "raise.way_back", f"the places of one order used on {value.dims[0]}", "on rows in that order"
            )
    elif isinstance(number, (TokenOf, Slot)):
        over = tokens(number.ids) if isinstance(number, TokenOf) else slots(number.ids)
        mapped = match_dims(value.dims[0], over)
    else:
        return None
    if mapped is None:
        return None
    value = mapped_value(value, mapped)
    return Value((*index.dims, *value.dims[1:]), _numbered(value.term, number))


def _numbered(term: Term, number: Slot | Place | TokenOf) -> Term:
    """Positions that were moved by the numbers of slots or tokens: those of slots, or of their tokens."""
    if isinstance(term, Position) and not isinstance(number, Place):
        if isinstance(number, Slot) and term.over == slots(number.ids):
            return number
        if term.over == tokens(number.ids):
            return TokenOf(number.ids)
    return term


def _picked(reader: Reader, node: Node, source: Node, index: Value) -> Value | None:
    """``source[ids]``: matrices [E, K, N] or biases [E, N]."""
    picked, ids = opaque(source), as_ids(index)
    if ids is None or len(picked.dims) < 2 or not source.meta["val"].is_floating_point() or is_float(ids[1]):
        return None
    assert isinstance(picked.term, Tensor)
    return Value((*ids[0].dims, *picked.dims[1:]), Pick(picked.term, ids[1]))


def _lines(reader: Reader, node: Node) -> tuple[Node, Value] | None:
    """The source and the index of a gather along the first dimension, of whole lines."""
    name, args = str(node.target), node.args
    if "index_select" in name or "gather" in name:
        source, at, index = args[:3]
        if at not in (0, -len(sizes(input_node(node)))):
            return None
        whole = "gather" in name
    elif "embedding" in name:
        source, index = args[:2]
        whole = False
    else:
        source, indices = args[:2]
        if not isinstance(indices, (list, tuple)) or len(indices) != 1:
            return None
        index, whole = indices[0], False
    if not isinstance(source, Node) or not isinstance(index, Node):
        return None
    if index.meta["val"].dtype not in (torch.int32, torch.int64):
        return None
    value = reader.value(index)
    if value is None:
        return None
    return (source, value) if not whole else _whole_lines(source, value)


def _whole_lines(source: Node, value: Value) -> tuple[Node, Value] | None:
    """Of ``gather``: an index that is the same along every dimension but the first, as long as those of the source."""
    if not is_line_index(value, sizes(source)):
        return None
    return source, Value(value.dims[:1], value.term)


def is_line_index(value: Value, shape: tuple[Any, ...]) -> bool:
    """Whether an index [n, ...] is the same for all elements of a line of ``shape``."""
    beside = value.dims[1:]
    spread = all(axis.kind == "spread" for axis in flat(beside))
    return spread and tuple(product(each) for each in beside) == shape[1:]


@rule("index_copy")
def scattered(reader: Reader, node: Node) -> Value | None:
    """Rows in order of experts, put where a permutation says: back in order of slots; every line is written."""
    read = _put(reader, node)
    if read is None:
        return None
    base, index, source = read
    number = index.term
    if not isinstance(number, Slot) or len(index.dims) != 1:
        return None
    value = reader.value(source)
    order: Dim = index.dims[0]
    if value is None or sizes(base) != sizes(node) or not value.dims:
        return None
    if len(order) != 1 or order[0].kind != SORTED:
        return None
    if isinstance(value.term, Position):
        counts = value.dims == (value.term.over,) and product(value.dims[0]) == order[0].size
        return Value((slots(number.ids),), Place(number.ids, order[0])) if counts else None
    if value.dims[0] != order:
        return None
    return Value((slots(number.ids), *value.dims[1:]), value.term)


def _put(reader: Reader, node: Node) -> tuple[Node, Value, Node] | None:
    """(what is written into, index of its lines, what is written) of a call that writes whole lines."""
    base, by_element = node.args[0], overload_of(node) == "scatter.src"
    if by_element or "index_copy" in str(node.target):
        at, index, source = (argument(node, name) for name in ("dim", "index", "src" if by_element else "source"))
        if at != 0:
            return None
    elif "scatter" in str(node.target):  # a number, or a reduction
        return None
    else:
        indices, source = argument(node, "indices"), argument(node, "values")
        if argument(node, "accumulate") or len(indices) != 1:
            return None
        index = indices[0]
    if not isinstance(base, Node) or not isinstance(index, Node) or not isinstance(source, Node):
        return None
    value = reader.value(index)
    if value is None or (by_element and not is_line_index(value, sizes(base))):
        return None
    return base, Value(value.dims[:1], value.term) if by_element else value, source
