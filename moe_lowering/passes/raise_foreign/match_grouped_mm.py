"""Grouped matrix products of torch's: transformers' ``grouped_mm`` and its fallback, torchtitan.

And torch_npu's, of rows that ATen operators moved, as early code for Ascend has them; of rows that torch_npu moved see
``npu_forms``.

The products of a layer share one tensor of offsets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.graph.walks import VIEWS, source_of, stock_name_of
from moe_lowering.passes.raise_foreign.match_experts import match_experts
from moe_lowering.passes.raise_foreign.records import ForeignBlock, ForeignForm
from moe_lowering.passes.raise_foreign.split_layers import split_layers

NAME = "grouped_mm"


def by_offsets(anchors: Sequence[Node]) -> list[list[Node]]:
    """Products with one tensor of offsets, layer by layer; without offsets it is a batched product of something else."""
    groups: dict[Any, list[Node]] = defaultdict(list)
    for node in anchors:
        offsets = _offsets(node)
        if offsets is not None:
            groups[_spelling(offsets)].append(node)
    return [layer for nodes in groups.values() for layer in split_layers(nodes)]


_NPU, _MOVES = "npu_grouped_matmul", ("index", "index_select", "gather", "embedding")


def _offsets(node: Node) -> Any:
    """What tells a product how many rows each expert has; None of a product of torch_npu's that has no part in this form."""
    if stock_name_of(node) != _NPU:
        return argument(node, "offs")
    groups = argument(node, "group_list")
    first = (
        min((user for user in groups.users if stock_name_of(user) == _NPU), default=None)
        if isinstance(groups, Node)
        else None
    )
    moved = None if first is None else source_of(argument(first, "x")[0])
    return groups if isinstance(moved, Node) and stock_name_of(moved) in _MOVES else None


def _spelling(node: Any, depth: int = 12) -> Any:
    """Equal for nodes that compute the same from the same: a graph that is not of AOTAutograd may do so twice."""
    if isinstance(node, (list, tuple)):
        return tuple(_spelling(each, depth) for each in node)
    if not isinstance(node, Node) or node.op != "call_function" or not depth or not _is_of_offsets(node):
        return node
    return (node.target, _spelling(node.args, depth - 1), tuple(sorted(map(str, node.kwargs.items()))))


def _is_of_offsets(node: Node) -> bool:
    return stock_name_of(node) in ("cumsum", "histc", "bincount", "sort", "getitem") or stock_name_of(node) in VIEWS


def match(graph: Graph, anchors: list[Node], deployment: Deployment) -> ForeignBlock:
    offsets = _offsets(anchors[0])
    spelling = _spelling(offsets)
    every = graph.find_nodes(op="call_function", target=anchors[0].target)
    ids_are_shared = any(node not in anchors and _spelling(_offsets(node)) == spelling for node in every)
    return match_experts(NAME, graph, anchors, deployment, offsets, ids_are_shared)


FORM = ForeignForm(
    NAME,
    ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default", f"npu.{_NPU}.default"),
    by_offsets,
    match,
)
