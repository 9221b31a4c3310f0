"""Graphs inside of a graph: which they are, who runs them, and whether their blocks may be lowered there.

Contract. Reads only; ``computed_inputs`` marks inputs while the pass runs. A graph inside of another one is an attribute that
is a GraphModule, however often it is called: each is returned once, whoever calls it, with those inside of it behind it.
What calls it decides:

- ``RUNS_ONCE`` runs it where it stands, on every rank: it is lowered as the outer graph is.
- ``MAY_DIFFER`` runs it or not, or a number of times, as data or sizes say, which may differ between ranks. An exchange
  that only some ranks come to hangs them all. (That of the generic operators as well: the model is at fault, and lowering
  would not mend it.) It is lowered where nothing is exchanged, on one rank, and else left and reported: ``subgraph.branch``.
- any other operator may run it elsewhere, or compile it: left and reported, ``subgraph.operator``.

npugraph_ex and torchair of torch_npu 2.13 compile no graph that has one of these; the plain backend does.
Source: torch.higher_order_ops.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.operands import COMPUTED_OUTSIDE, is_stored

RUNS_ONCE = frozenset({
    "invoke_subgraph", "wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap_activation_checkpoint",
    "tag_activation_checkpoint", "hints_wrapper", "strict_mode",
})  # fmt: skip
MAY_DIFFER = frozenset({"cond", "while_loop", "while_loop_stack_output", "map_impl", "scan"})
CODES = {
    "subgraph.branch": "whether and how often it runs may differ between ranks, and its exchanges would hang the others; "
    "take the layer out of it",
    "subgraph.operator": "it is not known how this operator runs its graph; take the layer out of it",
}


@dataclasses.dataclass(frozen=True)
class Subgraph:
    """A graph inside of a graph.

    Attributes:
        name: the path of its attribute from the outermost graph.
        operators: names of what calls it, in graph order, once per call.
        refused: why nothing in it may be lowered, with its code; "" where blocks may be.
    """

    gm: GraphModule
    name: str
    operators: tuple[str, ...]
    refused: str

    def __str__(self) -> str:
        called = f"{len(self.operators)} x {self.operators[0]}" if self.operators else "nobody calls it"
        return f"inside {self.name} ({called})"


def find_subgraphs(gm: GraphModule, deployment: Deployment) -> list[Subgraph]:
    """All graphs inside of ``gm``, each once, an outer one before those inside of it."""
    subgraphs: dict[GraphModule, Subgraph] = {}
    pending = [Subgraph(gm, "", (), "")]
    while pending:
        outer = pending.pop(0)
        for inner, name, operators in _nested_modules(outer.gm):
            path = f"{outer.name}.{name}" if outer.name else name
            refused = outer.refused or _refusal_text(operators, deployment)
            before = subgraphs.get(inner)
            if before is not None:
                refused = before.refused or refused
                path, operators = before.name, before.operators + operators
            subgraphs[inner] = Subgraph(inner, path, operators, refused)
            if before is None or before.refused != refused:
                pending.append(subgraphs[inner])
    return list(subgraphs.values())


@contextlib.contextmanager
def computed_inputs(gm: GraphModule, subgraphs: Sequence[Subgraph]) -> Iterator[None]:
    """Within it, inputs of graphs inside of ``gm`` are marked that are no stored tensors in every call that can be read."""
    if not subgraphs:  # no calls of graphs are in it then
        yield
        return
    graphs = [gm, *(sub.gm for sub in subgraphs)]
    try:
        while any(_mark(inner, callers) for outer in graphs for inner, _, callers in _calls(outer)):
            pass  # an input that is computed may be given to a graph further in
        yield
    finally:
        for sub in subgraphs:
            for node in _inputs(sub.gm):
                node.meta.pop(COMPUTED_OUTSIDE, None)


def _mark(inner: GraphModule, callers: list[Node]) -> bool:
    """Mark the inputs of one graph that are computed; whether a mark is new."""
    inputs, changed = _inputs(inner), False
    for passed in map(_operands, callers):
        known = passed if len(passed) == len(inputs) else [None] * len(inputs)
        for node, value in zip(inputs, known, strict=True):
            if not (isinstance(value, Node) and is_stored(value)) and not node.meta.get(COMPUTED_OUTSIDE, False):
                node.meta[COMPUTED_OUTSIDE] = changed = True
    return changed


def _inputs(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _operands(caller: Node) -> list[Any]:
    """What a call gives to its graph, input by input; empty of an operator whose calls are not read here."""
    name = _operator(caller)
    if name == "invoke_subgraph":
        return list(caller.args[2:])
    if name == "cond" and len(caller.args) == 4 and isinstance(caller.args[3], (list, tuple)):
        return list(caller.args[3])
    return []


def _nested_modules(gm: GraphModule) -> Iterator[tuple[GraphModule, str, tuple[str, ...]]]:
    for inner, name, callers in _calls(gm):
        yield inner, name, tuple(map(_operator, callers))


def _calls(gm: GraphModule) -> Iterator[tuple[GraphModule, str, list[Node]]]:
    """The graphs inside of one, with the name of the attribute and who calls it there."""
    for op in ("get_attr", "call_module"):
        for node in gm.graph.find_nodes(op=op):
            inner = _attribute(gm, str(node.target))
            if isinstance(inner, GraphModule):
                yield inner, str(node.target), list(node.users) if op == "get_attr" else [node]


def _attribute(gm: GraphModule, path: str) -> object:
    value: object = gm._parameters.get(path)
    if value is not None:  # most of what graphs read: ``Module.__getattr__`` looks there last, in Python
        return value
    value = gm
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _operator(node: Node) -> str:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return str(node.target._name)
    return node.op if node.op != "call_function" else str(node.target)


def _refusal_text(operators: tuple[str, ...], deployment: Deployment) -> str:
    exchanges = deployment.ep_size > 1 or deployment.tp_size > 1
    for name in operators:
        if name in MAY_DIFFER:
            if exchanges:
                return f"[subgraph.branch] it is inside {name}: {CODES['subgraph.branch']}"
        elif name not in RUNS_ONCE:
            return f"[subgraph.operator] it is inside {name}: {CODES['subgraph.operator']}"
    return ""
