"""Grouped matrix products of torch's: transformers' ``grouped_mm`` and its fallback, torchtitan.

The products of a layer share one tensor of offsets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.arguments import argument
from moe_lowering.passes.raise_foreign.match_experts import match_experts
from moe_lowering.passes.raise_foreign.records import ForeignBlock, Form

NAME = "grouped_mm"


def by_offsets(anchors: Sequence[Node]) -> list[list[Node]]:
    """Products with one tensor of offsets; without offsets it is a batched product of something else."""
    found: dict[Any, list[Node]] = defaultdict(list)
    for node in anchors:
        offsets = argument(node, "offs")
        if offsets is not None:
            found[offsets].append(node)
    return list(found.values())


def match(graph: Graph, anchors: list[Node], deployment: Deployment) -> ForeignBlock:
    return match_experts(NAME, graph, anchors)


FORM = Form(NAME, ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"), by_offsets, match)
