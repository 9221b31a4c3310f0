"""Gate and up projections that are the two halves of one stored tensor: it is that tensor that the experts read."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument, input_node
from moe_lowering.passes.graph.walks import stock_name_of
from moe_lowering.passes.raise_foreign.meanings import sizes
from moe_lowering.passes.raise_foreign.records import Weights
from moe_lowering.passes.raise_foreign.rules_of_layout import order_of

_NO_END = 2**62


@dataclasses.dataclass(frozen=True)
class _Half:
    """Lines ``start`` to ``end`` of dimension ``at`` of ``whole``; its last two dimensions were then swapped, or not."""

    whole: Node
    at: int
    start: int
    end: int
    swapped: bool


def joined_storage(weights: Weights) -> Weights | None:
    """The one tensor that gate and up are the halves of; None where they are none."""
    gate, up = (_half(node) for node in weights.nodes)
    if gate is None or up is None or gate.whole is not up.whole or (gate.at, gate.swapped) != (up.at, up.swapped):
        return None
    if (gate.start, gate.end, up.end) != (0, up.start, sizes(gate.whole)[gate.at]) or gate.end * 2 != up.end:
        return None
    transposed = weights.transposed != gate.swapped
    columns = 1 if transposed else 2  # where N stands in what is stored
    return Weights((gate.whole,), transposed) if gate.at == columns else None


def _view_of(node: Node) -> str:
    """The name of the operator that a view is; "" of a copy (``slice_copy``), which is its tensor as it was and not as it is."""
    return "" if str(getattr(node.target, "_opname", "")).endswith("_copy") else stock_name_of(node)


def _half(node: Node) -> _Half | None:
    swapped = False
    while (name := _view_of(node)) in ("transpose", "permute", "alias", "detach"):
        if name in ("transpose", "permute"):
            if order_of(node) != [0, 2, 1]:
                return None
            swapped = not swapped
        node = input_node(node)
    if _view_of(node) != "slice" or argument(node, "step") != 1:
        return None
    whole, at = node.args[0], argument(node, "dim")
    assert isinstance(whole, Node)
    at %= len(sizes(whole))
    width = sizes(whole)[at]
    start, end = argument(node, "start") or 0, argument(node, "end")
    end = width if end is None or (isinstance(end, int) and end >= _NO_END) else end
    if not all(isinstance(n, int) and 0 <= n <= width for n in (start, end)):
        return None
    return _Half(whole, at, start, end, swapped)
