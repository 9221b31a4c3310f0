"""``Meaning``: what each node of a graph holds, as a record of ``values``, by a rule for each operator.

The rules are in ``rules`` and ``group_rules``.

Contract. ``Meaning.of`` reads the graph and never edits it, and gives ``Opaque`` for whatever it does not know. A rule
holds for every value that its arguments may have, except among equal scores (see the notes of ``match_router``). A rule
that fails at something of a router's gives an ``Opaque`` whose ``why`` says what is missing.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import Source, equal_sizes
from moe_lowering.passes.graph.own_writes import functional_name, is_own_write
from moe_lowering.passes.graph.walks import without_copy
from moe_lowering.passes.routers.values import Const, Opaque, Reason, Scores, Value, val

_NODES = 160  # of one router: what is asked beyond is opaque
INTEGERS = (torch.int32, torch.int64)
_BETWEEN = ("topk", "max", "softplus", "_to_copy", "convert_element_type", "to")  # have no record, or may have none
CASTS = ("_to_copy", "convert_element_type", "to")
EXACT = {(torch.bfloat16, torch.float32), (torch.float16, torch.float32)}

Rule = Callable[["Meaning", Node], "Value | None"]
RULES: dict[str, Rule] = {}


class Meaning:
    """What nodes of one graph hold; asked once each."""

    def __init__(self) -> None:
        self._known: dict[Node, Value] = {}
        self._left = _NODES

    def start(self) -> None:
        """Before another router is looked at. What was not understood because too many nodes were asked is open again."""
        if not self._left:
            self._known = {node: value for node, value in self._known.items() if not isinstance(value, Opaque)}
        self._left = _NODES

    def of(self, node: Any) -> Value:
        if not isinstance(node, Node):
            return Const(float(node)) if is_number(node) else Opaque(node)
        if node not in self._known:
            self._known[node] = Opaque(node)
            if self._left:
                self._left -= 1
                rule = RULES.get(aten_name_of(node))
                meaning = rule(self, node) if rule is not None and val(node) is not None else None
                self._known[node] = Opaque(node, self._why(node)) if meaning is None else meaning
        return self._known[node]

    def _why(self, node: Node) -> Reason | None:
        """What is known against an argument, for a node that is nothing because of it."""
        values = [self._known.get(source) for source in node.all_input_nodes]
        return next((value.why for value in values if isinstance(value, Opaque) and value.why is not None), None)

    def is_part(self, node: Node) -> bool:
        """Whether a node was understood as a part of a router, or stands between two parts."""
        if aten_name_of(node) in _BETWEEN:
            return True
        return node in self._known and not isinstance(self._known[node], Opaque)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """The rule of operators, by their names in ATen."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


@functools.lru_cache(maxsize=4096)
def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        mutable = target._schema.is_mutable
        return without_copy(name) if namespace in ("aten", "prims") and not mutable else ""
    return "getitem" if target is operator.getitem else ""


def aten_name_of(node: Node) -> str:
    """The name of a functional operator of ATen, or of a write that means the same; "" of any other node."""
    if node.op != "call_function":
        return ""
    return _target_name(node.target) or (functional_name(node) if is_own_write(node) else "")


def arg(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether an argument is a number that a graph fixes."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_last(node: Any, dim: Any) -> bool:
    """Whether ``dim`` is the last axis of a node."""
    value = val(node)
    if isinstance(dim, (list, tuple)):
        dim = dim[0] if len(dim) == 1 else None
    return value is not None and isinstance(dim, int) and dim in (-1, value.dim() - 1)


def dtype_of(node: Any) -> torch.dtype:
    """The dtype of a node that has a value."""
    value = val(node)
    assert value is not None
    return value.dtype


def source(reader: Node, index: int) -> Source | None:
    """Where logits come from: an argument, before casts that lose nothing."""
    node = reader.args[index] if len(reader.args) > index else None
    while isinstance(node, Node) and aten_name_of(node) in CASTS and is_plain_cast(node):
        before = node.args[0]
        if val(before) is None or (dtype_of(before), dtype_of(node)) not in EXACT:
            break
        reader, index, node = node, 0, before
    return Source(reader, index) if val(node) is not None else None


def raw(reader: Node, index: int, value: Value) -> Scores | None:
    """An argument as logits that nothing has scored."""
    logits = source(reader, index)
    if logits is None:
        return None
    return Scores(logits.node, logits, why=value.why if isinstance(value, Opaque) else None)


def same_lead(a: Any, b: Any) -> bool:
    """Whether two tensors have the same sizes but for the last."""
    first, second = val(a), val(b)
    if first is None or second is None:
        return False
    return equal_sizes(first.shape[:-1], second.shape[:-1])


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two tensors have the same sizes."""
    first, second = val(a), val(b)
    if first is None or second is None:
        return False
    return equal_sizes(first.shape, second.shape)


def keeps_axis(node: Node) -> bool:
    """Whether a reduction keeps its axis, with one element."""
    return bool(arg(node, 2, "keepdim", False))


def is_plain_cast(node: Node) -> bool:
    """Whether a cast changes the dtype and nothing else that matters."""
    before, after = val(node.args[0]), val(node)
    return before is not None and after is not None and before.device == after.device
