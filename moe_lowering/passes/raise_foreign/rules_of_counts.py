"""Rules of counting: how many slots each expert has, and where its rows end."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument, explicit_arguments, input_node
from moe_lowering.passes.graph.walks import VIEWS, stock_name_of
from moe_lowering.passes.raise_foreign.meanings import Value, as_ids, feature, flat, is_float, sizes, slots
from moe_lowering.passes.raise_foreign.read_meanings import Reader, rule
from moe_lowering.passes.raise_foreign.rules_of_routing import order_of_ids
from moe_lowering.passes.raise_foreign.terms import FEATURE, Counts, Ends, OneHot, Position, Tensor

_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)  # hold any count of slots
_FILLED = {  # by operators that fill, with what
    **dict.fromkeys(("ones", "ones_like", "new_ones"), 1),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), 0),
}


@rule("histc", "bincount")
def histogram(reader: Reader, node: Node) -> Value | None:
    source = input_node(node)
    value = reader.value(source)
    (count,) = sizes(node)
    if not isinstance(count, int) and stock_name_of(node) == "bincount":  # at least that many; ids are experts
        count = argument(node, "minlength") or None
    if value is None or not isinstance(count, int) or source.meta["val"].dtype not in _EXACT:
        return None
    ids = as_ids(value)
    if ids is None or not covers_slots(reader, ids[0], ids[1]) or is_float(ids[1]):
        return None
    if stock_name_of(node) == "histc":
        low, high = argument(node, "min"), argument(node, "max")
        if argument(node, "bins") != count or low != 0 or high not in (count - 1, count):
            return reader.refuse(
                node,
                "raise.histogram",
                f"{count} bins from {low} to {high}",
                f"{count} bins from 0 to {count - 1} or {count}, one for each expert",
            )
    elif argument(node, "weights") is not None:
        return None
    return Value((feature(count),), Counts(ids[1], count))


def is_filled(node: Node, number: int) -> bool:
    """Whether all of a tensor is ``number``, 0 or 1, by the operator that made it; views and casts keep both."""
    while stock_name_of(node) in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    name = stock_name_of(node)
    filled = argument(node, "fill_value") if name in ("full", "full_like", "new_full") else _FILLED.get(name)
    return isinstance(filled, (int, float)) and filled == number


def covers_slots(reader: Reader, value: Value, ids: Tensor) -> bool:
    """Whether each slot stands in a value once."""
    axes = flat(value.dims)
    return axes == slots(ids) or order_of_ids(reader, axes) == ids


@rule("cumsum")
def ends(reader: Reader, node: Node) -> Value | None:
    source = node.args[0]
    value = reader.value(source) if isinstance(source, Node) else None
    if (
        value is None
        or not isinstance(value.term, Counts)
        or node.meta["val"].dtype not in _EXACT
        or len(value.dims) != 1
    ):
        return None
    return Value(value.dims, Ends(value.term.ids, value.term.experts))


@rule("searchsorted")
def ends_by_search(reader: Reader, node: Node) -> Value | None:
    """How many of the ids in order are at most each expert's number."""
    ordered, numbers = (reader.value(each) for each in node.args[:2])
    right = argument(node, "right") or argument(node, "side") == "right"
    if ordered is None or numbers is None or not right or argument(node, "sorter") is not None:
        return None
    ids, (count,) = as_ids(ordered), sizes(node) if len(sizes(node)) == 1 else (None,)
    if (
        ids is None
        or is_float(ids[1])
        or not isinstance(count, int)
        or order_of_ids(reader, flat(ids[0].dims)) != ids[1]
    ):
        return None
    is_counting = isinstance(numbers.term, Position) and numbers.dims == (numbers.term.over,)
    return Value((feature(count),), Ends(ids[1], count)) if is_counting else None


@rule("one_hot")
def one_hot(reader: Reader, node: Node) -> Value | None:
    """Before decompositions."""
    value, count = reader.value(node.args[0]), argument(node, "num_classes")
    ids = None if value is None else as_ids(value)
    if ids is None or not isinstance(count, int) or sizes(node)[-1] != count or not covers_slots(reader, *ids):
        return None
    return Value((*ids[0].dims, feature(count)), OneHot(ids[1], count))


@rule("eq")
def compared(reader: Reader, node: Node) -> Value | None:
    """Which expert a slot has: ids == arange(E), broadcast over a dimension that the ids do not have."""
    left, right = (reader.value(each) for each in node.args[:2])
    if left is None or right is None:
        return None
    for chosen, numbers in ((left, right), (right, left)):
        ids, over = as_ids(chosen) if isinstance(chosen.term, Tensor) else None, numbers.term
        if (
            ids is None
            or not isinstance(over, Position)
            or is_float(ids[1])
            or not covers_slots(reader, ids[0], ids[1])
        ):
            continue
        count = len(sizes(node))
        by_slot, by_expert = (((),) * (count - len(dims)) + dims for dims in (ids[0].dims, numbers.dims))
        at = next((at for at, dim in enumerate(by_expert) if dim), None)
        experts = None if at is None else sizes(node)[at]
        if not isinstance(experts, int) or at is None or by_slot[at]:
            continue
        if by_expert != (*((),) * at, over.over, *((),) * (count - at - 1)):
            continue
        return Value((*by_slot[:at], feature(experts), *by_slot[at + 1 :]), OneHot(ids[1], experts))
    return None


def scattered_ones(reader: Reader, node: Node) -> Value | None:
    """Of ``scatter`` of a one into zeros [..., E] by ids [..., k], which are different ones for a token.

    Every dtype holds zero and one; of sums of them see ``counted_matches``.
    """
    base, at, index, number = node.args[:4]
    value, count = reader.value(index), sizes(node)[-1]
    if at not in (-1, len(sizes(node)) - 1) or number != 1 or not isinstance(base, Node) or not isinstance(count, int):
        return None
    ids = as_ids(value) if value is not None and value.is_opaque and is_filled(base, 0) else None
    if ids is None or is_float(ids[1]) or sizes(base)[:-1] != sizes(input_node(node, 2))[:-1]:
        return None
    return Value((*ids[0].dims[:-1], feature(count)), OneHot(ids[1], count))


def counted_matches(reader: Reader, node: Node, value: Value) -> Value | None:
    """Of ``sum`` of ``one_hot`` over dimensions of slots: over all of them it is the counts."""
    term = value.term
    assert isinstance(term, OneHot)
    over, count = explicit_arguments(node).get("dim"), len(value.dims)
    at = {each % count for each in ([over] if isinstance(over, int) else over or ())}
    summed = [axis for each in at for axis in value.dims[each]]
    if not at or any(axis.kind == FEATURE for axis in summed) or node.meta["val"].dtype not in _EXACT:
        return None
    if any(axis not in slots(term.ids) for axis in summed) and order_of_ids(reader, tuple(summed)) != term.ids:
        return None
    kept = argument(node, "keepdim")
    dims = tuple(() if each in at else value.dims[each] for each in range(count) if kept or each not in at)
    is_whole = flat(dims) == feature(term.experts)
    return Value(dims, Counts(term.ids, term.experts) if is_whole else term)


def counted_ones(reader: Reader, node: Node, base: Any, index: Any, ones: Any) -> Value | None:
    """Of ``scatter_add``, ``index_add`` and ``index_put``: a one for each slot, added to a zero for each expert."""
    if explicit_arguments(node).get("alpha", 1) != 1 or not all(isinstance(n, Node) for n in (base, index, ones)):
        return None
    count, value = sizes(node), reader.value(index)
    if len(count) != 1 or not isinstance(count[0], int) or not is_filled(base, 0) or not is_filled(ones, 1):
        return None
    if value is None or node.meta["val"].dtype not in _EXACT or sizes(ones) != sizes(index):
        return None
    ids = as_ids(value)
    if ids is None or is_float(ids[1]) or not covers_slots(reader, ids[0], ids[1]):
        return None
    return Value((feature(count[0]),), Counts(ids[1], count[0]))
