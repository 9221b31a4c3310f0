"""MoE layers that are written with torch's own operators: found by what they compute, not by a name.

Contract. Reads the graph, never edits it. Each function returns the nodes by which one form is known, in no order. A form is
reported only where the graph shows that experts are chosen; so embeddings, attention (paged, with absorbed weights, with chosen
keys), samplers, LoRA and block-diagonal layers are not taken for one:

- gathered weights (``gathered_weights``): two stacked weights are indexed by the same ids, and a product with one goes through an
  activation into a product with the other. (LoRA has no activation there, chosen keys and values a softmax; what is written at
  these ids, as the states of a recurrent layer are, is no weight.) Between them stand pointwise operators. Where the ids come
  from one choice among as many as there are weights, they may be other ones, of one choice after the other or lines of a
  table, all matrices of an expert may be one tensor, and anything but a softmax or another product may stand between.
- stacked weights: two products with stored 3-D weights and an activation between, of rows that a routing has put there or
  weighted. (Absorbed MLA weights have attention between them; other block-diagonal layers no
  routing.) Also dense products with all experts' columns, whose hidden values a matrix over experts weights.
- a loop over experts (``expert_loops``): ids, or a matrix made from them by scatter, one_hot or a comparison, are taken apart
  expert by expert, and each part weights or selects rows of a product of its own; so are scores that were compared with
  the last chosen one, and tokens that experts choose. (Tokens that end a text, and a mask for each class, meet one product; the
  best tokens of each text one weight.)
- routing that leaves the graph: one_hot of the ids with the number of experts as its width, or counts of them, goes to
  ``nonzero`` or out of the graph, which is what stays of a loop that dynamo could not trace. Of ids that are no result of a
  top-k of several, the matrix goes there as well. (Layers that count the words or codes in use show counts alone.) Also ids
  themselves, or slots in their order, beside weights that were normalised or are those of a module that is named for experts.
  (Samplers choose of many more, classifiers normalise nothing.)

Cost: the graph's index by target; nothing is walked without a gathered or batched weight or the ids of a top-k.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_lowering.passes.emission.emitter import is_emitted
from moe_lowering.passes.graph.arguments import input_node
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
from moe_lowering.passes.leftovers.foreign_operators import ROUTER, is_moe_module, kind_of
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
    return any(map(chooses, calls.named(*CHOICES))) or any(True for _ in calls.routers())


def _experts_of(product: Node) -> set[Any]:
    """How many matrices the stored weights of a product have; empty where it has none."""
    return {_experts(node) for node in product.args[-2:] if isinstance(node, Node)} - {None}


def _experts(operand: Node) -> Any:
    """How many matrices a stored weight has: of three axes as it is stored, or as it is used; None of another node."""
    source: Any = operand
    name = name_of(source)
    while name in VIEWS and source.args:
        base = source.args[0]
        if not isinstance(base, Node):
            return None
        if name in ("expand", "repeat") and shape_of(source) != shape_of(base):  # rows that are given to every expert
            return None
        source, name = base, name_of(base)
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
    return depends_on([*first.all_input_nodes, *weights], is_local, chooses)


def chooses(node: Node) -> bool:
    if name_of(node) in ("max", "sort"):  # other layers with a top-k, such as poolings, read its values alone
        return any(name_of(user) == "getitem" and user.args[1] == 1 for user in node.users)
    return name_of(node) in CHOICES or (node.op == "call_function" and kind_of(node.target) == ROUTER)


def is_local(node: Node) -> bool:
    """Whether a walk may pass a node: not a product with a weight, as what is behind one belongs to another layer."""
    name = name_of(node)
    return name not in MATMULS or (name in BATCHED and not _experts_of(node))


# ------------------------------------------------------------------------------------------------------------ choices


def chosen(calls: GraphCalls) -> Iterator[tuple[Node, Any]]:
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


def least_chosen(calls: GraphCalls) -> Iterator[tuple[Node, Any]]:
    """(the scores that a choice gave, number of what they were chosen from): models compare all scores with the least of them."""
    for node in calls.named("topk", "kthvalue"):
        shape, dim = shape_of(node.args[0]), node.args[2] if len(node.args) > 2 else -1
        if shape and isinstance(dim, int):
            yield from ((user, shape[dim]) for user in node.users if name_of(user) == "getitem" and user.args[1] == 0)


# --------------------------------------------------------------------------------------- routing that leaves the graph


def routing_alone(calls: GraphCalls, is_ours: Walk) -> list[Node]:
    """Where ids go to ``nonzero`` or out of the graph as a matrix over experts or as counts.

    Args:
        is_ours: whether a node belongs to a block, generic or lowered: ids that reach one are told by that block.
    """
    matches: list[Node] = []
    for ids, experts in [*chosen(calls), *((ids, None) for ids in _integer_inputs(calls.graph))]:
        spreads = functools.partial(_is_count, ids=ids, experts=experts)
        derived = walk_readers([ids], lambda n: is_view(n) or name_of(n) in ONE_HOT, spreads)
        leaving = [node for node in derived if _leaves_graph(node, _has_several_choices(ids))]
        leaving += [input_node(ids)] if _leaves_as_routing(ids, experts) else []
        # last: of a model's input these walks are the long ones
        if leaving and not reaches(ids, is_ours) and not any(walk_readers([ids], _has_whole_numbers, is_ours)):
            matches += leaving
    return matches


def _leaves_as_routing(ids: Node, experts: Any) -> bool:
    """Whether ids leave the graph beside weights that were normalised, or beside any of a module that is named for experts.

    Models break the graph there where a loop over experts asks which have tokens. Of as many words as a vocabulary has, or
    where nothing was normalised, it may be any choice of the best.
    """
    choice = ids.args[0] if name_of(ids) == "getitem" else None
    if (
        not isinstance(choice, Node)
        or name_of(choice) != "topk"
        or not isinstance(experts, int)
        or experts > _MOST_EXPERTS
    ):
        return False
    if not any(walk_readers([ids], _is_order, _is_output)):
        return False
    weights = [user for user in choice.users if name_of(user) == "getitem" and user.args[1] == 0]
    weights += [user for user in ids.users if name_of(user) == "gather"]
    modules = [*(choice.meta.get("nn_module_stack") or {}).values()]
    if modules and is_moe_module(modules[-1]):  # the innermost: a model that is named so may choose other things, too
        return any(walk_readers(weights, _is_scaled, _is_output))
    normed = walk_readers(weights, is_view, lambda n: name_of(n) in ("_softmax", "softmax") or _divides_by_sum(n))
    return _has_several_choices(ids) and any(walk_readers(list(normed), _is_scaled, _is_output))


def _has_whole_numbers(node: Node) -> bool:
    """Whether a node has ids that something was done to: they are still those of the block that they come to."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(each, torch.Tensor) and not each.is_floating_point() for each in values)


def _is_output(node: Node) -> bool:
    return node.op == "output"


_MOST_EXPERTS = 1024


def _is_order(node: Node) -> bool:
    """Whether a node has some ids, or the slots in their order."""
    return is_view(node) or name_of(node) in ("select", "slice", "sort", "argsort", "getitem", "searchsorted")


def _divides_by_sum(node: Node) -> bool:
    divisor: Any = source_of(node.args[1]) if name_of(node) == "div" else None
    if isinstance(divisor, Node) and name_of(divisor) in ("add", "clamp", "clamp_min"):  # an epsilon
        divisor = source_of(divisor.args[0])
    return isinstance(divisor, Node) and name_of(divisor) == "sum"


def _is_scaled(node: Node) -> bool:
    return is_view(node) or name_of(node) == "mul"


def _has_several_choices(ids: Node) -> bool:
    """Whether ids are the result of a top-k of more than one. One class out of many is any classifier's result."""
    shape = shape_of(ids)
    return bool(shape and name_of(ids) == "getitem" and name_of(input_node(ids)) == "topk" and shape[-1] != 1)


def is_view(node: Node) -> bool:
    return name_of(node) in VIEWS


def _leaves_graph(node: Node, several: bool) -> bool:
    """Whether it goes to ``nonzero`` or out of the graph: itself or summed where ``several``, else itself and what has tokens."""
    if several:
        return any(walk_readers([node], lambda n: name_of(n) in _SUMS, _is_end))
    has_any = list(walk_readers([node], lambda n: name_of(n) in _SUMS, lambda n: name_of(n) in ("gt", "ne", "nonzero")))
    leaves = any(name_of(each) == "nonzero" for each in has_any) or any(walk_readers(has_any, is_view, _is_end))
    return leaves and any(walk_readers([node], is_view, _is_end))


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
