"""Replace a router that a model wrote with its own operators by the operators that ``route`` becomes.

Before: a ``Route`` whose ``raised`` is set, from ``match_router``. After: the operator stands where the selection
stood. Its weights have the dtype of the model's; its ids are int64, or int32 for readers that would cast them to that.
Nodes of the router that nobody reads any more are gone; logits and scores that others read stay. Each result is
compared with what it replaces before anything is erased.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import Route
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.graph.arguments import input_node
from moe_lowering.passes.graph.edit_log import EditLog
from moe_lowering.passes.lower_route import emit_route
from moe_lowering.passes.verifier import defined_before_readers, same_value


def recording_key(route: Route) -> tuple[object, ...]:
    """What routers must have in common for the same nodes to be emitted for them."""
    assert route.weights is not None
    dims = input_node(route.node).meta["val"].dim()
    return ("router", route.spec, route.weights.meta["val"].dtype, bool(_readers(route)), dims)


def rewrite_router(route: Route, emit: Emitter, edits: EditLog) -> None:
    """Edit the graph; whatever is raised, the step of the log takes it back."""
    assert route.weights is not None and route.ids is not None
    readers, casts, dead = _readers(route), _casts(route), _dead(route)
    weights, ids = emit_route(route, emit, use_gating=True)
    with emit.at(route.node, route.node):
        replaced = [(route.weights, emit.cast(weights, route.weights.meta["val"].dtype))]
        if readers:
            replaced.append((route.ids, emit.cast(ids, route.ids.meta["val"].dtype)))
    replaced += [(cast, ids) for cast in casts]
    for old, new in replaced:
        same_value(old, new)
        defined_before_readers([user for user in old.users if user not in dead], old, new)
    for old, new in replaced:
        edits.replace_uses(old, new)
    edits.erase([*casts, *dead])
    named: set[Node] = set()
    for old, new in replaced:
        if new not in named:
            edits.take_name(new, old)
            named.add(new)


def _casts(route: Route) -> list[Node]:
    """Readers of the ids that only cast them to int32."""
    assert route.ids is not None
    return [user for user in route.ids.users if _is_int32(user)]


def _is_int32(node: Node) -> bool:
    return node.target is aten._to_copy.default and dict(node.kwargs) == {"dtype": torch.int32}


def _readers(route: Route) -> list[Node]:
    """The other readers of the ids that remain."""
    assert route.ids is not None
    dead = set(_dead(route))
    return [user for user in route.ids.users if user not in dead and not _is_int32(user)]


def _dead(route: Route) -> list[Node]:
    """Nodes of the router that nobody reads once its results have been replaced."""
    assert route.raised is not None
    dead: set[Node] = set()
    for node in sorted(route.raised.interior, reverse=True):
        if node in (route.weights, route.ids) or all(user in dead for user in node.users):
            dead.add(node)
    return list(dead)
