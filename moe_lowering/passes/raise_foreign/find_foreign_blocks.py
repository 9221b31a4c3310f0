"""The stage that raises what others wrote: all layers of known forms in a graph, and why an anchor is none.

Contract. Reads the graph, never edits it. ``FORMS`` is the table of forms; a graph without their anchors costs a look at its
index of targets, whatever its size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.emission.emitter import is_emitted
from moe_lowering.passes.graph.arguments import is_by_position
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.raise_foreign import (
    match_gathered_weights,
    match_grouped_mm,
    rules_of_counts,
    rules_of_experts,
    rules_of_layout,
    rules_of_npu,
    rules_of_routing,
    rules_of_sums,
)
from moe_lowering.passes.raise_foreign.graph_facts import reading
from moe_lowering.passes.raise_foreign.npu_forms import NPU_FORMS
from moe_lowering.passes.raise_foreign.records import ForeignBlock, ForeignForm, NotThisForm
from moe_lowering.passes.run.messages import describe_internal_error, log_warning
from moe_lowering.report.leftovers import NotRaised

FORMS: dict[str, ForeignForm] = {
    form.name: form for form in (match_grouped_mm.FORM, match_gathered_weights.FORM, *NPU_FORMS)
}
# Imported for the rules that they add
assert rules_of_counts and rules_of_experts and rules_of_layout and rules_of_npu and rules_of_routing and rules_of_sums


def find_foreign_blocks(graph: Graph, deployment: Deployment) -> tuple[list[ForeignBlock], dict[Node, NotRaised]]:
    """All layers of the known forms in graph order, and of each other anchor why it is in none."""
    with reading(graph):
        return _find(graph, deployment)


def _find(graph: Graph, deployment: Deployment) -> tuple[list[ForeignBlock], dict[Node, NotRaised]]:
    layers: list[ForeignBlock] = []
    left: dict[Node, NotRaised] = {}
    by_name = _anchors_by_name(graph)
    for form in FORMS.values():
        anchors = sorted(node for name in form.anchors for node in by_name.get(name, ()))
        try:
            groups = form.groups(anchors) if anchors else []
        except Exception as error:
            groups = []
            left.update(dict.fromkeys(anchors, _failed(graph, anchors, error)))
        for group in groups:
            try:
                block = form.match(graph, group, deployment)
                _require_apart(block, layers)
                layers.append(block)
            except NotThisForm as reason:
                left.update(dict.fromkeys(group, reason.record))
            except Exception as error:
                left.update(dict.fromkeys(group, _failed(graph, group, error)))
    return sorted(layers, key=lambda block: block.result), left


def _failed(graph: Graph, nodes: Sequence[Node], error: Exception) -> NotRaised:
    """A defect of ours must not fail the user's compile, nor keep other layers from being raised. Nor must an operator whose
    arguments are by name, which traced graphs do not have, and not all that looks at chains asks for."""
    named = next((n for n in graph.nodes if n.op == "call_function" and not is_by_position(n)), None)
    if named is not None:
        seen = f"{named.name} ({call_name(named)}) has its arguments by name"
        return NotThisForm(named, "raise.by_name", seen, "by position").record
    log_warning("moe_lowering: looking for layers that others wrote failed, this one is left as it was")
    expected = "a graph that the forms can be looked for in"
    return NotThisForm(nodes[0], "raise.internal", describe_internal_error(error), expected).record


def _require_apart(block: ForeignBlock, others: Iterable[ForeignBlock]) -> None:
    for other in others:
        if not set(block.interior).isdisjoint(other.interior):
            raise NotThisForm(
                block.result, "raise.overlap", f"operations that the layer of {other.result.name} has too", "its own"
            )


def _anchors_by_name(graph: Graph) -> dict[str, list[Node]]:
    """The anchors of all forms in a graph, in one look at its index of targets."""
    found: dict[str, list[Node]] = {}
    for (op, target), nodes in list(graph._find_nodes_lookup_table.table.items()):
        if op == "call_function" and nodes and (name := _anchor_name(target)):
            found[name] = [node for node in nodes if not is_emitted(node) and is_by_position(node)]
    return found


@functools.lru_cache(maxsize=4096)
def _anchor_name(target: Any) -> str:
    """The name of an anchor of a form, with its overload; empty of other targets."""
    return str(target) if isinstance(target, torch._ops.OpOverload) and str(target) in _ANCHORS else ""


_ANCHORS = frozenset(name for form in FORMS.values() for name in form.anchors)
