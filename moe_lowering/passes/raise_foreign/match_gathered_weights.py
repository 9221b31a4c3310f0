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
from moe_lowering.passes.graph.walks import VIEWS, name_of, source_of, walk_readers
from moe_lowering.passes.raise_foreign.match_experts import match_experts
from moe_lowering.passes.raise_foreign.records import ForeignBlock, Form, NotThisForm

NAME = "gathered_weights"


def by_ids(anchors: Sequence[Node]) -> list[list[Node]]:
    """Gathers of matrices by one tensor of integers that go into batched products, two of them or more."""
    groups: dict[Any, list[Node]] = defaultdict(list)
    for node in anchors:
        ids = _ids(node)
        if ids is not None and _products(node):
            groups[source_of(ids)].append(node)
    return [nodes for nodes in groups.values() if len(nodes) > 1]


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
    return list(walk_readers([gather], lambda node: name_of(node) in VIEWS, lambda node: name_of(node) in products))


def match(graph: Graph, anchors: list[Node], deployment: Deployment) -> ForeignBlock:
    products = [product for gather in anchors for product in _products(gather)]
    if len(set(products)) != len(anchors):
        raise NotThisForm(
            anchors[0], "raise.operation", f"{len(anchors)} gathers for {len(set(products))} products", "one for each"
        )
    return match_experts(NAME, graph, products, deployment, _ids(anchors[0]))


FORM = Form(NAME, ("aten.index.Tensor", "aten.index_select.default"), by_ids, match)
