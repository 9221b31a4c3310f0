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
    walk_readers,
)
from moe_lowering.passes.leftovers.graph_calls import GraphCalls


def gathered_weights(calls: GraphCalls) -> list[Node]:
    """Gathers of stacked weights by the ids of experts."""
    by_ids: dict[Any, list[Node]] = defaultdict(list)
    for node in calls.named("index", "index_select"):
        ids = _gathers_rows(node)
        if ids is not None and not _is_written_at(node.args[0], source_of(ids)):
            by_ids[source_of(ids)].append(node)
    matches: set[Node] = set()
    for gathers in by_ids.values():
        if len(gathers) > 1:
            products = {gather: set(_products(gather)) for gather in gathers}
            passes = _is_no_attention if all(map(_is_chosen_among, gathers)) else _is_pointwise
            for first, second in ((a, b) for a in gathers for b in gathers if a is not b):
                if behind_activation(products[first], products[second], passes):
                    matches |= {first, second}
    return list(matches)


def _gathers_rows(node: Node) -> Node | None:
    """The ids of a gather along the first axis of something with three axes or more; None of another one."""
    shape = shape_of(node.args[0])
    if shape is not None and len(shape) < 3:
        return None
    if name_of(node) == "index_select":
        dim, ids = node.args[1:3]
        return ids if dim == 0 and isinstance(ids, Node) else None
    indices = node.args[1]
    if not isinstance(indices, (list, tuple)) or len(indices) != 1 or not isinstance(indices[0], Node):
        return None
    value = indices[0].meta.get("val")
    return None if isinstance(value, torch.Tensor) and value.dtype is torch.bool else indices[0]


def _is_chosen_among(gather: Node) -> bool:
    """Whether the ids of a gather are the places of the best among as many scores as there are weights."""
    chosen = source_of(_gathers_rows(gather))
    choice = chosen.args[0] if name_of(chosen) == "getitem" and chosen.args[1] == 1 else chosen
    if name_of(choice) not in CHOICES or not choice.args:
        return False
    stacked, scores = shape_of(gather.args[0]), shape_of(choice.args[0])
    if not stacked or not scores:
        return False
    return bool(size_key(scores[-1]) == size_key(stacked[0]))


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
