"""Which node of a graph is the result of a layer: the first one on every way from its products that is a sum over choices."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch.fx import Node

from moe_lowering.passes.graph.walks import stock_name_of
from moe_lowering.passes.raise_foreign.closed_region import is_dead, looks_only
from moe_lowering.passes.raise_foreign.match_activation import match_activation
from moe_lowering.passes.raise_foreign.meanings import Value, choices, flat, tokens
from moe_lowering.passes.raise_foreign.read_meanings import Reader, is_made_alike
from moe_lowering.passes.raise_foreign.records import NotThisForm
from moe_lowering.passes.raise_foreign.terms import Expert, Part, Summed, Term, Times, Weighted

_STEPS = 400  # nodes between the first product and the result


def find_result(reader: Reader, products: Sequence[Node]) -> Node:
    """The first node on every way from the products that is a sum over choices."""
    pending, visited = list(products), set(products)
    heapq.heapify(pending)
    ends: list[Node] = []
    for _ in range(_STEPS):
        if not pending:
            break
        node = heapq.heappop(pending)
        if looks_only(node) or is_dead(node) or is_made_alike(node):
            continue
        value = reader.value(node) if node.op != "output" else None
        if value is None:
            if node.op == "output" or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
                raise _ends_early(node, reader)
            if isinstance(node.meta["val"], torch.Tensor):
                raise reader.reason(node)
        elif _is_layer(value):
            ends.append(node)
            continue
        for user in node.users:
            if user not in visited:
                visited.add(user)
                heapq.heappush(pending, user)
    if pending or len(ends) != 1:
        raise NotThisForm(
            min(products),
            "raise.result",
            f"{len(ends)} sums over the choices of a token",
            "one, that all products go into",
        )
    return ends[0]


def _ends_early(node: Node, reader: Reader) -> NotThisForm:
    source = next((n for n in node.all_input_nodes if reader.is_derived(n)), node)
    if _is_unweighted(reader.value(source)):
        return NotThisForm(
            source,
            "raise.no_weights",
            f"{source.name}, results by token with one expert each, that no routing weight is multiplied with; of weights "
            "on x itself, in front of the routing, nothing is left to see",
            "a routing weight for each slot, on the experts' rows",
        )
    return NotThisForm(
        source,
        "raise.read_outside",
        f"{source.name} is read by {node.name} before it is the result of a layer",
        "values inside of a layer that are read inside only",
    )


def _is_layer(value: Value) -> bool:
    term = value.term
    if isinstance(term, Summed):
        return True
    rows = term.rows if isinstance(term, Weighted) else term
    done = isinstance(term, Weighted) or (isinstance(rows, Expert) and _weighs_input(rows))
    return done and _is_by_token(rows, value)


def _is_by_token(rows: Term, value: Value) -> bool:
    """Whether rows are results of the second product, by token: with k = 1 nothing is left to sum."""
    if not isinstance(rows, Expert) or not isinstance(rows.rows, Times):
        return False
    return not choices(rows.ids) and flat(value.dims)[:-1] == tokens(rows.ids)


def _is_unweighted(value: Value | None) -> bool:
    return value is not None and not isinstance(value.term, Weighted) and _is_by_token(value.term, value)


def _weighs_input(second: Expert) -> bool:
    def first(term: Term) -> Term:
        return first(term.whole) if isinstance(term, Part) else term

    gated = match_activation(second.rows)
    inner = None if gated is None else first(gated.gate)
    return isinstance(inner, Expert) and isinstance(inner.rows, Weighted)


def end_of_casts(reader: Reader, node: Node) -> Node:
    """The result after casts that are its only readers, as far as they lead to the dtype of the experts."""
    while len(users := [user for user in node.users if not looks_only(user)]) == 1:
        (user,) = users
        if stock_name_of(user) not in ("_to_copy", "convert_element_type", "to") or reader.value(user) is None:
            break
        if reader.value(user) != reader.value(node):
            break
        node = user
    return node
