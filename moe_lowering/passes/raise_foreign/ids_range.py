"""Whether the ids of a layer are experts that it has, and those of one token different ones.

An id past the last expert is a row that no product computes: what the layer then makes of it (nothing, garbage, an identity
expert) is not what ``dispatch`` does. So ids must come from choices among as many experts, or from outside of the graph: an
input, or a table that is stored. The latter are taken to be experts, as the generic operators take them. With k > 1 the ids of
one token must also differ (``distinct_ids``).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.passes.graph.arguments import argument, explicit_arguments, input_node
from moe_lowering.passes.graph.walks import VIEWS, stock_name_of
from moe_lowering.passes.raise_foreign.distinct_ids import may_repeat, read_to_differ

_CHOICES = ("topk", "sort", "max", "min")  # (values, indices)
_LOOK_UPS = ("index", "index_select", "gather", "embedding")  # of a table, by anything
_JOINS = ("cat", "stack", "where", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "flip")
_CASTS = ("_to_copy", "to", "convert_element_type")
_STEPS = 60
# Operators that fill a tensor, and the argument with the number
_FILLED = {"full": "fill_value", "full_like": "fill_value", "new_full": "fill_value", "scalar_tensor": "s"}
_ROUTERS = ("npu_moe_gating_top_k_softmax", "npu_moe_gating_top_k_softmax_v2")


def out_of_range(ids: Node, experts: int, given: bool = True) -> Node | None:
    """The node because of which ids are not known to be in [0, experts) and to differ within a token; None where they are.

    Args:
        given: take ids from outside of the graph to be so.
    """
    return _walk(ids, experts, given)[0] or may_repeat(ids, given=False)


def made_from(ids: Node, experts: int) -> list[Node]:
    """The nodes whose values the ids are taken from, back to a choice or to what is given: what the proof was read from."""
    return sorted({*_walk(ids, experts, given=True)[1], *read_to_differ(ids)})


def _walk(ids: Node, experts: int, given: bool) -> tuple[Node | None, list[Node]]:
    """The node because of which ids may be out of range, or None; and the nodes that were looked at."""
    pending, visited = [ids], {ids}
    while pending:
        node = pending.pop()
        sources = _sources(node, experts) if given or node.op not in ("placeholder", "get_attr") else None
        if sources is None or len(visited) > _STEPS:
            return node, sorted(visited)
        fresh = [source for source in sources if source not in visited]
        visited.update(fresh)
        pending += fresh
    return None, sorted(visited)


def _sources(node: Node, experts: int) -> list[Node] | None:
    """What a node's values are taken from; [] where they are in range, None where that is not known."""
    if node.op in ("placeholder", "get_attr"):
        return []
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _item(node, experts)
    name, first = stock_name_of(node), node.args[0] if node.args else None
    if name in _CASTS and not _holds(node.meta["val"].dtype, experts):
        return None
    if name in VIEWS or name in _LOOK_UPS:
        return [first] if isinstance(first, Node) else None
    if name in _JOINS:
        operands = node.args[1:3] if name == "where" else first if isinstance(first, (list, tuple)) else [first]
        return (
            [each for each in operands if isinstance(each, Node)]
            if all(isinstance(e, Node) for e in operands)
            else None
        )
    if name == "arange":
        count = node.meta["val"].shape[0]
        start, step = (explicit_arguments(node).get(name, default) for name, default in (("start", 0), ("step", 1)))
        return [] if (start, step) == (0, 1) and isinstance(count, int) and count <= experts else None
    if name in ("argmax", "argsort"):
        return _of_few(node, explicit_arguments(node).get("dim", -1 if name == "argsort" else None), experts)
    if name == "clamp":
        low, high = (explicit_arguments(node).get(bound) for bound in ("min", "max"))
        fits = isinstance(low, int) and isinstance(high, int) and 0 <= low <= high < experts
        return [] if fits else None
    return None


def _holds(dtype: torch.dtype, experts: int) -> bool:
    """Whether a dtype holds the number of each expert."""
    if dtype.is_floating_point:
        return experts <= 2 / torch.finfo(dtype).eps
    return dtype is not torch.bool and experts - 1 <= torch.iinfo(dtype).max


def past_experts(ids: Node, experts: int) -> Node | None:
    """The node that gives some tokens an id that is no expert, on purpose; None where none is seen.

    Chains of torch_npu operators drop such tokens (``finished`` of a router, a mask filled with the number of experts), which
    ``dispatch`` does not. What else makes their ids is taken to make experts, as those operators take it.
    """
    pending, visited = [ids], {ids}
    while pending and len(visited) <= _STEPS:
        node = pending.pop()
        name = stock_name_of(node)
        if name in _ROUTERS and argument(node, "finished") is not None:
            return node
        filled = node.args[1:] if name == "where" else node.args[2:] if name == "masked_fill" else ()
        if any(not _is_expert(each, experts) for each in filled):
            return node
        followed = node.target is operator.getitem or name in (*VIEWS, *_JOINS, "masked_fill", "clone")
        fresh = [source for source in node.all_input_nodes if followed and source not in visited]
        visited.update(fresh)
        pending += fresh
    return None


def _is_expert(value: Any, experts: int) -> bool:
    """Whether what a mask fills in may be an expert: its number, or a value that is not known."""
    if isinstance(value, Node):
        name = _FILLED.get(stock_name_of(value))
        value = None if name is None else argument(value, name)
    return not isinstance(value, (int, float)) or 0 <= value < experts


def _item(node: Node, experts: int) -> list[Node] | None:
    source, index = node.args
    if not isinstance(source, Node):
        return None
    name = stock_name_of(source)
    if name == "route":
        return [] if index == 1 and input_node(source).meta["val"].shape[-1] == experts else None
    if name in _CHOICES and index == 1:
        return _of_few(source, argument(source, "dim"), experts)
    return _sources(source, experts) if name in _JOINS else None


def _of_few(node: Node, dim: Any, experts: int) -> list[Node] | None:
    """[] where a choice is among at most ``experts``."""
    shape = input_node(node).meta["val"].shape
    if not isinstance(dim, int):
        return None
    size = shape[dim]
    return [] if isinstance(size, int) and size <= experts else None
