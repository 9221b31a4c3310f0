"""Arguments and results of an operator's node, by the names in the operator's schema instead of by position.

``read`` makes the record that the operator's own kernels take (``custom_ops``), with nodes in place of tensors; ``argument``
and ``arguments`` serve every operator; ``results`` finds the nodes that take its results apart.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.fx import Node

Call = TypeVar("Call")


def read(call: Callable[..., Call], node: Node) -> Call:
    """The arguments of a generic operator's node as the record of that operator, e.g. ``read(DispatchCall[Node], node)``."""
    return call(*node.args, **node.kwargs)


def argument(node: Node, name: str) -> Any:
    """One argument of a node, or its default when the node does not have it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    index, default = _parameters(node.target)[name]
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def input_node(node: Node, index: int = 0) -> Node:
    """An argument by its position, of an operator that has a tensor there."""
    value = node.args[index]
    assert isinstance(value, Node), f"{node.name}: argument {index} is {value!r}, no node"
    return value


def explicit_arguments(node: Node) -> dict[str, Any]:
    """The arguments that the node has, in the order of the schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return {**dict(zip(_parameters(node.target), node.args, strict=False)), **node.kwargs}


def is_by_position(node: Node) -> bool:
    """Whether the arguments that an operator of ATen must have stand by position, as in graphs that were traced; those of others
    are read by name."""
    target = node.target
    known = isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims")
    return not known or len(node.args) >= _required(target)


@functools.lru_cache(maxsize=4096)
def _required(target: torch._ops.OpOverload) -> int:
    return sum(not a.has_default_value() and not a.kwarg_only for a in target._schema.arguments)


def positional_arguments(call: Any) -> tuple[Any, ...]:
    """The fields of a record of arguments by position, as a graph has them: without defaults at its end."""
    values, defaults = [*call], type(call)._field_defaults
    while (last := call._fields[len(values) - 1]) in defaults and values[-1] == defaults[last]:
        values.pop()
    return tuple(values)


def arguments(node: Node) -> dict[str, Any]:
    """All arguments, defaults filled in, in the order of the schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    defaults = {name: default for name, (_, default) in _parameters(node.target).items()}
    return {**defaults, **explicit_arguments(node)}


@functools.lru_cache(maxsize=256)
def _parameters(target: torch._ops.OpOverload) -> dict[str, tuple[int, Any]]:
    """(index, default or None) of each argument; read from the schema they cost 20 times as much as from here."""
    schema = target._schema.arguments
    return {a.name: (at, a.default_value if a.has_default_value() else None) for at, a in enumerate(schema)}


def results(node: Node) -> dict[str, Node] | None:
    """The getitem users of a node by the name of the result, an index of -1 being the last one.

    None when it is used in another way, a result twice (under whatever index), or with an index that is none: a slice, a
    node, a number that it has no result for.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    names = _results(node.target)
    outputs: dict[str, Node] = {}
    for user in node.users:
        args = user._args
        index = args[1] if user.target is operator.getitem and len(args) == 2 else None
        if not isinstance(index, int) or not -len(names) <= index < len(names) or names[index] in outputs:
            return None
        outputs[names[index]] = user
    return outputs


@functools.lru_cache(maxsize=256)
def _results(target: torch._ops.OpOverload) -> tuple[str, ...]:
    return tuple(result.name for result in target._schema.returns)
