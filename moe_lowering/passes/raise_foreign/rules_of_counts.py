"""Rules of counting: how many slots each expert has, and where its rows end."""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_lowering.passes.arguments import argument, explicit_arguments
from moe_lowering.passes.foreign_walks import name_of
from moe_lowering.passes.raise_foreign.meanings import Value, as_ids, feature, flat, is_float, sizes, slots
from moe_lowering.passes.raise_foreign.read_meanings import Reader, rule
from moe_lowering.passes.raise_foreign.rules_of_routing import order_of_ids
from moe_lowering.passes.raise_foreign.terms import Counts, Ends, OneHot, Position, Tensor

_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)  # hold any count of slots
_ONES = ("ones", "ones_like", "new_ones")
_ZEROS = ("zeros", "zeros_like", "new_zeros")


@rule("histc", "bincount")
def histogram(reader: Reader, node: Node) -> Value | None:
    source = node.args[0]
    value = reader.value(source) if isinstance(source, Node) else None
    (count,) = sizes(node)
    if value is None or not isinstance(count, int) or source.meta["val"].dtype not in _EXACT:  # type: ignore[union-attr]
        return None
    ids = as_ids(value)
    if ids is None or not covers_slots(reader, ids[0], ids[1]) or is_float(ids[1]):
        return None
    if "histc" in str(node.target):
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


def covers_slots(reader: Reader, value: Value, ids: Tensor) -> bool:
    """Whether each slot stands in a value once."""
    axes = flat(value.dims)
    return axes == slots(ids) or order_of_ids(reader, axes) == ids


@rule("cumsum")
def ends(reader: Reader, node: Node) -> Value | None:
    source = node.args[0]
    value = reader.value(source) if isinstance(source, Node) else None
    if value is None or not isinstance(value.term, Counts) or node.meta["val"].dtype not in _EXACT:
        return None
    return Value(value.dims, Ends(value.term.ids, value.term.experts))


@rule("eq")
def one_hot(reader: Reader, node: Node) -> Value | None:
    """Which expert a slot has: ids [..., 1] == arange(E), as one_hot is traced."""
    left, right = (reader.value(each) for each in node.args[:2])
    if left is None or right is None:
        return None
    for chosen, numbers in ((left, right), (right, left)):
        ids = as_ids(chosen) if isinstance(chosen.term, Tensor) and isinstance(numbers.term, Position) else None
        if ids is None or is_float(ids[1]) or chosen.dims[-1] != () or len(numbers.dims) != 1:
            continue
        count = sizes(node)[-1]
        if isinstance(count, int) and len(sizes(node)) == len(chosen.dims):
            return Value((*ids[0].dims[:-1], feature(count)), OneHot(ids[1], count))
    return None


def counted_matches(reader: Reader, node: Node, value: Value) -> Value | None:
    """Of ``sum`` of ``one_hot``: over all slots it is the counts."""
    term = value.term
    assert isinstance(term, OneHot)
    over = explicit_arguments(node).get("dim")
    at = sorted(each % len(value.dims) for each in ([over] if isinstance(over, int) else over or ()))
    slot_dims = value.dims[:-1]
    if at != [*range(len(slot_dims))] or not covers_slots(reader, Value(slot_dims, term.ids), term.ids):
        return None
    kept = ((),) * len(at) if argument(node, "keepdim") else ()
    return Value((*kept, value.dims[-1]), Counts(term.ids, term.experts))


def counted_ones(reader: Reader, node: Node) -> Value | None:
    """Of ``scatter_add`` and ``index_add``: a one for each slot, added to a zero for each expert."""
    base, at, index, ones = node.args[:4]
    if at != 0 or not all(isinstance(each, Node) for each in (base, index, ones)):
        return None
    count, value = sizes(node), reader.value(index)
    if len(count) != 1 or not isinstance(count[0], int) or name_of(base) not in _ZEROS or name_of(ones) not in _ONES:  # type: ignore[arg-type]
        return None
    if value is None or node.meta["val"].dtype not in _EXACT or sizes(ones) != sizes(index):  # type: ignore[arg-type]
        return None
    ids = as_ids(value)
    if ids is None or is_float(ids[1]) or not covers_slots(reader, ids[0], ids[1]):
        return None
    return Value((feature(count[0]),), Counts(ids[1], count[0]))
