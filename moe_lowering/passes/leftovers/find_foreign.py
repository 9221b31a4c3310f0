"""``find_foreign``: the MoE layers of a graph that are not written with the generic operators, which the pass reports and leaves.

Contract. Reads the graph, never edits it; returns one record per layer, with its operators counted, the model's line and
what to do. Run on what is left after lowering: nodes that the pass emitted carry a mark (``emitter.MARK``) and are not
found, so that running it twice finds nothing new. Codes are the keys of ``FORMS``. What a name does not show is in
``foreign_aten``, the names are in ``foreign_operators``.

Cost: the graph's index by target gives the targets that occur, and each is classified once per process.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_lowering.passes.emission.emitter import is_emitted
from moe_lowering.passes.find_blocks import module_path
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.leftovers import foreign_operators as operators
from moe_lowering.passes.leftovers.expert_loops import expert_loops, hidden_by_expert, stacked_results
from moe_lowering.passes.leftovers.foreign_aten import reaches, routing_alone, stacked_weights
from moe_lowering.passes.leftovers.gathered_weights import gathered_weights
from moe_lowering.passes.leftovers.graph_calls import GraphCalls
from moe_lowering.passes.verifier import is_generic
from moe_lowering.report.leftovers import ForeignMoe, NotRaised
from moe_lowering.source_lines import innermost

# By code: what was seen. The operators themselves stand beside it.
FORMS = {
    "foreign.grouped_mm": "experts as grouped matrix products of torch's",
    "foreign.npu_operator": "experts written with Ascend operators",
    "foreign.opaque_operator": "an operator that hides experts",
    "foreign.gathered_weights": "weights of experts gathered by ids",
    "foreign.stacked_weights": "batched products with the weights of all experts, and a routing",
    "foreign.expert_loop": "a loop over experts",
    "foreign.routing_alone": "ids of experts that leave the graph: their experts are computed elsewhere",
    "foreign.router": "a router whose experts are not known",
    "foreign.not_traced": "a generic operator in a graph that AOTAutograd has not traced",
}
_HAND_WRITTEN = "write the layer with moe_lowering.moe_experts or moe_lowering.MoE"
_ADVICE = {
    "foreign.npu_operator": f"{_HAND_WRITTEN}, which chooses and checks these operators itself",
    "foreign.opaque_operator": f"{_HAND_WRITTEN} in place of the operator, which no pass can look into",
    "foreign.not_traced": "run the pass on a graph of torch.compile or torch.export, or call the operator's overload",
}
_TRANSFORMERS = (
    'moe_lowering.integrations.transformers.register(), then model.set_experts_implementation("moe_lowering") or '
    'from_pretrained(..., experts_implementation="moe_lowering")'
)


def find_foreign(
    graph: Graph, reported: Container[Node] = (), not_raised: Mapping[Node, NotRaised] | None = None
) -> list[ForeignMoe]:
    """One record for each MoE layer of the graph that is neither generic nor emitted by the pass, in graph order.

    Args:
        reported: nodes of layers that are reported as blocks, lowered or left: their routers are not told alone.
        not_raised: of operators that the pass tried to raise, why it did not.
    """

    def is_told(node: Node) -> bool:
        return node in reported or _is_ours(node)

    codes: dict[Node, str] = {}
    for node, kind in _by_name(graph, is_told):
        codes[node] = f"foreign.{kind}"
    calls = GraphCalls(graph)
    for code, nodes in (
        ("foreign.gathered_weights", gathered_weights(calls)),
        ("foreign.stacked_weights", stacked_weights(calls) + hidden_by_expert(calls)),
        ("foreign.expert_loop", expert_loops(calls) + stacked_results(calls)),
        ("foreign.routing_alone", routing_alone(calls, is_told)),
    ):
        for node in nodes:
            if not is_emitted(node):
                codes.setdefault(node, code)
    layers = _group_by_layer(sorted(node for node in codes if node not in reported))
    return [_record(nodes, codes, not_raised or {}) for nodes in layers]


def _by_name(graph: Graph, is_told: Callable[[Node], bool]) -> Iterable[tuple[Node, str]]:
    for (op, target), nodes in list(graph._find_nodes_lookup_table.table.items()):
        # No nodes: a look-up in the graph's index leaves an empty entry for its target
        if op != "call_function" or not nodes:
            continue
        if isinstance(target, torch._ops.HigherOrderOperator):
            yield from ((node, kind) for node in nodes if (kind := _kind_inside(node)) is not None)
            continue
        kind = operators.kind_of(target)
        if kind is not None:
            yield from ((node, kind) for node in nodes if _counts_as_moe(node, kind, is_told))


def _kind_inside(node: Node) -> str | None:
    """The kind of what a higher-order operator calls, a Triton kernel among it; None where that is no MoE's."""
    for called in operators.called_operators(node):
        kind = operators.kind_of(called)
        if kind is not None:
            return kind
    return operators.OPAQUE if operators.is_moe_name(operators.triton_kernel(node)) else None


def _counts_as_moe(node: Node, kind: str, is_told: Callable[[Node], bool]) -> bool:
    if is_emitted(node) or not operators.is_used_for_experts(node):
        return False
    return kind != operators.ROUTER or not reaches(node, is_told)


def _is_ours(node: Node) -> bool:
    return is_emitted(node) or is_generic(node)


# --------------------------------------------------------------------------------------------------------------- layers


def _group_by_layer(nodes: list[Node]) -> list[list[Node]]:
    """Groups of nodes of one layer: by module, with the modules inside of it; by function where no module is recorded."""
    modules = {_module_name(node) for node in nodes}
    layers: dict[Any, list[Node]] = defaultdict(list)
    for node in nodes:
        layers[_outermost(_module_name(node), modules) or _function(node)].append(node)
    return list(layers.values())


def _module_name(node: Node) -> str:
    return module_path(node) if node.meta.get("nn_module_stack") else ""


def _outermost(path: str, among: set[str]) -> str:
    """The shortest path of ``among`` that is the path's own or one above it; the whole model's, "", is none."""
    parts = path.split(".")
    above = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((each for each in above if each in among), path)


def _function(node: Node) -> tuple[str, str]:
    line = innermost(node.meta.get("stack_trace") or "")
    return ("", "") if line is None else (line.file, line.function)


def _record(nodes: list[Node], codes: dict[Node, str], not_raised: Mapping[Node, NotRaised]) -> ForeignMoe:
    """The record of one layer: its code is the first of ``FORMS`` that was seen, with all operators that were seen."""
    code = min((codes[node] for node in nodes), key=list(FORMS).index)
    first = next(node for node in nodes if codes[node] == code)
    line = innermost(first.meta.get("stack_trace") or "")
    counts = Counter(_call_name(node) for node in nodes)
    return ForeignMoe(
        place=_module_name(first) or f"{first.name} ({call_name(first)})",
        line="" if line is None else str(line),
        operators=tuple(counts.items()),
        code=code,
        reason=FORMS[code],
        advice=_TRANSFORMERS if _is_transformers(nodes) else advice_of(code),
        not_raised=next((not_raised[node] for node in nodes if node in not_raised), None),
    )


def advice_of(code: str) -> str:
    """What to change where the layer is none of transformers."""
    return _ADVICE.get(code, _HAND_WRITTEN)


def _call_name(node: Node) -> str:
    kernel = operators.triton_kernel(node)
    if kernel:
        return kernel
    for target in operators.called_operators(node):
        namespace, name = operators.library_and_name(target)
        if name:
            return f"{namespace}.{name}"
    return node.name


def _is_transformers(nodes: list[Node]) -> bool:
    """Whether a module of the transformers package calls one of the nodes."""
    for node in nodes:
        for entry in (node.meta.get("nn_module_stack") or {}).values():
            kind = entry[1] if isinstance(entry, (tuple, list)) and len(entry) > 1 else ""
            module = kind if isinstance(kind, str) else getattr(kind, "__module__", "")
            if str(module).split(".")[0] == "transformers":
                return True
    return False
