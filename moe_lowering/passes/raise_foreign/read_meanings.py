"""What the nodes around an anchor mean: rules by operator, asked for one node after the other, from its operands.

Contract. ``Reader.value`` never guesses: a node without a rule, or whose rule does not hold, is an opaque tensor; where it
is computed from a product of the experts it has no meaning at all, and ``reason`` says what was seen. Nothing is walked
but what is asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_lowering.passes.graph.arguments import is_by_position
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.graph.own_writes import functional_name
from moe_lowering.passes.graph.walks import name_of, stock_name_of
from moe_lowering.passes.raise_foreign.meanings import Value, is_whole, opaque, product, sizes
from moe_lowering.passes.raise_foreign.records import NotThisForm
from moe_lowering.passes.raise_foreign.terms import Counts, Ends, Tensor

Rule: TypeAlias = "Callable[[Reader, Node], Value | None]"
ItemRule: TypeAlias = "Callable[[Reader, Node, int], Value | None]"

RULES: dict[str, Rule] = {}  # by the name of the operator, without its overload
NEAR: set[str] = set()  # operators whose rules are of use within a layer only
ITEM_RULES: dict[str, ItemRule] = {}  # of operators with several results: the node and which result


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def near_rule(*names: str) -> Callable[[Rule], Rule]:
    """A rule of an operator that computes: in front of a layer, where a model is full of them, it is not looked at."""
    NEAR.update(names)
    return rule(*names)


def item_rule(*names: str) -> Callable[[ItemRule], ItemRule]:
    def add(function: ItemRule) -> ItemRule:
        ITEM_RULES.update(dict.fromkeys(names, function))
        return function

    return add


def is_made_alike(node: Node) -> bool:
    """Whether a node has the shape of another one and nothing else of it: ``zeros_like`` and its kin."""
    name = stock_name_of(node)
    return name.endswith("_like") or name.startswith("new_")


_OTHERS = frozenset({"transformers::grouped_mm_fallback", "npu::npu_grouped_matmul", "npu::npu_swiglu"})
_REACH = 300  # nodes in front of the first product that may belong to a layer


def _before(node: Node) -> Node:
    """The node that stands ``_REACH`` in front of another, or the first of the graph."""
    for _ in range(_REACH):
        if node.prev.op == "root":
            break
        node = node.prev
    return node


def _is_float(node: Node) -> bool:
    return bool(node.meta["val"].is_floating_point())


def _is_known(target: object) -> bool:
    """Whether the rules are those of an operator: another library's ``silu`` may be something else."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.namespace in ("aten", "prims") or target._schema.name in _OTHERS


def _is_histogram(value: Value, node: Node) -> bool:
    """Whether a node counts by ``bincount``, whose size depends on the ids: they are experts, of which there are as many."""
    (size,) = node.meta["val"].shape if len(node.meta["val"].shape) == 1 else (0,)
    return isinstance(value.term, (Counts, Ends)) and len(value.dims) == 1 and bool(free_unbacked_symbols(size))


class Reader:
    """Values of nodes, as far as they were asked for.

    Args:
        products: the matrix products of the layer that is read: what is computed from them is never opaque.
    """

    def __init__(self, products: Iterable[Node]) -> None:
        self._products = frozenset(products)
        self._first = min(self._products)
        self._floor = _before(self._first)
        self._values: dict[Node, Value | None] = {}
        self._derived: dict[Node, bool] = {}
        self.reasons: dict[Node, NotThisForm] = {}
        # (node, ids, number): what was read as the identity, which it is where these ids are below the number
        self.bounds: list[tuple[Node, Tensor, int]] = []

    def value(self, node: Any) -> Value | None:
        """What a tensor's node means; None where that is not known, and of what is no node."""
        if not isinstance(node, Node):
            return None
        if node not in self._values:
            value = None
            if isinstance(node.meta.get("val"), torch.Tensor):
                value = self._apply(node)
                if (
                    value is not None
                    and tuple(map(product, value.dims)) != sizes(node)
                    and not _is_histogram(value, node)
                ):
                    value = self.refuse(
                        node,
                        "raise.shape",
                        f"{node.name} of shape {[*map(str, sizes(node))]} where it has a line for each of other tokens or slots",
                        "sizes that are those of the tokens, choices and experts for every number of tokens",
                    )
                if value is not None and not value.is_opaque and not is_whole(value.term) and not _is_float(node):
                    value = self.refuse(node, "raise.cast", f"{node.name} in {node.meta['val'].dtype}", "a float dtype")
                if value is None and not self.is_derived(node):
                    value = opaque(node)
            self._values[node] = value
        return self._values[node]

    def assume(self, node: Node, value: Value) -> None:
        """What a node means that no rule reads."""
        self._values[node] = value

    def start_at(self, node: Node | None) -> None:
        """The ids come from what ``node`` is computed from: nothing in front of them is part of the layer but operands."""
        value = None if node is None else self.value(node)
        ids = getattr(value.term, "ids", value.term) if value is not None else None
        if isinstance(ids, Tensor):
            self._floor = max(self._floor, ids.node)

    def _apply(self, node: Node) -> Value | None:
        if node.op != "call_function":
            return None
        if node.target is operator.getitem:
            source, index = node.args
            if not isinstance(source, Node) or not isinstance(index, int):
                return None
            items = ITEM_RULES.get(name_of(source)) if _is_known(source.target) else None
            return items(self, source, index) if items is not None and self._is_readable(source) else None
        if not _is_known(node.target):
            return None
        if not self._is_readable(node):
            return None
        name = functional_name(node)
        rule = RULES.get(name) if name not in NEAR or node >= self._floor else None
        return None if rule is None else rule(self, node)

    def _is_readable(self, node: Node) -> bool:
        """Whether a node is as traced graphs have it, which is what rules read."""
        if not is_by_position(node):
            self.refuse(
                node, "raise.by_name", f"{node.name} ({call_name(node)}) has its arguments by name", "by position"
            )
            return False
        without = next((each for each in node.all_input_nodes if each.meta.get("val") is None), None)
        if without is not None:
            self.refuse(
                node, "raise.no_value", f"{without.name} has no fake value (meta['val'])", "a node of torch.compile's"
            )
        return without is None

    def is_derived(self, node: Node) -> bool:
        """Whether a node is computed from one of the products."""
        pending = [node]
        while pending:
            at = pending[-1]
            if at in self._derived:
                pending.pop()
            elif at in self._products:
                self._derived[at] = True
            elif at < self._first or is_made_alike(at):
                self._derived[at] = False
            else:
                todo = [source for source in at.all_input_nodes if source not in self._derived]
                if todo:
                    pending += todo
                else:
                    self._derived[at] = any(self._derived[source] for source in at.all_input_nodes)
        return self._derived[node]

    def refuse(self, node: Node, code: str, seen: str, expected: str) -> Value | None:
        """Note why a node has no meaning; returns None, for rules to return."""
        self.reasons.setdefault(node, NotThisForm(node, code, seen, expected))
        return None

    def reason(self, node: Node) -> NotThisForm:
        """Why a node that should have a meaning has none."""
        called = node.args[0] if node.target is operator.getitem else node
        assert isinstance(called, Node)
        return (
            self.reasons.get(node)
            or self.reasons.get(called)
            or NotThisForm(
                node,
                "raise.operation",
                f"{call_name(called)} of what the experts compute",
                "views, casts, biases of the experts, an activation that grouped_mlp has, routing weights, and the sum over "
                "the choices of a token",
            )
        )
