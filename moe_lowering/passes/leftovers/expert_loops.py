"""Loops over experts, and all experts in one product: see ``foreign_aten`` for what is told of them and what is not.

Contract. Reads the graph, never edits it.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Container
from typing import Any

from torch.fx import Node

from moe_lowering.passes.graph.walks import (
    MATMULS,
    ONE_HOT,
    POINTWISE,
    SPREADS,
    VIEWS,
    depends_on,
    is_activation,
    name_of,
    shape_of,
    source_of,
    walk_readers,
)
from moe_lowering.passes.leftovers.foreign_aten import chooses, chosen, is_local, is_view, least_chosen
from moe_lowering.passes.leftovers.graph_calls import GraphCalls


def expert_loops(calls: GraphCalls) -> list[Node]:
    """Where ids are taken apart expert by expert."""
    matches: list[Node] = []
    for ids, experts in chosen(calls):
        matches += _parts_that_weigh([ids], ids, experts, SPREADS | {"sub"})
    for values, experts in least_chosen(calls):
        compared = [*walk_readers([values], lambda n: name_of(n) in _LEAST, lambda n: name_of(n) in _ORDERS)]
        matches += _parts_that_weigh(compared, values, experts, _SCORES)
    return matches + _rows_by_expert(calls)


def _parts_that_weigh(starts: list[Node], ids: Node, experts: Any, through: Container[str]) -> list[Node]:
    """The parts of experts in what is made of ``starts``, where they weight or select rows of different products."""
    part = functools.partial(_expert_part, ids=ids, experts=experts)
    nodes = list(walk_readers(starts, lambda n: name_of(n) in through, part))
    selected = {node: _selected_products(node) for node in nodes}
    by_part: dict[Any, frozenset[Node]] = defaultdict(frozenset)
    for node in nodes:  # a model may take an expert's part twice, to read rows and to write them
        by_part[part(node)] |= selected[node]
    return [node for node, rows in selected.items() if rows] if len(set(by_part.values())) > 1 else []


_LEAST = VIEWS | {"select", "slice", "min", "amin", "getitem"}
_ORDERS = ("lt", "le", "gt", "ge")
# Also what makes weights of scores of which those below the last chosen one became nothing
_SCORES = SPREADS | {"_softmax", "softmax", "div", "sub", "rsub"}


def _rows_by_expert(calls: GraphCalls) -> list[Node]:
    """Where experts choose tokens: each takes its line of the tokens' numbers, and the rows meet a weight of its own."""
    matches: list[Node] = []
    for node in calls.named("topk"):
        for ids in (user for user in node.users if name_of(user) == "getitem" and user.args[1] == 1):
            lines = [user for user in ids.users if name_of(user) == "select" and user.args[1] == 0]
            weights = {line: frozenset(map(_weight_of, _selected_products(line))) - {None} for line in lines}
            by_line: dict[Any, frozenset[Any]] = {line.args[2]: own for line, own in weights.items() if own}
            if len(set(by_line.values())) > 1:
                matches += [line for line, own in weights.items() if own]
    return matches


def _weight_of(product: Node) -> tuple[Node, Any] | None:
    """The stored matrix of a product, or the stored matrices and which of them it is."""
    for operand in product.all_input_nodes if name_of(product) in MATMULS else ():
        source, which = source_of(operand), None
        if name_of(source) == "select":
            source, which = source_of(source.args[0]), source.args[1:]
        if source.op in ("placeholder", "get_attr") and len(shape_of(source) or ()) == (2 if which is None else 3):
            return source, which
    return None


def hidden_by_expert(calls: GraphCalls) -> list[Node]:
    """Where a matrix over experts weights what is between two products, each of which has the weights of all experts."""
    matches: list[Node] = []
    for ids, experts in chosen(calls):
        made = walk_readers([ids], is_view, lambda n: name_of(n) in ONE_HOT)
        matrices = [node for node in made if _width(node) == experts]
        for node in walk_readers(matrices, lambda n: name_of(n) in SPREADS, lambda n: name_of(n) == "mul"):
            hidden = [each for each in node.all_input_nodes if _is_hidden(each)]
            if hidden and (_width(node) != experts or len(shape_of(node) or ()) > 2) and _meets_product(node):
                matches.append(node)
    return matches


def _width(node: Node) -> Any:
    return (shape_of(node) or (None,))[-1]


def _is_hidden(node: Node) -> bool:
    """Whether a node is a product behind an activation."""
    return depends_on(
        [node], _is_between, lambda n: is_activation(name_of(n)) and depends_on([n], _is_between, _is_matmul)
    )


def _is_between(node: Node) -> bool:
    name = name_of(node)
    return name in VIEWS or name in POINTWISE or is_activation(name)


def _is_matmul(node: Node) -> bool:
    return name_of(node) in MATMULS


def _meets_product(node: Node) -> bool:
    return any(walk_readers([node], is_view, _is_matmul))


def stacked_results(calls: GraphCalls) -> list[Node]:
    """Where results of all experts are put together, to be weighted or picked by ids."""
    matches = []
    for node in calls.named("cat", "stack"):
        parts = node.args[0]
        if isinstance(parts, (list, tuple)) and len(parts) > 1 and all(_is_product(part) for part in parts):
            meets = walk_readers(
                [node], is_view, lambda n: name_of(n) in ("mul", "bmm", "gather", "index", "index_select")
            )
            others = [other for each in meets for other in each.all_input_nodes if source_of(other) is not node]
            if depends_on(others, is_local, chooses):
                matches.append(node)
    return matches


def _expert_part(node: Node, ids: Node, experts: Any) -> Any:
    """Which expert's part of the ids a node takes; None of a node that takes none."""
    name = name_of(node)
    if name in ("eq", "ne") and isinstance(node.args[1], (int, float)):
        return ("equal", node.args[1])
    if name not in ("select", "slice") or source_of(node.args[0]) is ids or len(node.args) < 3:
        return None
    shape, dim = shape_of(node.args[0]), node.args[1]
    if shape is None or not isinstance(dim, int) or not isinstance(node.args[2], int):
        return None
    if experts is not None and shape[dim] not in (experts, experts + 1):
        return None
    own_shape = shape_of(node)
    return ("part", node.args[2]) if name == "select" or (own_shape is not None and own_shape[dim] == 1) else None


def _selected_products(part: Node) -> frozenset[Node]:
    """The products whose rows an expert's part weights or picks, those of rows that it picks, and what gives their numbers."""
    matches: set[Node] = set()

    def ends(node: Node) -> bool:
        name = name_of(node)
        if name in ("nonzero", "index_add", "masked_select", "_local_scalar_dense"):
            matches.add(node)
        elif name in ("mul", "where", "index"):
            matches.update(source_of(source) for source in node.all_input_nodes if _is_product(source))
        if name == "index":
            matches.update(walk_readers([node], lambda n: name_of(n) in VIEWS, lambda n: name_of(n) in MATMULS))
        return False

    for _ in walk_readers([part], lambda n: name_of(n) in SPREADS, ends):
        pass
    return frozenset(matches)


def _is_product(node: Any) -> bool:
    """A product, also with a bias added or weights on it."""
    source = source_of(node)
    if isinstance(source, Node) and name_of(source) in ("add", "mul"):
        return any(name_of(source_of(each)) in MATMULS for each in source.all_input_nodes)
    return isinstance(source, Node) and name_of(source) in MATMULS
