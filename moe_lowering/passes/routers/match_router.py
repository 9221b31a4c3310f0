"""Find the routers of MoE blocks in a model's own operators, and prove that they compute what ``route`` computes.

Before: ids and weights that a block reads, computed by ATen operators from logits. After: ``Route`` records, as for a call
of ``route``. Nothing is edited here, and nothing is guessed: a router that is not proven is returned with the reason.

A router is proven when
- the ids that the block reads are those of one selection (a top-k, a maximum), but for views and casts;
- the selection is over scores in float32: softmax, sigmoid, sqrt(softplus) of logits, plus a bias [E], with experts
  outside of the best groups at -inf (or at 0, without a bias, as scores are never negative);
- weights on the block's way are these scores at these ids, without the bias; divided by their sum, with an epsilon or not;
  times a number; in float32, rounded to 16 bits once at the end. What the model does to them afterwards stays as it is,
  with its own operators; so the last node that is weights in this sense becomes a result of ``route``.
- nothing but these weights reads the values of the selection, which would be in another order than the new ids;
- no write in place reaches it, and no scope's border is within.
Everybody who reads the ids reads the new ones; logits and scores that others read stay.

What stays open, and is said in the notes: among equal scores ``torch.topk`` takes any, and ``route`` the lower id; where a
model chooses by logits and weighs by softmax, logits that are nearer than float32 rounds softmax to are such equals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Graph, Node

from moe_lowering.passes.blocks import Block, RaisedRouter, Route
from moe_lowering.passes.graph.arguments import results
from moe_lowering.passes.graph.memory_effects import Writes
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.graph.own_writes import is_own_write
from moe_lowering.passes.graph.scopes import scope_paths
from moe_lowering.passes.leftovers.foreign_operators import ROUTER, kind_of
from moe_lowering.passes.raise_foreign.closed_region import may_be_left_out
from moe_lowering.passes.routers import rules
from moe_lowering.passes.routers.group_rules import VIEWS
from moe_lowering.passes.routers.meaning import CASTS, Meaning, aten_name_of, same_sizes
from moe_lowering.passes.routers.prove_router import differs, spec_of
from moe_lowering.passes.routers.values import Chosen, Opaque, Reason, Selection, Taken, val

assert rules  # which add their rules to those of ``Meaning``
_SAME = frozenset((*CASTS, *VIEWS, "getitem"))
_CONE = 96  # nodes between a selection and the block that are looked at
_READERS = 200  # of values of a selection
_ROUTE = torch.ops.moe_lowering.route.default

TIES = "among equal scores the lower id is chosen, where torch.topk takes any"
BY_LOGITS = (
    "the model chooses by logits, the operator by their softmax: what float32 does not tell apart there counts as equal"
)


@dataclasses.dataclass(frozen=True)
class RouterLeft:
    """A router that stays as it is: the node that it is known by, why, and the node that the reason is about where it has one."""

    node: Node
    reason: str
    at: Node | None = None


@dataclasses.dataclass(frozen=True)
class _NoRouter(Exception):
    """Why a block's ids and weights are no router's. Never leaves this module."""

    reason: Reason


@dataclasses.dataclass(frozen=True)
class RouterReader:
    """What an MoE block reads of its router, and ``end``, the node that its result is known by."""

    ids: Node
    weights: Node
    end: Node


def readers_of(blocks: Sequence[Block]) -> list[RouterReader]:
    """Those of blocks in generic form whose ids do not come from ``route``."""
    return [RouterReader(block.ids, block.weights, block.combine) for block in blocks if block.route is None]


def match_routers(graph: Graph, readers: Sequence[RouterReader]) -> tuple[list[Route], list[RouterLeft]]:
    """The routers that are proven, and those that are left; of readers whose ids are an input of the graph none.

    Args:
        graph: as it is before any block of it is lowered.
        readers: of blocks in whatever form.
    """
    found: dict[Node, Route] = {}
    left: dict[Node, RouterLeft] = {}
    looked = _Graph(graph)
    for reader in readers:
        origin = _origin(reader.ids)
        if origin.op in ("placeholder", "get_attr") or _is_router(origin):
            continue
        try:
            route = looked.match(reader)
        except _NoRouter as no:
            left.setdefault(origin, RouterLeft(origin, str(no.reason), no.reason.node))
            continue
        other = found.setdefault(route.node, route)
        if other.weights is not route.weights:  # two blocks read different weights of one selection
            left[route.node] = RouterLeft(route.node, str(_two_readers(route)), route.node)
    routes = [route for node, route in found.items() if node not in left]
    return routes, list(left.values())


def _two_readers(route: Route) -> Reason:
    return Reason("router.two_weights", route.node, "two blocks read different weights of it", "the same weights")


def _origin(node: Node) -> Node:
    """What ids are a view or a cast of; of an operator with several results the operator."""
    while aten_name_of(node) in _SAME and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_router(node: Node) -> bool:
    """``route``, or a router of torch_npu's or vLLM's: what they compute is told elsewhere."""
    return node.target is _ROUTE or (node.op == "call_function" and kind_of(node.target) == ROUTER)


class _Graph:
    """What routers of one graph share."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._meaning = Meaning()
        self._writes: Writes | None = None
        self._scopes: dict[Node, tuple[str, ...]] | None = None

    def match(self, reader: RouterReader) -> Route:
        self._meaning.start()
        ids = self._selected(reader.ids)
        weights = self._weights(reader.weights, ids)
        interior = self._interior(ids, weights)
        self._require_quiet(ids, weights, interior)
        chosen, weighted = self._meaning.of(ids), self._meaning.of(weights)
        assert isinstance(chosen, Chosen) and isinstance(weighted, Taken)
        raised = _raised(weighted, interior, reader.end)
        return Route(chosen.by.node, weights, ids, spec_of(weighted), raised)

    def _selected(self, node: Node) -> Node:
        """The node of the ids as they come from the selection."""
        chosen = self._meaning.of(node)
        if not isinstance(chosen, Chosen):
            origin = _origin(node)
            seen = f"the ids that the block reads come from {call_name(origin)}"
            raise _NoRouter(_why(chosen) or Reason("router.no_selection", origin, seen, "the ids of a top-k"))
        outputs = results(chosen.by.node)
        if outputs is None:
            seen = "its result is used as a whole, or one output twice"
            raise _NoRouter(Reason("router.whole_result", chosen.by.node, seen, "each output once"))
        return outputs["indices"]

    def _weights(self, node: Node, ids: Node) -> Node:
        """The last node on the way to the block that ``route`` computes."""
        chosen = self._meaning.of(ids)
        assert isinstance(chosen, Chosen)
        by = chosen.by
        reasons: list[Reason] = []
        for candidate in _between(node, by.node):
            weighted = self._meaning.of(candidate)
            if not isinstance(weighted, Taken):
                reasons += [why] if (why := _why(weighted)) else []
                continue
            if weighted.by != by:
                seen = f"weights of another selection ({call_name(weighted.by.node)}) than the ids"
                reasons.append(Reason("router.two_selections", candidate, seen, "those of the one that gives the ids"))
                continue
            reason = (
                differs(by, weighted, candidate) or _shape_differs(candidate, ids) or _read_elsewhere(by, candidate)
            )
            if reason is None:
                return candidate
            reasons.append(reason)
        if reasons:
            raise _NoRouter(reasons[0])
        seen = "the block's weights are no scores at the ids of the selection"
        raise _NoRouter(Reason("router.weights", node, seen, f"weights from {call_name(by.node)}"))

    def _interior(self, ids: Node, weights: Node) -> tuple[Node, ...]:
        """The nodes that the router consists of: what was looked at, from the logits to its results."""
        chosen = self._meaning.of(ids)
        assert isinstance(chosen, Chosen)
        inside: set[Node] = set()
        pending, border = [ids, weights], {chosen.by.scores.logits, chosen.by.scores.bias}
        while pending:
            node = pending.pop()
            is_view = aten_name_of(node) in VIEWS and node.args[0] in border
            if (
                node in inside
                or node in border
                or not aten_name_of(node)
                or not (is_view or self._meaning.is_part(node))
            ):
                continue
            inside |= {node, *(each for user in node.users for each in _unread(user))}
            pending += node.all_input_nodes
        return tuple(sorted(inside))

    def _require_quiet(self, ids: Node, weights: Node, interior: Sequence[Node]) -> None:
        """No write into what the router reads or holds, and all of it in one scope."""
        if self._writes is None:
            self._writes, self._scopes = Writes(self._graph), scope_paths(self._graph)
        inputs = [source for node in interior for source in node.all_input_nodes]
        end = next(iter(reversed(self._graph.nodes)))
        own = {node for node in interior if is_own_write(node) and (node is weights or {*node.users} <= {*interior})}
        # A write that stays for other readers: what it writes into would be read anew
        stays = next((node for node in interior if is_own_write(node) and node not in own), None)
        writer = stays or self._writes.between(min(interior), end, {*interior, *inputs}, gone=own)
        if writer is not None:
            seen = "a write in place into what the router reads or holds"
            raise _NoRouter(Reason("router.written", writer, seen, "no write into them, or into a copy"))
        assert self._scopes is not None
        paths = {self._scopes.get(node, ()) for node in interior}
        if len(paths) > 1:
            seen = "the router is partly in another scope"
            raise _NoRouter(Reason("router.scopes", weights, seen, "all of it in one scope"))


def _unread(node: Node, depth: int = 4) -> list[Node]:
    """A node and its readers, where none of them is read by anything else: remains of a trace."""
    if not aten_name_of(node) or not may_be_left_out(node) or (node.users and not depth):
        return []
    unread = [node]
    for user in node.users:
        behind = _unread(user, depth - 1)
        if not behind:
            return []
        unread += behind
    return unread


def _why(value: object) -> Reason | None:
    return value.why if isinstance(value, Opaque) else None


def _between(node: Node, start: Node) -> Iterator[Node]:
    """``node`` and what it is computed from, as far as it comes after ``start``; the latest first."""
    visited, pending = {node}, [node]
    while pending and len(visited) < _CONE:
        for source in pending.pop().all_input_nodes:
            if source not in visited and start < source:
                visited.add(source)
                pending.append(source)
    return iter(sorted(visited, reverse=True))


def _read_elsewhere(by: Selection, weights: Node) -> Reason | None:
    """Values of the selection may reach nothing but through the weights: elsewhere they would meet the old order."""
    values = [user for user in by.node.users if user.args[1] == 0 and user is not weights]
    visited, pending = set(values), list(values)
    while pending:
        for user in pending.pop().users:
            if user is weights or user in visited:
                continue
            visited.add(user)
            pending.append(user)
            if not aten_name_of(user) or len(visited) > _READERS:
                return Reason(
                    "router.read_elsewhere",
                    by.node,
                    f"its values also reach {call_name(user)}",
                    "values that only weights read",
                )
    return None


def _shape_differs(weights: Node, ids: Node) -> Reason | None:
    first, second = val(weights), val(ids)
    assert first is not None and second is not None
    if same_sizes(weights, ids):
        return None
    seen = f"weights {tuple(first.shape)} for ids {tuple(second.shape)}"
    return Reason("router.shape", weights, seen, "weights of the shape of the ids")


def _raised(weighted: Taken, interior: tuple[Node, ...], end: Node) -> RaisedRouter:
    scores = weighted.by.scores
    notes = (TIES,) if scores.scoring else (TIES, BY_LOGITS)
    return RaisedRouter(scores.source, scores.bias_source, interior, end, notes)
