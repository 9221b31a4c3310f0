"""Rules of what is added up: the choices of a token, by a sum or into the lines of tokens; and rows that are put back.

Rows of all slots that are added to zeros by the numbers of their slots are put: each number is there once.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument, explicit_arguments
from moe_lowering.passes.graph.own_writes import functional_name, overload_of
from moe_lowering.passes.raise_foreign.meanings import Value, choices, sizes, slots, tokens
from moe_lowering.passes.raise_foreign.read_meanings import Reader, near_rule, rule
from moe_lowering.passes.raise_foreign.rules_of_counts import counted_matches, counted_ones, is_filled, scattered_ones
from moe_lowering.passes.raise_foreign.rules_of_routing import is_line_index, order_of_ids, scattered
from moe_lowering.passes.raise_foreign.terms import CHOICE, Dims, OneHot, Slot, Summed, TokenOf


@near_rule("sum")
def summed(reader: Reader, node: Node) -> Value | None:
    value = reader.value(node.args[0])
    if value is None or not value.is_slotted:
        return None
    if isinstance(value.term, OneHot):
        return counted_matches(reader, node, value)
    axes = explicit_arguments(node).get("dim")
    over = [axes] if isinstance(axes, int) else axes
    if not over or len(over) != 1:
        return None
    at = over[0] % len(value.dims)
    if value.dims[at] and not (len(value.dims[at]) == 1 and value.dims[at][0].kind == CHOICE):
        return reader.refuse(node, "raise.sum", "a sum over something else than choices", "over the choices of a token")
    kept: Dims = ((),) if argument(node, "keepdim") else ()
    dims = (*value.dims[:at], *kept, *value.dims[at + 1 :])
    return Value(dims, Summed(value.term) if value.dims[at] else value.term)


@near_rule("scatter_add", "index_add", "scatter_reduce")
def added_to_tokens(reader: Reader, node: Node) -> Value | None:
    """The rows of all slots, added to the lines of their tokens."""
    base, at, index, source = node.args[:4]
    arguments = explicit_arguments(node)
    if at != 0:
        return None
    if functional_name(node) != "scatter_reduce":
        counts = counted_ones(reader, node, base, index, source)
        if counts is not None:
            return counts
    if not all(isinstance(n, Node) for n in (base, index, source)):
        return None
    if (
        arguments.get("alpha", 1) != 1
        or arguments.get("reduce", "sum") != "sum"
        or not arguments.get("include_self", True)
    ):
        return None
    return _added_rows(reader, node, base, reader.value(index), reader.value(source), "scatter" in str(node.target))


@rule("scatter")
def put_or_counted(reader: Reader, node: Node) -> Value | None:
    """Rows, or places, written into lines; or ones at the experts of each token."""
    return scattered_ones(reader, node) if overload_of(node) == "scatter.value" else scattered(reader, node)


@rule("index_put", "_unsafe_index_put")
def put_or_added(reader: Reader, node: Node) -> Value | None:
    """Rows written into lines; with ``accumulate`` added to them."""
    base, indices, source = (argument(node, name) for name in ("self", "indices", "values"))
    if not argument(node, "accumulate"):
        return scattered(reader, node)
    if len(indices) != 1 or not all(isinstance(each, Node) for each in (base, indices[0], source)):
        return None
    counts = counted_ones(reader, node, base, indices[0], source)
    if counts is not None:
        return counts
    return _added_rows(reader, node, base, reader.value(indices[0]), reader.value(source), False)


def _added_rows(
    reader: Reader, node: Node, base: Any, number: Value | None, rows: Value | None, by_element: bool
) -> Value | None:
    if number is None or rows is None or not isinstance(number.term, (TokenOf, Slot)):
        return None
    ids = number.term.ids
    if by_element and not is_line_index(number, sizes(base)):
        return None
    first = number.dims[0]
    if not rows.dims or rows.dims[0] != first or len(rows.dims) != 2 or reader.is_derived(base):
        return None
    if first != slots(ids) and order_of_ids(reader, first) != ids:
        return None
    if isinstance(number.term, Slot):
        return Value((slots(ids), rows.dims[1]), rows.term) if is_filled(base, 0) else None
    term = rows.term if not choices(ids) else Summed(rows.term)
    if not is_filled(base, 0):
        term = Summed(rows.term, base)
    return Value((tokens(ids), rows.dims[1]), term)
