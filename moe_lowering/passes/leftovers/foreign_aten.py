"""MoE layers that are written with torch's own operators: found by what they compute, not by a name.

Contract. Reads the graph, never edits it. Each function returns the nodes by which one form is known, in no order. A form is
reported only where the graph shows that experts are chosen; so embeddings, attention (paged, with absorbed weights, with chosen
keys), samplers, LoRA and block-diagonal layers are not taken for one:

- gathered weights: two stacked weights are indexed by the same ids, and a product with one goes through an activation into
  a product with the other. (LoRA has no activation there, chosen keys and values a softmax; what is written at these ids, as
  the states of a recurrent layer are, is no weight.) Between them stand pointwise operators; any but a softmax or another
  product where the ids are a choice among as many as there are weights.
- stacked weights: two batched products with stored 3-D weights and an activation between, of rows that a routing has put
  there or weighted. (Absorbed MLA weights have attention between them; other block-diagonal layers no routing.)
- a loop over experts: ids, or a matrix made from them by scatter, one_hot or a comparison, are taken apart expert by
  expert, and each part weights or selects rows of a product of its own. (Tokens that end a text, and a mask for each class,
  meet one product.)
- routing that leaves the graph: one_hot of the ids with the number of experts as its width, or counts of them, goes to
  ``nonzero`` or out of the graph, which is what stays of a loop that dynamo could not trace. Of ids that are no result of a
  top-k of several, the matrix goes there as well. (Layers that count the words or codes in use show counts alone.)

Cost: the graph's index by target; nothing is walked without a gathered or batched weight or the ids of a top-k.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_lowering.passes.emission.emitter import is_emitted
from moe_lowering.passes.graph.walks import (
    BATCHED,
    CHOICES,
    MATMULS,
    ONE_HOT,
    PRODUCTS,
    SPREADS,
    VIEWS,
    Walk,
    depends_on,
    name_of,
    shape_of,
    source_of,
    walk_readers,
)
from moe_lowering.passes.leftovers.foreign_operators import ROUTER, kind_of
from moe_lowering.passes.leftovers.gathered_weights import behind_activation
from moe_lowering.passes.leftovers.graph_calls import GraphCalls

# ------------------------------------------------------------------------------------------------------- stacked weights


def stacked_weights(calls: GraphCalls) -> list[Node]:
    """Products with stored weights of experts, all of them at once."""
    if not _has_choice(calls):
        return []
    stored = {node: experts for node in calls.named(*PRODUCTS) if (experts := _experts_of(node))}
    matches: set[Node] = set()
    for first, experts in stored.items():
        for second in behind_activation({first}, stored):
            if experts & stored[second] and _is_routed(first, second):
                matches |= {first, second}
    return list(matches)


def _has_choice(calls: GraphCalls) -> bool:
    return any(map(_chooses, calls.named(*CHOICES))) or any(True for _ in calls.routers())


def _experts_of(product: Node) -> set[Any]:
    """How many matrices the stored weights of a product have; empty where it has none."""
    return {_experts(node) for node in product.args[-2:] if isinstance(node, Node)} - {None}


def _experts(operand: Node) -> Any:
    """How many matrices a stored weight has: of three axes as it is stored, or as it is used; None of another node."""
    source: Any = operand
    name = name_of(source)
    while name in VIEWS and source.args:
        source = source.args[0]
        if name in ("expand", "repeat") or not isinstance(source, Node):  # rows that are given to every expert
            return None
        name = name_of(source)
    if name == "cat":  # gate and up side by side
        parts = {_experts(part) for part in source.args[0]} if len(shape_of(source) or ()) == 3 else set()
        return parts.pop() if len(parts) == 1 else None
    if source.op not in ("placeholder", "get_attr"):
        return None
    stored = shape_of(source)
    used = stored if source is operand else shape_of(operand)
    if stored is not None and len(stored) == 3:
        return str(stored[0])
    return str(used[0]) if used is not None and len(used) == 3 and stored is not None and len(stored) == 2 else None


def _is_routed(first: Node, second: Node) -> bool:
    weighted = walk_readers(
        [second],
        lambda n: name_of(n) in VIEWS or name_of(n) in ("add", "slice"),
        lambda n: name_of(n) in ("mul", "bmm", "gather", "index", "index_select"),
    )
    weights = [source for product in weighted for source in product.all_input_nodes if source is not second]
    return depends_on([*first.all_input_nodes, *weights], _is_local, _chooses)


def _chooses(node: Node) -> bool:
    if name_of(node) in ("max", "sort"):  # other layers with a top-k, such as poolings, read its values alone
        return any(name_of(user) == "getitem" and user.args[1] == 1 for user in node.users)
    return name_of(node) in CHOICES or (node.op == "call_function" and kind_of(node.target) == ROUTER)


def _is_local(node: Node) -> bool:
    """Whether a walk may pass a node: not a product with a weight, as what is behind one belongs to another layer."""
    name = name_of(node)
    return name not in MATMULS or (name in BATCHED and not _experts_of(node))


# --------------------------------------------------------------------------------------------------- loops over experts


def expert_loops(calls: GraphCalls) -> list[Node]:
    """Where ids are taken apart expert by expert."""
    matches: list[Node] = []
    for ids, experts in _chosen(calls):
        parts: dict[Any, Node] = {}
        for node in walk_readers(
            [ids], lambda n: name_of(n) in SPREADS, functools.partial(_expert_part, ids=ids, experts=experts)
        ):
            parts[_expert_part(node, ids, experts)] = node
        selected = {node: _selected_products(node) for node in parts.values()}
        if len(set(selected.values())) > 1:
            matches += [node for node, rows in selected.items() if rows]
    return matches


def stacked_results(calls: GraphCalls) -> list[Node]:
    """Where results of all experts are put together, to be weighted or picked by ids."""
    matches = []
    for node in calls.named("cat", "stack"):
        parts = node.args[0]
        if isinstance(parts, (list, tuple)) and len(parts) > 1 and all(_is_product(part) for part in parts):
            meets = walk_readers(
                [node], _is_view, lambda n: name_of(n) in ("mul", "bmm", "gather", "index", "index_select")
            )
            others = [other for each in meets for other in each.all_input_nodes if source_of(other) is not node]
            if depends_on(others, _is_local, _chooses):
                matches.append(node)
    return matches


def _chosen(calls: GraphCalls) -> Iterator[tuple[Node, Any]]:
    """(ids, number of what they were chosen from) of every top-k and the like."""
    for node in calls.named("topk", "max", "sort"):
        shape, dim = shape_of(node.args[0]), 0 if len(node.args) < 3 else node.args[2]
        if name_of(node) == "max":
            dim = node.args[1] if len(node.args) > 1 else None
        elif name_of(node) == "topk":
            dim = node.args[2] if len(node.args) > 2 else -1
        else:
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
        if shape and isinstance(dim, int):
            yield from ((user, shape[dim]) for user in node.users if name_of(user) == "getitem" and user.args[1] == 1)
    for node in calls.named("argmax", "argsort"):
        shape, dim = shape_of(node.args[0]), node.args[1] if len(node.args) > 1 else None
        if shape and isinstance(dim, int):
            yield node, shape[dim]
    for router in calls.routers():
        if not is_emitted(router):
            yield from ((user, None) for user in router.users if name_of(user) == "getitem" and user.args[1] == 1)


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


# --------------------------------------------------------------------------------------- routing that leaves the graph


def routing_alone(calls: GraphCalls, is_ours: Walk) -> list[Node]:
    """Where ids go to ``nonzero`` or out of the graph as a matrix over experts or as counts.

    Args:
        is_ours: whether a node belongs to a block, generic or lowered: ids that reach one are told by that block.
    """
    matches: list[Node] = []
    for ids, experts in [*_chosen(calls), *((ids, None) for ids in _integer_inputs(calls.graph))]:
        spreads = functools.partial(_is_count, ids=ids, experts=experts)
        derived = walk_readers([ids], lambda n: _is_view(n) or name_of(n) in ONE_HOT, spreads)
        leaving = [node for node in derived if _leaves_graph(node, _has_several_choices(ids))]
        if leaving and not reaches(ids, is_ours):  # last: of a model's input that walk is the long one
            matches += leaving
    return matches


def _has_several_choices(ids: Node) -> bool:
    """Whether ids are the result of a top-k of more than one. One class out of many is any classifier's result."""
    shape = shape_of(ids)
    return bool(shape) and name_of(ids) == "getitem" and name_of(ids.args[0]) == "topk" and shape[-1] != 1  # type: ignore


def _is_view(node: Node) -> bool:
    return name_of(node) in VIEWS


def _leaves_graph(node: Node, several: bool) -> bool:
    """Whether it goes to ``nonzero`` or out of the graph: itself or summed where ``several``, else itself and what has tokens."""
    if several:
        return any(walk_readers([node], lambda n: name_of(n) in _SUMS, _is_end))
    has_any = list(walk_readers([node], lambda n: name_of(n) in _SUMS, lambda n: name_of(n) in ("gt", "ne", "nonzero")))
    leaves = any(name_of(each) == "nonzero" for each in has_any) or any(walk_readers(has_any, _is_view, _is_end))
    return leaves and any(walk_readers([node], _is_view, _is_end))


_SUMS = VIEWS | {"sum", "gt", "cumsum", "ne"}


def _is_end(node: Node) -> bool:
    return name_of(node) in ("nonzero", "output")


def _integer_inputs(graph: Graph) -> Iterator[Node]:
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32):
            yield node


def reaches(ids: Node, ends: Walk) -> bool:
    """Whether ids, however they are spread, mapped and cast, reach a node for which ``ends`` holds."""
    mapped = SPREADS | {"index", "gather", "embedding", "index_select", "remainder", "floor_divide"}
    return any(walk_readers([ids], lambda n: name_of(n) in mapped, ends))


def _is_count(node: Node, ids: Node, experts: Any) -> bool:
    """Whether a node makes a matrix over the experts, or their counts, from ids."""
    name, shape, own = name_of(node), shape_of(node), shape_of(ids)
    if name in ("bincount", "histc"):
        return True
    if name == "sum":
        return experts is not None and shape in ((experts,), (experts + 1,))
    if name not in ONE_HOT or shape is None or own is None or len(shape) != len(own) + 1:
        return False
    return experts is None or shape[-1] in (experts, experts + 1)
