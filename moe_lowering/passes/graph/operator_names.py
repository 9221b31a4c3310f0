"""Names of what nodes call, as reports have them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

# What a node is that calls nothing, in words.
_KINDS = {"placeholder": "an input", "get_attr": "a constant", "output": "the output"}


def operator_name(node: Node) -> str:
    """``namespace.name`` of an operator, the name of a function."""
    target = node.target
    known = _NAMES.get(id(target))
    if known is None or known[0] is not target:
        known = target, _name(target)
        if isinstance(target, torch._ops.OpOverload) or target is operator.getitem:  # others may be made for one graph
            _NAMES[id(target)] = known
    return known[1]


_NAMES: dict[int, tuple[Any, str]] = {}  # by id: an operator's own hash is Python code


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.replace("::", ".")
    return getattr(target, "__name__", str(target))


def call_name(node: Node) -> str:
    """What a node is, for people: ``aten.eq.Scalar``, of one of several results ``aten.topk.default[1]``, or ``an input``.

    A function is named with its module, as ``math.sqrt``: its ``repr`` would say where it is in memory.
    """
    if node.op != "call_function":
        return _KINDS.get(node.op, str(node.target))
    target: Any = node.target
    if target is operator.getitem and node.args and isinstance(node.args[0], Node):
        return f"{call_name(node.args[0])}[{node.args[1]}]"
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
        return str(target)
    module = str(getattr(target, "__module__", None) or "").removeprefix("_")
    name = getattr(target, "__name__", type(target).__name__)
    return f"{module}.{name}" if module else name
