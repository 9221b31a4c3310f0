"""MoE layers that are written with torch's own operators: found by what they compute, not by a name.

Contract. Reads the graph, never edits it. Each function returns the nodes by which one form is known, in no order. A form is
told only where the graph shows that experts are chosen; so embeddings, attention (paged, with absorbed weights, with chosen
keys), samplers, LoRA and block-diagonal layers are not taken for one:

- gathered weights: two stacked weights are indexed by the same ids, and a product with one goes through an activation into
  a product with the other. (LoRA has no activation there, chosen keys and values a softmax.)
- stacked weights: two batched products with stored 3-D weights and an activation between, of rows that a routing has put
  there or weighted. (Absorbed MLA weights have attention between them; other block-diagonal layers no routing.)
- a loop over experts: ids, or a matrix made from them by scatter, one_hot or a comparison, are taken apart expert by
  expert, and each part weights or selects rows of a product.
- routing that leaves the graph: one_hot of the ids with the number of experts as its width, or counts of them, goes to
  ``nonzero`` or out of the graph, which is what stays of a loop that dynamo could not trace.

Cost: the graph's index by target; nothing is walked without a gathered or batched weight or the ids of a top-k.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_lowering.passes.foreign_operators import ROUTER, kind_of

_STEPS = 400  # nodes that one walk may visit


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEWS = _words(
    "view _unsafe_view reshape permute transpose t expand unsqueeze squeeze clone contiguous alias detach _to_copy to "
    "convert_element_type flatten unflatten _reshape_alias repeat lift_fresh_copy"
)
_POINTWISE = _words(
    "add sub mul div neg clamp clamp_min clamp_max minimum maximum rsub addcmul square where split split_with_sizes "
    "unbind chunk slice select getitem cat chunk_cat npu_format_cast"
)
_ACTIVATIONS = ("silu", "swish", "glu", "gelu", "sigmoid", "relu", "tanh", "erf", "mish", "softplus", "pow", "elu")
_MATMULS = _words("mm bmm addmm baddbmm matmul linear addbmm einsum _scaled_mm npu_bmmv2 addmv mv _int_mm")
_BATCHED = ("bmm", "baddbmm")
# What makes a matrix over experts from ids, and what is done to it before it weights or selects rows.
_SPREADS = _VIEWS | _words(
    "scatter scatter_add eq ne one_hot where mul add sum any bitwise_and logical_and bitwise_or logical_or "
    "select slice gt ge lt getitem sigmoid masked_fill index_put select_scatter slice_scatter logical_not bitwise_not"
)
_CHOICES = _words("topk argmax sort argsort max")

Walk = Callable[[Node], Any]  # a question about a node


@functools.lru_cache(maxsize=4096)
def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return "getitem" if target is operator.getitem else ""


def _name(node: Node) -> str:
    return _name_of(node.target) if node.op == "call_function" else node.op


def _is_activation(name: str) -> bool:
    return any(word in name for word in _ACTIVATIONS) and "backward" not in name


def _calls(graph: Graph, *names: str) -> Iterator[Node]:
    for (op, target), nodes in list(graph._find_nodes_lookup_table.table.items()):
        if op == "call_function" and nodes and _name_of(target) in names:
            yield from nodes


def _shape(node: Any) -> tuple[Any, ...] | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _source(node: Any) -> Any:
    """What a node is a view, a cast or a copy of."""
    while isinstance(node, Node) and _name(node) in _VIEWS and node.args:
        node = node.args[0]
    return node


def _reached(starts: list[Node], through: Walk, ends: Walk) -> Iterator[Node]:
    """Readers of ``starts`` for which ``ends`` holds, through nodes for which ``through`` does."""
    seen, pending = set(starts), list(starts)
    while pending and len(seen) < _STEPS:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if ends(user):
                yield user
            if through(user):
                pending.append(user)


def _depends(starts: list[Node], through: Walk, ends: Walk) -> bool:
    """Whether ``ends`` holds for one of the nodes that ``starts`` are computed from, through nodes with ``through``."""
    seen, pending = set(starts), list(starts)
    while pending and len(seen) < _STEPS:
        node = pending.pop()
        if ends(node):
            return True
        if through(node):
            fresh = [source for source in node.all_input_nodes if source not in seen]
            seen.update(fresh)
            pending += fresh
    return False


# ------------------------------------------------------------------------------------------------------ gathered weights


def gathered_weights(graph: Graph) -> list[Node]:
    """Gathers of stacked weights by the ids of experts."""
    by_ids: dict[Any, list[Node]] = defaultdict(list)
    for node in _calls(graph, "index", "index_select"):
        ids = _gathers_rows(node)
        if ids is not None:
            by_ids[_source(ids)].append(node)
    found: set[Node] = set()
    for gathers in by_ids.values():
        if len(gathers) > 1:
            products = {gather: set(_products(gather)) for gather in gathers}
            for first, second in ((a, b) for a in gathers for b in gathers if a is not b):
                if _activated_between(products[first], products[second]):
                    found |= {first, second}
    return list(found)


def _gathers_rows(node: Node) -> Node | None:
    """The ids of a gather along the first axis of something with three axes or more; None of another one."""
    shape = _shape(node.args[0])
    if shape is not None and len(shape) < 3:
        return None
    if _name(node) == "index_select":
        dim, ids = node.args[1:3]
        return ids if dim == 0 and isinstance(ids, Node) else None
    indices = node.args[1]
    if not isinstance(indices, (list, tuple)) or len(indices) != 1 or not isinstance(indices[0], Node):
        return None
    value = indices[0].meta.get("val")
    return None if isinstance(value, torch.Tensor) and value.dtype is torch.bool else indices[0]


def _products(weight: Node) -> Iterator[Node]:
    """Products that a weight goes into, also one that is written as mul and sum."""
    scaled = _VIEWS | {"mul", "div", "sub", "add"}
    return _reached(
        [weight], lambda node: _name(node) in scaled, lambda node: _name(node) in _MATMULS or _name(node) == "sum"
    )


def _activated_between(first: set[Node], second: set[Node]) -> bool:
    """Whether a product among ``first`` goes through an activation into one among ``second``, and nothing but pointwise."""
    plain = _VIEWS | _POINTWISE
    activations = [
        user for product in first
        for user in _reached(
            [product], lambda n: _name(n) in plain or _is_activation(_name(n)), lambda n: _is_activation(_name(n))
        )
    ]  # fmt: skip
    onward: Walk = lambda n: n not in second and (_name(n) in plain or _is_activation(_name(n)))  # noqa: E731
    return bool(activations) and any(_reached(activations, onward, second.__contains__))


# ------------------------------------------------------------------------------------------------------- stacked weights


def stacked_weights(graph: Graph) -> list[Node]:
    """Batched products with stored weights of experts, all of them at once."""
    stored = [node for node in _calls(graph, *_BATCHED) if _rows_of(node) is not None]
    if len(stored) < 2:
        return []
    found: set[Node] = set()
    for first, second in ((a, b) for a in stored for b in stored if a is not b):
        if _batch(first) == _batch(second) and _activated_between({first}, {second}) and _is_routed(first, second):
            found |= {first, second}
    return list(found)


def _batch(product: Node) -> Any:
    shape = _shape(product)
    return None if shape is None else str(shape[0])


def _rows_of(product: Node) -> Node | None:
    """The operand of a batched product that is not a stored weight; None where not exactly one of the two is."""
    operands = product.args[-2:]
    stored = [_is_stored(node) for node in operands]
    if sum(stored) != 1:
        return None
    rows = operands[0] if stored[1] else operands[1]
    return rows if isinstance(rows, Node) else None


def _is_stored(node: Any) -> bool:
    source = _source(node)
    return isinstance(source, Node) and source.op in ("placeholder", "get_attr") and len(_shape(source) or (0, 0)) > 1


def _is_routed(first: Node, second: Node) -> bool:
    rows = _rows_of(first)
    weighted = _reached(
        [second], lambda n: _name(n) in _VIEWS or _name(n) in ("add", "slice"), lambda n: _name(n) in ("mul", "bmm")
    )
    weights = [source for product in weighted for source in product.all_input_nodes if source is not second]
    return _depends([n for n in (rows, *weights) if n is not None], _is_local, _chooses)


def _chooses(node: Node) -> bool:
    return _name(node) in _CHOICES or (node.op == "call_function" and kind_of(node.target) == ROUTER)


def _is_local(node: Node) -> bool:
    """Not a product with a weight: what is behind one belongs to another layer."""
    name = _name(node)
    return name not in _MATMULS or (name in _BATCHED and _rows_of(node) is None)


# --------------------------------------------------------------------------------------------------- loops over experts


def expert_loops(graph: Graph) -> list[Node]:
    """Where ids are taken apart expert by expert."""
    found: list[Node] = []
    for ids, experts in _chosen(graph):
        parts: dict[Any, Node] = {}
        for node in _reached([ids], lambda n: _name(n) in _SPREADS, functools.partial(_part, ids=ids, experts=experts)):
            parts[_part(node, ids, experts)] = node
        telling = [node for node in parts.values() if _selects_rows(node)]
        if len(parts) > 1 and telling:
            found += telling
    return found


def _chosen(graph: Graph) -> Iterator[tuple[Node, Any]]:
    """(ids, number of what they were chosen from) of every top-k and the like."""
    for node in _calls(graph, "topk", "max", "sort"):
        shape, dim = _shape(node.args[0]), 0 if len(node.args) < 3 else node.args[2]
        if _name(node) == "max":
            dim = node.args[1] if len(node.args) > 1 else None
        elif _name(node) == "topk":
            dim = node.args[2] if len(node.args) > 2 else -1
        else:
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
        if shape and isinstance(dim, int):
            yield from ((user, shape[dim]) for user in node.users if _name(user) == "getitem" and user.args[1] == 1)
    for node in _calls(graph, "argmax", "argsort"):
        shape, dim = _shape(node.args[0]), node.args[1] if len(node.args) > 1 else None
        if shape and isinstance(dim, int):
            yield node, shape[dim]
    for (op, target), nodes in list(graph._find_nodes_lookup_table.table.items()):
        if op == "call_function" and nodes and kind_of(target) == ROUTER:
            yield from (
                (user, None) for n in nodes for user in n.users if _name(user) == "getitem" and user.args[1] == 1
            )


def _part(node: Node, ids: Node, experts: Any) -> Any:
    """Which expert's part of the ids a node takes; None of a node that takes none."""
    name = _name(node)
    if name in ("eq", "ne") and isinstance(node.args[1], (int, float)):
        return ("equal", node.args[1])
    if name not in ("select", "slice") or _source(node.args[0]) is ids or len(node.args) < 3:
        return None
    shape, dim = _shape(node.args[0]), node.args[1]
    if shape is None or not isinstance(dim, int) or not isinstance(node.args[2], int) or len(shape) < 2:
        return None
    if experts is not None and shape[dim] not in (experts, experts + 1):
        return None
    taken = _shape(node)
    return ("part", node.args[2]) if name == "select" or (taken is not None and taken[dim] == 1) else None


def _selects_rows(part: Node) -> bool:
    """Whether an expert's part weights rows of a product, or picks rows."""

    def ends(node: Node) -> bool:
        name = _name(node)
        if name in ("nonzero", "index_add", "masked_select"):
            return True
        return name in ("mul", "where", "index") and any(_is_product(source) for source in node.all_input_nodes)

    return any(_reached([part], lambda n: _name(n) in _SPREADS, ends))


def _is_product(node: Node) -> bool:
    source = _source(node)
    if isinstance(source, Node) and _name(source) == "add":  # a bias
        return any(_name(_source(each)) in _MATMULS for each in source.all_input_nodes)
    return isinstance(source, Node) and _name(source) in _MATMULS


# --------------------------------------------------------------------------------------- routing that leaves the graph


def routing_alone(graph: Graph, is_ours: Walk) -> list[Node]:
    """Where ids go to ``nonzero`` or out of the graph as a matrix over experts or as counts.

    Args:
        is_ours: whether a node belongs to a block, generic or lowered: ids that reach one are told by that block.
    """
    found: list[Node] = []
    for ids, experts in _chosen(graph):
        spreads = functools.partial(_counts, ids=ids, experts=experts)
        starts = [node for node in _reached([ids], _is_view, spreads) if _leaves(node)]
        if starts and not reaches(ids, is_ours):
            found += starts
    for ids in _integer_inputs(graph):  # the rest of a graph that broke behind the router
        spreads = functools.partial(_counts, ids=ids, experts=None)
        for node in _reached([ids], _is_view, spreads):
            summed = _reached([node], lambda n: _is_view(n) or _name(n) == "sum", lambda n: _name(n) in ("gt", "ne"))
            if any(_leaves(each) for each in summed) and not reaches(ids, is_ours):
                found.append(node)
    return found


def _is_view(node: Node) -> bool:
    return _name(node) in _VIEWS


def _leaves(node: Node) -> bool:
    """Whether it goes to ``nonzero`` or out of the graph, as it is, summed, or compared with a number."""
    onward = _VIEWS | {"sum", "gt", "cumsum", "ne"}
    return any(_reached([node], lambda n: _name(n) in onward, lambda n: n.op == "output" or _name(n) == "nonzero"))


def _integer_inputs(graph: Graph) -> Iterator[Node]:
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32):
            yield node


def reaches(ids: Node, ends: Walk) -> bool:
    """Whether ids, however they are spread, mapped and cast, reach a node for which ``ends`` holds."""
    mapped = _SPREADS | {"index", "gather", "embedding", "index_select", "remainder", "floor_divide"}
    return any(_reached([ids], lambda n: _name(n) in mapped, ends))


def _counts(node: Node, ids: Node, experts: Any) -> bool:
    """Whether a node makes a matrix over the experts, or their counts, from ids."""
    name = _name(node)
    if name in ("bincount", "histc"):
        return True
    if name not in ("scatter", "one_hot", "eq"):
        return False
    made, own = _shape(node), _shape(ids)
    if made is None or own is None or len(made) != len(own) + 1:
        return False
    return experts is None or made[-1] in (experts, experts + 1)
