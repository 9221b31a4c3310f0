"""Why experts' rows are no tokens of a routing in their graph: no expert is chosen, or other ranks sent the rows.

Both are told in the place of what a rule stumbled over, which names a step of theirs and not the form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from moe_lowering.passes.graph.walks import VIEWS, depends_on, name_of, split_words, walk_readers
from moe_lowering.passes.raise_foreign.records import NotThisForm

_MOVES = VIEWS | split_words("index index_select gather embedding getitem wait_tensor cat slice mul")
_BACK = _MOVES | split_words("where masked_fill index_put index_copy scatter sum")
_STEPS = 60


def reason_of_rows(of_ids: Node | None, products: Sequence[Node]) -> NotThisForm | None:
    """Why a layer whose experts are not chosen, or whose rows come from other ranks, is none; None of others."""
    first = min(products)
    if of_ids is not None and _is_fixed(of_ids):
        return NotThisForm(
            first, "raise.dense", f"rows of experts by {of_ids.name}, which depends on no ids: no expert is chosen",
            "ids of a routing; dense experts are products of their own, whatever weighs their input or their results",
        )  # fmt: skip
    exchange = next((node for node in first.all_input_nodes if depends_on([node], _is_moved, _exchanges)), None)
    if exchange is not None:
        return NotThisForm(
            first, "raise.exchanged", f"rows {exchange.name}, which all_to_all_single exchanges between ranks in the graph",
            "tokens of this rank: the generic operators exchange them themselves",
        )  # fmt: skip
    # torch.compile breaks transformers' form behind the first exchange: then the rows are inputs, and results are sent back
    back = next(walk_readers([max(products)], lambda node: name_of(node) in _BACK, _exchanges), None)
    if back is not None:
        return NotThisForm(
            back, "raise.exchanged", f"results of the experts, which {back.name} sends back to other ranks",
            "results of this rank's tokens: the generic operators exchange them themselves",
        )  # fmt: skip
    return None


def _is_fixed(node: Node) -> bool:
    """Whether a node is made from numbers and sizes alone."""
    pending, visited = [node], {node}
    while pending:
        node = pending.pop()
        if len(visited) > _STEPS or (node.op != "call_function" and isinstance(node.meta.get("val"), torch.Tensor)):
            return False
        fresh = [source for source in node.all_input_nodes if source not in visited and not _is_size(node)]
        visited.update(fresh)
        pending += fresh
    return True


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _is_moved(node: Node) -> bool:
    return name_of(node) in _MOVES


def _exchanges(node: Node) -> bool:
    return "all_to_all_single" in name_of(node)
