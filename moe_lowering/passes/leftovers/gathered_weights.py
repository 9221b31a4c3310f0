"""Layers that gather stacked weights by the ids of experts: see ``foreign_aten`` for what is told of them and what is not.

Contract. Reads the graph, never edits it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.graph.walks import (
    CHOICES,
    MATMULS,
    POINTWISE,
    VIEWS,
    WRITES,
    Walk,
    is_activation,
    name_of,
    shape_of,
    source_of,
    split_words,
    walk_readers,
)
from moe_lowering.passes.leftovers.graph_calls import GraphCalls

# Operators that turn the ids of a choice into other ids, or put them elsewhere
_MAPS = VIEWS | split_words(
    "select slice flip roll add sub mul rsub remainder index index_select gather split unbind getitem"
)
_GATHERS = ("index", "index_select", "embedding", "gather")


def gathered_weights(calls: GraphCalls) -> list[Node]:
    """Gathers of stacked weights by the ids of experts: of one tensor, or of one choice among as many as there are weights."""
    by_ids: dict[Any, list[Node]] = defaultdict(list)
    chosen: set[Node] = set()
    for node in calls.named(*_GATHERS):
        ids = _gathers_rows(node)
        if ids is None or _is_written_at(node.args[0], source_of(ids)):
            continue
        choice = _choice_among(node, ids)
        if choice is not None:
            chosen.add(node)
        if _has_matrices(node, choice is not None):
            by_ids[choice or source_of(ids)].append(node)
    matches: set[Node] = set()
    for gathers in by_ids.values():
        products = {gather: set(_products(gather)) for gather in gathers}
        if len(gathers) == 1:
            matches |= {each for each in gathers if each in chosen and _is_all_weights(each, products[each])}
            continue
        passes = _is_no_attention if chosen.issuperset(gathers) else _is_pointwise
        for first, second in ((a, b) for a in gathers for b in gathers if a is not b):
            if behind_activation(products[first], products[second], passes):
                matches |= {first, second}
    return list(matches)


def _is_all_weights(gather: Node, products: set[Node]) -> bool:
    """Whether one stored tensor has all matrices of an expert, of which one product's is behind another's activation."""
    source = source_of(gather.args[0])
    parts = source.args[0] if name_of(source) == "cat" else [source]
    stored = all(getattr(source_of(part), "op", "") in ("placeholder", "get_attr") for part in parts)
    return stored and any(behind_activation({first}, products - {first}) for first in products)


def _gathers_rows(node: Node) -> Node | None:
    """The ids of a gather along the first axis; None of another one."""
    if name_of(node) in ("index_select", "gather"):
        dim, ids = node.args[1:3]
        return ids if dim == 0 and isinstance(ids, Node) else None
    given: Any = node.args[1]
    if name_of(node) == "index":
        given = given[0] if isinstance(given, (list, tuple)) and len(given) == 1 else None
    if not isinstance(given, Node):
        return None
    value = given.meta.get("val")
    return None if isinstance(value, torch.Tensor) and value.dtype is torch.bool else given


def _has_matrices(gather: Node, is_chosen: bool) -> bool:
    """Whether a gather gives matrices: of a tensor with three axes or more; or, by a choice, lines that views make matrices."""
    shape, lines = shape_of(gather.args[0]), shape_of(gather)
    if shape is None or len(shape) >= 3:
        return is_chosen or name_of(gather) in ("index", "index_select")
    views = (shape_of(user) or () for user in gather.users if name_of(user) in VIEWS)
    return is_chosen and lines is not None and any(len(view) == len(lines) + 1 and view[-1] != 1 for view in views)


def _choice_among(gather: Node, ids: Node) -> Node | None:
    """The choice among as many scores as there are weights that the ids of a gather come from, whatever was done to them."""
    node: Any = ids
    while isinstance(node, Node) and name_of(node) in _MAPS and node.args:
        source: Any = node.args[0]
        if name_of(node) in _GATHERS and len(shape_of(source) or ()) == 1:  # a table of experts
            node = _gathers_rows(node)
        else:
            node = source
    if not isinstance(node, Node) or name_of(node) not in CHOICES or not node.args:
        return None
    stacked, scores = shape_of(gather.args[0]), shape_of(node.args[0])
    if not stacked or not scores or len(stacked) < 2:
        return None
    return node if size_key(scores[-1]) == size_key(stacked[0]) else None


def _is_written_at(stacked: Any, ids: Node) -> bool:
    """Whether something stacked gets new rows at ``ids``, as states of recurrent layers do and weights do not."""
    stored = source_of(stacked)

    def writes(node: Node) -> bool:
        if not any(word in name_of(node) for word in WRITES) or source_of(node.args[0]) is not stored:
            return False
        return any(source_of(source) is ids for source in node.all_input_nodes)

    return any(walk_readers([stored], lambda node: name_of(node) in VIEWS, writes))


def _products(weight: Node) -> Iterator[Node]:
    """Products that a weight goes into, also one that is written as mul and sum."""
    through = VIEWS | POINTWISE
    return walk_readers(
        [weight], lambda node: name_of(node) in through, lambda node: name_of(node) in MATMULS or name_of(node) == "sum"
    )


def behind_activation(products: set[Node], among: Container[Node], passes: Walk | None = None) -> list[Node]:
    """Nodes of ``among`` that one of ``products`` goes into through an activation, and nothing but what ``passes`` holds for
    (None: pointwise operators)."""
    passes = passes or _is_pointwise

    def onward(node: Node) -> bool:
        return node not in among and passes(node)

    activations = list(walk_readers(list(products), passes, _activates))
    return list(walk_readers(activations, onward, among.__contains__)) if activations else []


def _activates(node: Node) -> bool:
    """An activation, or the exponential of one; of a softmax the exponentials are summed."""
    if name_of(node) == "exp":
        return not any(name_of(user) == "sum" for user in node.users)
    return is_activation(name_of(node))


def _is_pointwise(node: Node) -> bool:
    name = name_of(node).removesuffix("_")  # also in place
    return name in VIEWS or name in POINTWISE or is_activation(name)


def _is_no_attention(node: Node) -> bool:
    """Whether a node may stand between the products of experts: no softmax, and no product of its own."""
    name = name_of(node)
    return node.op == "call_function" and "softmax" not in name and name not in MATMULS
