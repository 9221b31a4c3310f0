"""Matrices of experts gathered by ids, one for each slot: transformers' ``batched_mm``, gpt-fast.

The gathers of a layer have one tensor of ids; each goes into a batched product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.graph.walks import VIEWS, source_of, stock_name_of, walk_readers
from moe_lowering.passes.raise_foreign.match_experts import match_experts
from moe_lowering.passes.raise_foreign.records import ForeignBlock, ForeignForm, NotThisForm
from moe_lowering.passes.raise_foreign.split_layers import split_layers

NAME = "gathered_weights"


def by_ids(anchors: Sequence[Node]) -> list[list[Node]]:
    """Gathers of matrices by one tensor of integers that go into batched products, two of them or more; layer by layer."""
    groups: dict[Any, list[Node]] = defaultdict(list)
    for node in anchors:
        ids = _ids(node)
        if ids is not None and _products(node):
            groups[source_of(ids)].append(node)
    return [layer for nodes in groups.values() if len(nodes) > 1 for layer in _by_layer(nodes)]


def _by_layer(gathers: list[Node]) -> list[list[Node]]:
    """The gathers of each layer, where each goes into one product."""
    products = {product: gather for gather in gathers for product in _products(gather)}
    if len(products) != len(gathers):
        return [gathers]
    return [[products[product] for product in layer] for layer in split_layers([*products])]


def _ids(node: Node) -> Node | None:
    source, index = node.args[:2]
    if isinstance(index, (list, tuple)):
        index = index[0] if len(index) == 1 else None
    elif node.args[1] != 0:  # index_select along another axis
        return None
    else:
        index = node.args[2]
    if not isinstance(source, Node) or not isinstance(index, Node):
        return None
    stacked, ids = source.meta.get("val"), index.meta.get("val")
    if not isinstance(stacked, torch.Tensor) or not isinstance(ids, torch.Tensor):
        return None
    is_ids = ids.dtype in (torch.int32, torch.int64)
    return index if stacked.dim() == 3 and stacked.is_floating_point() and is_ids else None


def _products(gather: Node) -> list[Node]:
    """The batched products that a gathered tensor goes into."""
    products = ("bmm", "matmul", "einsum")
    return list(
        walk_readers([gather], lambda node: stock_name_of(node) in VIEWS, lambda node: stock_name_of(node) in products)
    )


def match(graph: Graph, anchors: list[Node], deployment: Deployment) -> ForeignBlock:
    products = [product for gather in anchors for product in _products(gather)]
    if len(set(products)) != len(anchors):
        raise NotThisForm(
            anchors[0], "raise.operation", f"{len(anchors)} gathers for {len(set(products))} products", "one for each"
        )
    ids = source_of(_ids(anchors[0]))
    every = graph.find_nodes(op="call_function", target=anchors[0].target)
    ids_are_shared = any(node not in anchors and source_of(_ids(node)) is ids and _products(node) for node in every)
    return match_experts(NAME, graph, products, deployment, _ids(anchors[0]), ids_are_shared, spreads=True)


FORM = ForeignForm(NAME, ("aten.index.Tensor", "aten.index_select.default"), by_ids, match)
